//! What a copy wrote alone and gives up, kept in the state directory for a person.
//!
//! Each save is a directory `surplus/SERVICE/WHEN` with an image of every volume concerned, sparse, each block at its own
//! offset, and `about.json`, which names the blocks. It is written beside its name and renamed when all of it is
//! durable, so what has no `.partial` at its end is whole.

use crate::events::now_ms;
use holdfast_replicator_core::api::SurplusAbout;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt};
use std::path::{Path, PathBuf};

/// Directory of it in the state directory.
const DIRECTORY: &str = "surplus";
const ABOUT: &str = "about.json";
const PARTIAL: &str = ".partial";
/// The filesystem of the state directory keeps so many bytes free: the event log is there, too.
const LEFT_FREE: u64 = 64 << 20;

/// What `about.json` says.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct About {
    pub service: String,
    /// Milliseconds since 1970.
    pub saved_ms: u64,
    /// Slot of the copy whose blocks replaced these.
    pub peer_slot: u8,
    /// Generation that both had, hexadecimal, and the position in it after which these were written.
    pub generation: String,
    pub after: u64,
    /// Blocks of the bitmap, and their bytes: an upper bound of what was written.
    pub blocks: u64,
    pub bytes: u64,
    pub ranges: Vec<Range>,
}

/// Bytes of one volume that were saved.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Range {
    pub volume: String,
    pub offset: u64,
    pub length: u64,
}

/// One save that is whole.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Saved {
    /// Its name among those of its service.
    pub name: String,
    pub path: PathBuf,
    pub about: About,
}

/// A save that is being written.
pub struct Writer {
    partial: PathBuf,
    path: PathBuf,
    about: About,
    volumes: Vec<String>,
    files: Vec<Option<File>>,
}

impl Writer {
    /// Begins one. `volumes`: names by index.
    ///
    /// # Errors
    /// The directory can't be made, or the filesystem would be left with less than 64 MiB.
    pub fn begin(
        state_dir: &Path,
        service: &str,
        volumes: &[String],
        about: &SurplusAbout,
    ) -> io::Result<Writer> {
        let directory = state_dir.join(DIRECTORY).join(service);
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&directory)?;
        let space = rustix::fs::statvfs(&directory)?;
        let free = space.f_bavail.saturating_mul(space.f_frsize);
        if free < about.bytes.saturating_add(LEFT_FREE) {
            let text = format!(
                "{} has {free} bytes free; the event log needs some of them",
                directory.display()
            );
            return Err(io::Error::new(io::ErrorKind::StorageFull, text));
        }
        let saved_ms = now_ms();
        let name = format!("{saved_ms}-{:08x}", about.save as u32);
        let partial = directory.join(format!("{name}{PARTIAL}"));
        fs::DirBuilder::new().mode(0o700).create(&partial)?;
        Ok(Writer {
            partial,
            path: directory.join(name),
            about: About {
                service: service.to_owned(),
                saved_ms,
                peer_slot: about.peer.0,
                generation: about.generation.to_string(),
                after: about.after,
                blocks: about.blocks,
                bytes: about.bytes,
                ranges: Vec::new(),
            },
            volumes: volumes.to_vec(),
            files: volumes.iter().map(|_| None).collect(),
        })
    }

    /// Bytes of a volume, to its place in the image.
    ///
    /// # Errors
    /// The file can't be written.
    pub fn write(&mut self, volume: usize, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let (Some(name), Some(slot)) = (self.volumes.get(volume), self.files.get_mut(volume))
        else {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "there is no such volume",
            ));
        };
        let file = match slot {
            Some(file) => file,
            None => slot.insert(File::create_new(image(&self.partial, name))?),
        };
        file.write_all_at(bytes, offset)?;
        self.about.ranges.push(Range {
            volume: name.clone(),
            offset,
            length: bytes.len() as u64,
        });
        Ok(())
    }

    /// All of it is durable under its name when this returns.
    ///
    /// # Errors
    /// It can't be; what is there stays a partial one.
    pub fn keep(self) -> io::Result<PathBuf> {
        for file in self.files.iter().flatten() {
            file.sync_all()?;
        }
        let about = File::create_new(self.partial.join(ABOUT))?;
        about.write_all_at(&serde_json::to_vec_pretty(&self.about)?, 0)?;
        about.sync_all()?;
        File::open(&self.partial)?.sync_all()?;
        fs::rename(&self.partial, &self.path)?;
        let parents = self.path.ancestors().skip(1).take(3);
        for parent in parents {
            File::open(parent)?.sync_all()?;
        }
        Ok(self.path)
    }

    /// It is not wanted any more.
    pub fn discard(self) {
        // What stays is a partial one, and is removed before the next.
        let _ = fs::remove_dir_all(&self.partial);
    }
}

