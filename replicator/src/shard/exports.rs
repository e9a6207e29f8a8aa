//! What an application may open: the volumes of services that this node is primary of, by epoch.

use super::budget::Budget;
use super::buffers::ClientBuf;
use super::driver::Shard;
use super::requests::covering;
use holdfast_disk::{MAX_BUF, buffer_bytes};
use holdfast_frontend::{
    BlockSizes, ClientInfo, CloseReason, CloseSignal, Completion, ExportError, ExportInfo, Exports,
    IoError, IoErrorKind, MAX_REQUEST_BYTES, Request, Volume,
};
use holdfast_replicator_core::api::Role;
use holdfast_wire_format::ids::{Epoch, VolumeIndex};
use std::future::poll_fn;
use std::rc::{Rc, Weak};
use std::task::{Context, Poll};

/// One volume of one service in one epoch.
pub struct Export {
    shard: Weak<Shard>,
    service: usize,
    volume: VolumeIndex,
    sector: u32,
    info: ExportInfo,
    closed: CloseSignal,
    writes: Rc<Budget>,
    reads: Rc<Budget>,
}

/// The exports of a service that clients opened in the present epoch.
#[derive(Default)]
pub(super) struct OpenExports {
    open: Vec<Rc<Export>>,
}

impl OpenExports {
    /// Everybody who came while another epoch ruled, or before this copy stopped being primary, is sent away (a
    /// client that replayed old writes would overwrite newer data).
    pub fn role_changed(&mut self, role: Role, epoch: Epoch) {
        let reason = match role {
            Role::Primary | Role::Promoting => CloseReason::Superseded,
            Role::Detached => CloseReason::Stopping,
            Role::Demoting | Role::Secondary => CloseReason::Demoted,
        };
        tracing::debug!(
            epoch = epoch.number,
            exports = self.open.len(),
            ?reason,
            "closing exports"
        );
        self.close(&reason);
    }

    /// Sends everybody away.
    pub fn close(&mut self, reason: &CloseReason) {
        for export in self.open.drain(..) {
            export.closed.close(reason.clone());
        }
    }

    /// The export of that volume, made when the first client asks. `size` may have grown since: then a new one is made
    /// and earlier sessions keep theirs.
    fn get(
        &mut self,
        volume: VolumeIndex,
        info: &ExportInfo,
        make: impl FnOnce() -> Export,
    ) -> Rc<Export> {
        if let Some(export) = self
            .open
            .iter()
            .find(|export| export.volume == volume && export.info == *info)
        {
            return export.clone();
        }
        let export = Rc::new(make());
        self.open.push(export.clone());
        export
    }
}

impl Export {
    fn gone() -> IoError {
        IoError::new(IoErrorKind::ShuttingDown, "the replicator is stopping")
    }
}

impl Volume for Export {
    type Buf = ClientBuf;

    fn info(&self) -> ExportInfo {
        self.info.clone()
    }

    fn poll_buffer(
        &self,
        cx: &mut Context<'_>,
        offset: u64,
        len: u32,
    ) -> Poll<Result<ClientBuf, IoError>> {
        let Some(shard) = self.shard.upgrade() else {
            return Poll::Ready(Err(Export::gone()));
        };
        let (from, to) = covering(offset, u64::from(len), self.sector);
        let whole = (to - from) as usize;
        if !shard.memory.can_ever(whole) {
            return Poll::Ready(Err(IoError::new(
                IoErrorKind::NoMemory,
                "the request is larger than the shard's memory",
            )));
        }
        if self.writes.poll_room(cx, buffer_bytes(whole)).is_pending() {
            return Poll::Pending;
        }
        shard.memory.poll_client(cx, whole).map(|buf| {
            let receipt = Some(self.writes.take(buffer_bytes(whole)));
            Ok(ClientBuf {
                buf,
                start: (offset - from) as usize,
                len: len as usize,
                receipt,
            })
        })
    }

