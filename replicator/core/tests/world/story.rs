//! The sentences that stories in this folder are told with.

use super::*;
use holdfast_wire_format::superblock;

/// Fresh copies of one volume that were started and agree.
pub fn together(seed: u64, modes: &[Mode], policy: OnPeerLoss, size: u64) -> World {
    let mut w = World::new(seed, modes, policy, &[size], true);
    let all: Vec<usize> = (0..modes.len()).collect();
    for n in &all {
        w.start(*n);
    }
    w.until("the copies agree", 4000, |w| w.settled(&all));
    w
}

/// These two can reach each other again.
pub fn mend(w: &mut World, a: usize, b: usize) {
    w.cut.retain(|pair| *pair != (a.min(b), a.max(b)));
}

/// These two can't reach each other from here on.
pub fn cut(w: &mut World, a: usize, b: usize) {
    w.cut.push((a.min(b), a.max(b)));
    w.drop_link(a, b, "cut");
}

pub fn ok(result: AdminResult) {
    if let Err(refusal) = result {
        panic!("{refusal}");
    }
}

/// Asks for a write of one whole block of the first volume.
pub fn write(w: &mut World, n: usize, block: u64, fill: u8) -> RequestId {
    w.write(n, 0, block * BLOCK, vec![fill; BLOCK as usize], false)
}

/// The same, and it is acknowledged.
pub fn written(w: &mut World, n: usize, block: u64, fill: u8) {
    let request = write(w, n, block, fill);
    w.until("the write completes", 100_000, |w| {
        w.status_of(n, request).is_some()
    });
    assert_eq!(w.status_of(n, request), Some(Status::Ok));
}

/// The disk of `n` has that block filled so.
pub fn holds(w: &World, n: usize, block: u64, fill: u8) -> bool {
    let at = (block * BLOCK) as usize;
    w.nodes[n].disk.data[0][at..at + BLOCK as usize]
        .iter()
        .all(|b| *b == fill)
}

/// Copy `n` said something of this kind.
pub fn noticed(w: &World, n: usize, kind: &str) -> bool {
    w.nodes[n].notices.iter().any(|notice| notice.kind == kind)
}

/// The newer superblock of a copy's lead volume, as it is on the disk.
pub fn on_disk(w: &World, n: usize) -> Superblock {
    let slot = |offset| -> [u8; 4096] {
        let block = &w.nodes[n].disk.meta[&(0, offset)];
        block.as_slice().try_into().expect("4 KiB")
    };
    superblock::choose(&slot(0), &slot(4096))
        .expect("a superblock")
        .0
}

/// These two, neither of which is primary, agree; if they differ they get some time to find out.
pub fn agree(w: &mut World, a: usize, b: usize) {
    w.until("the two agree", 100_000, |w| {
        let equal = w.nodes[a].disk.data == w.nodes[b].disk.data;
        w.settled(&[a, b]) && (equal || w.now.0 > 60_000_000_000)
    });
}
