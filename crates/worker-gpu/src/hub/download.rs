//! Downloads of a model into the cache: what it consists of, file by file, each resumed where it broke off and compared
//! with the checksum that the hub states.
//!
//! Never here: where things lie in the cache. The `hf-hub` crate is not used: it neither resumes nor compares, and brings
//! a second TLS library; see `docs/decisions/`.

use anyhow::{Context as _, anyhow, bail};
use reqwest::blocking::{Client, ClientBuilder, RequestBuilder, Response};
use reqwest::header::{CONTENT_LENGTH, CONTENT_RANGE, ETAG, HeaderMap, LOCATION, RANGE};
use reqwest::redirect::Policy;
use reqwest::{Method, StatusCode, Url};
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::hub::cache::{self, Place};
use crate::hub::progress::Progress;
use crate::hub::{Hub, Name};

/// What is fetched of a model besides its weights, where it has it.
const FILES: &[&str] =
    &["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"];

const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// How often in a row a transfer may break off without a byte.
const FAILURES_MAX: u32 = 5;

/// How long is waited at most between two attempts.
const WAIT_MAX: Duration = Duration::from_secs(30);

/// How long connecting may take.
const CONNECT: Duration = Duration::from_secs(10);

/// How long a server may be silent.
const SILENCE: Duration = Duration::from_secs(60);

/// The list of a model's files is not longer than this, in bytes.
const LIST_BYTES_MAX: u64 = 32 << 20;

/// Redirections of the hub to itself; more are a circle.
const REDIRECTIONS_MAX: usize = 10;

/// A download of one model.
pub(super) struct Download<'a> {
    pub(super) hub: &'a Hub,
    pub(super) name: &'a Name,
    pub(super) place: &'a Place,
}

/// Why something did not arrive.
enum Failure {
    /// Another attempt may help.
    Passing(anyhow::Error),
    /// Another attempt may help, and some of it arrived.
    BrokenOff(anyhow::Error),
    /// It will not.
    Lasting(anyhow::Error),
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Lasting(error.into())
    }
}

/// A file as the hub describes it.
struct Remote {
    url: Url,
    /// Its checksum: SHA-256 of large files, another one of small ones.
    etag: String,
    /// Its length in bytes.
    size: u64,
}

/// The connections of a download.
struct Http {
    /// For questions: a redirection is an answer.
    asking: Client,
    /// For contents.
    fetching: Client,
}

