//! What happens to a dump while it is under way.

use std::process::Child;
use std::time::{Duration, Instant};

use crate::bed::{Bed, Host};

/// What happens to the reader of the pages, or to the link.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Fault {
    /// The reader is stopped before the dump.
    Stopped,
    /// The reader is stopped at a moment of the dump's first 60 ms.
    Moment,
    /// The link moves 50 MB a second.
    Slow,
    None,
}

/// A fault, and the run in which it comes: the moment is another in each.
pub(crate) struct Disturbed {
    pub fault: Fault,
    pub run: u32,
}

impl Disturbed {
    /// Runs a dump on host A; returns how long it took. A reader that was stopped goes on when the dump has ended, or after
    /// 300 ms, for CRIU may wait for it.
    pub(crate) fn dump(
        &self,
        bed: &Bed,
        command: &[&str],
        reader: Option<(Host, &str)>,
    ) -> Result<Duration, String> {
        // One that has read all and ended cannot be stopped any more.
        let signal = |signal| reader.map(|(host, pid)| bed.run(host, &["kill", signal, pid]));
        let stops = matches!(self.fault, Fault::Stopped | Fault::Moment);
        if self.fault == Fault::Slow {
            let shape = "tc qdisc add dev eth0 root tbf rate 400mbit burst 256k latency 100ms";
            bed.ok(Host::A, &["sh", "-c", shape]);
        }
        if self.fault == Fault::Stopped {
            signal("-STOP");
        }
        let start = Instant::now();
        let mut criu = bed.spawn(Host::A, command);
        if self.fault == Fault::Moment {
            std::thread::sleep(Duration::from_millis(u64::from(self.run * 7 % 60)));
            signal("-STOP");
        }
        if stops {
            wait_at_most(&mut criu, start + Duration::from_millis(300));
            signal("-CONT");
        }
        let output = criu.wait_with_output().unwrap();
        let took = start.elapsed();
        if self.fault == Fault::Slow {
            bed.ok(Host::A, &["tc", "qdisc", "del", "dev", "eth0", "root"]);
        }
        if output.status.success() {
            Ok(took)
        } else {
            Err(format!("criu dump: {}{}", output.status, String::from_utf8_lossy(&output.stderr)))
        }
    }
}

fn wait_at_most(child: &mut Child, limit: Instant) {
    while child.try_wait().unwrap().is_none() && Instant::now() < limit {
        std::thread::sleep(Duration::from_millis(1));
    }
}
