//! The figures that the daemons show to Prometheus and to people: scraped while images move, parsed by a real
//! OpenMetrics parser, held against what the daemons tell otherwise, the page of names and the dashboard; and
//! `criu-imagectl status --watch`.
//!
//! The daemons are real. No root is needed; Debian's python3-prometheus-client is.
#![allow(clippy::unwrap_used)]

// Each target uses a part of what they share.
#[allow(dead_code)]
#[path = "../bad_input/criu.rs"]
mod criu;
#[allow(dead_code)]
#[path = "../bad_input/daemons.rs"]
mod daemons;
#[allow(dead_code)]
#[path = "../bad_input/hosts.rs"]
mod hosts;
#[allow(dead_code)]
#[path = "../pages/page_client.rs"]
mod page_client;

mod bed;
mod scrape;

mod names;
mod told;
mod transfer;
