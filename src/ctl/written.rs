//! Images, and links to images, that a command writes into a directory.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};

use super::exit::Failure;

/// What was written so far. Dropped before [`keep`](Written::keep), it is removed again.
pub(super) struct Written {
    dir: PathBuf,
    made_dir: bool,
    files: Vec<PathBuf>,
    force: bool,
}

impl Written {
    /// A directory for images of these names, which is made if it is missing.
    pub(super) fn prepare<'a>(
        dir: &Path,
        mut names: impl Iterator<Item = &'a str>,
        force: bool,
    ) -> Result<Written, Failure> {
        let made_dir = match fs::metadata(dir) {
            Ok(_) => false,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                // They are the memory of a process: nobody else may look.
                DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed(dir))?;
                true
            }
            Err(error) => return Err(failed(dir)(error)),
        };
        let there = |name: &&str| fs::symlink_metadata(dir.join(name)).is_ok();
        if let (false, Some(name)) = (force, names.find(there)) {
            let path = dir.join(name);
            return Err(Failure::failed(format!("{} is there already", path.display()))
                .cure("name another directory, or replace it with --force"));
        }
        Ok(Written { dir: dir.to_owned(), made_dir, files: Vec::new(), force })
    }

    /// Makes a new file; a name is never followed to somewhere else.
    pub(super) fn create(&mut self, name: &str) -> Result<(PathBuf, File), Failure> {
        let path = self.make_room(name)?;
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        let file = file.map_err(failed(&path))?;
        self.files.push(path.clone());
        Ok((path, file))
    }

    /// Makes a symbolic link.
    pub(super) fn link(&mut self, name: &str, to: &str) -> Result<(), Failure> {
        let path = self.make_room(name)?;
        symlink(to, &path).map_err(failed(&path))?;
        self.files.push(path);
        Ok(())
    }

    /// Where something of that name goes; what is there is removed if that is wanted.
    fn make_room(&self, name: &str) -> Result<PathBuf, Failure> {
        let path = self.dir.join(name);
        if self.force {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(failed(&path)(error));
                }
                _ => {}
            }
        }
        Ok(path)
    }

    /// All is well.
    pub(super) fn keep(mut self) {
        self.files.clear();
        self.made_dir = false;
    }
}

impl Drop for Written {
    fn drop(&mut self) {
        for file in &self.files {
            let _ = fs::remove_file(file);
        }
        if self.made_dir {
            let _ = fs::remove_dir(&self.dir);
        }
    }
}

fn failed(path: &Path) -> impl Fn(io::Error) -> Failure {
    let path = path.display().to_string();
    move |error| Failure::failed(format!("{path}: {error}"))
}
