//! What a request may ask for: a pure function from a header to a plan.

use crate::error::{IoError, IoErrorKind};
use crate::volume::{BlockSizes, ExportInfo, MAX_REQUEST_BYTES};

use super::wire::{RequestHeader, command, command_flag};

/// What the handshake settled, and the export as it was then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Negotiated {
    /// Bytes.
    pub size: u64,
    pub read_only: bool,
    pub discard: bool,
    pub fast_zero: bool,
    pub cache: bool,
    pub block_sizes: BlockSizes,
    /// The client asked for the block sizes, so it must keep to them.
    pub client_knows_sizes: bool,
    pub structured: bool,
    /// The client chose `base:allocation`.
    pub allocation: bool,
}

impl Negotiated {
    pub fn new(info: &ExportInfo) -> Self {
        Negotiated {
            size: info.size,
            read_only: info.read_only,
            discard: info.discard,
            fast_zero: info.fast_zero,
            cache: info.cache,
            block_sizes: info.block_sizes,
            client_knows_sizes: false,
            structured: false,
            allocation: false,
        }
    }

    fn max_payload(&self) -> u32 {
        if self.client_knows_sizes {
            self.block_sizes.maximum
        } else {
            // A client that did not ask may rely on the protocol's own maximum.
            MAX_REQUEST_BYTES
        }
    }
}

/// A request that may go to the volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plan {
    Read,
    /// Payload follows.
    Write {
        fua: bool,
    },
    Flush,
    Discard {
        fua: bool,
    },
    WriteZeroes {
        fua: bool,
        may_unmap: bool,
        fast: bool,
    },
    Cache,
    BlockStatus {
        one: bool,
    },
    /// Nothing to do: a length of 0.
    Nothing,
    Disconnect,
}

fn invalid(message: &'static str) -> IoError {
    IoError::new(IoErrorKind::Invalid, message)
}

fn unsupported(message: &'static str) -> IoError {
    IoError::new(IoErrorKind::NotSupported, message)
}

