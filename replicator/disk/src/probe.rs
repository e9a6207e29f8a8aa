//! What the system says about a path: sector size, aliases through loop devices, what reads back zeroes.

use rustix::fs::{AtFlags, FallocateFlags, StatxFlags, fallocate, statx};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// What a path really is, whatever it is called: equal identities share their bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Identity {
    File { device: u64, inode: u64 },
    Device { number: u64 },
}

impl Identity {
    pub(crate) fn of(metadata: &std::fs::Metadata) -> Identity {
        use std::os::unix::fs::FileTypeExt;
        if metadata.file_type().is_block_device() {
            Identity::Device {
                number: metadata.rdev(),
            }
        } else {
            Identity::File {
                device: metadata.dev(),
                inode: metadata.ino(),
            }
        }
    }
}

/// Unit of direct I/O on a regular file, in bytes. Filesystems that do not tell are asked with a read of one sector.
pub(crate) fn file_sector_size(file: &File) -> io::Result<u32> {
    let stat = statx(
        file.as_fd(),
        c"",
        AtFlags::EMPTY_PATH,
        StatxFlags::DIOALIGN | StatxFlags::BASIC_STATS,
    )?;
    if stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0 && stat.stx_dio_offset_align != 0 {
        return Ok(stat
            .stx_dio_offset_align
            .max(stat.stx_dio_mem_align)
            .max(512));
    }
    let mut page = crate::buf::AlignedBytes::zeroed(4096);
    match rustix::io::pread(file, &mut page[..512], 512) {
        Ok(_) => Ok(512),
        Err(Errno::INVAL) => Ok(4096),
        Err(error) => Err(error.into()),
    }
}

/// Unit in which the filesystem keeps holes, in bytes: smaller pieces are zeroed by writing, since punching part of a
/// block goes through the page cache.
pub(crate) fn file_block_size(metadata: &std::fs::Metadata, sector: u32) -> u32 {
    let block = u32::try_from(metadata.blksize()).unwrap_or(4096);
    if block.is_power_of_two() {
        block.clamp(4096.max(sector), 1 << 20)
    } else {
        4096.max(sector)
    }
}

/// Whether holes can be punched into this file. Asked beyond its end, where nothing changes.
pub(crate) fn file_punches_holes(file: &File, size: u64, block: u32) -> bool {
    let beyond = size.next_multiple_of(u64::from(block));
    fallocate(
        file,
        FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
        beyond,
        u64::from(block),
    )
    .is_ok()
}

/// Whether a block device can deallocate a range so that it reads back zeroes: it must have a "write zeroes" command and
/// support deallocation. Then `fallocate(PUNCH_HOLE)` is the call that either gives zeroes or fails.
pub(crate) fn device_punches_holes(number: u64) -> bool {
    let limit = |name: &str| {
        queue_file(number, name)
            .and_then(|text| text.trim().parse::<u64>().ok())
            .unwrap_or(0)
    };
    limit("write_zeroes_max_bytes") > 0 && limit("discard_max_bytes") > 0
}

fn device_dir(number: u64) -> PathBuf {
    PathBuf::from(format!(
        "/sys/dev/block/{}:{}",
        rustix::fs::major(number),
        rustix::fs::minor(number)
    ))
}

fn queue_file(number: u64, name: &str) -> Option<String> {
    let dir = device_dir(number);
    // A partition has no queue of its own; its disk is the directory above.
    std::fs::read_to_string(dir.join("queue").join(name))
        .or_else(|_| std::fs::read_to_string(dir.join("../queue").join(name)))
        .ok()
}

/// The file under a loop device or a partition of one.
pub(crate) fn file_under_loop(number: u64) -> Option<PathBuf> {
    let dir = device_dir(number);
    let read = |path: PathBuf| std::fs::read_to_string(path).ok();
    let text =
        read(dir.join("loop/backing_file")).or_else(|| read(dir.join("../loop/backing_file")))?;
    Some(PathBuf::from(text.trim_end_matches('\n')))
}

/// A loop device (such as `/dev/loop3`) over the file with this identity.
pub(crate) fn loop_over(identity: Identity) -> Option<PathBuf> {
    for entry in std::fs::read_dir("/sys/block").ok()?.flatten() {
        let name = entry.file_name();
        if !name.to_string_lossy().starts_with("loop") {
            continue;
        }
        let Ok(file) = std::fs::read_to_string(entry.path().join("loop/backing_file")) else {
            continue;
        };
        if std::fs::metadata(file.trim_end_matches('\n'))
            .is_ok_and(|metadata| Identity::of(&metadata) == identity)
        {
            return Some(Path::new("/dev").join(name));
        }
    }
    None
}

/// Who holds a flock on this file, as " (process 12, name)"; empty when the kernel does not tell (another container).
pub(crate) fn lock_holder(metadata: &std::fs::Metadata) -> String {
    let Ok(locks) = std::fs::read_to_string("/proc/locks") else {
        return String::new();
    };
    let (major, minor) = (
        rustix::fs::major(metadata.dev()),
        rustix::fs::minor(metadata.dev()),
    );
    let place = format!("{major:02x}:{minor:02x}:{}", metadata.ino());
    for line in locks.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        if words.get(1) == Some(&"FLOCK") && words.get(5) == Some(&place.as_str()) {
            let pid = words.get(4).copied().unwrap_or("?");
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            return match name.trim() {
                "" => format!(" (taken by process {pid}, which has ended or is out of sight)"),
                name => format!(" (process {pid}, {name})"),
            };
        }
    }
    String::new()
}
