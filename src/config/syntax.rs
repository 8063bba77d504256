//! How a value is written in TOML, what it may be, and what to tell who wrote it otherwise: what
//! that takes, and the quantities. The rest is in [`words`](super::words).
//!
//! A field says which syntax it has: `#[serde(with = "As::<Size<1, 2>>")]`.

use super::{Keep, physical_memory, units};
use serde::{
    Deserializer, Serializer,
    de::{Error, Unexpected, Visitor},
};
use std::{fmt, marker::PhantomData, time::Duration};

/// One kind of value: how it is read, checked and written.
pub(super) trait Syntax {
    /// What it is once read.
    type Value;

    /// Says what is expected, range and example included.
    fn expected(f: &mut fmt::Formatter<'_>) -> fmt::Result;

    /// Reads a TOML string; `None` if it is not what is expected.
    fn from_text(_text: &str) -> Option<Self::Value> {
        None
    }

    /// Reads a TOML integer.
    fn from_integer(_integer: u64) -> Option<Self::Value> {
        None
    }

    /// Reads a TOML boolean.
    fn from_bool(_flag: bool) -> Option<Self::Value> {
        None
    }

    /// Writes the value so that it reads back the same.
    fn write<S: Serializer>(value: &Self::Value, serializer: S) -> Result<S::Ok, S::Error>;
}

/// Joins a [`Syntax`] to serde's `with`.
pub(super) struct As<X>(PhantomData<X>);

impl<X: Syntax> As<X> {
    pub(super) fn serialize<S: Serializer>(value: &X::Value, s: S) -> Result<S::Ok, S::Error> {
        X::write(value, s)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<X::Value, D::Error> {
        d.deserialize_any(Self(PhantomData))
    }
}

impl<X: Syntax> Visitor<'_> for As<X> {
    type Value = X::Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        X::expected(f)
    }

    fn visit_str<E: Error>(self, v: &str) -> Result<X::Value, E> {
        X::from_text(v).ok_or_else(|| E::invalid_value(Unexpected::Str(v), &self))
    }

    fn visit_u64<E: Error>(self, v: u64) -> Result<X::Value, E> {
        X::from_integer(v).ok_or_else(|| E::invalid_value(Unexpected::Unsigned(v), &self))
    }

    fn visit_i64<E: Error>(self, v: i64) -> Result<X::Value, E> {
        let read = u64::try_from(v).ok().and_then(X::from_integer);
        read.ok_or_else(|| E::invalid_value(Unexpected::Signed(v), &self))
    }

    fn visit_bool<E: Error>(self, v: bool) -> Result<X::Value, E> {
        X::from_bool(v).ok_or_else(|| E::invalid_type(Unexpected::Bool(v), &self))
    }
}

/// Bytes, from `MIN` to `MAX`.
pub(super) struct Size<const MIN: u64, const MAX: u64>;

impl<const MIN: u64, const MAX: u64> Syntax for Size<MIN, MAX> {
    type Value = u64;

    fn expected(f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (min, max) = (units::print_size(MIN), units::print_size(MAX));
        write!(f, r#"a size from {min} to {max}, such as "1M" (K = 1024) or 1048576 (bytes)"#)
    }

    fn from_text(text: &str) -> Option<u64> {
        units::parse_size(text).and_then(Self::from_integer)
    }

    fn from_integer(bytes: u64) -> Option<u64> {
        (MIN..=MAX).contains(&bytes).then_some(bytes)
    }

    fn write<S: Serializer>(bytes: &u64, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&units::print_size(*bytes))
    }
}

/// An amount of memory in bytes: a size, or a percentage of the machine's memory, as in systemd's
/// `MemoryMax=`.
pub(super) struct Memory;

/// Below 64 KiB it is a slip (`50` for `50%`); 4 EiB is more than any machine has.
type MemorySize = Size<{ 64 << 10 }, { 4 << 60 }>;

impl Syntax for Memory {
    type Value = u64;

    fn expected(f: &mut fmt::Formatter<'_>) -> fmt::Result {
        MemorySize::expected(f)?;
        write!(f, r#", or a share of the machine's memory, such as "50%""#)
    }

    fn from_text(text: &str) -> Option<u64> {
        match units::parse_percentage(text, physical_memory()) {
            Some(bytes) => MemorySize::from_integer(bytes),
            None => MemorySize::from_text(text),
        }
    }

    fn from_integer(bytes: u64) -> Option<u64> {
        MemorySize::from_integer(bytes)
    }

    fn write<S: Serializer>(bytes: &u64, s: S) -> Result<S::Ok, S::Error> {
        MemorySize::write(bytes, s)
    }
}

/// A duration that is not nothing and that a clock can be moved by.
pub(super) struct Span;

impl Span {
    const MIN: Duration = Duration::from_millis(1);
    const MAX: Duration = Duration::from_secs(100 * 31_557_600);
}

impl Syntax for Span {
    type Value = Duration;

    fn expected(f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, r#"a duration from 1ms to 100y, such as "500ms", "2h 30min" or 30 (seconds)"#)
    }

    fn from_text(text: &str) -> Option<Duration> {
        units::parse_duration(text).filter(|d| (Self::MIN..=Self::MAX).contains(d))
    }

    fn from_integer(seconds: u64) -> Option<Duration> {
        Some(Duration::from_secs(seconds)).filter(|d| (Self::MIN..=Self::MAX).contains(d))
    }

    fn write<S: Serializer>(duration: &Duration, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&units::print_duration(*duration))
    }
}

impl Syntax for Keep {
    type Value = Self;

    fn expected(f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, r#""taken", "dropped", or "#)?;
        Span::expected(f)
    }

    fn from_text(text: &str) -> Option<Self> {
        match text {
            "taken" => Some(Self::Taken),
            "dropped" => Some(Self::Dropped),
            _ => Span::from_text(text).map(Self::For),
        }
    }

    fn from_integer(seconds: u64) -> Option<Self> {
        Span::from_integer(seconds).map(Self::For)
    }

    fn write<S: Serializer>(keep: &Self, s: S) -> Result<S::Ok, S::Error> {
        match keep {
            Self::Taken => s.serialize_str("taken"),
            Self::Dropped => s.serialize_str("dropped"),
            Self::For(duration) => Span::write(duration, s),
        }
    }
}

/// How many there may be of something: at least one, and few enough to be counted by a semaphore.
pub(super) struct Count;

impl Count {
    const MAX: u64 = 10_000_000;
}

impl Syntax for Count {
    type Value = u64;

    fn expected(f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a whole number from 1 to {}, such as 1024", Self::MAX)
    }

    fn from_integer(count: u64) -> Option<u64> {
        (1..=Self::MAX).contains(&count).then_some(count)
    }

    fn write<S: Serializer>(count: &u64, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_u64(*count)
    }
}