/// What to do with a request, or how to refuse it. A refused write's payload must still be skipped.
pub fn plan(header: &RequestHeader, on: &Negotiated) -> Result<Plan, IoError> {
    let flags = header.flags;
    let fua = flags & command_flag::FUA != 0;
    // FUA is fine on every command, by the specification; it means something on those that change data.
    let (plan, own_flags) = match header.command {
        command::READ => (Plan::Read, command_flag::DF),
        command::WRITE => (Plan::Write { fua }, 0),
        command::DISCONNECT => return Ok(Plan::Disconnect),
        command::FLUSH => (Plan::Flush, 0),
        command::TRIM => (Plan::Discard { fua }, 0),
        command::CACHE => (Plan::Cache, 0),
        command::WRITE_ZEROES => (
            Plan::WriteZeroes {
                fua,
                may_unmap: flags & command_flag::NO_HOLE == 0,
                fast: flags & command_flag::FAST_ZERO != 0,
            },
            command_flag::NO_HOLE | command_flag::FAST_ZERO,
        ),
        command::BLOCK_STATUS => (
            Plan::BlockStatus {
                one: flags & command_flag::REQ_ONE != 0,
            },
            command_flag::REQ_ONE,
        ),
        _ => return Err(invalid("this server does not know the command")),
    };
    if flags & !(own_flags | command_flag::FUA) != 0 {
        return Err(invalid("a flag that this command does not take"));
    }
    let payload = matches!(plan, Plan::Read | Plan::Write { .. });
    let changes = matches!(
        plan,
        Plan::Write { .. } | Plan::Discard { .. } | Plan::WriteZeroes { .. }
    );
    match plan {
        // Offset and length are reserved; a client that leaves rubbish there still means a flush.
        Plan::Flush => return Ok(plan),
        Plan::BlockStatus { .. } if !on.allocation => {
            return Err(invalid("no metadata context was negotiated"));
        }
        Plan::BlockStatus { .. } if header.length == 0 => {
            return Err(invalid("the status of no bytes"));
        }
        Plan::Read if flags & command_flag::DF != 0 && !on.structured => {
            return Err(invalid("DF needs structured replies"));
        }
        // Not EINVAL: a client then falls back to writing, which is what it should do here.
        Plan::WriteZeroes { fast: true, .. } if !on.fast_zero => {
            return Err(unsupported("this export has no fast zeroes"));
        }
        Plan::Discard { .. } if !on.discard => {
            return Err(unsupported("this export has no trim"));
        }
        Plan::Cache if !on.cache => {
            return Err(unsupported("this export has no cache"));
        }
        _ => {}
    }
    if changes && on.read_only {
        return Err(IoError::new(
            IoErrorKind::NotPermitted,
            "the export is read-only",
        ));
    }
    if payload && header.length > on.max_payload() {
        return Err(invalid("the request is larger than the maximum"));
    }
    let end = header.offset.checked_add(u64::from(header.length));
    if end.is_none_or(|end| end > on.size) {
        return Err(match plan {
            Plan::Write { .. } | Plan::WriteZeroes { .. } => {
                IoError::new(IoErrorKind::NoSpace, "past the end of the export")
            }
            _ => invalid("past the end of the export"),
        });
    }
    if on.client_knows_sizes {
        let mask = u64::from(on.block_sizes.minimum) - 1;
        if (header.offset | u64::from(header.length)) & mask != 0 {
            return Err(invalid("not aligned to the minimum block size"));
        }
    }
    Ok(if header.length == 0 {
        Plan::Nothing
    } else {
        plan
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn on() -> Negotiated {
        Negotiated {
            size: 64 * MIB,
            read_only: false,
            discard: true,
            fast_zero: true,
            cache: true,
            block_sizes: BlockSizes {
                minimum: 512,
                preferred: 4096,
                maximum: MAX_REQUEST_BYTES,
            },
            client_knows_sizes: false,
            structured: true,
            allocation: true,
        }
    }

    fn kind(
        command: u16,
        flags: u16,
        offset: u64,
        length: u32,
        on: &Negotiated,
    ) -> Result<Plan, IoErrorKind> {
        let header = RequestHeader {
            flags,
            command,
            cookie: 7,
            offset,
            length,
        };
        plan(&header, on).map_err(|error| error.kind)
    }

    #[test]
    fn past_the_end_is_enospc_for_writes_and_einval_for_the_rest() {
        let on = on();
        for (offset, length) in [
            (64 * MIB - 511, 512),
            (64 * MIB, 1),
            (u64::MAX, 2),
            (u64::MAX - 4, 4),
        ] {
            for command in [command::WRITE, command::WRITE_ZEROES] {
                assert_eq!(
                    kind(command, 0, offset, length, &on),
                    Err(IoErrorKind::NoSpace)
                );
            }
            for command in [
                command::READ,
                command::TRIM,
                command::CACHE,
                command::BLOCK_STATUS,
            ] {
                assert_eq!(
                    kind(command, 0, offset, length, &on),
                    Err(IoErrorKind::Invalid)
                );
            }
        }
        assert_eq!(
            kind(command::READ, 0, 64 * MIB - 512, 512, &on),
            Ok(Plan::Read)
        );
    }

    #[test]
    fn only_a_client_that_knows_the_block_sizes_must_keep_to_them() {
        let mut on = on();
        assert_eq!(kind(command::READ, 0, 1, 3, &on), Ok(Plan::Read));
        on.client_knows_sizes = true;
        assert_eq!(kind(command::READ, 0, 1, 3, &on), Err(IoErrorKind::Invalid));
        assert_eq!(
            kind(command::READ, 0, 512, 513, &on),
            Err(IoErrorKind::Invalid)
        );
        on.block_sizes.maximum = 65536;
        assert_eq!(
            kind(command::READ, 0, 0, 65536 + 512, &on),
            Err(IoErrorKind::Invalid)
        );
        // Only payloads have a maximum.
        assert_eq!(
            kind(command::TRIM, 0, 0, 64 << 20, &on),
            Ok(Plan::Discard { fua: false })
        );
    }

    #[test]
    fn a_read_only_export_refuses_what_changes_it() {
        let on = Negotiated {
            read_only: true,
            ..on()
        };
        for command in [command::WRITE, command::TRIM, command::WRITE_ZEROES] {
            assert_eq!(
                kind(command, 0, 0, 512, &on),
                Err(IoErrorKind::NotPermitted)
            );
        }
        assert_eq!(kind(command::FLUSH, 0, 0, 0, &on), Ok(Plan::Flush));
    }

    #[test]
    fn flags_belong_to_their_commands() {
        let on = on();
        assert_eq!(
            kind(command::WRITE, command_flag::DF, 0, 512, &on),
            Err(IoErrorKind::Invalid)
        );
        assert_eq!(
            kind(command::READ, 1 << 9, 0, 512, &on),
            Err(IoErrorKind::Invalid)
        );
        assert_eq!(
            kind(command::READ, command_flag::FUA, 0, 512, &on),
            Ok(Plan::Read)
        );
        assert_eq!(kind(99, 0, 0, 512, &on), Err(IoErrorKind::Invalid));
        let zeroes = command_flag::NO_HOLE | command_flag::FAST_ZERO | command_flag::FUA;
        assert_eq!(
            kind(command::WRITE_ZEROES, zeroes, 0, 512, &on),
            Ok(Plan::WriteZeroes {
                fua: true,
                may_unmap: false,
                fast: true
            })
        );
        let slow = Negotiated {
            fast_zero: false,
            ..on
        };
        assert_eq!(
            kind(command::WRITE_ZEROES, zeroes, 0, 512, &slow),
            Err(IoErrorKind::NotSupported)
        );
    }

    #[test]
    fn what_an_export_does_not_offer_never_reaches_the_volume() {
        let on = Negotiated {
            discard: false,
            cache: false,
            ..on()
        };
        for command in [command::TRIM, command::CACHE] {
            assert_eq!(
                kind(command, 0, 0, 512, &on),
                Err(IoErrorKind::NotSupported)
            );
        }
    }

    #[test]
    fn no_bytes_is_no_work() {
        let on = on();
        for command in [command::READ, command::WRITE, command::TRIM, command::CACHE] {
            assert_eq!(kind(command, 0, 4096, 0, &on), Ok(Plan::Nothing));
        }
        assert_eq!(
            kind(command::BLOCK_STATUS, 0, 0, 0, &on),
            Err(IoErrorKind::Invalid)
        );
    }
}
