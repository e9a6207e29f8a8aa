//! The disks of the small world: requests end in any order, a power cut keeps what was flushed and any part of the rest.

use super::*;

#[derive(Clone, Default)]
pub struct Disk {
    /// What a read sees.
    pub data: Vec<Vec<u8>>,
    /// What survives a power cut for certain.
    pub durable: Vec<Vec<u8>>,
    pub meta: BTreeMap<(u16, u64), Vec<u8>>,
    /// Ranges written since the last flush.
    pub unflushed: Vec<(usize, usize, usize)>,
}

impl MetaSource for &Disk {
    fn read(
        &mut self,
        volume: VolumeIndex,
        offset: u64,
        bytes: &mut [u8],
    ) -> Result<(), DiskError> {
        bytes.fill(0);
        if let Some(block) = self.meta.get(&(volume.0, offset)) {
            bytes.copy_from_slice(block);
        }
        Ok(())
    }
}

impl World {
    /// The process dies; `power`: the disk loses a random part of what it had not flushed.
    pub fn crash(&mut self, n: usize, power: bool) {
        for m in 0..self.nodes.len() {
            self.drop_link(n, m, "crash");
        }
        let pending = std::mem::take(&mut self.nodes[n].pending);
        for mut action in pending {
            if let Action::MetaWriteBuf {
                place, buf, length, ..
            } = &action
                && self.tear_metadata
            {
                // Any sectors of it may land.
                let (place, length) = (*place, *length as usize);
                let mut bytes = self.nodes[n].bufs[&buf.0].clone();
                for (i, new) in bytes[..length].chunks_mut(4096).enumerate() {
                    let block = (place.volume.0, place.offset + i as u64 * 4096);
                    let old = self.nodes[n].disk.meta.get(&block).cloned();
                    let old = old.unwrap_or_else(|| vec![0; 4096]);
                    for (new, old) in new.chunks_mut(512).zip(old.chunks(512)) {
                        if self.rng.chance(50) {
                            new.copy_from_slice(&old[..new.len()]);
                        }
                    }
                }
                self.nodes[n].bufs.insert(buf.0, bytes);
            }
            if let Action::MetaWrite { place, bytes, .. } = &mut action
                && self.tear_metadata
            {
                // Any sectors of it may land.
                let old = self.nodes[n].disk.meta.get(&(place.volume.0, place.offset));
                let old = old.cloned().unwrap_or_else(|| vec![0; bytes.len()]);
                for (new, old) in bytes.chunks_mut(512).zip(old.chunks(512)) {
                    if self.rng.chance(50) {
                        new.copy_from_slice(old);
                    }
                }
            }
            if let Action::StoreSwap { .. } = &action {
                self.swap_without_asker(&action);
                continue;
            }
            // What was submitted may land or not.
            if self.rng.chance(50) {
                self.apply_disk(n, &action);
            }
        }
        let rng = &mut self.rng;
        let node = &mut self.nodes[n];
        if power {
            for (v, o, l) in std::mem::take(&mut node.disk.unflushed) {
                for at in (o..o + l).step_by(512) {
                    let (cache, platter) = (&mut node.disk.data[v], &mut node.disk.durable[v]);
                    if rng.chance(50) {
                        cache[at..at + 512].copy_from_slice(&platter[at..at + 512]);
                    } else {
                        platter[at..at + 512].copy_from_slice(&cache[at..at + 512]);
                    }
                }
            }
        }
        node.core = None;
        node.bufs.clear();
        node.wants.clear();
        node.reads.clear();
    }

