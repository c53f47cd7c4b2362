//! The API worker: calls remote providers.
//!
//! A provider is a row of `providers.toml`, a dialect a row of [`dialect::DIALECTS`], a price a row of `prices.csv`, a
//! kind of failure a row in [`classify`]. [`perform`] joins them: one call for each attempt. Never here: when a job is
//! tried again (`genmill-core`), leases (`genmill-worker`), Redis (`genmill-queue`).

pub mod catalog;
pub mod classify;
pub mod collect;
pub mod dialect;
pub mod http;
pub mod inspect;
mod keys;
pub mod limits;
pub mod perform;
pub mod prices;
pub mod providers;
pub mod stop;

#[cfg(test)]
mod fixture;
