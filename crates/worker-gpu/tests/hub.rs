//! Models of the hub: from the cache, and downloaded from a server on this machine that stands in for the hub, with
//! ranges, redirections, broken transfers and wrong checksums.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

use axum::Router;
use axum::body::Body;
use axum::extract::{Path as Segments, State};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use genmill_daemon::config;
use genmill_daemon::environment::Environment;
use genmill_daemon::models::ModelPath;
use genmill_daemon::secret::Secret;
use genmill_engine::{LoadOptions, Model, ModelPaths};
use genmill_worker_gpu::hub::Hub;
use serde_json::json;
use sha2::{Digest as _, Sha256};
use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const MODEL: &str = "model.safetensors";

/// What the server does, and what it was asked.
#[derive(Default)]
struct Script {
    files: BTreeMap<String, Bytes>,
    /// After how many bytes the next transfers of large files break off.
    cuts: Mutex<VecDeque<usize>>,
    /// Whether checksums are wrong.
    lies: bool,
    /// Answers everything with this.
    refusal: Option<StatusCode>,
    /// Requests for contents: path, range, authorization.
    asked: Mutex<Vec<(String, String, String)>>,
    address: Mutex<Option<SocketAddr>>,
    /// Where the model is downloaded to.
    blobs: Mutex<PathBuf>,
}

impl Script {
    /// A model as a fixture of the engine has it.
    fn of(fixture: &str) -> Self {
        let folder = fixtures().join(fixture);
        let files = std::fs::read_dir(folder).unwrap().map(|entry| {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            (name, Bytes::from(std::fs::read(path).unwrap()))
        });
        Self { files: files.collect(), ..Self::default() }
    }

    fn etag(&self, file: &str) -> String {
        let mut bytes = self.files[file].to_vec();
        if self.lies {
            bytes.push(0);
        }
        Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The ranges that were asked for of a file's contents.
    fn ranges(&self, file: &str) -> Vec<String> {
        let asked = self.asked.lock().unwrap();
        asked.iter().filter(|(path, ..)| path.ends_with(file)).map(|(_, range, _)| range.clone()).collect()
    }

    fn note(&self, path: &str, headers: &HeaderMap) {
        let text = |name| headers.get(name).map_or_else(String::new, |value| value.to_str().unwrap().to_owned());
        let asked = (path.to_owned(), text(header::RANGE), text(header::AUTHORIZATION));
        self.asked.lock().unwrap().push(asked);
    }
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../engine/tests/fixtures")
}

/// The hub: a list of files, and each of them; large ones are elsewhere.
async fn info(State(script): State<Arc<Script>>) -> Response {
    let files: Vec<_> = script.files.keys().map(|file| json!({"rfilename": file})).collect();
    match script.refusal {
        Some(status) => status.into_response(),
        None => axum::Json(json!({"sha": COMMIT, "siblings": files})).into_response(),
    }
}

async fn resolve(
    State(script): State<Arc<Script>>,
    Segments((org, name, file)): Segments<(String, String, String)>,
    method: Method,
    headers: HeaderMap,
) -> Response {
    let Some(bytes) = script.files.get(&file) else { return StatusCode::NOT_FOUND.into_response() };
    if method == Method::GET {
        script.note(&format!("/{org}/{name}/{file}"), &headers);
    }
    if file.ends_with(".safetensors") {
        // Another host, as far as names go.
        let port = script.address.lock().unwrap().unwrap().port();
        let headers = [
            ("x-linked-etag", format!("\"{}\"", script.etag(&file))),
            ("x-linked-size", bytes.len().to_string()),
            ("location", format!("http://localhost:{port}/cdn/{file}")),
        ];
        return (StatusCode::FOUND, headers).into_response();
    }
    ([(header::ETAG, format!("\"{}\"", &script.etag(&file)[..40]))], bytes.clone()).into_response()
}

async fn cdn(State(script): State<Arc<Script>>, Segments(file): Segments<String>, headers: HeaderMap) -> Response {
    script.note(&format!("/cdn/{file}"), &headers);
    let bytes = script.files[&file].clone();
    let range =
        headers.get(header::RANGE).and_then(|range| range.to_str().ok()?.strip_prefix("bytes=")?.strip_suffix('-'));
    let start: usize = range.map_or(0, |start| start.parse().unwrap());
    let rest = bytes.slice(start..);
    let response = Response::builder()
        .status(if range.is_some() { StatusCode::PARTIAL_CONTENT } else { StatusCode::OK })
        .header(header::CONTENT_RANGE, format!("bytes {start}-{}/{}", bytes.len() - 1, bytes.len()))
        .header(header::CONTENT_LENGTH, rest.len());
    let body = match script.cuts.lock().unwrap().pop_front() {
        None => Body::from(rest),
        Some(cut) => {
            let path = script.blobs.lock().unwrap().join(format!("{}.incomplete", script.etag(&file)));
            let broken = stream::once(async move {
                has_length(&path, (start + cut) as u64).await;
                Err(std::io::Error::other("cut"))
            });
            Body::from_stream(stream::iter([Ok(rest.slice(..cut))]).chain(broken))
        }
    };
    response.body(body).unwrap()
}

/// Waits until a file has so many bytes, so that a connection is cut only when what was sent before has arrived.
async fn has_length(path: &Path, bytes: u64) {
    let arrived = async {
        while !std::fs::metadata(path).is_ok_and(|metadata| metadata.len() >= bytes) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), arrived).await.unwrap();
}

