//! A backing: one file, partition, logical volume or loop device, opened for direct I/O and locked.

use crate::error::{DiskError, DiskErrorKind, OpKind, OpenError};
#[cfg(feature = "fault-injection")]
use crate::fault::FaultDisk;
use crate::in_place;
use crate::job::Caps;
use crate::lock::{guard_aliases, lock};
use crate::probe::{self, Identity};
use rustix::fs::{FallocateFlags, SeekFrom, fallocate};
use std::cell::Cell;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
#[cfg(feature = "fault-injection")]
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Between two looks at a backing that is held by another.
const LOCK_POLL: Duration = Duration::from_millis(10);

/// How to open a backing.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// Only reads; takes a shared lock, so that several readers go together and none with a writer.
    pub read_only: bool,
    /// Create a regular file of this many bytes; refused if something exists there.
    pub create_size: Option<u64>,
    /// With `create_size`: allocate all of it now, so that no later write can fail for want of space.
    pub preallocate: bool,
    /// Sector size of the volume in bytes (a power of two, 512 to 4096), if it is already decided. At least what direct
    /// I/O needs here.
    pub sector_size: Option<u32>,
    /// How long to wait while another holds the backing. After a process was killed the kernel keeps its files for a moment (as long as
    /// the disk works on its last requests), so a restart should allow some seconds.
    pub lock_wait: Duration,
    /// Do not open a block device exclusively (O_EXCL). For looking at a device that is known to be mounted.
    pub shared_device: bool,
    /// Put a volatile cache and a fault switchboard over the file, commanded through this Unix socket.
    #[cfg(feature = "fault-injection")]
    pub fault_control: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BackingKind {
    File,
    BlockDevice,
}

/// Below the jobs: the kernel, or a disk that fails on command.
pub(crate) enum Engine {
    Kernel,
    /// The kernel, and small transfers without the ring: the file is in memory.
    Memory,
    #[cfg(feature = "fault-injection")]
    Fault(Arc<FaultDisk>),
}

pub(crate) struct BackingInner {
    pub(crate) file: File,
    pub(crate) path: Arc<Path>,
    pub(crate) engine: Engine,
    pub(crate) caps: Cell<Caps>,
    kind: BackingKind,
    identity: Identity,
    /// Holds the lock of the file under a loop device, so that nobody opens that file by its own name.
    _under_loop: Option<File>,
    pub(crate) size: Cell<u64>,
    pub(crate) in_flight: Cell<u32>,
    /// Errno of the first failed flush; see [`DiskErrorKind::FlushLost`].
    pub(crate) flush_lost: Cell<Option<i32>>,
    pub(crate) read_only: bool,
    /// Decided at open and never changed: the copies of a volume must agree on what a discard does.
    pub(crate) discard_zeroes: bool,
}

/// An open, locked backing; a cheap handle. When the last handle is gone (a ring holds one from attach to detach, and one per unfinished
/// request) it is closed and the lock ends.
#[derive(Clone)]
pub struct Backing {
    pub(crate) inner: Rc<BackingInner>,
}

impl std::fmt::Debug for Backing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Backing({}, {} bytes)",
            self.path().display(),
            self.size()
        )
    }
}

