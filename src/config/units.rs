//! Sizes and durations as systemd writes them: `512M` (K = 1024), `2h 30min`.
//!
//! The words are those of systemd.time(7) and of `MemoryMax=` in systemd.resource-control(5). A
//! number without a unit is bytes, or seconds. What is printed here reads back as the same value.

use std::time::Duration;

const SIZES: [(&str, u64); 6] = [
    ("E", 1 << 60),
    ("P", 1 << 50),
    ("T", 1 << 40),
    ("G", 1 << 30),
    ("M", 1 << 20),
    ("K", 1 << 10),
];

const SECOND: u64 = 1_000_000;
const DAY: u64 = 86_400 * SECOND;

/// The units of time in microseconds; a unit's first name is the one printed. Months and years
/// have systemd's lengths (30.44 and 365.25 days) and are never printed, being no round number
/// of anything.
const TIMES: [(&[&str], u64); 9] = [
    (&["y", "years", "year"], 31_557_600 * SECOND),
    (&["M", "months", "month"], 2_629_800 * SECOND),
    (&["w", "weeks", "week"], 7 * DAY),
    (&["d", "days", "day"], DAY),
    (&["h", "hours", "hour", "hr"], 3600 * SECOND),
    (&["min", "minutes", "minute", "m"], 60 * SECOND),
    (&["s", "seconds", "second", "sec"], SECOND),
    (&["ms", "msec"], 1000),
    (&["us", "µs", "μs", "usec"], 1),
];

/// Reads a size in bytes: `4096`, `512M`, `1.5G`. `None` if it is no size or does not fit.
pub(super) fn parse_size(text: &str) -> Option<u64> {
    let text = text.trim();
    let (number, unit) = text.split_at(number_len(text));
    let unit = match unit.trim_start() {
        "" | "B" => 1,
        unit => SIZES.iter().find(|(name, _)| *name == unit)?.1,
    };
    scaled(number, unit)
}

/// Writes a size with the largest unit that leaves a whole number.
pub(super) fn print_size(bytes: u64) -> String {
    match SIZES.iter().find(|(_, unit)| bytes > 0 && bytes % unit == 0) {
        Some((name, unit)) => format!("{}{name}", bytes / unit),
        None => bytes.to_string(),
    }
}

/// Reads a share of `whole`: `50%`, `12.5%`. `None` if it is none, or more than all of it.
pub(super) fn parse_percentage(text: &str, whole: u64) -> Option<u64> {
    let number = text.trim().strip_suffix('%')?.trim_end();
    // In millionths, so that a few decimals count.
    let share = scaled(number, 10_000).filter(|share| *share <= 1_000_000)?;
    u64::try_from(u128::from(whole) * u128::from(share) / 1_000_000).ok()
}

/// Reads a duration: `30` (seconds), `500ms`, `1.5s`, `2h 30min`, to the microsecond. `None` if
/// it is no duration or does not fit.
pub(super) fn parse_duration(text: &str) -> Option<Duration> {
    let mut rest = text.trim();
    if !rest.is_empty() && number_len(rest) == rest.len() {
        return scaled(rest, SECOND).map(Duration::from_micros);
    }
    let mut sum = 0u64;
    loop {
        let (number, tail) = rest.split_at(number_len(rest));
        let tail = tail.trim_start();
        let end = tail.find(|c: char| !c.is_alphabetic()).unwrap_or(tail.len());
        let (name, tail) = tail.split_at(end);
        let (_, unit) = TIMES.iter().find(|(names, _)| names.contains(&name))?;
        sum = sum.checked_add(scaled(number, *unit)?)?;
        rest = tail.trim_start();
        if rest.is_empty() {
            return Some(Duration::from_micros(sum));
        }
    }
}

/// Writes a duration as the sum of its units, largest first: `1min 30s`. What is below a
/// microsecond is left out.
pub(super) fn print_duration(duration: Duration) -> String {
    let mut rest = duration.as_micros();
    let mut parts = Vec::new();
    for (names, unit) in &TIMES[2..] {
        let unit = u128::from(*unit);
        if rest >= unit {
            parts.push(format!("{}{}", rest / unit, names[0]));
            rest %= unit;
        }
    }
    if parts.is_empty() { "0s".into() } else { parts.join(" ") }
}

/// Bytes of the decimal number `text` begins with.
fn number_len(text: &str) -> usize {
    text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len())
}