/// A server, and a cache of its own.
struct Place {
    script: Arc<Script>,
    address: SocketAddr,
    cache: TempDir,
    stop: CancellationToken,
    // Dropped last: it serves.
    _runtime: Runtime,
}

impl Place {
    fn new(script: Script) -> Self {
        genmill_daemon::tls::install();
        let runtime = Runtime::new().unwrap();
        let script = Arc::new(script);
        let routes = Router::new()
            .route("/api/models/{org}/{name}/revision/main", get(info))
            .route(&format!("/{{org}}/{{name}}/resolve/{COMMIT}/{{file}}"), get(resolve))
            .route("/cdn/{file}", get(cdn))
            .with_state(Arc::clone(&script));
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        *script.address.lock().unwrap() = Some(address);
        let _guard = runtime.enter();
        drop(runtime.handle().spawn(axum::serve(listener, routes).into_future()));
        drop(_guard);
        let cache = TempDir::new().unwrap();
        *script.blobs.lock().unwrap() = cache.path().join("models--org--tiny/blobs");
        Self { script, address, cache, stop: CancellationToken::new(), _runtime: runtime }
    }

    fn settings(&self) -> config::Hub {
        config::Hub {
            endpoint: format!("http://{}", self.address),
            token: Some(Secret::new("hf_secret")),
            cache: Some(self.cache.path().to_owned()),
            ..config::Hub::default()
        }
    }

    fn hub(&self, settings: &config::Hub) -> Hub {
        let hub = Hub::new(settings, &Environment::default(), self.stop.clone()).unwrap();
        hub.with_retry_wait(Duration::from_millis(1))
    }

    fn folder(&self) -> Result<PathBuf, String> {
        self.hub(&self.settings()).folder(&named("org/tiny")).map_err(|error| format!("{error:#}"))
    }

    fn model(&self) -> PathBuf {
        self.cache.path().join("models--org--tiny")
    }

    /// Puts the beginning of a download there, as a worker that was killed leaves it.
    fn begun(&self, bytes: &[u8]) {
        let blobs = self.model().join("blobs");
        std::fs::create_dir_all(&blobs).unwrap();
        std::fs::write(blobs.join(format!("{}.incomplete", self.script.etag(MODEL))), bytes).unwrap();
    }

