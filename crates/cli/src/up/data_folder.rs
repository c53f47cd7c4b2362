//! The data folder: one mill at a time. The lock is also held by the Redis in it, so that a Redis that outlives a killed
//! `up` by a moment keeps the next one out.

use anyhow::{Context as _, bail};
use rustix::process::{Pid, test_kill_process};
use std::fs::{File, TryLockError};
use std::io::{Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// How long a Redis may need to end whose `up` is gone.
const WAIT_MAX: Duration = Duration::from_secs(10);

/// A data folder that is ours.
#[derive(Debug)]
pub(crate) struct DataFolder {
    path: PathBuf,
    lock: File,
}

impl DataFolder {
    /// Takes the folder, which is made when there is none.
    ///
    /// # Errors
    /// When another `up` has it.
    pub(crate) async fn take(path: &Path) -> anyhow::Result<Self> {
        let folder = Self::open(path)?;
        let deadline = Instant::now() + WAIT_MAX;
        loop {
            match folder.lock.try_lock() {
                Ok(()) => return folder.sign(),
                Err(TryLockError::Error(error)) => return Err(error).context("cannot lock the data folder"),
                Err(TryLockError::WouldBlock) => {}
            }
            let holder = folder.holder();
            if Instant::now() >= deadline || holder.is_some_and(|pid| test_kill_process(pid).is_ok()) {
                let holder = holder.map(|pid| format!(" (process {})", pid.as_raw_nonzero())).unwrap_or_default();
                bail!(
                    "another `genmill up`{holder} runs on {}: stop it, or choose another folder with --data-dir",
                    path.display()
                );
            }
            sleep(Duration::from_millis(50)).await;
        }
    }

    fn open(path: &Path) -> anyhow::Result<Self> {
        let open = || {
            std::fs::create_dir_all(path.join("redis"))?;
            // Absolute, because Redis changes its working folder.
            let path = path.canonicalize()?;
            let lock = File::options().read(true).write(true).create(true).truncate(false).open(path.join("lock"))?;
            Ok::<_, std::io::Error>(Self { path, lock })
        };
        open().with_context(|| format!("cannot use the data folder {}", path.display()))
    }

    /// Writes this process's id into the lock.
    fn sign(mut self) -> anyhow::Result<Self> {
        let mut write = || {
            self.lock.set_len(0)?;
            self.lock.rewind()?;
            write!(self.lock, "{}", std::process::id())
        };
        write().context("cannot write into the data folder")?;
        Ok(self)
    }

    /// The `up` that took the folder last.
    fn holder(&self) -> Option<Pid> {
        let mut text = String::new();
        let mut lock = &self.lock;
        lock.rewind().and_then(|()| lock.read_to_string(&mut text)).ok()?;
        Pid::from_raw(text.trim().parse().ok()?)
    }

    /// Where Redis keeps its files.
    pub(crate) fn redis(&self) -> PathBuf {
        self.path.join("redis")
    }

    /// The lock, for a child to hold too.
    pub(crate) fn share_lock(&self) -> std::io::Result<File> {
        self.lock.try_clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_folder_belongs_to_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new");
        let first = DataFolder::take(&path).await.unwrap();
        let error = DataFolder::take(&path).await.unwrap_err().to_string();
        assert!(error.contains("another `genmill up`") && error.contains(&std::process::id().to_string()), "{error}");
        drop(first);
        DataFolder::take(&path).await.unwrap();
    }

    #[tokio::test]
    async fn a_dead_holders_redis_is_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let first = DataFolder::take(folder.path()).await.unwrap();
        let held_by_redis = first.share_lock().unwrap();
        // No process has this id.
        std::fs::write(folder.path().join("lock"), "2147483647").unwrap();
        drop(first);
        let path = folder.path().to_owned();
        let mut next = std::pin::pin!(DataFolder::take(&path));
        let waiting = tokio::time::timeout(Duration::from_millis(200), next.as_mut()).await;
        assert!(waiting.is_err(), "it is still held");
        drop(held_by_redis);
        next.await.unwrap();
    }
}