impl Backing {
    /// Opens and locks `path`. Blocks: for the start-up path only.
    ///
    /// # Errors
    /// [`OpenError`], each with what to do.
    pub fn open(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Backing, OpenError> {
        let path = path.as_ref();
        let created = match options.create_size {
            Some(size) => Some(create(path, size, options.preallocate)?),
            None => None,
        };
        let deadline = Instant::now() + options.lock_wait;
        let mut told = false;
        let opened = loop {
            let opened = Self::open_existing(path, options);
            let held = matches!(
                opened,
                Err(OpenError::Locked { .. } | OpenError::InUse { .. } | OpenError::Aliased { .. })
            );
            if !held || Instant::now() >= deadline {
                break opened;
            }
            if !std::mem::replace(&mut told, true) {
                tracing::info!(
                    path = %path.display(),
                    "the disk is still held by somebody, perhaps by requests of a killed process; waiting for it for {:?} at most",
                    options.lock_wait
                );
            }
            // The kernel has no way to wait for a lock, an exclusive open and a loop device at once, with a limit.
            std::thread::sleep(LOCK_POLL);
        };
        if let (Err(_), Some(())) = (&opened, created) {
            let _ = std::fs::remove_file(path);
        }
        opened
    }

    fn open_existing(path: &Path, options: &OpenOptions) -> Result<Backing, OpenError> {
        let open_error = |source| OpenError::Open {
            path: path.into(),
            source,
        };
        // Looked at before it is opened: opening a tape or a fifo has effects.
        let before = std::fs::metadata(path).map_err(open_error)?;
        let kind = kind_of(&before).map_err(|found| OpenError::WrongKind {
            path: path.into(),
            found,
        })?;
        let mut flags = libc::O_DIRECT;
        if kind == BackingKind::BlockDevice && !options.shared_device {
            flags |= libc::O_EXCL;
        }
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(!options.read_only)
            .custom_flags(flags)
            .open(path)
            .map_err(|source| match (source.raw_os_error(), kind) {
                (Some(libc::EINVAL), BackingKind::File) => OpenError::NoDirectIo {
                    path: path.into(),
                    source,
                },
                (Some(libc::EBUSY), BackingKind::BlockDevice) => {
                    OpenError::InUse { path: path.into() }
                }
                _ => open_error(source),
            })?;
        let metadata = file.metadata().map_err(open_error)?;
        let identity = Identity::of(&metadata);
        if identity != Identity::of(&before) {
            return Err(open_error(io::Error::other(
                "the path was replaced while it was being opened",
            )));
        }
        lock(&file, path, &metadata, options.read_only)?;
        let under_loop = guard_aliases(path, identity, options.read_only)?;

        let query = |what| {
            move |source: io::Error| OpenError::Query {
                path: path.into(),
                what,
                source,
            }
        };
        let needed = match kind {
            BackingKind::File => {
                probe::file_sector_size(&file).map_err(query("finding the unit of direct I/O"))?
            }
            BackingKind::BlockDevice => rustix::fs::ioctl_blksszget(&file)
                .map_err(|e| query("finding the sector size")(e.into()))?,
        };
        let sector = options.sector_size.unwrap_or(needed);
        if sector < needed || needed > 4096 || sector > 4096 || !sector.is_power_of_two() {
            return Err(OpenError::SectorSize {
                path: path.into(),
                needed,
                wanted: sector,
            });
        }
        let size = usable_size(&file, sector).map_err(query("finding the size"))?;
        if size == 0 {
            return Err(OpenError::Empty {
                path: path.into(),
                sector,
            });
        }
        let (block, punch) = match kind {
            BackingKind::File => {
                let block = probe::file_block_size(&metadata, sector);
                (
                    block,
                    !options.read_only && probe::file_punches_holes(&file, metadata.len(), block),
                )
            }
            BackingKind::BlockDevice => {
                let Identity::Device { number } = identity else {
                    unreachable!("a block device has a number")
                };
                (
                    sector,
                    !options.read_only && probe::device_punches_holes(number),
                )
            }
        };
        let caps = Caps {
            sector,
            block,
            punch,
            zero_range: true,
            is_device: kind == BackingKind::BlockDevice,
        };

        let engine = match kind == BackingKind::File && in_place::in_memory(&file) {
            true => Engine::Memory,
            false => Engine::Kernel,
        };
        #[cfg(feature = "fault-injection")]
        let engine = match &options.fault_control {
            Some(socket) => Engine::Fault(
                FaultDisk::open(file.try_clone().map_err(open_error)?, sector, socket).map_err(
                    |source| OpenError::FaultControl {
                        socket: socket.clone(),
                        source,
                    },
                )?,
            ),
            None => engine,
        };

        Ok(Backing {
            inner: Rc::new(BackingInner {
                file,
                path: path.into(),
                engine,
                caps: Cell::new(caps),
                kind,
                identity,
                _under_loop: under_loop,
                size: Cell::new(size),
                in_flight: Cell::new(0),
                flush_lost: Cell::new(None),
                read_only: options.read_only,
                discard_zeroes: punch,
            }),
        })
    }

    /// As given to [`Self::open`].
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    pub fn kind(&self) -> BackingKind {
        self.inner.kind
    }

    /// Equal for two names of one file or device: two volumes must not share it.
    pub fn identity(&self) -> Identity {
        self.inner.identity
    }

    /// Sector size in bytes: 512 to 4096; every request is a multiple of it.
    pub fn sector_size(&self) -> u32 {
        self.inner.caps.get().sector
    }

    /// Bytes that requests may use: the size found at [`Self::open`] or by the last [`Self::adopt_size`], in whole sectors.
    pub fn size(&self) -> u64 {
        self.inner.size.get()
    }

    /// Whether `Discard` leaves zeroes behind; otherwise it does nothing.
    pub fn discard_zeroes(&self) -> bool {
        self.inner.discard_zeroes
    }

    pub fn is_read_only(&self) -> bool {
        self.inner.read_only
    }

    /// Requests that the disk has not answered.
    pub fn in_flight(&self) -> u32 {
        self.inner.in_flight.get()
    }

    /// What the system says the size is now, in bytes and whole sectors; requests still use [`Self::size`]. Cheap (one
    /// system call, no I/O).
    ///
    /// # Errors
    /// The device is gone.
    pub fn current_size(&self) -> io::Result<u64> {
        usable_size(&self.inner.file, self.sector_size())
    }

    /// Takes [`Self::current_size`] over as [`Self::size`], so that requests may use what was added, and returns it.
    ///
    /// # Errors
    /// The device is gone.
    pub fn adopt_size(&self) -> io::Result<u64> {
        let size = self.current_size()?;
        self.inner.size.set(size);
        Ok(size)
    }

    /// Grows a regular file to `size` bytes, durably, and adopts it; a size not above the present one changes nothing.
    /// The work runs on a helper thread, so the shard goes on.
    ///
    /// # Errors
    /// No space, or not a regular file (grow the device by its own means, then [`Self::adopt_size`]).
    pub async fn grow(&self, size: u64, preallocate: bool) -> io::Result<u64> {
        if self.inner.kind != BackingKind::File {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "a block device is grown by its own tools (lvextend, parted); then ask for its size again",
            ));
        }
        let file = self.inner.file.try_clone()?;
        tokio::task::spawn_blocking(move || grow_file(&file, size, preallocate))
            .await
            .map_err(io::Error::other)??;
        self.adopt_size()
    }
}

