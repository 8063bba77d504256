//! `put`: files become images of a snapshot, by name, through the proxy.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use indicatif::ProgressBar;
use serde_json::json;

use super::cli::{Daemon, Put};
use super::exit::{Exit, Failure};
use super::print::{Output, clean, progress, size, span};
use super::reach;
use crate::client::{Client, Error, Writer};
use crate::control::model::Role;
use crate::criu::names::check_image;
use crate::criu::remote::PARENT;
use crate::sys::pump;

/// Puts, and waits until the cache has each.
pub(super) fn run(daemon: &Daemon, output: Output, put: &Put) -> Result<(), Failure> {
    if daemon.cache {
        return Err(reach::mistaken("put", Role::Proxy));
    }
    let id = &put.snapshot;
    reach::must_be_id(id)?;
    let images = images(put)?;
    let client = reach::remote(daemon, Role::Proxy);
    let begun = Instant::now();
    if let Some(list) = &put.list {
        client.push_id(list, id).map_err(|error| told(error, id))?;
    }
    let total = images.iter().map(|image| image.size).sum();
    let bar = progress(clean(id), total);
    let mut bytes = 0;
    for image in &images {
        bar.set_message(clean(&image.name));
        bytes += send(&client, put, image, &bar)?;
    }
    drop(bar);
    let count = images.len();
    if put.finish {
        client.finish_dump(id, Some(count as u64)).map_err(|error| told(error, id))?;
    }

    let ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
    let result = json!({ "snapshot": id, "images": count, "bytes": bytes, "milliseconds": ms });
    output.print(&result, || {
        format!("{}: {count} images, {} in {}", clean(id), size(bytes), span(ms))
    })
}

/// What becomes an image.
#[derive(Debug)]
struct Image {
    name: String,
    path: PathBuf,
    /// Of a file; what else there is ends when it ends.
    size: Option<u64>,
}

/// Looks at everything before anything is sent: what fails later damages the snapshot.
fn images(put: &Put) -> Result<Vec<Image>, Failure> {
    if put.files.is_empty() && (put.finish || put.list.is_none()) {
        let failure = Failure::usage("nothing to put: no FILE is named");
        return Err(if put.finish {
            failure.cure(format!("to end the dump: criu-imagectl finish {}", put.snapshot))
        } else {
            failure
        });
    }
    if put.name.is_some() && put.files.len() != 1 {
        return Err(
            Failure::usage("--name is the name of one image").cure("put the others by themselves")
        );
    }
    let mut images: Vec<Image> = Vec::new();
    for path in &put.files {
        let name = name(put, path)?;
        if images.iter().any(|image| image.name == name) {
            let what = format!("two files are called {name}, and would be one image");
            return Err(Failure::usage(what).cure("put them by themselves, with --name NAME"));
        }
        images.push(Image { size: size_of(path)?, path: path.clone(), name });
    }
    Ok(images)
}

fn name(put: &Put, path: &Path) -> Result<String, Failure> {
    let cure = "name the image: --name NAME";
    let name = match (&put.name, path.file_name()) {
        (Some(name), _) => Some(name.as_str()),
        (None, Some(name)) if !is_stdin(path) => name.to_str(),
        (None, _) => None,
    };
    let Some(name) = name else {
        let what = if is_stdin(path) { "stdin".into() } else { path.display().to_string() };
        return Err(Failure::usage(format!("{what} gives no image its name")).cure(cure));
    };
    check_image(name).map_err(|bad| Failure::usage(bad.to_string()).cure(cure))?;
    if name == PARENT {
        return Err(Failure::usage(format!("{PARENT} is the list of ids, no image")).cure(cure));
    }
    Ok(name.to_owned())
}

fn is_stdin(path: &Path) -> bool {
    path.as_os_str() == "-"
}

/// The size of a file; `None` of what is no regular file, but can be read.
fn size_of(path: &Path) -> Result<Option<u64>, Failure> {
    if is_stdin(path) {
        return Ok(None);
    }
    let metadata = fs::metadata(path).map_err(|error| failed(path, &error))?;
    if metadata.is_dir() {
        let what = format!("{} is a directory", path.display());
        return Err(Failure::failed(what)
            .cure(format!("name the files in it: {}", path.join("*").display())));
    }
    if metadata.is_file() {
        // Whether it may be read at all is also to be known before.
        File::open(path).map_err(|error| failed(path, &error))?;
    }
    Ok(metadata.is_file().then_some(metadata.len()))
}

/// Sends one image. A writer that fails is dropped: to the proxy it has died.
fn send(client: &Client, put: &Put, image: &Image, bar: &ProgressBar) -> Result<u64, Failure> {
    let id = &put.snapshot;
    let open = if put.append { Client::open_append } else { Client::open_write };
    let mut writer = open(client, id, &image.name).map_err(|error| told(error, id))?;
    let copied = copy(&mut writer, image, bar).and_then(|bytes| writer.finish().map(|()| bytes));
    copied.map_err(|error| match error {
        Error::Io(error) => failed(&image.path, &error),
        error => told(error, id),
    })
}

fn copy(writer: &mut Writer, image: &Image, bar: &ProgressBar) -> Result<u64, Error> {
    let mut moved = |bytes| bar.inc(bytes);
    if is_stdin(&image.path) {
        return Ok(pump::copy(&mut io::stdin().lock(), writer, &mut moved)?);
    }
    let mut file = File::open(&image.path)?;
    match image.size {
        Some(_) => writer.copy_from(&file, &mut moved),
        None => Ok(pump::copy(&mut file, writer, &mut moved)?),
    }
}

fn failed(path: &Path, error: &io::Error) -> Failure {
    Failure::failed(format!("{}: {error}", path.display()))
}

/// What the proxy said.
fn told(error: Error, id: &str) -> Failure {
    let failure = Failure::from(error);
    if failure.exit == Exit::Damaged {
        failure.cure(format!(
            "begin it anew: criu-imagectl put --list {id} …; or forget it: criu-imagectl --proxy drop {id}"
        ))
    } else {
        failure
    }
}
