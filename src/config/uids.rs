//! How a list of user ids is written.

use super::syntax::{As, Syntax};
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{SeqAccess, Visitor},
};
use std::fmt;

const EXPECTED: &str = "a list of numeric user ids, such as [1000, 1001]";

pub(super) fn serialize<S: Serializer>(uids: &[u32], s: S) -> Result<S::Ok, S::Error> {
    uids.serialize(s)
}

pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<u32>, D::Error> {
    d.deserialize_any(List)
}

struct List;

impl<'de> Visitor<'de> for List {
    type Value = Vec<u32>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(EXPECTED)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<u32>, A::Error> {
        let mut uids = Vec::new();
        while let Some(Uid(uid)) = list.next_element()? {
            uids.push(uid);
        }
        Ok(uids)
    }
}

#[derive(Deserialize)]
struct Uid(#[serde(with = "As::<UidSyntax>")] u32);

struct UidSyntax;

impl Syntax for UidSyntax {
    type Value = u32;

    fn expected(f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(EXPECTED)
    }

    fn from_integer(uid: u64) -> Option<u32> {
        // The last id is "none" to the kernel (chown(2)), and nobody's.
        u32::try_from(uid).ok().filter(|uid| *uid != u32::MAX)
    }

    fn write<S: Serializer>(uid: &u32, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_u32(*uid)
    }
}