impl BackingInner {
    pub(crate) fn error(
        &self,
        kind: DiskErrorKind,
        op: OpKind,
        offset: u64,
        len: u64,
    ) -> DiskError {
        DiskError {
            kind,
            op,
            offset,
            len,
            path: self.path.clone(),
        }
    }

    /// Size of the device now, in bytes.
    pub(crate) fn device_size(&self) -> Option<u64> {
        usable_size(&self.file, 1).ok()
    }

    pub(crate) fn raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// The kind of error for a number of the kernel.
pub(crate) fn errno_kind(errno: i32) -> DiskErrorKind {
    match errno {
        libc::ENOSPC | libc::EDQUOT => DiskErrorKind::NoSpace,
        errno => DiskErrorKind::Io(errno),
    }
}

fn kind_of(metadata: &std::fs::Metadata) -> Result<BackingKind, &'static str> {
    let kind = metadata.file_type();
    if kind.is_file() {
        Ok(BackingKind::File)
    } else if kind.is_block_device() {
        Ok(BackingKind::BlockDevice)
    } else if kind.is_dir() {
        Err("a directory")
    } else if kind.is_char_device() {
        Err("a character device")
    } else {
        Err("a pipe or socket")
    }
}

/// The end of the file or device (no I/O), in whole sectors.
fn usable_size(file: &File, sector: u32) -> io::Result<u64> {
    // Direct I/O on a shared description never uses the file position, so moving it disturbs nobody.
    let size = rustix::fs::seek(file, SeekFrom::End(0))?;
    Ok(size - size % u64::from(sector))
}

fn create(path: &Path, size: u64, preallocate: bool) -> Result<(), OpenError> {
    let file = match std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
    {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            return Err(OpenError::AlreadyExists { path: path.into() });
        }
        Err(source) => {
            return Err(OpenError::Open {
                path: path.into(),
                source,
            });
        }
    };
    let filled = grow_file(&file, size, preallocate).and_then(|()| {
        // The name must survive a power loss as well as the contents.
        let parent = path
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty())
            .unwrap_or(Path::new("."));
        File::open(parent)?.sync_all()
    });
    filled.map_err(|source| {
        let _ = std::fs::remove_file(path);
        OpenError::Create {
            path: path.into(),
            size,
            source,
        }
    })
}

fn grow_file(file: &File, size: u64, preallocate: bool) -> io::Result<()> {
    let now = file.metadata()?.len();
    if size > now {
        if preallocate {
            fallocate(file, FallocateFlags::empty(), now, size - now)?;
        } else {
            file.set_len(size)?;
        }
    }
    file.sync_all()
}
