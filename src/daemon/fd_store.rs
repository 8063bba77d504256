//! systemd's file descriptor store: it keeps files for a service while that does not run, and hands them to the
//! next run (`systemd.service(5)`, `FileDescriptorStoreMax=`). Without systemd nothing is kept.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use sd_notify::NotifyState;

use super::notify;

/// Files with bytes of images; several snapshots may need one.
const FILE: &str = "image-";
/// Files that say what a snapshot is. They are told by their names: what an image says is its sender's.
const RECORD: &str = "record-";

/// So many files the units have systemd keep (`FileDescriptorStoreMax=`). Their names are all in one variable of the
/// environment, which may have 128 KiB: theirs are short.
const MAX: usize = 4096;

/// How many files systemd keeps for this service; 0 without systemd.
pub fn room() -> usize {
    if !notify::is_read() {
        return 0;
    }
    // Before 254 systemd does not tell.
    let told = std::env::var("FDSTORE").ok().and_then(|max| max.parse().ok());
    told.unwrap_or(MAX).min(MAX)
}

/// The name of a file with bytes of images.
pub fn file_name(number: u64) -> String {
    format!("{FILE}{number}")
}

/// The name of a record.
pub fn record_name(number: u64) -> String {
    format!("{RECORD}{number}")
}

/// Whether a file of that name is a record.
pub fn is_record(name: &str) -> bool {
    name.starts_with(RECORD)
}

/// Whether a file of that name was kept for a cache.
pub fn is_ours(name: &str) -> bool {
    number(name).is_some()
}

/// The number in a name.
pub fn number(name: &str) -> Option<u64> {
    name.strip_prefix(FILE).or_else(|| name.strip_prefix(RECORD))?.parse().ok()
}

/// Has systemd keep a file. It is kept from now on, even if this process is killed at once: systemd reads its
/// messages before it looks for dead processes.
pub async fn keep(name: &str, file: &File) -> io::Result<()> {
    notify::send(&[NotifyState::FdStore, NotifyState::FdName(name)], Some(file.as_fd())).await
}

/// Has systemd close what it keeps under a name.
pub async fn forget(name: &str) {
    let forget = [NotifyState::FdStoreRemove, NotifyState::FdName(name)];
    if let Err(error) = notify::send(&forget, None).await {
        tracing::warn!("systemd cannot be told to close {name}, which it keeps: {error}");
    }
}