    fn blobs(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.model().join("blobs")).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    /// What was downloaded is what the hub has.
    fn check(&self, folder: &Path) {
        for (file, bytes) in &self.script.files {
            if file != "reference.json" {
                assert!(std::fs::read(folder.join(file)).unwrap() == *bytes, "{file}");
            }
        }
    }
}

/// A model that is listed by its name alone.
fn named(name: &str) -> ModelPath {
    ModelPath { written: PathBuf::from(name), resolved: Path::new("/nowhere").join(name) }
}

#[test]
fn a_model_is_downloaded_once_and_then_found() {
    let place = Place::new(Script::of("qwen2"));
    let folder = place.folder().unwrap();
    assert_eq!(folder, place.model().join("snapshots").join(COMMIT));
    place.check(&folder);
    // The layout of all tools: links to blobs that are called by their checksum.
    assert_eq!(std::fs::read_to_string(place.model().join("refs/main")).unwrap(), COMMIT);
    let blob = Path::new("../../blobs").join(place.script.etag(MODEL));
    assert_eq!(std::fs::read_link(folder.join(MODEL)).unwrap(), blob);
    assert!(!folder.join("reference.json").exists());
    let asked = place.script.asked.lock().unwrap().len();
    let offline = config::Hub { offline: true, ..place.settings() };
    assert_eq!(place.hub(&offline).folder(&named("org/tiny")).unwrap(), folder);
    assert_eq!(place.folder().unwrap(), folder);
    assert_eq!(place.script.asked.lock().unwrap().len(), asked);
    let paths = ModelPaths { model_path: folder, tokenizer_path: None };
    assert_eq!(
        Model::load(&paths, &LoadOptions { threads: 1, ..LoadOptions::default() }).unwrap().card().context_tokens(),
        512
    );
}

#[test]
fn all_parts_of_a_sharded_model_are_fetched() {
    let place = Place::new(Script::of("qwen2-untied"));
    place.check(&place.folder().unwrap());
    assert_eq!(place.script.ranges("model-00003-of-00004.safetensors").len(), 2);
}

#[test]
fn a_folder_comes_before_the_hub() {
    let place = Place::new(Script { refusal: Some(StatusCode::NOT_FOUND), ..Script::of("qwen2") });
    let local = ModelPath { written: PathBuf::from("qwen2"), resolved: fixtures().join("qwen2") };
    assert_eq!(place.hub(&place.settings()).folder(&local).unwrap(), local.resolved);
}

#[test]
fn the_token_is_for_the_hub_alone() {
    let place = Place::new(Script::of("qwen2"));
    place.folder().unwrap();
    for (path, _, authorization) in place.script.asked.lock().unwrap().iter() {
        let expected = if path.starts_with("/cdn/") { "" } else { "Bearer hf_secret" };
        assert_eq!(authorization, expected, "{path}");
    }
}

#[test]
fn a_transfer_that_breaks_off_goes_on_where_it_was() {
    let script = Script::of("qwen2");
    // More often than attempts without a byte may fail.
    script.cuts.lock().unwrap().extend([1000, 1, 1, 1, 1, 1, 50_000]);
    let place = Place::new(script);
    place.check(&place.folder().unwrap());
    let starts = [1000, 1001, 1002, 1003, 1004, 1005, 51_005].map(|start| format!("bytes={start}-"));
    let ranges = place.script.ranges(&format!("cdn/{MODEL}"));
    assert_eq!((ranges[0].as_str(), &ranges[1..]), ("", &starts[..]));
}

#[test]
fn a_transfer_that_always_breaks_off_is_an_error() {
    let script = Script::of("qwen2");
    script.cuts.lock().unwrap().extend([0; 100]);
    let place = Place::new(script);
    let error = place.folder().unwrap_err();
    assert!(error.contains("could not be downloaded"), "{error}");
    assert_eq!(place.script.ranges(&format!("cdn/{MODEL}")).len(), 5);
}

