//! A replicated volume as a filesystem of this machine, without a block device of its own: the export as a file (nbdfuse), a
//! loop device over that, ext4 on it. Everything is taken apart again when dropped, in whatever way a test ends.

use crate::cluster::Part;
use crate::loop_device::LoopDevice;
use crate::process;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(60);

/// Whether all that [`MountedVolume`] needs is here; says that something is skipped if not.
pub fn available() -> bool {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: mounting needs root");
        return false;
    }
    if !Path::new("/dev/fuse").exists() {
        eprintln!("skipped: no /dev/fuse here");
        return false;
    }
    if !["nbdfuse", "losetup", "mke2fs", "mount", "umount"]
        .into_iter()
        .all(process::available)
    {
        return false;
    }
    // A machine may have the programs and none of the devices.
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.as_file().set_len(1 << 20).expect("a sparse file");
    LoopDevice::over(file.path()).is_some()
}

/// `mke2fs -t ext4` on a mounted volume's device, before it is mounted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Format {
    Make,
    Keep,
}

/// An NBD export as a file.
struct NbdFuse {
    child: Child,
    file: PathBuf,
}

impl NbdFuse {
    #[track_caller]
    fn mount(file: &Path, uri: &str) -> NbdFuse {
        std::fs::write(file, "").expect("a file to mount over");
        let before = std::fs::metadata(file).expect("the file").dev();
        let mut command = Command::new("nbdfuse");
        command.arg(file).arg(uri);
        let mut fuse = NbdFuse {
            child: process::spawn(command).expect("nbdfuse"),
            file: file.to_path_buf(),
        };
        let start = Instant::now();
        while std::fs::metadata(file).map_or(before, |found| found.dev()) == before {
            if let Some(ended) = fuse.child.try_wait().expect("waiting for an own child") {
                panic!("nbdfuse {uri} ended: {ended}");
            }
            assert!(start.elapsed() < LIMIT, "nbdfuse {uri} does not mount");
            std::thread::sleep(Duration::from_millis(2));
        }
        fuse
    }

    /// Ends the process, and with it, in the kernel, every request on the file, those to come included: nothing that is still
    /// dirty in a page cache above it can reach the volume, or another one, any more.
    fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for NbdFuse {
    fn drop(&mut self) {
        self.kill();
        let _ = unmount(&["--lazy"], &self.file);
    }
}

fn unmount(options: &[&str], place: &Path) -> std::process::Output {
    let mut command = Command::new("umount");
    command.args(options).arg(place);
    process::run(command, LIMIT)
}

/// A volume of the primary, mounted.
pub struct MountedVolume {
    directory: PathBuf,
    mounted: bool,
    device: PathBuf,
    fuse: NbdFuse,
}

impl MountedVolume {
    /// Mounts the export at `uri` at `place/NAME`, with its file beside it.
    ///
    /// # Panics
    /// It cannot be mounted. [`available`] says beforehand what is missing.
    #[track_caller]
    pub fn mount(uri: &str, place: &Path, name: &str, format: Format) -> MountedVolume {
        let fuse = NbdFuse::mount(&place.join(format!("{name}.img")), uri);
        let device = LoopDevice::over(&fuse.file).expect("a loop device");
        if format == Format::Make {
            let mut command = Command::new("mke2fs");
            command.args(["-q", "-F", "-t", "ext4"]).arg(device.path());
            process::must(command, LIMIT);
        }
        let directory = place.join(name);
        std::fs::create_dir_all(&directory).expect("a directory");
        let mut command = Command::new("mount");
        command
            .args(["-t", "ext4"])
            .arg(device.path())
            .arg(&directory);
        process::must(command, LIMIT);
        MountedVolume {
            directory,
            mounted: true,
            device: device.detach_when_unused(),
            fuse,
        }
    }

    /// Where the filesystem is.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Takes it apart in good order: everything written is on the volume afterwards.
    #[track_caller]
    pub fn unmount(mut self) {
        self.unmount_filesystem();
        let ended = unmount(&[], &self.fuse.file);
        assert!(ended.status.success(), "{ended:?}");
        let ended = process::wait(&mut self.fuse.child, LIMIT);
        assert!(
            ended.is_some_and(|status| status.success()),
            "nbdfuse: {ended:?}"
        );
    }

