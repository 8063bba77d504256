//! What goes to stdout: text for people, JSON for programs.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use indicatif::{ProgressBar, ProgressFinish, ProgressStyle};
use serde::Serialize;

use super::exit::Failure;
use crate::criu::names::is_unprintable;

/// How results are printed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Output {
    pub(super) json: bool,
}

impl Output {
    /// Prints a result: `value` with `--json`, else what `text` makes.
    pub(super) fn print(
        self,
        value: &impl Serialize,
        text: impl FnOnce() -> String,
    ) -> Result<(), Failure> {
        let printed = if self.json {
            serde_json::to_string_pretty(value)
                .map_err(|error| Failure::failed(format!("the result is not JSON: {error}")))?
        } else {
            text()
        };
        self.write(printed).map(drop)
    }

    /// Prints what is made already. Returns whether anybody still reads.
    #[allow(clippy::unused_self)] // what prints has an output
    pub(super) fn write(self, mut printed: String) -> Result<bool, Failure> {
        if !printed.is_empty() && !printed.ends_with('\n') {
            printed.push('\n');
        }
        let mut stdout = io::stdout().lock();
        match stdout.write_all(printed.as_bytes()).and_then(|()| stdout.flush()) {
            // `| head` has read enough.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
            Err(error) => Err(Failure::failed(format!("stdout cannot be written: {error}"))),
            Ok(()) => Ok(true),
        }
    }
}

/// A bar or, when the total is not known, a spinner. It shows itself on a terminal only (stderr)
/// and is cleared when it is dropped.
pub(super) fn progress(what: String, total: Option<u64>) -> ProgressBar {
    let (bar, template) = match total {
        Some(total) => (
            ProgressBar::new(total),
            "{prefix} {bar:30} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {msg}",
        ),
        None => (
            ProgressBar::new_spinner(),
            "{spinner} {prefix} {binary_bytes} {binary_bytes_per_sec} {msg}",
        ),
    };
    bar.enable_steady_tick(Duration::from_millis(200));
    let style = ProgressStyle::with_template(template);
    bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        .with_prefix(what)
        .with_finish(ProgressFinish::AndClear)
}

/// A table: cells aligned in columns two spaces apart, the numbers' columns to the right.
pub(super) fn table(headings: &[&str], numbers: &[usize], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = headings.iter().map(|heading| heading.len()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    let headings: Vec<String> = headings.iter().map(|&heading| heading.to_owned()).collect();
    for row in std::iter::once(&headings).chain(rows) {
        let mut line = String::new();
        for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
            let _ = if numbers.contains(&column) {
                write!(line, "{cell:>width$}  ")
            } else {
                write!(line, "{cell:<width$}  ")
            };
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// A size with its binary unit: `0 B`, `1.5 KiB`, `12 MiB`.
pub(super) fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    // In tenths, rounded down: nothing that does not fit is said to fit.
    let mut tenths = u128::from(bytes) * 10 / 1024;
    let mut unit = 0;
    while tenths >= 10_240 {
        tenths /= 1024;
        unit += 1;
    }
    let name = UNITS[unit];
    if tenths >= 1000 || tenths % 10 == 0 {
        format!("{} {name}", tenths / 10)
    } else {
        format!("{}.{} {name}", tenths / 10, tenths % 10)
    }
}

/// Milliseconds in the largest unit that tells enough: `840 ms`, `12 s`, `5 min`, `3 h`, `9 d`.
pub(super) fn span(ms: u64) -> String {
    let seconds = ms / 1000;
    match seconds {
        0 => format!("{ms} ms"),
        1..=119 => format!("{seconds} s"),
        120..=7_199 => format!("{} min", seconds / 60),
        7_200..=172_799 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// How long ago a time was, in milliseconds; 0 if the clock was set back.
pub(super) fn since(then_ms: u64) -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
    u64::try_from(now).unwrap_or(u64::MAX).saturating_sub(then_ms)
}

/// Words from a peer, made safe for a terminal and for one line.
pub(super) fn clean(words: &str) -> String {
    words.chars().map(|c| if is_unprintable(c) { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_spans_read_well() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (150 << 10, "150 KiB"),
            ((1 << 20) - 1, "1023 KiB"),
            (12 << 20, "12 MiB"),
            (3 << 29, "1.5 GiB"),
            (u64::MAX, "15.9 EiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
        for (ms, text) in [(840, "840 ms"), (61_000, "61 s"), (600_000, "10 min")] {
            assert_eq!(span(ms), text);
        }
    }

    #[test]
    fn a_table_is_aligned() {
        let rows =
            [vec!["web".to_owned(), "5".to_owned()], vec!["d".to_owned(), "12345".to_owned()]];
        assert_eq!(table(&["ID", "N"], &[1], &rows), "ID       N\nweb      5\nd    12345\n");
    }

    #[test]
    fn what_a_peer_says_cannot_steer_the_terminal() {
        assert_eq!(clean("a\x1b[2J\nb"), "a [2J b");
    }
}
