//! What in a service's status should worry a person. A silently degraded mirror is the classic way to lose data, so
//! everything short of "all copies in sync" is named here, in one place, for the screen, for JSON and for metrics.

use super::report::*;
use holdfast_replicator_core::words;
use holdfast_wire_format::frame::GoodbyeCode;

/// Everything short of full health, worst first.
pub fn problems(service: &ServiceReport) -> Vec<Problem> {
    let mut found = Vec::new();
    let mut say = |severity, text: String| found.push(Problem { severity, text });

    match service.state {
        StateName::UpToDate | StateName::Complete => {}
        StateName::Failed if others_hold_it(service) => say(
            Severity::Critical,
            "the disk of this node's copy failed; only the other copies hold the data".into(),
        ),
        StateName::Failed => say(
            Severity::Critical,
            "the disk of this node's copy failed, and no other copy is known to hold everything: \
             keep this disk"
                .into(),
        ),
        StateName::Inconsistent => say(
            Severity::Degraded,
            match service.undo.as_ref().filter(|undo| !undo.intact) {
                Some(undo) => format!(
                    "this node's copy is in the middle of a resync and cannot be promoted, not even by force, until it \
                     ends: {}",
                    undo.why_lost
                ),
                None => {
                    "this node's copy is in the middle of a resync and cannot be promoted without force".into()
                }
            },
        ),
        StateName::Outdated | StateName::Consistent => say(
            Severity::Degraded,
            format!(
                "this node's copy is {}: a real past point, but behind",
                service.state
            ),
        ),
        StateName::Blank => {
            say(
                Severity::Degraded,
                "this node's copy holds no data yet".into(),
            );
        }
    }
    if service.parked {
        let reason = if service.parked_reason.is_empty() {
            "a copy that must have every write is missing"
        } else {
            &service.parked_reason
        };
        say(Severity::Critical, format!("client I/O waits: {reason}"));
    }
    if service.suspended {
        say(
            Severity::Critical,
            "client I/O is held on request; `holdfast resume --io` lets it go on".into(),
        );
    }
    if service.role == RoleName::Detached {
        say(
            Severity::Critical,
            "the service is detached on this node and does nothing until `holdfast attach` or a start of the replicator takes it up again".into(),
        );
        // It meets nobody, and nothing is wrong with the others for that.
        return found;
    }
    let other_primary =
        service.role == RoleName::Primary && service.peers.iter().any(|peer| peer.is_primary);
    if other_primary {
        say(
            Severity::Critical,
            "the peer claims to be primary as well; `holdfast split-brain show` has the facts"
                .into(),
        );
    }
    for volume in service.volumes.iter().filter(|volume| volume.unread) {
        say(
            Severity::Degraded,
            format!(
                "a verify could not read all of volume {} from this node's disk: what stands there may be lost on this copy. Replace the \
                 disk, or have all of it written anew (`holdfast invalidate`); a verify that reads everything ends this",
                volume.name
            ),
        );
    }
    for peer in &service.peers {
        peer_problems(service, peer, &mut say);
    }
    found.sort_by_key(|problem| std::cmp::Reverse(problem.severity));
    found
}

fn peer_problems(
    service: &ServiceReport,
    peer: &PeerReport,
    say: &mut dyn FnMut(Severity, String),
) {
    let name = &peer.name;
    let why = |text: &str| {
        if text.is_empty() {
            String::new()
        } else {
            format!(" ({text})")
        }
    };
    match peer.link {
        LinkName::Off => say(
            Severity::Degraded,
            format!(
                "the link to {name} is off{}; {}",
                why(&peer.last_error),
                way_back(service, peer)
            ),
        ),
        LinkName::Connecting => {
            say(
                Severity::Degraded,
                format!("{name} is unreachable{}", why(&peer.last_error)),
            );
        }
        LinkName::Handshake => {
            say(
                Severity::Degraded,
                format!(
                    "no replication with {name} yet: handshake{}",
                    why(peer.handshake.lines().next().unwrap_or_default())
                ),
            );
        }
        LinkName::Resync | LinkName::Established => {}
    }
    if peer.state == Some(StateName::Failed) && peer.link != LinkName::Off {
        let text = if peer.is_primary {
            format!(
                "{name} is primary without a disk of its own: this copy alone holds the current data"
            )
        } else {
            format!("the disk of {name}'s copy failed")
        };
        say(Severity::Degraded, text);
    }
    if let Some(resync) = &peer.resync {
        let direction = if resync.is_source { "to" } else { "from" };
        let held = if resync.paused { ", paused" } else { "" };
        say(
            Severity::Degraded,
            format!("resync {direction} {name} is not finished{held}"),
        );
    }
    if let Some(verify) = &peer.verify
        && verify.different_bytes > 0
    {
        say(
            Severity::Critical,
            format!(
                "verify found {} bytes that differ from {name}",
                verify.different_bytes
            ),
        );
    }
    for volume in &peer.unread_volumes {
        say(
            Severity::Degraded,
            format!(
                "a verify could not read all of volume {volume} from the disk of {name}: what stands there may be lost on that copy"
            ),
        );
    }
    let synced = matches!(peer.link, LinkName::Established) && peer.resync.is_none();
    if service.role == RoleName::Primary
        && peer.mode != ReplicationMode::Async
        && !service.in_sync.contains(&peer.slot)
        && (synced || peer.dirty_bytes > 0)
    {
        say(
            Severity::Degraded,
            format!("{name} is not in the in-sync set: it lacks acknowledged writes"),
        );
    }
}

