//! Reading and writing a backing before its shard serves: plain system calls through an aligned bounce buffer.

use crate::backing::{Backing, Engine, errno_kind};
use crate::buf::AlignedBytes;
use crate::error::{DiskError, DiskErrorKind, OpKind};
use rustix::io::Errno;

impl Backing {
    /// Reads `bytes.len()` bytes at `offset`, any alignment, through a bounce buffer. **Blocks**: before the shard serves.
    ///
    /// # Errors
    /// [`DiskError`]; `bytes` may then be partly filled.
    pub fn read_exact_at(&self, offset: u64, bytes: &mut [u8]) -> Result<(), DiskError> {
        let end = self.check(OpKind::Read, offset, bytes.len() as u64)?;
        let sector = u64::from(self.sector_size());
        let mut at = offset - offset % sector;
        let mut bounce = AlignedBytes::zeroed(bounce_len(end.next_multiple_of(sector) - at));
        while at < end {
            let want = usize::try_from(end.next_multiple_of(sector) - at)
                .map_or(bounce.len(), |left| left.min(bounce.len()));
            self.sync_read(at, &mut bounce[..want])?;
            let (from, to) = (at.max(offset), (at + want as u64).min(end));
            bytes[(from - offset) as usize..(to - offset) as usize]
                .copy_from_slice(&bounce[(from - at) as usize..(to - at) as usize]);
            at += want as u64;
        }
        Ok(())
    }

    /// Writes whole sectors at `offset` through a bounce buffer; durable after [`Self::sync`]. **Blocks**: before the
    /// shard serves.
    ///
    /// # Errors
    /// [`DiskError`]; part of the bytes may be written.
    pub fn write_all_at(&self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        self.check(OpKind::Write, offset, bytes.len() as u64)?;
        let sector = self.sector_size();
        if self.inner.read_only {
            return Err(self.inner.error(
                DiskErrorKind::ReadOnly,
                OpKind::Write,
                offset,
                bytes.len() as u64,
            ));
        }
        if !offset.is_multiple_of(u64::from(sector)) || !bytes.len().is_multiple_of(sector as usize)
        {
            return Err(self.inner.error(
                DiskErrorKind::Misaligned { sector },
                OpKind::Write,
                offset,
                bytes.len() as u64,
            ));
        }
        let mut bounce = AlignedBytes::zeroed(bounce_len(bytes.len() as u64));
        let mut at = offset;
        for piece in bytes.chunks(bounce.len()) {
            bounce[..piece.len()].copy_from_slice(piece);
            self.sync_write(at, &bounce[..piece.len()])?;
            at += piece.len() as u64;
        }
        Ok(())
    }

    /// Makes what was written durable. **Blocks**: before the shard serves.
    ///
    /// # Errors
    /// [`DiskError`]; what was written since the last good flush may be lost, and every later flush fails too.
    pub fn sync(&self) -> Result<(), DiskError> {
        if let Some(errno) = self.inner.flush_lost.get() {
            return Err(self
                .inner
                .error(DiskErrorKind::FlushLost(errno), OpKind::Flush, 0, 0));
        }
        #[cfg(feature = "fault-injection")]
        let noted = crate::record::began(&self.inner.path, || crate::record::Request::Flush);
        let result = match &self.inner.engine {
            Engine::Kernel | Engine::Memory => retry(|| rustix::fs::fdatasync(&self.inner.file)),
            #[cfg(feature = "fault-injection")]
            Engine::Fault(disk) => disk.blocking_sync(),
        };
        #[cfg(feature = "fault-injection")]
        crate::record::ended(noted, result.is_ok());
        result.map_err(|errno| {
            self.inner.flush_lost.set(Some(errno.raw_os_error()));
            self.inner
                .error(errno_kind(errno.raw_os_error()), OpKind::Flush, 0, 0)
        })
    }

    fn check(&self, op: OpKind, offset: u64, len: u64) -> Result<u64, DiskError> {
        let size = self.size();
        offset
            .checked_add(len)
            .filter(|end| *end <= size)
            .ok_or_else(|| {
                self.inner
                    .error(DiskErrorKind::BeyondEnd { size }, op, offset, len)
            })
    }

    fn sync_read(&self, offset: u64, bytes: &mut [u8]) -> Result<(), DiskError> {
        let mut done = 0;
        while done < bytes.len() {
            let result = match &self.inner.engine {
                Engine::Kernel | Engine::Memory => retry(|| {
                    rustix::io::pread(&self.inner.file, &mut bytes[done..], offset + done as u64)
                }),
                #[cfg(feature = "fault-injection")]
                Engine::Fault(disk) => disk.blocking_read(offset + done as u64, &mut bytes[done..]),
            };
            done += self.progress(
                OpKind::Read,
                offset + done as u64,
                (bytes.len() - done) as u64,
                result,
            )?;
        }
        Ok(())
    }

    fn sync_write(&self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        let mut done = 0;
        while done < bytes.len() {
            let rest = &bytes[done..];
            #[cfg(feature = "fault-injection")]
            let noted = crate::record::began(&self.inner.path, || crate::record::Request::Write {
                offset: offset + done as u64,
                bytes: rest.into(),
                durable: false,
            });
            let result = match &self.inner.engine {
                Engine::Kernel | Engine::Memory => {
                    retry(|| rustix::io::pwrite(&self.inner.file, rest, offset + done as u64))
                }
                #[cfg(feature = "fault-injection")]
                Engine::Fault(disk) => disk.blocking_write(offset + done as u64, rest),
            };
            #[cfg(feature = "fault-injection")]
            crate::record::ended(noted, result.is_ok());
            done += self.progress(
                OpKind::Write,
                offset + done as u64,
                rest.len() as u64,
                result,
            )?;
        }
        Ok(())
    }

    fn progress(
        &self,
        op: OpKind,
        offset: u64,
        len: u64,
        result: Result<usize, Errno>,
    ) -> Result<usize, DiskError> {
        let sector = self.sector_size() as usize;
        match result {
            // A piece of a sector is not kept: the next try starts at a whole one again, as direct I/O demands.
            Ok(n) if n >= sector => Ok(n - n % sector),
            Ok(_) if op == OpKind::Read => {
                Err(self
                    .inner
                    .error(DiskErrorKind::BeyondEnd { size: offset }, op, offset, len))
            }
            Ok(_) => Err(self
                .inner
                .error(DiskErrorKind::Io(libc::EIO), op, offset, len)),
            Err(errno) => Err(self
                .inner
                .error(errno_kind(errno.raw_os_error()), op, offset, len)),
        }
    }
}

fn retry<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    loop {
        match call() {
            Err(Errno::INTR | Errno::AGAIN) => {}
            result => return result,
        }
    }
}

fn bounce_len(len: u64) -> usize {
    len.clamp(4096, 1 << 20).next_multiple_of(4096) as usize
}
