//! The figures of a daemon for Prometheus, in OpenMetrics' text format.
//!
//! - [`page`]: what a scrape shows. It is made anew for each, from where the daemon has its figures; only what
//!   is nowhere else is counted here ([`durations`], [`refusals`]).
//! - `request`: what a client asks for, without a socket.
//! - [`serve`]: one client, from its request to its answer.
//!
//! The format is that of <https://prometheus.io/docs/specs/om/open_metrics_spec/>, and `docs/metrics.md` has
//! every name.

pub mod durations;
pub mod page;
pub mod refusals;
mod request;
mod serve;

pub use serve::{CLIENTS_MAX, Figures, serve};
