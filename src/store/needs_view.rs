//! Whether a snapshot can be restored through the stream, or only from a view of its images as files.

use super::snapshot::Images;
use crate::criu::pipes::{Decides, NeedsFile, mappings_need_file};

/// So many bytes of images are looked into, of a snapshot in all: it happens at once, when the snapshot becomes whole, and this
/// takes some milliseconds. It is enough for forty thousand mappings. Of what has more it is not known what it needs, and a view
/// serves it in any case.
const LOOKED_INTO: u64 = 2 << 20;

/// Why a snapshot has to be restored from a view: the first image that CRIU would not get right through a pipe, and what is the matter
/// with it.
pub(super) fn why(images: &Images) -> Option<String> {
    let mut left = LOOKED_INTO;
    images.iter().find_map(|(name, image)| {
        let needs = match Decides::of(name)? {
            Decides::Size => (!image.is_empty()).then_some(NeedsFile::Rules),
            Decides::Mappings if image.len() > left => Some(NeedsFile::Unknown),
            Decides::Mappings => {
                left -= image.len();
                image.bytes().map_or(Some(NeedsFile::Unknown), |mm| mappings_need_file(&mm))
            }
        };
        needs.map(|needs| format!("{name}: {needs}"))
    })
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::*;
    use crate::store::image::Image;
    use crate::store::quota::Quota;

    fn images(named: &[(&str, &[u8])]) -> Images {
        let quota = Quota::new(1 << 30);
        let made = named.iter().map(|(name, bytes)| {
            let image = Image::made_of(name, bytes, quota.nothing()).unwrap();
            ((*name).to_owned(), Rc::new(image))
        });
        made.collect()
    }

    const NO_MAPPINGS: &[u8] = b"\x19\x43\x56\x54\x20\x28\x49\x57\x02\0\0\0\x08\x01";

    #[test]
    fn rules_need_a_view_and_an_empty_image_of_them_does_not() {
        let usual =
            [("mm-7.img", NO_MAPPINGS), ("iptables-9.img", b"*filter"), ("nftables-9.img", b"")];
        assert_eq!(why(&images(&usual)), None);
        let needs = why(&images(&[("mm-7.img", NO_MAPPINGS), ("nftables-9.img", b"table ip t")]));
        let said =
            "nftables-9.img: it has firewall rules, and CRIU runs none that come through a pipe";
        assert_eq!(needs.as_deref(), Some(said));
    }

    #[test]
    fn what_takes_too_long_to_look_into_needs_a_view() {
        // A vma_entry without anything.
        let record = [14 << 3 | 2, 0].repeat(1 << 19);
        let len = u32::try_from(record.len()).unwrap().to_le_bytes();
        let mm = [&NO_MAPPINGS[..8], &len, &record].concat();
        assert_eq!(why(&images(&[("mm-7.img", &mm)])), None);
        let needs = why(&images(&[("mm-7.img", &mm), ("mm-8.img", &mm)])).unwrap();
        assert!(needs.starts_with("mm-8.img: it cannot be told"), "{needs}");
    }
}