impl Download<'_> {
    /// Downloads what is missing, and returns the folder.
    pub(super) fn run(&self) -> anyhow::Result<PathBuf> {
        let _lock = self.place.lock(&self.hub.stop)?;
        // Another process may have done it while this one waited.
        if let Some(folder) = self.place.complete() {
            return Ok(folder);
        }
        let http = Http::new(&self.hub.endpoint)?;
        let (commit, files) = self.again(|| self.list(&http))?;
        let begun = Instant::now();
        let has = |file: &str| files.iter().any(|known| known == file);
        let fetch = |file: &str| self.again(|| self.file(&http, &commit, file));
        for file in FILES.iter().filter(|file| has(file)) {
            fetch(file)?;
        }
        let snapshot = self.place.snapshot(&commit);
        match (has(WEIGHTS), has(INDEX)) {
            (true, _) => fetch(WEIGHTS)?,
            (false, true) => {
                fetch(INDEX)?;
                let shards = cache::shards(&snapshot).with_context(|| format!("{INDEX} has no weight_map"))?;
                // Only what the hub lists as a plain file of the model.
                if let Some(odd) = shards.iter().find(|shard| !has(shard) || shard.contains(['/', '\\'])) {
                    bail!("{INDEX} names `{odd}`, which the model does not have");
                }
                shards.iter().try_for_each(|shard| fetch(shard))?;
            }
            (false, false) => bail!("the model has no safetensors weights, only those can be read"),
        }
        self.place.set_main(&commit)?;
        tracing::info!(model = self.name.0, commit, took = ?begun.elapsed(), "downloaded");
        self.place.complete().context("the model lacks config.json or tokenizer.json")
    }

    /// Tries until it works, fails for good, or has failed too often in a row without a byte.
    fn again<T>(&self, attempt: impl Fn() -> Result<T, Failure>) -> anyhow::Result<T> {
        let (mut failures, mut wait) = (0, self.hub.retry_wait);
        loop {
            let error = match attempt() {
                Ok(done) => return Ok(done),
                Err(Failure::Lasting(error)) => return Err(error),
                Err(Failure::Passing(error)) => {
                    failures += 1;
                    error
                }
                Err(Failure::BrokenOff(error)) => {
                    (failures, wait) = (0, self.hub.retry_wait);
                    error
                }
            };
            if failures == FAILURES_MAX {
                return Err(error);
            }
            tracing::warn!(error = format!("{error:#}"), "the download broke off, it goes on in {wait:?}");
            self.pause(wait)?;
            wait = WAIT_MAX.min(2 * wait);
        }
    }

    fn pause(&self, wait: Duration) -> anyhow::Result<()> {
        const LOOK_EVERY: Duration = Duration::from_millis(100);
        let until = Instant::now() + wait;
        while let Some(left) = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
            self.check_stop()?;
            std::thread::park_timeout(left.min(LOOK_EVERY));
        }
        self.check_stop()
    }

    fn check_stop(&self) -> anyhow::Result<()> {
        if self.hub.stop.is_cancelled() { bail!("the worker is stopping") } else { Ok(()) }
    }

    /// The newest commit and the names of its files.
    fn list(&self, http: &Http) -> Result<(String, Vec<String>), Failure> {
        let url = self.url(&["api", "models"], &["revision", "main"])?;
        let sent = self.request(&http.fetching, Method::GET, url).send();
        // Without a connection now there will be none in a minute: the machine is offline.
        let response =
            self.answer(sent.map_err(|error| if error.is_connect() { lasting(error) } else { passing(error) })?)?;
        let mut text = Vec::new();
        response.take(LIST_BYTES_MAX).read_to_end(&mut text).map_err(|error| Failure::Passing(error.into()))?;
        let model: Value = serde_json::from_slice(&text).context("the answer about the model is not JSON")?;
        let commit = model.get("sha").and_then(Value::as_str).unwrap_or_default();
        let files = model.get("siblings").and_then(Value::as_array).context("the answer names no files")?;
        if commit.is_empty() || !commit.chars().all(|letter| letter.is_ascii_alphanumeric()) {
            return Err(Failure::Lasting(anyhow!("the answer names no commit")));
        }
        let files = files.iter().filter_map(|file| file.get("rfilename")?.as_str()).map(str::to_owned).collect();
        Ok((commit.to_owned(), files))
    }

    /// Brings one file to its place.
    fn file(&self, http: &Http, commit: &str, file: &str) -> Result<(), Failure> {
        let remote = self.look(http, commit, file)?;
        let blob = self.place.blob(&remote.etag);
        if !blob.exists() {
            let path = self.place.incomplete(&remote.etag);
            let resumed = fs::metadata(&path).is_ok_and(|metadata| metadata.len() > 0);
            self.transfer(http, file, &remote, &path)?;
            if let Err(error) = compare(file, &remote, &path) {
                fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
                // The earlier part may have been of another download; a file that came at once is what the hub has.
                return Err(if resumed { Failure::Passing(error) } else { Failure::Lasting(error) });
            }
            fs::rename(&path, &blob).with_context(|| format!("cannot rename {}", path.display()))?;
        }
        Ok(self.place.link(commit, file, &remote.etag)?)
    }

    /// Asks for a file's checksum and size. Large files are elsewhere; the hub states both before it sends us there.
    fn look(&self, http: &Http, commit: &str, file: &str) -> Result<Remote, Failure> {
        let url = self.url(&[], &["resolve", commit, file])?;
        let mut at = url.clone();
        for _ in 0..REDIRECTIONS_MAX {
            let response = self.request(&http.asking, Method::HEAD, at.clone()).send().map_err(passing)?;
            let headers = response.headers();
            let linked = text(headers, "x-linked-etag");
            let next = response.status().is_redirection().then(|| text(headers, LOCATION.as_str())).flatten();
            let next = next.and_then(|next| at.join(next).ok()).filter(|next| next.host_str() == at.host_str());
            if let (None, Some(next)) = (linked, next) {
                at = next;
                continue;
            }
            let etag = linked.or_else(|| text(headers, ETAG.as_str())).map(|etag| etag.trim_start_matches("W/"));
            let etag = etag.map(|etag| etag.trim_matches('"').to_owned()).filter(|etag| is_plain(etag));
            let size = text(headers, "x-linked-size").or_else(|| text(headers, CONTENT_LENGTH.as_str()));
            let size = size.and_then(|size| size.parse().ok());
            if !response.status().is_redirection() {
                self.answer(response)?;
            }
            let described = etag.zip(size).map(|(etag, size)| Remote { url: url.clone(), etag, size });
            return Ok(described.with_context(|| format!("the hub states no checksum or size of {file}"))?);
        }
        Err(Failure::Lasting(anyhow!("the hub redirects {file} in circles")))
    }

    /// Fetches what is missing of a file.
    fn transfer(&self, http: &Http, name: &str, remote: &Remote, path: &Path) -> Result<(), Failure> {
        let cannot_write = || format!("cannot write {}", path.display());
        let mut file = File::options().create(true).append(true).open(path).with_context(cannot_write)?;
        let mut have = file.metadata().with_context(cannot_write)?.len();
        if have > remote.size {
            file.set_len(0).with_context(cannot_write)?;
            have = 0;
        }
        if have == remote.size {
            return Ok(());
        }
        let mut request = self.request(&http.fetching, Method::GET, remote.url.clone());
        if have > 0 {
            request = request.header(RANGE, format!("bytes={have}-"));
        }
        let response = self.answer(request.send().map_err(passing)?)?;
        let begins = text(response.headers(), CONTENT_RANGE.as_str()).and_then(|range| range.strip_prefix("bytes "));
        let goes_on = begins.is_some_and(|range| range.starts_with(&format!("{have}-")));
        if have > 0 && !(response.status() == StatusCode::PARTIAL_CONTENT && goes_on) {
            // The server sends it from the start.
            file.set_len(0).and_then(|()| file.seek(SeekFrom::Start(0))).with_context(cannot_write)?;
            have = 0;
        }
        let mut progress = Progress::new(name, have, remote.size);
        // No more than was stated, whatever the server sends.
        let mut body = response.take(remote.size - have);
        let mut buffer = vec![0; 1 << 16];
        let begun = have;
        let broken_off = |error: anyhow::Error, have| {
            let error = error.context(format!("the transfer of {name} broke off at {have} of {} bytes", remote.size));
            if have > begun { Failure::BrokenOff(error) } else { Failure::Passing(error) }
        };
        loop {
            self.check_stop()?;
            let count = body.read(&mut buffer).map_err(|error| broken_off(error.into(), have))?;
            if count == 0 {
                break;
            }
            file.write_all(&buffer[..count]).with_context(cannot_write)?;
            have += count as u64;
            progress.add(count as u64);
        }
        if have < remote.size {
            return Err(broken_off(anyhow!("it ended too early"), have));
        }
        Ok(file.sync_all().with_context(cannot_write)?)
    }

    /// `endpoint/before/org/name/after`.
    fn url(&self, before: &[&str], after: &[&str]) -> anyhow::Result<Url> {
        let mut url = self.hub.endpoint.clone();
        let Ok(mut path) = url.path_segments_mut() else { bail!("hub.endpoint (HF_ENDPOINT) is no HTTP address") };
        path.pop_if_empty().extend(before).extend(self.name.0.split('/')).extend(after);
        drop(path);
        Ok(url)
    }

    fn request(&self, client: &Client, method: Method, url: Url) -> RequestBuilder {
        // The token is for the hub: reqwest drops it when a redirection leads to another host.
        let request = client.request(method, url);
        match &self.hub.token {
            Some(token) => request.bearer_auth(token.reveal()),
            None => request,
        }
    }

    /// A response that is not a refusal.
    fn answer(&self, response: Response) -> Result<Response, Failure> {
        let status = response.status();
        match status.as_u16() {
            _ if status.is_success() => Ok(response),
            401 | 403 => Err(Failure::Lasting(anyhow!(
                "the hub answered {status}: there is no such model, or it is private or gated; accept its terms at \
                 {}/{} and set HF_TOKEN to a token of that account",
                self.hub.endpoint.as_str().trim_end_matches('/'),
                self.name.0
            ))),
            408 | 429 | 500.. => Err(Failure::Passing(anyhow!("the hub answered {status}"))),
            _ => Err(Failure::Lasting(anyhow!("the hub answered {status} to {}", response.url().path()))),
        }
    }
}

