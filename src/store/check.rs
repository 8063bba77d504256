//! What makes a set of images a checkpoint.

use super::image::Image;
use super::snapshot::Images;
use super::turns::Turns;
use crate::criu::images::{INVENTORY, Walk, is_records};
use crate::criu::pages::Space;

/// Checks that every image has ended, that there is an inventory unless the snapshot is `partial`, and
/// that no image's records are cut short. The error is the reason for which the snapshot is damaged.
pub(super) async fn check(images: &Images, partial: bool) -> Result<(), String> {
    if let Some(image) = images.values().find(|image| !image.is_whole()) {
        return Err(format!("image {} has not ended", image.name()));
    }
    let mut turns = Turns::new();
    match images.get(INVENTORY) {
        None if partial => {}
        None => return Err(format!("there is no {INVENTORY}: the dump did not succeed")),
        Some(inventory) if records(inventory, &mut turns).await? == 0 => {
            return Err(format!("image {INVENTORY} is cut short: it has no record"));
        }
        Some(_) => {}
    }
    for image in images.values().filter(|image| is_records(image.name())) {
        records(image, &mut turns).await?;
    }
    Ok(())
}

/// Checks that each task that has memory has the pages of it. Those of a dump that sent them to a page server
/// are in no image of its own.
pub(super) fn check_memory(images: &Images) -> Result<(), String> {
    let tasks = images.keys().filter_map(|name| {
        let pid = name.strip_prefix("mm-")?.strip_suffix(".img")?;
        pid.parse().ok().map(Space::Task)
    });
    for task in tasks {
        if !images.contains_key(&task.pagemap()) {
            return Err(format!(
                "there are no pages of {task}: neither {} nor a round of them has come",
                task.pagemap()
            ));
        }
    }
    Ok(())
}

/// How many records are walked over at once, some of which may be a piece to read: a fraction of a millisecond.
const RECORDS: u64 = 4096;

async fn records(image: &Image, turns: &mut Turns) -> Result<u64, String> {
    let cut = |error| format!("image {} is cut short: {error}", image.name());
    let mut walk = Walk::begin(image.reader(), image.len()).map_err(cut)?;
    loop {
        if let Some(records) = walk.go_on(RECORDS).map_err(cut)? {
            return Ok(records);
        }
        turns.pass_after_much().await;
    }
}
