//! Waiting for what takes long: a verification, a resync.

use super::client::{Client, ClientError};
use super::protocol::*;
use std::time::{Duration, Instant};

/// How often progress is looked at.
const INTERVAL_MS: u32 = 200;
/// Without a connected peer for this long, waiting is given up.
const UNREACHABLE: Duration = Duration::from_secs(60);

/// What a finished verification found, over all peers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Verified {
    pub compared_bytes: u64,
    pub different_bytes: u64,
}

fn fault(what: String, kept: &str, next: &str) -> ClientError {
    Fault::new(FaultCode::Refused, what, kept, next).into()
}

/// Watches one service until `judge` has an answer.
fn until<T>(
    client: Client,
    service: &str,
    mut judge: impl FnMut(&ServiceReport) -> Option<Result<T, ClientError>>,
) -> Result<T, ClientError> {
    let mut answer = None;
    client.watch(INTERVAL_MS, |status| {
        answer = match status.services.iter().find(|report| report.name == service) {
            Some(report) => judge(report),
            None => Some(Err(fault(
                format!("service {service} is gone from node {}", status.node),
                "",
                "`holdfast status` lists the services",
            ))),
        };
        answer.is_none()
    })?;
    answer.unwrap_or_else(|| {
        Err(fault(
            "the replicator stopped while it was waited for".into(),
            "What was done so far stays done",
            "Start it again and repeat the command",
        ))
    })
}

/// Waits until no verification of the service runs any more. `each` is called with the progress.
///
/// # Errors
/// The verification ended before it had compared everything, or the replicator stopped.
pub fn verify(
    client: Client,
    service: &str,
    mut each: impl FnMut(&VerifyReport),
) -> Result<Verified, ClientError> {
    until(client, service, |report| {
        let running: Vec<&VerifyReport> = report
            .peers
            .iter()
            .filter_map(|peer| peer.verify.as_ref())
            .collect();
        if let Some(verify) = running.iter().find(|verify| verify.running) {
            each(verify);
            return None;
        }
        if running.is_empty()
            || running
                .iter()
                .any(|verify| verify.done_bytes < verify.total_bytes)
        {
            return Some(Err(fault(
                format!(
                    "the verification of service {service} ended before everything was compared"
                ),
                "No data was changed",
                "`holdfast events` says why; repeat it once the peers are connected",
            )));
        }
        Some(Ok(Verified {
            compared_bytes: running.iter().map(|verify| verify.done_bytes).sum(),
            different_bytes: running.iter().map(|verify| verify.different_bytes).sum(),
        }))
    })
}

/// Waits until every peer of the service is connected and lacks nothing. `each` is called with the progress.
///
/// # Errors
/// A link is switched off, a peer stays away for a minute, or the replicator stopped.
pub fn resync(
    client: Client,
    service: &str,
    mut each: impl FnMut(&ResyncReport),
) -> Result<(), ClientError> {
    let mut away_since: Option<Instant> = None;
    until(client, service, |report| {
        if let Some(off) = report.peers.iter().find(|peer| peer.link == LinkName::Off) {
            return Some(Err(fault(
                format!("the link to {} is off: {}", off.name, off.last_error),
                "Nothing was changed",
                "`holdfast connect` allows it again; `holdfast explain-handshake` says why it may be off",
            )));
        }
        let away = report
            .peers
            .iter()
            .find(|peer| matches!(peer.link, LinkName::Connecting | LinkName::Handshake));
        match away {
            Some(peer) => {
                let since = *away_since.get_or_insert_with(Instant::now);
                if since.elapsed() > UNREACHABLE {
                    return Some(Err(fault(
                        format!(
                            "{} has been away for a minute: {}",
                            peer.name, peer.last_error
                        ),
                        "What was copied so far stays copied; the rest stays marked",
                        "Bring the node or the network back; the resync goes on by itself",
                    )));
                }
                return None;
            }
            None => away_since = None,
        }
        if let Some(resync) = report.peers.iter().find_map(|peer| peer.resync.as_ref()) {
            each(resync);
            return None;
        }
        report
            .peers
            .iter()
            .all(|peer| peer.link == LinkName::Established)
            .then_some(Ok(()))
    })
}