/// Where the image of a volume is in a save.
pub fn image(save: &Path, volume: &str) -> PathBuf {
    save.join(format!("{volume}.img"))
}

/// Removes what was being written when a process ended.
///
/// # Errors
/// It can't be read or removed.
pub fn remove_partial(state_dir: &Path, service: &str) -> io::Result<()> {
    for entry in entries(&state_dir.join(DIRECTORY).join(service))? {
        if entry.to_string_lossy().ends_with(PARTIAL) {
            fs::remove_dir_all(&entry)?;
        }
    }
    Ok(())
}

/// Every save of a service that is whole, oldest first.
///
/// # Errors
/// The directory or one of its `about.json` can't be read.
pub fn list(state_dir: &Path, service: &str) -> io::Result<Vec<Saved>> {
    let mut saved = Vec::new();
    for path in entries(&state_dir.join(DIRECTORY).join(service))? {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.ends_with(PARTIAL) {
            continue;
        }
        let about = serde_json::from_slice(&fs::read(path.join(ABOUT))?)?;
        saved.push(Saved {
            name: name.into_owned(),
            path: path.clone(),
            about,
        });
    }
    saved.sort_by_key(|s| (s.about.saved_ms, s.name.clone()));
    Ok(saved)
}

/// Removes a save. Cut short, what is left of it is a partial one, which nobody lists and the next save removes.
///
/// # Errors
/// It can't be removed.
pub fn remove(saved: &Saved) -> io::Result<()> {
    let mut partial = saved.path.clone().into_os_string();
    partial.push(PARTIAL);
    fs::rename(&saved.path, &partial)?;
    fs::remove_dir_all(&partial)
}

/// Bytes of the filesystem that a save takes.
///
/// # Errors
/// It can't be read.
pub fn space(saved: &Saved) -> io::Result<u64> {
    use std::os::unix::fs::MetadataExt;
    let files = entries(&saved.path)?;
    files.iter().try_fold(0, |bytes, path| {
        Ok(bytes + fs::symlink_metadata(path)?.blocks() * 512)
    })
}

