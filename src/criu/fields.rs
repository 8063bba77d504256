//! Protobuf messages field by field, so that nothing is lost of what is not known.

use prost::bytes::Buf;

/// The fields of a message that are not known here.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::criu) struct Unknown {
    /// The number of the first.
    pub(in crate::criu) first: Option<u32>,
    /// As they came, keys and all.
    pub(in crate::criu) bytes: Vec<u8>,
}

impl Unknown {
    pub(in crate::criu) fn push(&mut self, field: &Field) {
        self.first.get_or_insert(field.number);
        self.bytes.extend_from_slice(field.bytes);
    }
}

/// A field of a message.
pub(in crate::criu) struct Field<'a> {
    pub(in crate::criu) number: u32,
    /// Its value, if it is a number of variable length.
    pub(in crate::criu) value: Option<u64>,
    /// What it holds, if it is a message, or other bytes.
    pub(in crate::criu) contents: Option<&'a [u8]>,
    /// All of it, with its key.
    bytes: &'a [u8],
}

impl Field<'_> {
    /// Its number and its value, which may have more than the 32 bits that some fields have. Such a one
    /// is unknown: protobuf would drop the upper half.
    pub(in crate::criu) fn known(&self) -> Option<(u32, Result<u32, std::num::TryFromIntError>)> {
        self.value.map(|value| (self.number, value.try_into()))
    }
}

/// The fields of a message, in order; `None` where it is not protobuf, and then no further.
pub(in crate::criu) struct Fields<'a>(pub(in crate::criu) &'a [u8]);

impl<'a> Iterator for Fields<'a> {
    type Item = Option<Field<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let message = std::mem::take(&mut self.0);
        let mut rest = message;
        let Some((number, value, contents)) = take_field(&mut rest) else { return Some(None) };
        let (bytes, rest) = message.split_at(message.len() - rest.len());
        self.0 = rest;
        Some(Some(Field { number, value, contents, bytes }))
    }
}

/// A field's number, its value and its contents.
type Taken<'a> = (u32, Option<u64>, Option<&'a [u8]>);

/// Takes a field off the front: its number, its value if it is a varint, and its bytes if it has a length.
/// Groups are not taken: CRIU has never used any.
fn take_field<'a>(message: &mut &'a [u8]) -> Option<Taken<'a>> {
    let key = take_varint(message)?;
    let number = u32::try_from(key >> 3).ok().filter(|number| *number != 0)?;
    let (kind, len) = match key & 7 {
        0 => return Some((number, Some(take_varint(message)?), None)),
        1 => (1, 8),
        2 => (2, usize::try_from(take_varint(message)?).ok()?),
        5 => (5, 4),
        _ => return None,
    };
    let (bytes, rest) = message.split_at_checked(len)?;
    *message = rest;
    Some((number, None, (kind == 2).then_some(bytes)))
}

/// Takes a varint off the front: 7 bits a byte, the lowest first, at most 64.
fn take_varint(message: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let byte = message.try_get_u8().ok()?;
        let bits = u64::from(byte & 0x7f);
        if bits << shift >> shift != bits {
            return None;
        }
        value |= bits << shift;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

/// Appends a field that is a number.
pub(in crate::criu) fn put_field(message: &mut Vec<u8>, number: u64, value: u64) {
    for mut left in [number << 3, value] {
        while left >= 0x80 {
            message.push(left.to_le_bytes()[0] | 0x80);
            left >>= 7;
        }
        message.push(left.to_le_bytes()[0]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn fields_are_taken_as_they_came() {
        let message = b"\x08\x96\x01\x32\x02hi\x3d1234\x4112345678";
        let fields: Vec<_> = Fields(message).map(Option::unwrap).collect();
        let said: Vec<_> = fields.iter().map(|field| (field.number, field.value)).collect();
        assert_eq!(said, [(1, Some(150)), (6, None), (7, None), (8, None)]);
        let contents: Vec<_> = fields.iter().map(|field| field.contents).collect();
        assert_eq!(contents, [None, Some(&b"hi"[..]), None, None]);
        assert_eq!(fields.iter().map(|field| field.bytes).collect::<Vec<_>>().concat(), message);
    }

    #[test]
    fn what_is_no_protobuf_ends_there() {
        for bad in [
            &b"\x08"[..],                                      // no value
            b"\x08\x80",                                       // half of one
            b"\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x02",   // over 64 bits
            b"\x08\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\0", // over 10 bytes
            b"\0\0",                                           // the field 0
            b"\x0b\x0c",                                       // a group
            b"\x32\x03hi",                                     // cut
            b"\x32\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",   // 2^64 - 1 bytes
            b"\x3d123",                                        // 3 of 4 bytes
        ] {
            let mut fields = Fields(bad);
            assert!(fields.next().unwrap().is_none(), "{bad:?}");
            assert!(fields.next().is_none());
        }
    }

    proptest! {
        #[test]
        fn a_number_survives_the_way(number in 1u32..1 << 29, value: u64) {
            let mut message = Vec::new();
            put_field(&mut message, number.into(), value);
            let fields: Vec<_> = Fields(&message).map(Option::unwrap).collect();
            prop_assert_eq!((fields.len(), fields[0].number), (1, number));
            prop_assert_eq!((fields[0].value, fields[0].bytes), (Some(value), &message[..]));
        }

        #[test]
        fn no_bytes_make_the_walk_panic_or_lose_any(message: Vec<u8>) {
            let mut seen = Vec::new();
            for field in Fields(&message).flatten() {
                seen.extend_from_slice(field.bytes);
            }
            prop_assert!(message.starts_with(&seen));
        }
    }
}