    /// What the death of the machine does to it: nothing that was not on the volume yet ever gets there. Then it is taken
    /// apart; whoever used it must have ended.
    #[track_caller]
    pub fn abandon(mut self) {
        self.cut_off();
        self.unmount_filesystem();
    }

    /// The first half of [`MountedVolume::abandon`]: its users get errors from now on.
    pub fn cut_off(&mut self) {
        self.fuse.kill();
    }

    #[track_caller]
    fn unmount_filesystem(&mut self) {
        let ended = unmount(&[], &self.directory);
        assert!(ended.status.success(), "{ended:?}");
        self.mounted = false;
        // The device lets go of the file with its last user.
        let start = Instant::now();
        while self.holds_the_file() {
            assert!(
                start.elapsed() < LIMIT,
                "{} still holds {}",
                self.device.display(),
                self.fuse.file.display()
            );
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn holds_the_file(&self) -> bool {
        let name = self.device.file_name().expect("/dev/loopN");
        let told = Path::new("/sys/block").join(name).join("loop/backing_file");
        std::fs::read_to_string(told)
            .is_ok_and(|file| file.trim() == self.fuse.file.to_string_lossy())
    }
}

impl Drop for MountedVolume {
    fn drop(&mut self) {
        if self.mounted {
            // Whoever still uses it: without nbdfuse no request of theirs goes on for ever.
            self.fuse.kill();
            let _ = unmount(&["--lazy"], &self.directory);
        }
    }
}

/// A filesystem of a few bytes that a test fills.
pub struct SmallFilesystem {
    directory: PathBuf,
    /// Under ext4.
    device: Option<(LoopDevice, PathBuf)>,
}

impl SmallFilesystem {
    /// Makes one of `bytes` at `directory`: a tmpfs for a state directory, ext4 for anything that disks are about.
    ///
    /// # Panics
    /// It cannot be mounted. [`available`] says beforehand what is missing.
    #[track_caller]
    pub(crate) fn mount(directory: &Path, part: Part, bytes: u64) -> SmallFilesystem {
        std::fs::create_dir_all(directory).expect("a directory");
        let mut command = Command::new("mount");
        let mut device = None;
        if part == Part::State {
            command
                .args(["-t", "tmpfs", "-o"])
                .arg(format!("size={bytes}"))
                .arg("none");
        } else {
            let image = directory.with_extension("ext4");
            std::fs::File::create(&image)
                .and_then(|file| file.set_len(bytes))
                .expect("a sparse file");
            let over = LoopDevice::over(&image).expect("a loop device");
            let mut make = Command::new("mke2fs");
            make.args(["-q", "-F", "-t", "ext4", "-m", "0"])
                .arg(over.path());
            process::must(make, LIMIT);
            command.args(["-t", "ext4"]).arg(over.path());
            device = Some((over, image));
        }
        command.arg(directory);
        process::must(command, LIMIT);
        SmallFilesystem {
            directory: directory.to_path_buf(),
            device,
        }
    }

    fn ballast(&self) -> PathBuf {
        self.directory.join("ballast")
    }

    /// Bytes that files can still take.
    pub fn free(&self) -> u64 {
        let found = rustix::fs::statvfs(&self.directory).expect("a filesystem");
        found.f_bavail * found.f_frsize
    }

    /// Leaves about `rest` bytes to others.
    #[track_caller]
    pub fn fill(&self, rest: u64) {
        let file = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.ballast())
            .expect("a file");
        let length = file.metadata().expect("a file").len();
        let more = self.free().saturating_sub(rest);
        // What is full already cannot become fuller.
        let took = rustix::fs::fallocate(
            &file,
            rustix::fs::FallocateFlags::empty(),
            length,
            more.max(1),
        );
        if took.is_err() {
            // In pieces, since the filesystem keeps some blocks for itself.
            let mut at = file.metadata().expect("a file").len();
            while rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), at, 4096)
                .is_ok()
            {
                at += 4096;
            }
        }
    }

    /// Gives up what [`SmallFilesystem::fill`] took.
    #[track_caller]
    pub fn make_room(&self) {
        std::fs::remove_file(self.ballast()).expect("it was filled");
    }
}

impl Drop for SmallFilesystem {
    fn drop(&mut self) {
        let ended = unmount(&[], &self.directory);
        if !ended.status.success() {
            let _ = unmount(&["--lazy"], &self.directory);
        }
        self.device.take();
    }
}
