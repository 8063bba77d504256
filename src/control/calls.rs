//! The calls of the interface as they stand in JSON, for both sides.

use serde::{Deserialize, Serialize};
use zlink::introspect;

use super::model::{Image, ImageFile, LinkStatus, Snapshot, Status, Withdrawn};
use crate::timeline::Phase;

/// The methods, by the names that stand on the wire.
pub(super) mod method {
    pub(in super::super) const STATUS: &str = "org.criu.ImageRelay.Status";
    pub(in super::super) const LIST: &str = "org.criu.ImageRelay.List";
    pub(in super::super) const SHOW: &str = "org.criu.ImageRelay.Show";
    pub(in super::super) const TIMELINE: &str = "org.criu.ImageRelay.Timeline";
    pub(in super::super) const WATCH: &str = "org.criu.ImageRelay.Watch";
    pub(in super::super) const WITHDRAW: &str = "org.criu.ImageRelay.Withdraw";
    pub(in super::super) const CONNECT: &str = "org.criu.ImageRelay.Connect";
    pub(in super::super) const DROP: &str = "org.criu.ImageRelay.Drop";
    pub(in super::super) const OPEN: &str = "org.criu.ImageRelay.Open";
    pub(in super::super) const OPEN_PAGES: &str = "org.criu.ImageRelay.OpenPages";
    pub(in super::super) const VIEW: &str = "org.criu.ImageRelay.View";
    pub(in super::super) const ACCEPT_CHANGED_MEMORY: &str =
        "org.criu.ImageRelay.AcceptChangedMemory";
    pub(in super::super) const EXPECT_DUMP: &str = "org.criu.ImageRelay.ExpectDump";
    pub(in super::super) const FINISH_DUMP: &str = "org.criu.ImageRelay.FinishDump";
    pub(in super::super) const GET_INFO: &str = "org.varlink.service.GetInfo";
    pub(in super::super) const GET_DESCRIPTION: &str =
        "org.varlink.service.GetInterfaceDescription";
}

/// The parameters of `Show`, `Timeline`, `Drop`, `View` and `AcceptChangedMemory`.
#[derive(Debug, Serialize, Deserialize, introspect::Type)]
pub(super) struct ById {
    pub(super) id: String,
}

/// The parameters of `Watch`.
#[derive(Debug, Serialize, Deserialize, introspect::Type)]
pub(super) struct WatchIn {
    pub(super) id: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) taken: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) known: Option<bool>,
}

/// The parameters of `Withdraw`.
#[derive(Debug, Serialize, Deserialize, introspect::Type)]
pub(super) struct WithdrawIn {
    pub(super) id: String,
    pub(super) attempt: u64,
    pub(super) reason: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) to: Option<String>,
}

/// The reply of `Withdraw`.
#[derive(Debug, Serialize, Deserialize, introspect::Type)]
pub(super) struct WithdrawOut {
    pub(super) outcome: Withdrawn,
}

/// The parameters of `Connect`.
#[derive(Debug, Serialize, Deserialize, introspect::Type)]
pub(super) struct ConnectIn {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) to: Option<String>,
    pub(super) timeout_ms: u64,
}

/// The reply of `Connect`.
#[derive(Debug, Serialize, Deserialize, introspect::Type)]
pub(super) struct ConnectOut {
    pub(super) link: LinkStatus,
}

/// The parameters of `Open`.
#[derive(Debug, Default, Serialize, Deserialize, introspect::Type)]
pub(super) struct OpenIn {
    pub(super) id: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) to: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) take: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) again: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) parent: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) copy: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) view: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) attempt: Option<u64>,
}

/// The parameters of `OpenPages`.
#[derive(Debug, Serialize, Deserialize, introspect::Type)]
pub(super) struct OpenPagesIn {
    pub(super) id: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) parent: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) to: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) attempt: Option<u64>,
}

/// The parameters of `ExpectDump`.
#[derive(Debug, Serialize, Deserialize, introspect::Type)]
pub(super) struct ExpectDumpIn {
    pub(super) pid: i32,
}

/// The parameters of `FinishDump`.
#[derive(Debug, Serialize, Deserialize, introspect::Type)]
pub(super) struct FinishDumpIn {
    pub(super) pid: i32,
    pub(super) timeout_ms: u64,
}

/// The reply of `FinishDump`.
#[derive(Debug, Serialize, Deserialize, introspect::Type)]
pub(super) struct FinishDumpOut {
    pub(super) snapshot: Snapshot,
}

/// No parameters, or none in the reply.
#[derive(Debug, Serialize, Deserialize, introspect::Type)]
pub(super) struct Nothing {}

/// The parameters of `org.varlink.service.GetInterfaceDescription`.
#[derive(Debug, Deserialize)]
pub(super) struct DescriptionIn {
    pub(super) interface: String,
}

/// The reply of `Status`.
#[derive(Debug, Serialize, Deserialize, introspect::Type)]
pub(super) struct StatusOut {
    pub(super) status: Status,
}

/// The reply of `List`.
#[derive(Debug, Serialize, Deserialize, introspect::Type)]
pub(super) struct ListOut {
    pub(super) snapshots: Vec<Snapshot>,
}

/// The reply of `Show`.
#[derive(Debug, Serialize, Deserialize, introspect::Type)]
pub(super) struct ShowOut {
    pub(super) snapshot: Snapshot,
    pub(super) images: Vec<Image>,
}

/// The reply of `Timeline`.
#[derive(Debug, Serialize, Deserialize, introspect::Type)]
pub(super) struct TimelineOut {
    pub(super) phases: Vec<Phase>,
}

/// A reply of `Watch`.
#[derive(Debug, Serialize, Deserialize, introspect::Type)]
pub(super) struct WatchOut {
    pub(super) snapshot: Snapshot,
}

/// The reply of `View`.
#[derive(Debug, Serialize, Deserialize, introspect::Type)]
pub(super) struct ViewOut {
    pub(super) images: Vec<ImageFile>,
}

/// The errors of the interface.
#[derive(Debug, Clone, PartialEq, Eq, zlink::ReplyError, introspect::ReplyError)]
#[zlink(interface = "org.criu.ImageRelay")]
pub(super) enum CallError {
    NoSuchSnapshot { id: String },
    Refused { reason: String },
    NoDescriptor,
    NotASocket,
}