    fn submit(&self, request: Request<ClientBuf>, completion: Completion<ClientBuf>) {
        let Some(shard) = self.shard.upgrade() else {
            return completion.fail(Export::gone());
        };
        if let Some(reason) = self.closed.reason() {
            // A session of an earlier epoch must not reach the service of a later one.
            return completion.fail(IoError::new(
                IoErrorKind::ShuttingDown,
                reason.as_str().to_owned(),
            ));
        }
        let Request::Read { offset, len } = request else {
            return shard.submit(self.service, self.volume, request, None, completion);
        };
        let (from, to) = covering(offset, u64::from(len), self.sector);
        let whole = (to - from) as usize;
        if self.reads.has_room(buffer_bytes(whole))
            && let Some(buf) = shard.memory.try_client(whole)
        {
            let read_into = Some((buf, self.reads.take(buffer_bytes(whole))));
            return shard.submit(self.service, self.volume, request, read_into, completion);
        }
        if !shard.memory.can_ever(whole) {
            return completion.fail(IoError::new(
                IoErrorKind::NoMemory,
                "the request is larger than the shard's memory",
            ));
        }
        // Memory is short: the read waits its turn on its own.
        let (service, volume, reads) = (self.service, self.volume, self.reads.clone());
        tokio::task::spawn_local(async move {
            poll_fn(|cx| reads.poll_room(cx, buffer_bytes(whole))).await;
            // Its share first: others that wait see it taken.
            let receipt = reads.take(buffer_bytes(whole));
            let buf = poll_fn(|cx| shard.memory.poll_client(cx, whole)).await;
            if !completion.is_abandoned() {
                shard.submit(service, volume, request, Some((buf, receipt)), completion);
                shard.pump();
            }
        });
    }

    fn end_of_batch(&self) {
        if let Some(shard) = self.shard.upgrade() {
            shard.pump();
        }
    }

    fn close_signal(&self) -> &CloseSignal {
        &self.closed
    }
}

/// The exports of a shard, by name: `volume`, `service/volume`, each with `@epoch` if the client must not be let in
/// again once that epoch is over.
pub struct ShardExports {
    pub(super) shard: Rc<Shard>,
}

impl Exports for ShardExports {
    type Volume = Export;

    fn list(&self, _client: &ClientInfo, each: &mut dyn FnMut(&str, &str)) {
        self.shard.with_services(|services| {
            for service in services
                .iter()
                .filter(|service| service.role == Role::Primary)
            {
                for volume in &service.volumes {
                    let name = format!("{}/{}", service.name, volume.name);
                    each(&name, &describe(&service.name, &volume.name, service.epoch));
                }
            }
        });
    }

    fn open(&self, name: &str, _client: &ClientInfo) -> Result<Rc<Export>, ExportError> {
        let asked = ExportName::parse(name)?;
        self.shard.with_services(|services| {
            let mut found = services.iter_mut().flat_map(|service| {
                let at = service
                    .volumes
                    .iter()
                    .position(|volume| volume.name == asked.volume);
                let fits = asked.service.is_none_or(|name| name == service.name);
                at.filter(|_| fits).map(|at| (service, at))
            });
            let Some((service, at)) = found.next() else {
                return Err(ExportError::Unknown(format!(
                    "there is no volume {name:?} on this node; `holdfast status` lists them"
                )));
            };
            if let Some((other, _)) = found.next() {
                return Err(ExportError::Unknown(format!(
                    "both service {} and service {} have a volume {:?}; ask for {}/{}",
                    service.name, other.name, asked.volume, service.name, asked.volume
                )));
            }
            drop(found);
            may_open(service.role, service.epoch, asked.epoch, &service.name)?;
            let files = &service.volumes[at];
            let sector = files.sector;
            let info = ExportInfo {
                size: files.size,
                read_only: false,
                rotational: false,
                multi_conn: true,
                discard: files.discard_zeroes,
                fast_zero: false,
                cache: false,
                block_sizes: BlockSizes {
                    minimum: 1,
                    preferred: sector.max(4096),
                    maximum: MAX_REQUEST_BYTES.min(MAX_BUF as u32 / 2),
                },
                description: describe(&service.name, &files.name, service.epoch).into(),
            };
            let volume = VolumeIndex(at as u16);
            let (index, writes, reads) = (
                service.index,
                service.write_budget.clone(),
                service.read_budget.clone(),
            );
            Ok(service.exports.get(volume, &info, || Export {
                shard: Rc::downgrade(&self.shard),
                service: index,
                volume,
                sector,
                info: info.clone(),
                closed: CloseSignal::new(),
                writes,
                reads,
            }))
        })
    }
}

