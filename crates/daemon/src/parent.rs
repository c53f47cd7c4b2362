//! Ending with the process that started this one, so that `kill -9` of `genmill up` leaves no orphans.
//!
//! Linux only: other systems have no such request, and an orphan there has to be ended by hand.

use rustix::process::{Signal, getppid};

/// Why a process cannot be tied to its parent.
#[derive(Debug, thiserror::Error)]
pub enum NoParent {
    /// It died before this process could ask for anything.
    #[error("process {parent}, which started this one, is gone")]
    Gone {
        /// The process that should be the parent.
        parent: i32,
    },
    /// The kernel refused.
    #[error("cannot tie this process to its parent")]
    Refused(#[source] std::io::Error),
}

/// Asks the kernel to send `signal` to this process when its parent dies. Survives an exec.
///
/// # Errors
/// [`NoParent`] when process `parent` is not the parent (any more), or the kernel refuses.
pub fn end_with(parent: i32, signal: Signal) -> Result<(), NoParent> {
    #[cfg(target_os = "linux")]
    rustix::process::set_parent_process_death_signal(Some(signal)).map_err(|errno| NoParent::Refused(errno.into()))?;
    #[cfg(not(target_os = "linux"))]
    drop(signal);
    // Asked afterwards: it may have died before the kernel knew.
    if getppid().map(|pid| pid.as_raw_nonzero().get()) == Some(parent) {
        return Ok(());
    }
    Err(NoParent::Gone { parent })
}