fn entries(directory: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(directory) {
        Ok(entries) => entries.map(|entry| Ok(entry?.path())).collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Writes the saved blocks of one volume into `target` (a file, made if need be, or a device) at their own offsets, and
/// makes them durable. Put over a copy of the volume as it was, that is the view of the side that lost. Returns how
/// many bytes it wrote.
///
/// # Errors
/// Reading the save or writing the target.
pub fn export(saved: &Saved, volume: &str, target: &Path) -> io::Result<u64> {
    let from = File::open(image(&saved.path, volume))?;
    let to = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(target)?;
    let mut written = 0;
    let mut bytes = Vec::new();
    for range in saved.about.ranges.iter().filter(|r| r.volume == volume) {
        bytes.resize(range.length as usize, 0);
        from.read_exact_at(&mut bytes, range.offset)?;
        to.write_all_at(&bytes, range.offset)?;
        written += range.length;
    }
    to.sync_all()?;
    Ok(written)
}

#[cfg(test)]
mod tests {
    use super::*;
    use holdfast_wire_format::ids::{GenerationId, Slot};

    fn about(bytes: u64) -> SurplusAbout {
        SurplusAbout {
            save: 7,
            peer: Slot(1),
            generation: GenerationId(5),
            after: 12,
            blocks: bytes / 4096,
            bytes,
        }
    }

    #[test]
    fn kept_listed_and_exported() {
        let state = tempfile::tempdir().unwrap();
        let names = ["log".to_owned(), "data".to_owned()];
        let mut writer = Writer::begin(state.path(), "db", &names, &about(8192)).unwrap();
        writer.write(1, 1 << 20, &[7; 4096]).unwrap();
        writer.write(1, 3 << 20, &[9; 4096]).unwrap();
        assert!(writer.write(2, 0, &[1; 512]).is_err(), "no such volume");
        assert!(
            list(state.path(), "db").unwrap().is_empty(),
            "not whole yet"
        );
        let path = writer.keep().unwrap();
        let saved = list(state.path(), "db").unwrap();
        assert_eq!((saved.len(), &saved[0].path), (1, &path));
        assert_eq!(saved[0].about.ranges.len(), 2);
        assert!(!image(&path, "log").exists(), "nothing of it was saved");
        let target = state.path().join("restored");
        fs::write(&target, vec![1; 4 << 20]).unwrap();
        assert_eq!(export(&saved[0], "data", &target).unwrap(), 8192);
        let restored = fs::read(&target).unwrap();
        assert_eq!(restored.len(), 4 << 20);
        let at = |offset: usize| {
            (
                restored[offset - 1],
                restored[offset],
                restored[offset + 4096],
            )
        };
        assert_eq!((at(1 << 20), at(3 << 20)), ((1, 7, 1), (1, 9, 1)));
    }

    #[test]
    fn a_save_is_removed_alone_and_gives_its_space_back() {
        let state = tempfile::tempdir().unwrap();
        for save in [7, 8] {
            let about = SurplusAbout {
                save,
                ..about(65536)
            };
            let mut writer =
                Writer::begin(state.path(), "db", &["data".to_owned()], &about).unwrap();
            writer.write(0, 1 << 20, &[save as u8; 65536]).unwrap();
            writer.keep().unwrap();
        }
        let saves = list(state.path(), "db").unwrap();
        let bytes = space(&saves[0]).unwrap();
        assert!((65536..1 << 20).contains(&bytes), "sparse: {bytes}");
        remove(&saves[0]).unwrap();
        assert!(!saves[0].path.exists());
        assert_eq!(list(state.path(), "db").unwrap(), saves[1..]);
        assert!(remove(&saves[0]).is_err(), "it is gone");
        // Cut short in the middle of the removal.
        let partial = saves[1].path.with_extension("partial");
        fs::rename(&saves[1].path, &partial).unwrap();
        assert_eq!(list(state.path(), "db").unwrap(), []);
        remove_partial(state.path(), "db").unwrap();
        assert!(!partial.exists());
    }

    #[test]
    fn what_is_not_whole_is_nothing() {
        let state = tempfile::tempdir().unwrap();
        let names = ["data".to_owned()];
        let mut writer = Writer::begin(state.path(), "db", &names, &about(4096)).unwrap();
        writer.write(0, 0, &[7; 4096]).unwrap();
        drop(writer);
        assert!(list(state.path(), "db").unwrap().is_empty());
        remove_partial(state.path(), "db").unwrap();
        let left = fs::read_dir(state.path().join("surplus/db")).unwrap();
        assert_eq!(left.count(), 0);
        Writer::begin(state.path(), "db", &names, &about(4096))
            .unwrap()
            .discard();
        assert!(
            entries(&state.path().join("surplus/db"))
                .unwrap()
                .is_empty()
        );
        let Err(full) = Writer::begin(state.path(), "db", &names, &about(1 << 60)) else {
            panic!("a PiB is free");
        };
        assert_eq!(full.kind(), io::ErrorKind::StorageFull);
    }
}
