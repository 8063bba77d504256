//! Numbers of 32 bits that came with more: protobuf decoders drop the upper half, so that another
//! snapshot would be meant.

use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};

use super::generated::Kind;

/// The first field of a message that has 32 bits and came with more, by its number. What is no protobuf is no
/// matter of this.
pub(super) fn too_wide(kind: Kind, mut message: &[u8]) -> Option<u32> {
    let narrow = narrow_fields(kind);
    while !message.is_empty() {
        let (field, wire_type) = decode_key(&mut message).ok()?;
        let mut numbers = match wire_type {
            WireType::Varint => {
                if is_wide(decode_varint(&mut message).ok()?) && narrow.contains(&field) {
                    return Some(field);
                }
                continue;
            }
            WireType::LengthDelimited if narrow.contains(&field) => {
                let len = usize::try_from(decode_varint(&mut message).ok()?).ok()?;
                let (packed, rest) = message.split_at_checked(len)?;
                message = rest;
                packed
            }
            other => {
                skip_field(other, field, &mut message, DecodeContext::default()).ok()?;
                continue;
            }
        };
        while !numbers.is_empty() {
            if is_wide(decode_varint(&mut numbers).ok()?) {
                return Some(field);
            }
        }
    }
    None
}

fn is_wide(number: u64) -> bool {
    u32::try_from(number).is_err()
}

/// The fields of a kind that are `uint32`.
fn narrow_fields(kind: Kind) -> &'static [u32] {
    match kind {
        Kind::Unspecified
        | Kind::Hello
        | Kind::Welcome
        | Kind::Goodbye
        | Kind::KeepAlive
        | Kind::PagesForget => &[],
        Kind::SnapshotBegin
        | Kind::SnapshotReady
        | Kind::SnapshotList
        | Kind::SnapshotEnd
        | Kind::SnapshotAck
        | Kind::SnapshotAbort
        | Kind::SnapshotWithdraw
        | Kind::SnapshotWithdrawn
        | Kind::Space
        | Kind::PageData
        | Kind::PagesRequest => &[1],
        Kind::ImageBegin
        | Kind::ImageReady
        | Kind::ImageData
        | Kind::ImageEnd
        | Kind::ImageAck
        | Kind::Region
        | Kind::Spaces => &[1, 2],
        Kind::Pages => &[1, 4],
        Kind::RegionRequest => &[1, 5],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    /// The numbers of the `uint32` fields of each message, by its name.
    fn declared() -> BTreeMap<String, Vec<u32>> {
        let mut declared = BTreeMap::<_, Vec<u32>>::new();
        let mut message = String::new();
        for line in include_str!("../../proto/link.proto").lines() {
            let words: Vec<_> = line.trim().trim_start_matches("repeated ").split(' ').collect();
            match words[..] {
                ["message", name, ..] => message = name.to_owned(),
                ["uint32", _, "=", number, ..] => {
                    let number = number.trim_end_matches(';').parse().unwrap();
                    declared.entry(message.clone()).or_default().push(number);
                }
                _ => {}
            }
        }
        declared
    }

    #[test]
    fn every_field_of_32_bits_is_looked_at() {
        let mut declared = declared();
        for kind in (1..).map_while(|kind| Kind::try_from(kind).ok()) {
            let words = kind.as_str_name().split('_');
            let name: String =
                words.map(|word| word[..1].to_owned() + &word[1..].to_lowercase()).collect();
            assert_eq!(narrow_fields(kind), declared.remove(&name).unwrap_or_default(), "{name}");
        }
        assert_eq!(declared, BTreeMap::new());
    }

    #[test]
    fn a_number_of_more_than_32_bits_is_found() {
        // 2^40, where 0 would be read.
        let wide = b"\x80\x80\x80\x80\x80\x20";
        for field in [1, 2] {
            let message = [&[field << 3], &wide[..]].concat();
            assert_eq!(too_wide(Kind::ImageData, &message), Some(u32::from(field)));
        }
        assert_eq!(too_wide(Kind::ImageData, &[&[3 << 3], &wide[..]].concat()), None, "an offset");
        assert_eq!(too_wide(Kind::ImageData, &[&[15 << 3], &wide[..]].concat()), None, "unknown");
        let packed = [b"\x12\x07\x01", &wide[..]].concat();
        assert_eq!(too_wide(Kind::Spaces, &packed), Some(2));
        assert_eq!(too_wide(Kind::ImageData, b"\x08\xff\xff\xff\xff\x0f"), None);
        assert_eq!(too_wide(Kind::Hello, b"\x0a\x01a"), None);
    }
}