impl Http {
    fn new(endpoint: &Url) -> anyhow::Result<Self> {
        let host = endpoint.host_str().unwrap_or_default().trim_matches(['[', ']']);
        let here = host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback());
        let base = || -> ClientBuilder {
            let base = Client::builder().connect_timeout(CONNECT).timeout(SILENCE).user_agent("genmill");
            // Servers on this machine: never through a proxy.
            if here { base.no_proxy() } else { base }
        };
        let context = "cannot set up HTTPS; is the package ca-certificates installed?";
        Ok(Self {
            asking: base().redirect(Policy::none()).build().context(context)?,
            fetching: base().build().context(context)?,
        })
    }
}

fn passing(error: reqwest::Error) -> Failure {
    Failure::Passing(error.without_url().into())
}

fn lasting(error: reqwest::Error) -> Failure {
    Failure::Lasting(error.without_url().into())
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// Whether an etag can be a file's name.
fn is_plain(etag: &str) -> bool {
    !etag.is_empty() && etag.chars().all(|letter| letter.is_ascii_alphanumeric() || letter == '-')
}

/// Compares a whole file with the checksum that the hub states: SHA-256, for large files. Of small ones it states
/// another, and their length must do.
fn compare(file: &str, remote: &Remote, path: &Path) -> anyhow::Result<()> {
    if remote.etag.len() != 64 {
        return Ok(());
    }
    let mut hash = Sha256::new();
    let mut input = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        match input.read(&mut buffer).with_context(|| format!("cannot read {}", path.display()))? {
            0 => break,
            count => hash.update(&buffer[..count]),
        }
    }
    let found: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    if found != remote.etag {
        bail!("{file} has the checksum {found}, the hub states {}: what came was deleted", remote.etag);
    }
    Ok(())
}
