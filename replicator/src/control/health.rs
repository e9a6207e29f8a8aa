//! What in a service's status should worry a person. A silently degraded mirror is the classic way to lose data, so
//! everything short of "all copies in sync" is named here, in one place, for the screen, for JSON and for metrics.

use super::report::*;

/// Everything short of full health, worst first.
pub fn problems(service: &ServiceReport) -> Vec<Problem> {
    let mut found = Vec::new();
    let mut say = |severity, text: String| found.push(Problem { severity, text });

    match service.state {
        StateName::UpToDate | StateName::Complete => {}
        StateName::Failed if service.in_sync.iter().any(|slot| *slot != service.slot) => say(
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
            "this node's copy is in the middle of a resync and cannot be promoted".into(),
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
            "the service is detached on this node and does nothing".into(),
        );
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
                "the link to {name} is off{}; `holdfast connect` allows it again",
                why(&peer.last_error)
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
    if let Some(resync) = &peer.resync {
        let direction = if resync.is_source { "to" } else { "from" };
        let held = if resync.paused { ", paused" } else { "" };
        say(
            Severity::Degraded,
            format!("resync {direction} {name} is not finished{held}"),
        );
        if !resync.is_source && !resync.undo_intact && service.state == StateName::Inconsistent {
            say(
                Severity::Degraded,
                format!(
                    "the undo of the resync from {name} is gone: if {name} is lost now, this copy is \
                     of no use"
                ),
            );
        }
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
        service.in_sync = vec![service.slot];
        assert!(problems(&service)[0].text.contains("keep this disk"));
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