    fn apply_disk(&mut self, n: usize, action: &Action) {
        let node = &mut self.nodes[n];
        match action {
            Action::DiskWrite {
                volume,
                offset,
                length,
                buf,
                fua,
                ..
            } => {
                let bytes = node.bufs[&buf.0].clone();
                let (v, o, l) = (volume.0 as usize, *offset as usize, *length as usize);
                node.disk.data[v][o..o + l].copy_from_slice(&bytes[..l]);
                node.disk.unflushed.push((v, o, l));
                if *fua {
                    node.disk.durable[v][o..o + l].copy_from_slice(&bytes[..l]);
                }
            }
            Action::DiskZero {
                volume,
                offset,
                length,
                fua,
                ..
            } => {
                let (v, o, l) = (volume.0 as usize, *offset as usize, *length as usize);
                node.disk.data[v][o..o + l].fill(0);
                node.disk.unflushed.push((v, o, l));
                if *fua {
                    node.disk.durable[v][o..o + l].fill(0);
                }
            }
            Action::DiskFlush { volume, .. } => {
                let flushed = volume.0 as usize;
                for (v, o, l) in std::mem::take(&mut node.disk.unflushed) {
                    if v == flushed {
                        let bytes = node.disk.data[v][o..o + l].to_vec();
                        node.disk.durable[v][o..o + l].copy_from_slice(&bytes);
                    } else {
                        node.disk.unflushed.push((v, o, l));
                    }
                }
            }
            Action::MetaWrite { place, bytes, .. } => {
                node.disk
                    .meta
                    .insert((place.volume.0, place.offset), bytes.clone());
            }
            Action::MetaWriteBuf {
                place, buf, length, ..
            } => {
                node.undo_bytes += u64::from(*length);
                for (i, block) in node.bufs[&buf.0].clone()[..*length as usize]
                    .chunks(4096)
                    .enumerate()
                {
                    let mut bytes = block.to_vec();
                    bytes.resize(4096, 0);
                    node.disk
                        .meta
                        .insert((place.volume.0, place.offset + i as u64 * 4096), bytes);
                }
            }
            _ => {}
        }
    }

    pub(super) fn finish_disk(&mut self, n: usize, at: usize) {
        let action = self.nodes[n].pending.remove(at);
        if let Action::MakeRoom { volume, size } = action {
            return self.make_room(n, volume, size);
        }
        if matches!(
            action,
            Action::SurplusWrite { .. } | Action::SurplusEnd { .. }
        ) {
            return self.finish_surplus(n, &action);
        }
        if matches!(action, Action::StoreRead { .. } | Action::StoreSwap { .. }) {
            return self.finish_store(n, &action);
        }
        let unreadable = matches!((&action, self.nodes[n].bad),
            (Action::DiskRead { volume, offset, length, .. }, Some((bad, at)))
                if volume.0 == bad && (*offset..offset + u64::from(*length)).contains(&at));
        if self.nodes[n].broken || unreadable {
            return self.finish_with_error(n, &action);
        }
        // A read returns what is there when it ends.
        match &action {
            Action::DiskRead {
                volume,
                offset,
                length,
                buf,
                ..
            } => {
                let (v, o, l) = (volume.0 as usize, *offset as usize, *length as usize);
                let bytes = self.nodes[n].disk.data[v][o..o + l].to_vec();
                if let Some(target) = self.nodes[n].bufs.get_mut(&buf.0) {
                    target[..l].copy_from_slice(&bytes);
                }
            }
            Action::MetaReadBuf {
                place, buf, length, ..
            } => {
                let mut bytes = Vec::new();
                for i in 0..u64::from(*length).div_ceil(4096) {
                    let block = self.nodes[n]
                        .disk
                        .meta
                        .get(&(place.volume.0, place.offset + i * 4096));
                    bytes.extend_from_slice(block.unwrap_or(&vec![0; 4096]));
                }
                if let Some(target) = self.nodes[n].bufs.get_mut(&buf.0) {
                    target[..*length as usize].copy_from_slice(&bytes[..*length as usize]);
                }
            }
            _ => self.apply_disk(n, &action),
        }
        let event = match action {
            Action::DiskWrite { op, buf, .. } => {
                self.nodes[n].bufs.remove(&buf.0);
                Event::DiskDone { op, result: Ok(()) }
            }
            Action::DiskRead { op, .. }
            | Action::DiskZero { op, .. }
            | Action::DiskFlush { op, .. } => Event::DiskDone { op, result: Ok(()) },
            Action::MetaWrite { op, .. }
            | Action::MetaWriteBuf { op, .. }
            | Action::MetaReadBuf { op, .. } => Event::MetaDone { op, result: Ok(()) },
            _ => unreachable!(),
        };
        self.event(n, event);
    }

