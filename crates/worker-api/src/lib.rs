//! The API worker: calls remote providers.
//!
//! A provider is a row of `providers.toml`, a dialect a row of [`dialect::DIALECTS`], a batch API a row of
//! [`batch::BATCH_APIS`], a price a row of `prices.csv`, a kind of failure a row in [`failure`]. [`perform`] joins them: one
//! call for each attempt and model; [`batch::perform`] does so for batches. Never here: when
//! a job is tried again (`genmill-core`), leases (`genmill-worker`), Redis (`genmill-queue`).

pub mod auth;
pub mod batch;
pub mod cache;
mod call;
pub mod catalog;
pub mod collect;
pub mod credit;
pub mod dialect;
pub mod failure;
pub mod fallbacks;
pub mod guard;
pub mod hedge;
pub mod http;
pub mod inspect;
mod keys;
pub mod limits;
pub mod perform;
pub mod prices;
pub mod providers;
pub mod repeats;
mod sample;
mod settle;
pub mod stop;
mod url;
pub mod wait;

#[cfg(test)]
mod fixture;
