//! The cache of the Hugging Face hub on disk: `models--ORG--NAME` with `blobs`, `refs` and `snapshots`.
//!
//! Never here: the network. A snapshot is a folder of links to blobs, which are called by their checksum; `refs/main`
//! names the newest. https://huggingface.co/docs/huggingface_hub/guides/manage-cache

use anyhow::Context as _;
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio_util::sync::CancellationToken;

use crate::hub::Name;

/// How often a lock that another process holds is tried.
const LOCK_EVERY: Duration = Duration::from_millis(200);

/// A model's place in the cache.
#[derive(Debug)]
pub(super) struct Place {
    folder: PathBuf,
    lock: PathBuf,
}

impl Place {
    pub(super) fn new(cache: &Path, name: &Name) -> Self {
        let folder = format!("models--{}", name.0.replace('/', "--"));
        Self { lock: cache.join(".locks").join(format!("{folder}.lock")), folder: cache.join(folder) }
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// The newest snapshot, when all that is needed of it is there.
    pub(super) fn complete(&self) -> Option<PathBuf> {
        let commit = fs::read_to_string(self.folder.join("refs/main")).ok()?;
        let snapshot = self.snapshot(commit.trim());
        let has = |file: &str| snapshot.join(file).exists();
        let weights = has("model.safetensors") || shards(&snapshot).is_some_and(|all| all.iter().all(|file| has(file)));
        (has("config.json") && has("tokenizer.json") && weights).then_some(snapshot)
    }

    /// The folder of a commit.
    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    /// Where a blob lies while it is not whole; the name is that of other tools.
    pub(super) fn incomplete(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(format!("{etag}.incomplete"))
    }

    /// Where a whole blob lies.
    pub(super) fn blob(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(etag)
    }

    /// Makes a file of a snapshot a link to a blob.
    pub(super) fn link(&self, commit: &str, file: &str, etag: &str) -> anyhow::Result<()> {
        let link = self.snapshot(commit).join(file);
        make_parent(&link)?;
        if fs::symlink_metadata(&link).is_ok() {
            fs::remove_file(&link).with_context(|| format!("cannot replace {}", link.display()))?;
        }
        let blob = Path::new("../../blobs").join(etag);
        #[cfg(unix)]
        let linked = std::os::unix::fs::symlink(blob, &link);
        #[cfg(not(unix))]
        let linked = fs::hard_link(link.with_file_name("").join(blob), &link);
        linked.with_context(|| format!("cannot make the link {}", link.display()))
    }

    /// Makes a commit the newest.
    pub(super) fn set_main(&self, commit: &str) -> anyhow::Result<()> {
        let path = self.folder.join("refs/main");
        make_parent(&path)?;
        fs::write(&path, commit).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Waits until no other process downloads this model. The lock ends with the file.
    pub(super) fn lock(&self, stop: &CancellationToken) -> anyhow::Result<File> {
        make_parent(&self.lock)?;
        make_parent(&self.incomplete(""))?;
        let open = || File::options().create(true).append(true).open(&self.lock);
        let file = open().with_context(|| format!("cannot open {}", self.lock.display()))?;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::WouldBlock) if stop.is_cancelled() => anyhow::bail!("stopped"),
                Err(TryLockError::WouldBlock) => std::thread::park_timeout(LOCK_EVERY),
                Err(TryLockError::Error(error)) => {
                    return Err(error).with_context(|| format!("cannot lock {}", self.lock.display()));
                }
            }
        }
    }
}

/// The weight files that the index in a folder names.
pub(super) fn shards(folder: &Path) -> Option<BTreeSet<String>> {
    let index: Value = serde_json::from_slice(&fs::read(folder.join("model.safetensors.index.json")).ok()?).ok()?;
    let names = index.get("weight_map")?.as_object()?.values();
    names.map(|name| name.as_str().map(str::to_owned)).collect()
}

fn make_parent(path: &Path) -> anyhow::Result<()> {
    let parent = path.parent().unwrap_or(path);
    fs::create_dir_all(parent).with_context(|| format!("cannot make the folder {}", parent.display()))
}