    /// As the shell: nothing else is under way on its disks, then the metadata is laid out for the larger size. Here the layout is
    /// the same one, since all of a volume is one page of the bitmap.
    fn make_room(&mut self, n: usize, volume: VolumeIndex, size: u64) {
        let busy = |action: &Action| {
            !matches!(
                action,
                Action::SurplusWrite { .. } | Action::SurplusEnd { .. } | Action::MakeRoom { .. }
            )
        };
        while let Some(at) = self.nodes[n].pending.iter().position(busy) {
            self.finish_disk(n, at);
        }
        let refuse = |why: &str| Err(why.to_owned());
        let may = match &self.nodes[n].core {
            Some(core) => core.may_move(volume),
            None => refuse("it is gone"),
        };
        let result = match may {
            _ if self.nodes[n].no_room => refuse("the device is too small"),
            Err(why) => Err(why),
            Ok(()) => {
                let node = &mut self.nodes[n];
                let slot = |offset| {
                    node.disk.meta[&(volume.0, offset)]
                        .as_slice()
                        .try_into()
                        .unwrap()
                };
                let (old, _) = superblock::choose(slot(0), slot(4096)).unwrap();
                let written = Superblock {
                    sequence: old.sequence + 2,
                    room: size,
                    ..old
                };
                for sequence in [written.sequence - 1, written.sequence] {
                    let image = superblock::encode(&Superblock {
                        sequence,
                        ..written.clone()
                    });
                    let offset = if sequence % 2 == 0 { 0 } else { 4096 };
                    node.disk
                        .meta
                        .insert((volume.0, offset), image.unwrap().to_vec());
                }
                for disk in [&mut node.disk.data, &mut node.disk.durable] {
                    disk[volume.0 as usize].resize(size as usize, 0);
                }
                node.core.as_mut().unwrap().moved(volume, &written);
                Ok(())
            }
        };
        self.event(
            n,
            Event::RoomMade {
                volume,
                size,
                result,
            },
        );
    }

    fn finish_surplus(&mut self, n: usize, action: &Action) {
        let node = &mut self.nodes[n];
        let full = node.surplus_full;
        let (op, save) = match action {
            Action::SurplusWrite { op, save, .. } | Action::SurplusEnd { op, save, .. } => {
                (*op, *save)
            }
            _ => unreachable!(),
        };
        let saved = node.surplus.iter_mut().find(|s| s.0.save == save).unwrap();
        match action {
            Action::SurplusWrite {
                volume,
                offset,
                length,
                buf,
                ..
            } => {
                let bytes = node.bufs[&buf.0][..*length as usize].to_vec();
                saved.1.push((volume.0, *offset, bytes));
            }
            Action::SurplusEnd { keep, .. } => saved.2 = Some(*keep && !full),
            _ => {}
        }
        let result = if full {
            Err("no space is left".into())
        } else {
            Ok(format!("/saved/{save}"))
        };
        self.event(n, Event::SurplusDone { op, result });
    }

    fn finish_with_error(&mut self, n: usize, action: &Action) {
        let result = Err(DiskError::Io);
        let event = match action {
            Action::DiskWrite { op, buf, .. } => {
                self.nodes[n].bufs.remove(&buf.0);
                Event::DiskDone { op: *op, result }
            }
            Action::DiskRead { op, .. }
            | Action::DiskZero { op, .. }
            | Action::DiskFlush { op, .. } => Event::DiskDone { op: *op, result },
            Action::MetaWrite { op, .. }
            | Action::MetaWriteBuf { op, .. }
            | Action::MetaReadBuf { op, .. } => Event::MetaDone { op: *op, result },
            _ => unreachable!(),
        };
        self.event(n, event);
    }

    /// The oldest request of that node's disk ends.
    pub fn finish_first(&mut self, n: usize) {
        self.finish_disk(n, 0);
    }

    /// That request of that node's disk ends.
    pub fn finish(&mut self, n: usize, at: usize) {
        self.finish_disk(n, at);
    }
}
