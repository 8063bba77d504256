//! criu-image-relay moves CRIU's checkpoints from host to host through memory.
//!
//! The modules stand in the order in which an image passes them:
//!
//! 1. [`criu`]: what CRIU says on its sockets. Codecs and session state machines, no sockets.
//! 2. [`proxy`]: the source host. CRIU's dumps come in, the link goes out.
//! 3. [`wire`]: the link between the hosts. Frames, messages, their order; and the lane that
//!    carries them.
//! 4. [`cache`]: the destination host. The link comes in, CRIU's restores are served.
//! 5. [`store`]: snapshots, their images in memory, the quota.
//!
//! [`client`] stands where CRIU stands: it puts images in and gets them out, for programs other than
//! CRIU.
//!
//! Around them: [`daemon`] is what both daemons need to be services, [`config`] turns TOML into
//! settings, [`control`] is the Varlink interface and [`ctl`] the command that speaks it and puts and
//! gets images, [`sys`] holds the system calls. [`timeline`] is what both daemons note of when things happened,
//! and [`metrics`] shows figures to Prometheus.
//!
//! `criu`, `wire` and `store` know neither `proxy` nor `cache`. `ARCHITECTURE.md` tells the rest.

pub mod criu;

pub mod proxy;

pub mod wire;

pub mod cache;

pub mod store;

pub mod client;

pub mod config;
pub mod control;
pub mod ctl;
pub mod daemon;
pub mod metrics;
pub mod sys;
pub mod timeline;
