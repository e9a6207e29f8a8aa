//! Which flavour of io_uring this kernel gives us: decided once, said once.

use crate::buf::BufPool;
use crate::error::RingError;
use io_uring::IoUring;
use std::io;

/// Registered buffers are at most this long each (a limit of the kernel).
pub(crate) const REGISTERED_PIECE: usize = 1 << 30;
/// Places for registered files; further backings work without.
pub(crate) const REGISTERED_FILES: u32 = 256;

/// What the ring can use, for logs and status.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RingFeatures {
    /// Completions run when this thread asks for them, never in between (Linux 6.1).
    pub defer_taskrun: bool,
    /// One submitting thread (Linux 6.0).
    pub single_issuer: bool,
    /// No interrupts of this thread for completions (Linux 5.19).
    pub cooperative: bool,
    pub registered_buffers: bool,
    pub registered_files: bool,
}

pub(crate) fn build(entries: u32) -> Result<(IoUring, RingFeatures), RingError> {
    // Newest first; a kernel answers EINVAL to flags it does not know.
    let flavours = [
        (true, true, true),
        (false, true, true),
        (false, false, true),
        (false, false, false),
    ];
    let mut last = io::Error::from_raw_os_error(libc::EINVAL);
    for (defer_taskrun, single_issuer, cooperative) in flavours {
        let mut builder = IoUring::builder();
        builder
            .dontfork()
            .setup_clamp()
            .setup_submit_all()
            .setup_cqsize(entries.saturating_mul(4));
        if defer_taskrun {
            builder.setup_defer_taskrun();
        }
        if single_issuer {
            builder.setup_single_issuer();
        }
        if cooperative {
            builder.setup_taskrun_flag();
            if !defer_taskrun {
                builder.setup_coop_taskrun();
            }
        }
        match builder.build(entries) {
            Ok(ring) => {
                let features = RingFeatures {
                    defer_taskrun,
                    single_issuer,
                    cooperative,
                    registered_buffers: false,
                    registered_files: false,
                };
                return Ok((ring, features));
            }
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => last = error,
            Err(error) => return Err(explain(error)),
        }
    }
    Err(RingError::Unsupported(last))
}

fn explain(source: io::Error) -> RingError {
    match source.raw_os_error() {
        Some(libc::ENOSYS) => RingError::Unsupported(source),
        Some(libc::EPERM | libc::EACCES) => {
            let sysctl = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled")
                .unwrap_or_else(|_| "unknown".into());
            RingError::Disabled {
                sysctl: sysctl.trim().into(),
                source,
            }
        }
        Some(libc::ENOMEM) => RingError::Memory(source),
        _ => RingError::Setup {
            what: "io_uring_setup",
            source,
        },
    }
}

/// Registers the arena. Refused (memlock limit): I/O works without it at more CPU, so it is only said.
pub(crate) fn register_pool(ring: &IoUring, pool: &BufPool) -> bool {
    let (base, len) = pool.memory();
    let pieces: Vec<libc::iovec> = (0..len)
        .step_by(REGISTERED_PIECE)
        .map(|from| libc::iovec {
            iov_base: base.as_ptr().wrapping_add(from).cast(),
            iov_len: (len - from).min(REGISTERED_PIECE),
        })
        .collect();
    // SAFETY: the arena stays mapped as long as a handle of the pool lives, and the ring keeps one until after the
    // io_uring instance is closed.
    match unsafe { ring.submitter().register_buffers(&pieces) } {
        Ok(()) => true,
        Err(error) => {
            tracing::warn!(
                %error,
                bytes = len,
                "buffers could not be registered with io_uring; large transfers cost about twice the CPU. Raise the memlock limit \
                 (LimitMEMLOCK=infinity in the systemd unit)"
            );
            false
        }
    }
}

pub(crate) fn register_files(ring: &IoUring) -> bool {
    match ring.submitter().register_files_sparse(REGISTERED_FILES) {
        Ok(()) => true,
        Err(error) => {
            tracing::warn!(%error, "files cannot be registered with io_uring; every request costs a little more CPU");
            false
        }
    }
}
