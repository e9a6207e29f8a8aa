//! The filesystem the demo mirrors: a real ext4 image with files in it where the machine has e2fsprogs, a generated
//! image where it has not (the report says which).

use super::DemoError;
use super::history::Random;
use super::nbd_client::{NbdClient, NbdError};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Bytes of the image, and of its region at the start of the volume.
pub const SIZE: u64 = 32 << 20;
/// Pieces that are all zero are not written: the volume reads zero there already.
const PIECE: usize = 64 << 10;

/// An image and what can be checked of it.
pub struct Image {
    pub bytes: Vec<u8>,
    /// `e2fsck`, where the image is a filesystem that it can judge.
    checker: Option<PathBuf>,
    /// For people: what this is.
    pub description: String,
}

/// Looks a program up in PATH, then where administrators' tools live without being in a user's PATH.
fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/sbin", "/usr/sbin", "/usr/local/sbin"].map(PathBuf::from))
        .map(|directory| directory.join(program))
        .find(|candidate| candidate.is_file())
}

impl Image {
    /// Makes the image, with scratch files in `directory`.
    ///
    /// # Errors
    /// `mke2fs` is there and fails, or the directory cannot be written.
    pub fn make(directory: &Path, seed: u64) -> Result<Self, DemoError> {
        let (Some(maker), Some(checker)) = (find("mke2fs"), find("e2fsck")) else {
            return Ok(Image {
                bytes: generated(seed),
                checker: None,
                description: "generated image (mke2fs and e2fsck are not installed)".into(),
            });
        };
        let tree = directory.join("tree");
        let files = plant_tree(&tree, seed)
            .map_err(|source| DemoError::io("writing the files of the image", &tree, source))?;
        let path = directory.join("image");
        let output = Command::new(&maker)
            .args([
                "-q",
                "-F",
                "-t",
                "ext4",
                "-b",
                "4096",
                "-L",
                "holdfast-demo",
                "-d",
            ])
            .arg(&tree)
            .arg(&path)
            .arg(format!("{}k", SIZE >> 10))
            .stdin(Stdio::null())
            .output()
            .map_err(|source| DemoError::io("starting", &maker, source))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            return Err(DemoError::tool(&maker, output.status, said));
        }
        let mut bytes = std::fs::read(&path)
            .map_err(|source| DemoError::io("reading the image", &path, source))?;
        // A shorter file only means that its end is a hole.
        bytes.resize(SIZE as usize, 0);
        Ok(Image {
            bytes,
            checker: Some(checker),
            description: format!("ext4 with {files} files, made by mke2fs"),
        })
    }

    /// Copies the image to the start of the volume and makes it durable. Returns the bytes written.
    ///
    /// # Errors
    /// That of the NBD connection.
    pub fn copy_to(&self, client: &mut NbdClient) -> Result<u64, NbdError> {
        let mut written = 0;
        for (index, piece) in self.bytes.chunks(PIECE).enumerate() {
            if piece.iter().any(|byte| *byte != 0) {
                client.write((index * PIECE) as u64, piece)?;
                written += piece.len() as u64;
            }
        }
        client.flush()?;
        Ok(written)
    }

    /// Whether `bytes`, read back, are the image; and what the filesystem checker says of them, if there is one.
    ///
    /// # Errors
    /// The bytes differ, the checker finds an error, or it cannot be run.
    pub fn check(&self, bytes: &[u8], directory: &Path) -> Result<String, DemoError> {
        let differing = bytes
            .chunks(4096)
            .zip(self.bytes.chunks(4096))
            .filter(|(read, written)| read != written)
            .count();
        if differing > 0 || bytes.len() != self.bytes.len() {
            return Err(DemoError::Broken(format!(
                "{differing} of {} blocks of the filesystem image differ from what was written",
                self.bytes.len() / 4096
            )));
        }
        let Some(checker) = &self.checker else {
            return Ok("byte for byte what was written (no e2fsck here)".into());
        };
        let path = directory.join("read-back");
        std::fs::write(&path, bytes)
            .map_err(|source| DemoError::io("writing what was read back", &path, source))?;
        let output = Command::new(checker)
            .args(["-f", "-n"])
            .arg(&path)
            .stdin(Stdio::null())
            .output()
            .map_err(|source| DemoError::io("starting", checker, source))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            return Err(DemoError::tool(checker, output.status, said));
        }
        Ok("clean by e2fsck, and byte for byte what was written".into())
    }
}

/// A few directories of files with contents that compress badly, as real ones do. Returns how many files.
fn plant_tree(tree: &Path, seed: u64) -> std::io::Result<usize> {
    let mut random = Random::new(seed);
    let mut files = 0;
    for directory in ["etc", "var/lib/app", "srv/www"] {
        let directory = tree.join(directory);
        std::fs::create_dir_all(&directory)?;
        for number in 0..24 {
            let mut file = std::fs::File::create(directory.join(format!("file-{number:02}")))?;
            for _ in 0..512 + random.below(8192) {
                file.write_all(&random.next().to_le_bytes())?;
            }
            files += 1;
        }
    }
    Ok(files)
}

/// Islands of data in a sea of zeroes, as in a young filesystem.
fn generated(seed: u64) -> Vec<u8> {
    let mut random = Random::new(seed);
    let mut bytes = vec![0; SIZE as usize];
    for block in bytes.chunks_mut(4096) {
        if random.below(8) == 0 {
            for word in block.chunks_exact_mut(8) {
                word.copy_from_slice(&random.next().to_le_bytes());
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_image_passes_its_own_check_and_damage_does_not() {
        let directory = tempfile::tempdir().unwrap();
        let image = Image::make(directory.path(), 3).unwrap();
        image.check(&image.bytes, directory.path()).unwrap();
        let mut damaged = image.bytes.clone();
        let last = damaged.len() - 1;
        damaged[last] ^= 1;
        let said = image
            .check(&damaged, directory.path())
            .unwrap_err()
            .to_string();
        assert!(said.contains("1 of 8192 blocks"), "{said}");
    }

    #[test]
    fn the_checker_judges_the_filesystem_itself() {
        let directory = tempfile::tempdir().unwrap();
        let mut image = Image::make(directory.path(), 3).unwrap();
        if image.checker.is_none() {
            eprintln!("skipped: e2fsprogs are not installed");
            return;
        }
        // The superblock's count of free blocks: equal bytes on both sides, and still a broken filesystem.
        image.bytes[1024 + 12] ^= 0x55;
        let copy = image.bytes.clone();
        assert!(matches!(
            image.check(&copy, directory.path()),
            Err(DemoError::Tool { .. })
        ));
    }

    #[test]
    fn only_what_is_not_zero_is_copied() {
        let Some(server) = crate::demo::qemu_nbd::serve(SIZE, false) else {
            return;
        };
        let directory = tempfile::tempdir().unwrap();
        let image = Image::make(directory.path(), 4).unwrap();
        let mut client =
            NbdClient::connect(server.uri(), std::time::Duration::from_secs(10)).unwrap();
        let written = image.copy_to(&mut client).unwrap();
        assert!(written > 0 && written < SIZE);
        let back = client.read(0, SIZE as usize).unwrap();
        image.check(&back, directory.path()).unwrap();
    }
}
