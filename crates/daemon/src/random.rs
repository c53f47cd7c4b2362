//! The only place that draws random numbers, from the operating system.

/// A fresh random number.
///
/// # Errors
/// When the operating system has no random numbers to give.
pub fn random_u64() -> std::io::Result<u64> {
    getrandom::u64().map_err(std::io::Error::from)
}
