//! `holdfast resync`

use crate::cli::{Place, Resync};
use crate::failure::Outcome;
use crate::progress::Progress;
use holdfast_replicator::control::follow;
use holdfast_replicator::control::render;

pub fn run(place: &Place, options: &Resync) -> Outcome {
    let mut session = place.session(&options.service)?;
    let report = session.report()?;
    if !options.wait {
        for peer in &report.peers {
            match &peer.resync {
                Some(resync) => say!("{}: {}", peer.name, render::resync_line(resync)),
                None => say!(
                    "{}: no resync; link {}, {} lacking",
                    peer.name,
                    peer.link,
                    render::bytes(peer.dirty_bytes)
                ),
            }
        }
        return Ok(());
    }
    let bar = Progress::start("resync");
    let result = follow::resync(session.client, &session.service, |resync| {
        let done = resync.total_bytes.saturating_sub(resync.left_bytes);
        bar.show(done, resync.total_bytes, &render::resync_line(resync));
    });
    bar.finish();
    result?;
    say!("every copy of service {} has everything", report.name);
    Ok(())
}
