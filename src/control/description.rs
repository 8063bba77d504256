//! Holds the interface's description against the types that speak it.

use zlink::idl::{Error, Field, Type};
use zlink::introspect::{ReplyError, Type as Introspect};

use super::calls::{
    ById, CallError, ConnectIn, ConnectOut, ExpectDumpIn, FinishDumpIn, FinishDumpOut, ListOut,
    Nothing, OpenIn, OpenPagesIn, ShowOut, StatusOut, TimelineOut, ViewOut, WatchIn, WatchOut,
    WithdrawIn, WithdrawOut,
};
use super::model::{
    Image, ImageFile, LinkStatus, Role, Snapshot, SnapshotState, Status, Withdrawn,
};
use super::{DESCRIPTION, INTERFACE};
use crate::timeline::{Phase, PhaseName};

/// The types that the description names, in its order.
const NAMED: [(&str, &Type<'_>); 10] = [
    ("Role", Role::TYPE),
    ("LinkStatus", LinkStatus::TYPE),
    ("Status", Status::TYPE),
    ("SnapshotState", SnapshotState::TYPE),
    ("Snapshot", Snapshot::TYPE),
    ("Image", Image::TYPE),
    ("ImageFile", ImageFile::TYPE),
    ("PhaseName", PhaseName::TYPE),
    ("Phase", Phase::TYPE),
    ("Withdrawn", Withdrawn::TYPE),
];

/// A type as the description refers to it.
fn spell(ty: &Type<'_>) -> String {
    let named = NAMED.iter().find(|(_, named)| *named == ty);
    named.map_or_else(|| spell_out(ty), |(name, _)| (*name).to_owned())
}

/// A type as the description defines it. The derive does not know serde's lowercase.
fn spell_out(ty: &Type<'_>) -> String {
    match ty {
        Type::Object(of) => fields(of.iter()),
        Type::Enum(of) => {
            let variants: Vec<_> = of.iter().map(|variant| variant.name().to_lowercase()).collect();
            format!("({})", variants.join(", "))
        }
        Type::Array(of) => format!("[]{}", spell(of.inner())),
        Type::Optional(of) => format!("?{}", spell(of.inner())),
        plain => plain.to_string(),
    }
}

fn fields<'f, 'i: 'f>(of: impl Iterator<Item = &'f Field<'i>>) -> String {
    let fields: Vec<_> =
        of.map(|field| format!("{}: {}", field.name(), spell(field.ty()))).collect();
    format!("({})", fields.join(", "))
}

#[test]
fn it_says_what_the_types_say() {
    let types = NAMED.map(|(name, ty)| format!("type {name} {}", spell_out(ty)));
    let methods = [
        ("Status", Nothing::TYPE, StatusOut::TYPE),
        ("List", Nothing::TYPE, ListOut::TYPE),
        ("Show", ById::TYPE, ShowOut::TYPE),
        ("Timeline", ById::TYPE, TimelineOut::TYPE),
        ("Watch", WatchIn::TYPE, WatchOut::TYPE),
        ("Withdraw", WithdrawIn::TYPE, WithdrawOut::TYPE),
        ("Connect", ConnectIn::TYPE, ConnectOut::TYPE),
        ("Drop", ById::TYPE, Nothing::TYPE),
        ("Open", OpenIn::TYPE, Nothing::TYPE),
        ("OpenPages", OpenPagesIn::TYPE, Nothing::TYPE),
        ("View", ById::TYPE, ViewOut::TYPE),
        ("AcceptChangedMemory", ById::TYPE, Nothing::TYPE),
        ("ExpectDump", ExpectDumpIn::TYPE, Nothing::TYPE),
        ("FinishDump", FinishDumpIn::TYPE, FinishDumpOut::TYPE),
    ]
    .map(|(name, input, output)| {
        format!("method {name}{} -> {}", spell_out(input), spell_out(output))
    });
    let error = |error: &&Error<'_>| format!("error {} {}", error.name(), fields(error.fields()));
    let errors = CallError::VARIANTS.iter().map(error);
    let mut spelled = vec![format!("interface {INTERFACE}")];
    spelled.extend(types.into_iter().chain(methods).chain(errors));

    let lines = DESCRIPTION.lines().filter(|line| !line.starts_with('#'));
    let words: Vec<_> = lines.flat_map(str::split_whitespace).collect();
    let described = words.join(" ").replace("( ", "(").replace(" )", ")");
    assert_eq!(described, spelled.join(" "));
}
