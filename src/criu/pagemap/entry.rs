//! One entry of a pagemap image: what it says, and what it means.

use super::{BadPagemap, NotUnderstood};
use crate::criu::fields::{Fields, Unknown, put_field};
use crate::criu::pages::{Contents, Run};

/// A run of pages, as an image says it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Entry {
    vaddr: u64,
    compat_nr_pages: u32,
    in_parent: Option<bool>,
    flags: Option<u32>,
    nr_pages: Option<u64>,
    unknown: Unknown,
}

impl Entry {
    /// As CRIU of any version can read it.
    pub(super) fn new(run: Run) -> Entry {
        Entry {
            vaddr: run.address(),
            // For CRIU before 4.2, which knows no other count. Later ones read it only where the other is
            // missing, and set it to 0.
            compat_nr_pages: u32::try_from(run.pages()).unwrap_or(0),
            in_parent: None,
            flags: Some(run.contents().flags()),
            nr_pages: Some(run.pages()),
            unknown: Unknown::default(),
        }
    }

    /// Decodes the record that begins at byte `at` of its image.
    pub(super) fn decode(record: &[u8], at: usize) -> Result<Entry, BadPagemap> {
        let mut entry = Entry::default();
        let (mut vaddr, mut compat_nr_pages) = (None, None);
        for field in Fields(record) {
            let field = field.ok_or(BadPagemap::NotProtobuf(at))?;
            match field.known() {
                Some((1, _)) => vaddr = field.value,
                Some((2, Ok(pages))) => compat_nr_pages = Some(pages),
                Some((3, _)) => entry.in_parent = field.value.map(|value| value != 0),
                Some((4, Ok(flags))) => entry.flags = Some(flags),
                Some((5, _)) => entry.nr_pages = field.value,
                _ => entry.unknown.push(&field),
            }
        }
        let missing = |field| BadPagemap::Missing { at, field };
        entry.vaddr = vaddr.ok_or(missing("vaddr"))?;
        entry.compat_nr_pages = compat_nr_pages.ok_or(missing("compat_nr_pages"))?;
        Ok(entry)
    }

    /// Encodes it, with what is not known at its end.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut record = Vec::new();
        put_field(&mut record, 1, self.vaddr);
        put_field(&mut record, 2, self.compat_nr_pages.into());
        let optional = [self.in_parent.map(u64::from), self.flags.map(u64::from), self.nr_pages];
        for (number, value) in (3..).zip(optional) {
            if let Some(value) = value {
                put_field(&mut record, number, value);
            }
        }
        record.extend_from_slice(&self.unknown.bytes);
        record
    }

    /// What it means, as `init_compat_pagemap_entry` in `criu/pagemap.c` takes the older
    /// forms.
    pub(super) fn run(&self) -> Result<Run, NotUnderstood> {
        let address = self.vaddr;
        if let Some(field) = self.unknown.first {
            return Err(NotUnderstood::Entry { address, field });
        }
        let (old, new) = (self.compat_nr_pages.into(), self.nr_pages);
        let pages = new.unwrap_or(old);
        if old != 0 && old != pages {
            return Err(NotUnderstood::TwoCounts { address, old, new: pages });
        }
        let contents = match (self.in_parent, self.flags) {
            // in_parent is older than the flags, and means PE_PARENT beside them.
            (Some(true), flags) => {
                Contents::from_flags(flags.unwrap_or(0) | Contents::Parent.flags())
            }
            (_, Some(flags)) => Contents::from_flags(flags),
            (_, None) => Ok(Contents::Present { lazy: false }),
        };
        let contents = contents.map_err(|flags| NotUnderstood::Flags { address, flags })?;
        Ok(Run::new(address, pages, contents)?)
    }
}
