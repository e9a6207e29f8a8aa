//! What the core tells people: the status snapshot.

use crate::api::*;
use crate::peer::*;
use crate::service::*;
use crate::status::*;
use holdfast_wire_format::ids::*;
use holdfast_wire_format::metadata::CopyState;

impl Core {
    /// A snapshot of everything this copy knows of its service.
    pub fn status(&self, now: Time) -> ServiceStatus {
        ServiceStatus {
            name: self.sb.service_name.clone(),
            service: self.sb.service,
            slot: self.slot,
            role: self.role,
            epoch: self.sb.epoch_gate,
            state: self.sb.state,
            generations: self.sb.generations.clone(),
            position: self.issued,
            stable_position: if self.role == Role::Primary {
                self.stable_position()
            } else {
                self.local_flushed
            },
            in_sync: self.sb.in_sync,
            in_sync_pending: self.sb.in_sync_pending,
            on_peer_loss: self.sb.on_peer_loss,
            parked: self.parked,
            parked_reason: self.parked_reason(),
            suspended: self.suspended,
            unclean_start: self.unclean_start,
            volumes: self
                .volumes
                .iter()
                .enumerate()
                .map(|(index, v)| VolumeStatus {
                    index: VolumeIndex(index as u16),
                    name: v.name.clone(),
                    size: v.size,
                    sector_size: v.sector_size,
                    disk: v.disk,
                    unread: !v.unread.is_empty(),
                })
                .collect(),
            peers: (0..self.peers.len())
                .map(|at| self.peer_status(at, now))
                .collect(),
            hot_extents: self.log.hot_count(),
            undo: self.undo_status(),
            counters: self.counters,
        }
    }

    fn parked_reason(&self) -> String {
        if self.suspended {
            return "client I/O is held by request".into();
        }
        if self.parked {
            return format!(
                "{} cannot be reached, was in sync, and the policy is suspend",
                crate::words::copies(self.missing_members())
            );
        }
        if self.congestion_blocks() {
            return "an asynchronous copy is over its bound and the policy is block".into();
        }
        String::new()
    }

    fn peer_status(&self, at: usize, now: Time) -> PeerStatus {
        let peer = &self.peers[at];
        let link = match peer.relation {
            Relation::Down if !peer.wanted => LinkState::Off,
            Relation::Down => LinkState::Connecting,
            Relation::Refused => LinkState::Off,
            Relation::Established => LinkState::Established,
            Relation::Source | Relation::Target | Relation::Joining { .. } => LinkState::Resync,
            _ => LinkState::Handshake,
        };
        PeerStatus {
            slot: peer.slot,
            node: peer.node,
            mode: peer.mode,
            link,
            // Since it told of its disk it said no other state.
            state: if peer.diskless {
                Some(CopyState::Failed)
            } else {
                peer.their_state
            },
            is_primary: peer.is_primary,
            dirty_bytes: peer.dirty_bytes(),
            unacknowledged_bytes: peer.unacked_bytes,
            lag_ms: self.behind_ms(at, now),
            lag_from_before: peer.behind_before && peer.behind_since.is_some(),
            unread: crate::unread::volumes(peer.unread),
            resync: self.resync_status(at, now),
            verify: (peer.verify.total_bytes > 0).then_some(VerifyStatus {
                total_bytes: peer.verify.total_bytes,
                done_bytes: peer.verify.done_bytes,
                different_bytes: peer.verify.different_bytes,
                running: peer.verify.running,
            }),
            handshake: peer.handshake.clone(),
            met_ms_ago: peer.met.map(|met| now.ms_since(met)),
            last_error: peer.last_error.clone(),
        }
    }

    fn resync_status(&self, at: usize, now: Time) -> Option<ResyncStatus> {
        let peer = &self.peers[at];
        let (is_source, done, left, started) = match peer.relation {
            Relation::Source => (
                true,
                peer.source.done_bytes,
                peer.dirty_bytes(),
                peer.source.started,
            ),
            Relation::Target => (
                false,
                peer.target.received_bytes,
                peer.dirty_bytes(),
                peer.target.started,
            ),
            _ => return None,
        };
        let elapsed = now.ms_since(started);
        let since_then = done.saturating_mul(1000).checked_div(elapsed).unwrap_or(0);
        // Only the source knows what is left.
        let seen = is_source
            .then(|| peer.source.pace.seen(now, left, done))
            .flatten();
        Some(ResyncStatus {
            is_source,
            total_bytes: if is_source {
                peer.source.total_bytes
            } else {
                done + left
            },
            left_bytes: left,
            done_bytes: done,
            paused: peer.resync_paused,
            started_ms_ago: elapsed,
            rate: seen.map_or(since_then, |s| s.copied),
            rate_limit: is_source.then(|| self.resync_rate.limit()).flatten(),
            gain: seen.map(|s| s.gained),
            eta_ms: seen
                .filter(|_| !peer.resync_paused)
                .and_then(|s| s.end(left)),
            undo_intact: self.undo_intact(),
        })
    }
}
