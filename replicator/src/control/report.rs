//! The status of a node, as it travels over the control socket and out of `holdfast status --json`: a mirror of
//! the core's `ServiceStatus` in names people can read, with the node's names filled in.

use holdfast_replicator_core::api::{Level, Role};
use holdfast_replicator_core::status::{self, LinkState, ServiceStatus};
use holdfast_replicator_core::words;
use holdfast_wire_format::ids::{Epoch, Slot, SlotSet};
use holdfast_wire_format::metadata::{CopyState, Generation, GenerationCause, Mode, OnPeerLoss};
use serde::{Deserialize, Serialize};

/// Everything a replicator process can say of itself at one moment.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Name of this node.
    pub node: String,
    /// Version of the program that runs.
    pub version: String,
    pub pid: u32,
    /// Since the process began.
    pub uptime_ms: u64,
    pub services: Vec<ServiceReport>,
}

/// One service on this node.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ServiceReport {
    pub name: String,
    /// 32 hexadecimal digits.
    pub service: String,
    /// Slot of this node's copy.
    pub slot: u8,
    pub role: RoleName,
    pub epoch: EpochReport,
    pub state: StateName,
    /// Oldest first; the last one is the current one.
    pub generations: Vec<GenerationReport>,
    /// Last position issued (primary) or applied (secondary).
    pub position: u64,
    /// Flushed by every member of the in-sync set.
    pub stable_position: u64,
    /// Slots of the committed in-sync set.
    pub in_sync: Vec<u8>,
    /// Slots that acknowledgements are required from as well.
    pub in_sync_pending: Vec<u8>,
    pub on_peer_loss: PeerLossPolicy,
    pub parked: bool,
    pub parked_reason: String,
    pub suspended: bool,
    pub unclean_start: bool,
    pub volumes: Vec<VolumeReport>,
    pub peers: Vec<PeerReport>,
    pub hot_extents: u64,
    /// Of a copy in the middle of a resync.
    #[serde(default)]
    pub undo: Option<UndoReport>,
    pub counters: CountersReport,
    /// Worst first; empty while all is well.
    pub problems: Vec<Problem>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct EpochReport {
    pub number: u64,
    /// Slot; none while nobody was ever promoted.
    pub owner: Option<u8>,
    /// Node name of the owner, where known.
    pub owner_node: Option<String>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct GenerationReport {
    /// 16 hexadecimal digits.
    pub id: String,
    pub parent: String,
    pub fork_position: u64,
    pub epoch: u64,
    pub cause: CauseName,
    /// Slot of the copy that made it.
    pub maker: u8,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct VolumeReport {
    pub index: u16,
    pub name: String,
    /// Bytes the application sees.
    pub size: u64,
    pub sector_size: u32,
    /// 32 hexadecimal digits.
    pub disk: String,
    /// Where an application finds it while this node is primary; empty when it is not offered.
    pub nbd_uris: Vec<String>,
    /// A verify could not read all of it from this node's disk, and none has since.
    #[serde(default)]
    pub unread: bool,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct PeerReport {
    pub slot: u8,
    /// Its name in this node's configuration.
    pub name: String,
    pub node: String,
    pub mode: ReplicationMode,
    pub link: LinkName,
    /// As the peer said when we last met it.
    pub state: Option<StateName>,
    pub is_primary: bool,
    pub dirty_bytes: u64,
    pub unacknowledged_bytes: u64,
    /// For how long it has lacked something: on its way, parked, or only bits; not only while it is connected.
    /// From before the start of this process where it lacks something from then.
    pub lag_ms: u64,
    /// It lacks something from before the start of this process, and since when is not known: `lag_ms` is a lower bound.
    #[serde(default)]
    pub lag_at_least: bool,
    /// Volumes that a verify could not read throughout on its disk, and none has since.
    #[serde(default)]
    pub unread_volumes: Vec<String>,
    pub resync: Option<ResyncReport>,
    pub verify: Option<VerifyReport>,
    /// What the last meeting decided, in words.
    pub handshake: String,
    /// How long ago that was.
    #[serde(default)]
    pub met_ms_ago: Option<u64>,
    pub last_error: String,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ResyncReport {
    pub is_source: bool,
    pub total_bytes: u64,
    pub left_bytes: u64,
    pub done_bytes: u64,
    pub paused: bool,
    pub started_ms_ago: u64,
    /// Bytes per second.
    pub rate: u64,
    /// Bytes per second by which less is left over the last seconds, less than zero if more is; only where this copy sends.
    #[serde(default)]
    pub gain: Option<i64>,
    /// `None`: not known yet, or no end in sight (`gain` is not above zero).
    pub eta_ms: Option<u64>,
    /// Bytes per second it is held to at present, for the application's sake or as configured.
    #[serde(default)]
    pub rate_limit: Option<u64>,
    pub undo_intact: bool,
}

/// Whether a copy in the middle of a resync can return to the point before it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct UndoReport {
    pub intact: bool,
    /// 16 hexadecimal digits, and the position in that generation.
    pub generation: String,
    pub position: u64,
    pub used_bytes: u64,
    pub capacity_bytes: u64,
    /// Why it is not intact; empty if it is.
    pub why_lost: String,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct VerifyReport {
    pub total_bytes: u64,
    pub done_bytes: u64,
    pub different_bytes: u64,
    pub running: bool,
}

/// Since the process began.
#[derive(Clone, Default, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CountersReport {
    pub reads: u64,
    pub read_bytes: u64,
    pub writes: u64,
    pub write_bytes: u64,
    pub flushes: u64,
    pub zeroes: u64,
    pub replicated_writes: u64,
    pub replicated_bytes: u64,
    pub resync_bytes: u64,
    /// Bytes a full copy by checksum did not send, because the target's digest was equal.
    pub resync_equal_bytes: u64,
    pub al_transactions: u64,
    pub bitmap_writes: u64,
    pub superblock_writes: u64,
    pub refused_frames: u64,
}

/// A line of the event log.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct EventReport {
    /// Milliseconds since 1970, UTC, by this node's clock.
    pub time_ms: u64,
    pub level: LevelName,
    /// Short and stable, for machines.
    pub kind: String,
    /// Empty when it concerns the node as a whole.
    #[serde(default)]
    pub service: String,
    #[serde(default)]
    pub peer: Option<String>,
    pub text: String,
}

/// Something a person should know of.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Problem {
    pub severity: Severity,
    pub text: String,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// The service runs, with less safety than configured.
    Degraded,
    /// The application waits or is refused, or data needs a person.
    Critical,
}

/// Declares the printable twin of an enum of the core: JSON name, display name and conversion from one list.
macro_rules! twin {
    ($(#[$doc:meta])* $name:ident of $from:ty { $($variant:ident => $pattern:pat, $text:literal;)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
        #[serde(rename_all = "kebab-case")]
        pub enum $name { $($variant),+ }

        impl From<$from> for $name {
            fn from(value: $from) -> Self {
                match value { $($pattern => $name::$variant),+ }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(match self { $($name::$variant => $text),+ })
            }
        }
    };
}

twin!(RoleName of Role {
    Secondary => Role::Secondary, "secondary";
    Promoting => Role::Promoting, "promoting";
    Primary => Role::Primary, "primary";
    Demoting => Role::Demoting, "demoting";
    Detached => Role::Detached, "detached";
});
twin!(StateName of CopyState {
    Blank => CopyState::Blank, "Blank";
    Inconsistent => CopyState::Inconsistent, "Inconsistent";
    Outdated => CopyState::Outdated, "Outdated";
    Consistent => CopyState::Consistent, "Consistent";
    Complete => CopyState::Complete, "Complete";
    UpToDate => CopyState::UpToDate, "UpToDate";
    Failed => CopyState::Failed, "Failed";
});
twin!(CauseName of GenerationCause {
    Created => GenerationCause::Created, "created";
    Promotion => GenerationCause::Promotion, "promotion";
    Restart => GenerationCause::Restart, "restart";
    PeerLost => GenerationCause::PeerLost, "peer lost";
    DiskLost => GenerationCause::DiskLost, "disk lost";
    Force => GenerationCause::Force, "force";
});
twin!(ReplicationMode of Mode {
    Sync => Mode::Sync, "sync";
    SemiSync => Mode::SemiSync, "semi-sync";
    Async => Mode::Async, "async";
});
twin!(PeerLossPolicy of OnPeerLoss {
    Suspend => OnPeerLoss::Suspend, "suspend";
    Continue => OnPeerLoss::Continue, "continue";
});
twin!(LinkName of LinkState {
    Off => LinkState::Off, "off";
    Connecting => LinkState::Connecting, "connecting";
    Handshake => LinkState::Handshake, "handshake";
    Resync => LinkState::Resync, "resync";
    Established => LinkState::Established, "established";
});
twin!(LevelName of Level {
    Info => Level::Info, "info";
    Warning => Level::Warning, "warning";
    Error => Level::Error, "error";
});

impl From<ReplicationMode> for Mode {
    fn from(mode: ReplicationMode) -> Self {
        match mode {
            ReplicationMode::Sync => Mode::Sync,
            ReplicationMode::SemiSync => Mode::SemiSync,
            ReplicationMode::Async => Mode::Async,
        }
    }
}

impl From<PeerLossPolicy> for OnPeerLoss {
    fn from(policy: PeerLossPolicy) -> Self {
        match policy {
            PeerLossPolicy::Suspend => OnPeerLoss::Suspend,
            PeerLossPolicy::Continue => OnPeerLoss::Continue,
        }
    }
}

impl From<&Generation> for GenerationReport {
    fn from(generation: &Generation) -> Self {
        GenerationReport {
            id: generation.id.to_string(),
            parent: generation.parent.to_string(),
            fork_position: generation.fork_position,
            epoch: generation.epoch.number,
            cause: generation.cause.into(),
            maker: generation.maker,
        }
    }
}

/// The members of a set by number.
pub(super) fn slots(set: SlotSet) -> Vec<u8> {
    set.iter().map(|slot| slot.0).collect()
}

impl ServiceReport {
    /// The printable form of a core's snapshot. `node_name` gives the configured name of a slot's node,
    /// `nbd_uris` the addresses at which a volume is offered (by its name).
    pub fn new(
        status: &ServiceStatus,
        node_name: &dyn Fn(Slot) -> Option<String>,
        nbd_uris: &dyn Fn(&str) -> Vec<String>,
    ) -> Self {
        let volume_name =
            |index: usize| status.volumes.get(index).map(|volume| volume.name.clone());
        let named = |text: &str| words::named_volumes(&words::named(text, node_name), &volume_name);
        let owner = (status.epoch.owner != Epoch::NO_OWNER).then_some(status.epoch.owner);
        let mut report = ServiceReport {
            name: status.name.clone(),
            service: status.service.to_string(),
            slot: status.slot.0,
            role: status.role.into(),
            epoch: EpochReport {
                number: status.epoch.number,
                owner,
                owner_node: owner.and_then(|slot| node_name(Slot(slot))),
            },
            state: status.state.into(),
            generations: status
                .generations
                .iter()
                .map(GenerationReport::from)
                .collect(),
            position: status.position,
            stable_position: status.stable_position,
            in_sync: slots(status.in_sync),
            in_sync_pending: slots(status.in_sync_pending),
            on_peer_loss: status.on_peer_loss.into(),
            parked: status.parked,
            parked_reason: named(&status.parked_reason),
            suspended: status.suspended,
            unclean_start: status.unclean_start,
            volumes: status
                .volumes
                .iter()
                .map(|volume| VolumeReport {
                    index: volume.index.0,
                    name: volume.name.clone(),
                    size: volume.size,
                    sector_size: volume.sector_size,
                    disk: volume.disk.to_string(),
                    nbd_uris: nbd_uris(&volume.name),
                    unread: volume.unread,
                })
                .collect(),
            peers: status
                .peers
                .iter()
                .map(|peer| peer_report(peer, node_name, &volume_name, &named))
                .collect(),
            hot_extents: status.hot_extents as u64,
            undo: status.undo.as_ref().map(|undo| UndoReport {
                intact: undo.intact,
                generation: undo.returns_to.0.to_string(),
                position: undo.returns_to.1,
                used_bytes: undo.used_bytes,
                capacity_bytes: undo.capacity_bytes,
                why_lost: named(&undo.why_lost),
            }),
            counters: (&status.counters).into(),
            problems: Vec::new(),
        };
        report.problems = super::health::problems(&report);
        report
    }

    /// The peer of that name or slot number.
    pub fn peer(&self, name: &str) -> Option<&PeerReport> {
        self.peers.iter().find(|peer| peer.name == name)
    }

    /// The volume of that name.
    pub fn volume(&self, name: &str) -> Option<&VolumeReport> {
        self.volumes.iter().find(|volume| volume.name == name)
    }

    /// Whether nothing needs a person's attention.
    pub fn healthy(&self) -> bool {
        self.problems.is_empty()
    }
}

fn peer_report(
    peer: &status::PeerStatus,
    node_name: &dyn Fn(Slot) -> Option<String>,
    volume_name: &dyn Fn(usize) -> Option<String>,
    named: &dyn Fn(&str) -> String,
) -> PeerReport {
    PeerReport {
        slot: peer.slot.0,
        name: node_name(peer.slot).unwrap_or_else(|| format!("slot-{}", peer.slot.0)),
        node: peer.node.to_string(),
        mode: peer.mode.into(),
        link: peer.link.into(),
        state: peer.state.map(StateName::from),
        is_primary: peer.is_primary,
        dirty_bytes: peer.dirty_bytes,
        unacknowledged_bytes: peer.unacknowledged_bytes,
        lag_ms: peer.lag_ms,
        lag_at_least: peer.lag_from_before,
        unread_volumes: peer
            .unread
            .iter()
            .filter_map(|volume| volume_name(volume.0.into()))
            .collect(),
        resync: peer.resync.map(|resync| ResyncReport {
            is_source: resync.is_source,
            total_bytes: resync.total_bytes,
            left_bytes: resync.left_bytes,
            done_bytes: resync.done_bytes,
            paused: resync.paused,
            started_ms_ago: resync.started_ms_ago,
            rate: resync.rate,
            gain: resync.gain,
            eta_ms: resync.eta_ms,
            rate_limit: resync.rate_limit,
            undo_intact: resync.undo_intact,
        }),
        verify: peer.verify.map(|verify| VerifyReport {
            total_bytes: verify.total_bytes,
            done_bytes: verify.done_bytes,
            different_bytes: verify.different_bytes,
            running: verify.running,
        }),
        handshake: named(&peer.handshake),
        met_ms_ago: peer.met_ms_ago,
        last_error: named(&peer.last_error),
    }
}

impl From<&status::Counters> for CountersReport {
    fn from(counters: &status::Counters) -> Self {
        CountersReport {
            reads: counters.reads,
            read_bytes: counters.read_bytes,
            writes: counters.writes,
            write_bytes: counters.write_bytes,
            flushes: counters.flushes,
            zeroes: counters.zeroes,
            replicated_writes: counters.replicated_writes,
            replicated_bytes: counters.replicated_bytes,
            resync_bytes: counters.resync_bytes,
            resync_equal_bytes: counters.resync_equal_bytes,
            al_transactions: counters.al_transactions,
            bitmap_writes: counters.bitmap_writes,
            superblock_writes: counters.superblock_writes,
            refused_frames: counters.refused_frames,
        }
    }
}
