//! The time of day, and the host's name.

use std::time::SystemTime;

/// Milliseconds since the epoch, for people; intervals are measured with `Instant`.
pub fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// This host's name, as `uname -n` has it.
pub fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}