/// `number` times `unit`, rounded down. Reckoned in whole numbers: `1.1G` in floating point
/// would come out differently on the way back.
fn scaled(number: &str, unit: u64) -> Option<u64> {
    let digits = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    if !digits(whole) || !digits(fraction) {
        return None;
    }
    // More decimals than these change nothing, as no unit times 10^18 leaves 128 bits.
    let fraction = &fraction[..fraction.len().min(18)];
    let power = 10u128.pow(u32::try_from(fraction.len()).ok()?);
    let part = fraction.parse::<u128>().ok()? * u128::from(unit) / power;
    let whole = u128::from(whole.parse::<u64>().ok()?) * u128::from(unit);
    u64::try_from(whole.checked_add(part)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("0", Some(0)),
            ("4096", Some(4096)),
            ("4096B", Some(4096)),
            ("64K", Some(65_536)),
            ("512M", Some(512 << 20)),
            ("512 M", Some(512 << 20)),
            ("1.5G", Some(3 << 29)),
            ("0.1K", Some(102)),
            ("1T", Some(1 << 40)),
            ("15E", Some(15 << 60)),
            ("18446744073709551615", Some(u64::MAX)),
            ("18446744073709551616", None),
            ("16E", None),
            ("99999999999999999999999K", None),
            ("", None),
            ("M", None),
            (".5M", None),
            ("1.M", None),
            ("1.2.3M", None),
            ("-1M", None),
            ("+1M", None),
            ("512m", None),
            ("512MB", None),
            ("512MiB", None),
            ("50%", None),
            ("infinity", None),
            ("1M 1K", None),
        ] {
            assert_eq!(parse_size(text), bytes, "{text:?}");
        }
    }

    #[test]
    fn percentages() {
        for (text, bytes) in [
            ("50%", Some(500)),
            ("100 %", Some(1000)),
            ("12.5%", Some(125)),
            ("0.1%", Some(1)),
            ("100.1%", None),
            ("%", None),
            ("50", None),
            ("-1%", None),
        ] {
            assert_eq!(parse_percentage(text, 1000), bytes, "{text:?}");
        }
        assert_eq!(parse_percentage("100%", u64::MAX), Some(u64::MAX));
    }

    #[test]
    fn durations() {
        for (text, micros) in [
            ("0", Some(0)),
            ("30", Some(30 * SECOND)),
            ("1.5", Some(1_500_000)),
            ("1.5s", Some(1_500_000)),
            ("500ms", Some(500_000)),
            ("7us", Some(7)),
            ("7µs", Some(7)),
            ("10min", Some(600 * SECOND)),
            ("10 m", Some(600 * SECOND)),
            ("2h 30min", Some(9000 * SECOND)),
            ("2h30min", Some(9000 * SECOND)),
            ("1 week 1day", Some(8 * DAY)),
            ("1M", Some(2_629_800 * SECOND)),
            ("1y", Some(31_557_600 * SECOND)),
            ("584542y", Some(584_542 * 31_557_600 * SECOND)),
            ("600000y", None),
            ("584542y 584542y", None),
            ("99999999999999999999s", None),
            ("", None),
            (" ", None),
            ("s", None),
            ("-5s", None),
            ("5 10s", None),
            ("5s 10", None),
            ("5s,", None),
            ("5parsec", None),
            ("1.s", None),
            ("infinity", None),
        ] {
            assert_eq!(parse_duration(text), micros.map(Duration::from_micros), "{text:?}");
        }
    }

    #[test]
    fn printed_as_one_would_write_it() {
        assert_eq!(print_size(0), "0");
        assert_eq!(print_size(1 << 20), "1M");
        assert_eq!(print_size(1536), "1536");
        assert_eq!(print_size(3 << 9 << 10), "1536K");
        assert_eq!(print_duration(Duration::ZERO), "0s");
        assert_eq!(print_duration(Duration::from_secs(600)), "10min");
        assert_eq!(print_duration(Duration::from_millis(90_500)), "1min 30s 500ms");
    }

    proptest! {
        #[test]
        fn a_printed_size_reads_back(bytes: u64) {
            prop_assert_eq!(parse_size(&print_size(bytes)), Some(bytes));
        }

        #[test]
        fn a_printed_duration_reads_back(micros: u64) {
            let duration = Duration::from_micros(micros);
            prop_assert_eq!(parse_duration(&print_duration(duration)), Some(duration));
        }

        #[test]
        fn no_text_makes_it_panic(text: String) {
            let _ = (parse_size(&text), parse_duration(&text), parse_percentage(&text, u64::MAX));
        }
    }
}