#[test]
fn what_an_earlier_worker_left_is_completed() {
    let place = Place::new(Script::of("qwen2"));
    place.begun(&place.script.files[MODEL][..1234]);
    place.check(&place.folder().unwrap());
    assert_eq!(place.script.ranges(&format!("cdn/{MODEL}")), ["bytes=1234-"]);
}

#[test]
fn what_an_earlier_worker_left_damaged_is_fetched_again() {
    let place = Place::new(Script::of("qwen2"));
    place.begun(&[7; 1234]);
    place.check(&place.folder().unwrap());
    assert_eq!(place.script.ranges(&format!("cdn/{MODEL}")), ["bytes=1234-", ""]);
}

#[test]
fn a_wrong_checksum_is_an_error_and_nothing_is_kept() {
    let place = Place::new(Script { lies: true, ..Script::of("qwen2") });
    let error = place.folder().unwrap_err();
    let stated = place.script.etag(MODEL);
    assert!(error.contains(&format!("the hub states {stated}")) && error.contains(MODEL), "{error}");
    assert!(!place.blobs().iter().any(|blob| blob.starts_with(&stated)), "{:?}", place.blobs());
    assert!(!place.model().join("refs/main").exists());
}

#[test]
fn workers_of_one_machine_share_a_download() {
    let place = Place::new(Script::of("qwen2"));
    let folders: Vec<PathBuf> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..3).map(|_| scope.spawn(|| place.folder().unwrap())).collect();
        workers.into_iter().map(|worker| worker.join().unwrap()).collect()
    });
    assert!(folders.iter().all(|folder| *folder == folders[0]));
    place.check(&folders[0]);
    assert_eq!(place.script.ranges(&format!("cdn/{MODEL}")).len(), 1);
}

#[test]
fn refusals_tell_what_to_do() {
    let refused = |status| Place::new(Script { refusal: Some(status), ..Script::of("qwen2") }).folder().unwrap_err();
    let error = refused(StatusCode::UNAUTHORIZED);
    assert!(error.contains("set HF_TOKEN") && !error.contains("hf_secret"), "{error}");
    assert!(refused(StatusCode::NOT_FOUND).contains("404"), "a missing model");
    assert!(refused(StatusCode::SERVICE_UNAVAILABLE).contains("503"), "a hub that is down");
    let mut script = Script::of("qwen2");
    script.files.remove(MODEL);
    assert!(Place::new(script).folder().unwrap_err().contains("no safetensors weights"));
}

#[test]
fn without_a_network_it_is_told_what_was_looked_for_and_where() {
    let place = Place::new(Script::of("qwen2"));
    let offline = config::Hub { offline: true, ..place.settings() };
    let error = format!("{:#}", place.hub(&offline).folder(&named("org/tiny")).unwrap_err());
    for part in ["/nowhere/org/tiny", "models--org--tiny", "HF_HUB_OFFLINE", "hf download org/tiny"] {
        assert!(error.contains(part), "{part}: {error}");
    }
    // A port on which nothing listens any more.
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let unreachable = config::Hub { endpoint: format!("http://{closed}"), ..place.settings() };
    let error = format!("{:#}", place.hub(&unreachable).folder(&named("org/tiny")).unwrap_err());
    for part in ["/nowhere/org/tiny", "models--org--tiny", &closed.to_string(), "could not be downloaded"] {
        assert!(error.contains(part), "{part}: {error}");
    }
    let path = ModelPath { written: PathBuf::from("a/b/c"), resolved: PathBuf::from("/nowhere/a/b/c") };
    let error = place.hub(&place.settings()).folder(&path).unwrap_err().to_string();
    assert!(error.contains("/nowhere/a/b/c does not exist"), "{error}");
}

#[test]
fn a_stopping_worker_ends_its_download() {
    let place = Place::new(Script::of("qwen2"));
    place.stop.cancel();
    assert!(place.folder().unwrap_err().contains("stopping"));
    assert!(!place.model().join("refs/main").exists());
}