fn describe(service: &str, volume: &str, epoch: Epoch) -> String {
    format!(
        "volume {volume} of service {service}, epoch {}",
        epoch.number
    )
}

/// Whether this copy may be opened now.
fn may_open(
    role: Role,
    epoch: Epoch,
    asked: Option<u64>,
    service: &str,
) -> Result<(), ExportError> {
    let reason = match role {
        Role::Primary => None,
        Role::Secondary => Some("this node is secondary; connect to the primary"),
        Role::Promoting => Some("this node is being promoted; try again in a moment"),
        Role::Demoting => Some("this node is being demoted; connect to the next primary"),
        Role::Detached => Some("the service is detached on this node"),
    };
    if let Some(reason) = reason {
        return Err(ExportError::Refused(format!("service {service}: {reason}")));
    }
    match asked {
        Some(asked) if asked < epoch.number => Err(ExportError::Refused(format!(
            "service {service}: epoch {asked} was superseded by epoch {}; what was not answered then must not be replayed",
            epoch.number
        ))),
        Some(asked) if asked > epoch.number => Err(ExportError::Refused(format!(
            "service {service}: epoch {asked} is not known here, the present one is {}",
            epoch.number
        ))),
        _ => Ok(()),
    }
}

#[derive(PartialEq, Eq, Debug)]
struct ExportName<'a> {
    service: Option<&'a str>,
    volume: &'a str,
    epoch: Option<u64>,
}

impl ExportName<'_> {
    fn parse(name: &str) -> Result<ExportName<'_>, ExportError> {
        let (path, epoch) = match name.split_once('@') {
            None => (name, None),
            Some((path, digits)) => match digits.parse::<u64>() {
                Ok(number) => (path, Some(number)),
                Err(_) => {
                    return Err(ExportError::Unknown(format!(
                        "{name:?}: what follows '@' is not the number of an epoch"
                    )));
                }
            },
        };
        let (service, volume) = match path.split_once('/') {
            None => (None, path),
            Some((service, volume)) => (Some(service), volume),
        };
        if volume.is_empty() || volume.contains('/') || service == Some("") {
            return Err(ExportError::Unknown(
                "name an export: volume, service/volume, or either with @epoch".to_owned(),
            ));
        }
        Ok(ExportName {
            service,
            volume,
            epoch,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        let parsed = |name| ExportName::parse(name).unwrap();
        assert_eq!(
            parsed("data"),
            ExportName {
                service: None,
                volume: "data",
                epoch: None
            }
        );
        assert_eq!(
            parsed("db/data@12"),
            ExportName {
                service: Some("db"),
                volume: "data",
                epoch: Some(12)
            }
        );
        for name in [
            "", "@3", "db/", "/data", "a/b/c", "data@", "data@x", "data@1@2",
        ] {
            assert!(ExportName::parse(name).is_err(), "{name}");
        }
    }

    #[test]
    fn only_a_primary_serves_and_only_its_own_epoch() {
        let epoch = Epoch {
            number: 7,
            owner: 0,
        };
        assert!(may_open(Role::Primary, epoch, None, "db").is_ok());
        assert!(may_open(Role::Primary, epoch, Some(7), "db").is_ok());
        for asked in [6, 8] {
            assert!(may_open(Role::Primary, epoch, Some(asked), "db").is_err());
        }
        for role in [
            Role::Secondary,
            Role::Promoting,
            Role::Demoting,
            Role::Detached,
        ] {
            assert!(may_open(role, epoch, Some(7), "db").is_err());
        }
    }
}