/// Whether another member of the in-sync set has a disk, as far as this node knows.
fn others_hold_it(service: &ServiceReport) -> bool {
    let failed = |slot: u8| {
        let mut peers = service.peers.iter();
        peers.any(|peer| peer.slot == slot && peer.state == Some(StateName::Failed))
    };
    let mut members = service.in_sync.iter();
    members.any(|slot| *slot != service.slot && !failed(*slot))
}

/// What lets a link that is off come back. A copy without a disk meets nobody, whatever it is told.
fn way_back(service: &ServiceReport, peer: &PeerReport) -> String {
    let failed = words::goodbye(GoodbyeCode::DiskFailed);
    if service.state == StateName::Failed && service.role != RoleName::Primary {
        "it stays off until the disk of this node's copy is replaced (stop the replicator, `holdfast volume replace-disk`, \
         start it) or, if it was a passing error, until `holdfast volume attach-disk` has it tried again"
            .into()
    } else if peer.state == Some(StateName::Failed) || peer.last_error.contains(failed) {
        format!(
            "the disk of {0}'s copy failed: once it is replaced there and {0} runs again, `holdfast connect` allows it again",
            peer.name
        )
    } else {
        "`holdfast connect` allows it again".into()
    }
}

#[cfg(test)]
mod tests {
    use super::super::render::tests::sample;
    use super::*;

    #[test]
    fn a_healthy_service_has_nothing_to_say() {
        assert_eq!(problems(&sample().services[0]), []);
    }

    #[test]
    fn each_trouble_is_named_and_the_worst_comes_first() {
        let mut service = sample().services.remove(0);
        service.parked = true;
        service.peers[0].link = LinkName::Connecting;
        service.peers[0].last_error = "timed out".into();
        let found = problems(&service);
        assert_eq!(found[0].severity, Severity::Critical);
        assert!(found[0].text.contains("waits"), "{found:?}");
        assert!(
            found
                .iter()
                .any(|p| p.text == "beta is unreachable (timed out)"),
            "{found:?}"
        );
    }

    #[test]
    fn nobody_is_told_to_give_the_only_current_data_away() {
        let mut service = sample().services.remove(0);
        service.state = StateName::Failed;
        service.in_sync = vec![0, 1];
        assert!(problems(&service)[0].text.contains("other copies hold"));
        service.peers[0].state = Some(StateName::Failed);
        assert!(problems(&service)[0].text.contains("keep this disk"));
        service.peers[0].state = Some(StateName::UpToDate);
        service.in_sync = vec![service.slot];
        assert!(problems(&service)[0].text.contains("keep this disk"));
    }

    #[test]
    fn a_copy_whose_disk_failed_is_not_told_to_connect() {
        let text = |service: &ServiceReport| {
            let found = problems(service);
            let off = found.iter().find(|p| p.text.contains("is off"));
            off.unwrap().text.clone()
        };
        let mut service = sample().services.remove(0);
        service.peers[0].link = LinkName::Off;
        service.peers[0].last_error = "disconnected by a person".into();
        assert!(text(&service).ends_with("`holdfast connect` allows it again"));
        // The other copy's disk, as this one was told or heard at the goodbye.
        service.peers[0].last_error = "closed by copy 1: its disk failed".into();
        let said = text(&service);
        assert!(said.contains("once it is replaced there"), "{said}");
        // Its own: no link helps.
        service.state = StateName::Failed;
        service.role = RoleName::Secondary;
        let said = text(&service);
        assert!(
            said.contains("replace-disk") && !said.contains("connect`"),
            "{said}"
        );
    }

    #[test]
    fn who_serves_for_a_diskless_primary_is_not_healthy() {
        let mut service = sample().services.remove(0);
        service.role = RoleName::Secondary;
        service.in_sync = vec![service.slot];
        service.peers[0].is_primary = true;
        service.peers[0].state = Some(StateName::Failed);
        let found = problems(&service);
        assert!(found[0].text.contains("this copy alone"), "{found:?}");
    }

    #[test]
    fn a_detached_service_says_that_and_no_more() {
        let mut service = sample().services.remove(0);
        service.role = RoleName::Detached;
        service.peers[0].link = LinkName::Connecting;
        let found = problems(&service);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].text.contains("is detached"), "{found:?}");
    }

    #[test]
    fn a_disk_that_a_verify_could_not_read_is_a_problem_on_both_sides() {
        let mut service = sample().services.remove(0);
        service.volumes[0].unread = true;
        assert!(
            problems(&service)[0]
                .text
                .contains("volume data from this node's disk")
        );
        service.volumes[0].unread = false;
        service.peers[0].unread_volumes = vec!["data".into()];
        assert!(
            problems(&service)[0]
                .text
                .contains("volume data from the disk of beta")
        );
    }

    #[test]
    fn a_peer_outside_the_in_sync_set_is_reported() {
        let mut service = sample().services.remove(0);
        service.in_sync = vec![0];
        service.peers[0].dirty_bytes = 4096;
        let found = problems(&service);
        assert!(
            found.iter().any(|p| p.text.contains("in-sync set")),
            "{found:?}"
        );
    }
}
