//! Growing a volume while it is in use.
//!
//! Every copy first gets *room*: metadata laid out for the larger size, and zeroes behind the volume's present end. That is the
//! shell's work ([`Action::MakeRoom`]), and changes nothing anybody sees. Then each copy takes the new size with one write of a
//! superblock: the others first, the primary last, so nothing is ever written to where another copy ends (D7: what is new reads
//! zero on every copy). A copy that was away, or a growth that was cut off, is finished when copies meet: the smaller one takes
//! the size of the larger if it has the room.

use crate::api::*;
use crate::op::Op;
use crate::peer::Relation;
use crate::roles::refusal;
use crate::service::*;
use holdfast_wire_format::frame::*;
use holdfast_wire_format::ids::*;
use holdfast_wire_format::layout::Layout;
use holdfast_wire_format::metadata::Superblock;
use holdfast_wire_format::superblock;

/// What a growth that this primary leads waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    /// Room on every copy.
    Room,
    /// The other copies take the new size.
    Others,
    /// So does this one.
    Own,
}

/// A growth that a person asked this primary for.
#[derive(Debug)]
pub(crate) struct Growth {
    admin: AdminId,
    volume: usize,
    size: u64,
    stage: Stage,
    /// All other copies, with the session they were asked in: one that goes away before it has the new size ends the growth.
    members: Vec<(usize, SessionId)>,
    /// Those that have not answered.
    waiting: Vec<(usize, SessionId)>,
    /// This copy has no room yet.
    own_room: bool,
}

/// Another copy that waits for this one.
#[derive(Clone, Copy, Debug)]
struct Asked {
    at: usize,
    session: SessionId,
    volume: usize,
    size: u64,
    step: GrowStep,
}

/// Everything about growing.
#[derive(Debug, Default)]
pub(crate) struct Growing {
    led: Option<Growth>,
    asked: Vec<Asked>,
    /// The shell makes room: one volume at a time.
    making: Option<(usize, u64)>,
    /// A size on its way to the disk, and whether other copies know of it.
    storing: Vec<(usize, u64, bool)>,
    /// A growth that this copy led was given up when others may have taken the new size: they meet again as soon as this copy's role
    /// allows, and the smaller one follows.
    unfinished: bool,
}

/// What two copies of different size do when they meet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum SizesMeet {
    /// They are equal, or row 1 of the table says what is wrong.
    Go,
    /// This copy takes the larger size first.
    Grows,
    /// The other one does.
    Waits,
}

impl Core {
    /// The size asked for, where it is one.
    fn growth_refused(&self, at: usize, size: u64) -> Option<(String, String)> {
        let stays = |what: String, next: &str| Some((what, next.to_owned()));
        let Some(v) = self.volumes.get(at) else {
            return stays("there is no such volume".into(), "List the volumes");
        };
        if size < v.size || !size.is_multiple_of(u64::from(v.sector_size)) {
            return stays(
                format!(
                    "volume {at} has {} bytes in sectors of {}, and can only grow, by whole sectors",
                    v.size, v.sector_size
                ),
                "Name a size above the present one",
            );
        }
        if Layout::of(&Superblock {
            data_size: size,
            room: 0,
            ..v.superblock.clone()
        })
        .is_err()
        {
            return stays(
                "no metadata can describe a volume of that size".into(),
                "Name a smaller size",
            );
        }
        if self.role != Role::Primary {
            return stays(
                format!("this copy is {}", crate::words::role(self.role)),
                "Grow the volume where the service runs; if it runs nowhere, promote a copy, or stop all replicators and grow each",
            );
        }
        if self.failed {
            return stays(
                "this copy goes without its disk".into(),
                "Replace the disk first",
            );
        }
        if let Some(growth) = &self.growing.led {
            return stays(
                format!(
                    "volume {} is growing to {} bytes already",
                    growth.volume, growth.size
                ),
                "Wait for that",
            );
        }
        for peer in &self.peers {
            let slot = peer.slot.0;
            if !matches!(peer.relation, Relation::Established) {
                return stays(
                    format!(
                        "copy {slot} is not connected and whole ({}): a volume grows on every copy at once",
                        peer.relation.name()
                    ),
                    "Connect it and let its resync finish, then grow",
                );
            }
            if !peer.grows {
                return stays(
                    format!("copy {slot} runs an older version, which grows stopped volumes only"),
                    "Use the same version on every node",
                );
            }
        }
        None
    }

    /// Makes a volume larger on all copies while it is in use.
    pub(crate) fn grow(
        &mut self,
        admin: AdminId,
        volume: VolumeIndex,
        size: u64,
        out: &mut Actions,
    ) {
        let at = volume.0 as usize;
        if let Some((what, next)) = self.growth_refused(at, size) {
            let result = Err(refusal(what, "The volume stays as it is", next));
            return out.push(Action::AdminDone { admin, result });
        }
        if self.volumes[at].size == size {
            let result = Ok(format!("volume {at} has {size} bytes already"));
            return out.push(Action::AdminDone { admin, result });
        }
        let waiting = self.everybody();
        let own_room = self.volumes[at].room < size;
        self.growing.led = Some(Growth {
            admin,
            volume: at,
            size,
            stage: Stage::Room,
            members: waiting.clone(),
            waiting: waiting.clone(),
            own_room,
        });
        for (peer, _) in waiting {
            self.send_growth(peer, at, size, GrowStep::MakeRoom, "", out);
        }
        if own_room {
            self.make_room(at, size, out);
        }
        self.growth_progress(out);
    }

    fn everybody(&self) -> Vec<(usize, SessionId)> {
        let sessions = self.peers.iter().enumerate();
        sessions
            .filter_map(|(at, peer)| peer.session.map(|session| (at, session)))
            .collect()
    }

    fn send_growth(
        &mut self,
        at: usize,
        volume: usize,
        size: u64,
        step: GrowStep,
        text: &str,
        out: &mut Actions,
    ) {
        let mut header = self.header(FrameKind::Grow);
        header.volume = VolumeIndex(volume as u16);
        let text = text.to_owned();
        self.send(
            at,
            header,
            Payload::Body(Body::Grow { size, step, text }),
            out,
        );
    }

    fn make_room(&mut self, volume: usize, size: u64, out: &mut Actions) {
        if self.growing.making.is_none() {
            self.growing.making = Some((volume, size));
            out.push(Action::MakeRoom {
                volume: VolumeIndex(volume as u16),
                size,
            });
        }
    }

    /// The shell made room, or says why not.
    pub(crate) fn room_made(
        &mut self,
        volume: VolumeIndex,
        size: u64,
        result: Result<(), String>,
        out: &mut Actions,
    ) {
        let at = volume.0 as usize;
        self.growing.making = None;
        if result.is_ok()
            && let Some(v) = self.volumes.get_mut(at)
        {
            v.room = v.room.max(size);
        }
        let asked = std::mem::take(&mut self.growing.asked);
        for ask in asked {
            if ask.step != GrowStep::MakeRoom {
                self.growing.asked.push(ask);
                continue;
            }
            if !self.peers[ask.at].on(ask.session) {
                continue;
            }
            match &result {
                Ok(()) if self.volumes[ask.volume].room >= ask.size => {
                    self.send_growth(ask.at, ask.volume, ask.size, GrowStep::Room, "", out);
                }
                Err(why) if (ask.volume, ask.size) == (at, size) => {
                    self.send_growth(ask.at, ask.volume, ask.size, GrowStep::Refused, why, out);
                }
                // Another size was asked for meanwhile.
                _ => {
                    self.growing.asked.push(ask);
                    self.make_room(ask.volume, ask.size, out);
                }
            }
        }
        let own = self
            .growing
            .led
            .as_ref()
            .is_some_and(|g| g.own_room && g.stage == Stage::Room);
        if own {
            match result {
                Err(why) => self.growth_over(&format!("no room here: {why}"), out),
                Ok(()) => {
                    let (volume, size) = self
                        .growing
                        .led
                        .as_ref()
                        .map_or((0, 0), |g| (g.volume, g.size));
                    if self.volumes[volume].room >= size {
                        if let Some(led) = &mut self.growing.led {
                            led.own_room = false;
                        }
                        self.growth_progress(out);
                    } else {
                        self.make_room(volume, size, out);
                    }
                }
            }
        }
    }

    /// A growth this primary leads goes on once everybody answered.
    fn growth_progress(&mut self, out: &mut Actions) {
        let Some(led) = &self.growing.led else { return };
        if !led.waiting.is_empty() || led.own_room {
            return;
        }
        let (volume, size) = (led.volume, led.size);
        let stage = match led.stage {
            Stage::Room => Stage::Others,
            Stage::Others => Stage::Own,
            Stage::Own => return,
        };
        let waiting = match stage {
            Stage::Others => led.members.clone(),
            _ => Vec::new(),
        };
        if let Some(led) = &mut self.growing.led {
            led.stage = stage;
            led.waiting.clone_from(&waiting);
        }
        if stage == Stage::Own {
            return self.store_size(volume, size, true, out);
        }
        for (peer, _) in waiting {
            self.send_growth(peer, volume, size, GrowStep::Grow, "", out);
        }
        // Nobody else to wait for.
        self.growth_progress(out);
    }

    /// The growth that this primary leads can't be finished now.
    fn growth_over(&mut self, why: &str, out: &mut Actions) {
        let Some(led) = self.growing.led.take() else {
            return;
        };
        self.growing.unfinished |= led.stage != Stage::Room;
        let kept = match led.stage {
            Stage::Room => "The volume has its old size on every copy".to_owned(),
            _ => format!(
                "Nothing is lost: every copy has room for {} bytes, those that have that size already serve the old one, and the rest \
                 follow when the copies meet again",
                led.size
            ),
        };
        let result = Err(refusal(
            format!("volume {} did not grow: {why}", led.volume),
            kept,
            "Remove the cause, then give the same command again",
        ));
        let admin = led.admin;
        out.push(Action::AdminDone { admin, result });
    }

    /// With each event: who is waited for may have gone, and this copy may not be primary any more.
    pub(crate) fn watch_growth(&mut self, out: &mut Actions) {
        if self.growing.unfinished && matches!(self.role, Role::Primary | Role::Secondary) {
            self.growing.unfinished = false;
            self.sizes_meet_again("a growth was not finished", out);
        }
        let Some(led) = &self.growing.led else { return };
        if self.failed {
            return self.growth_over("the disk of this copy failed", out);
        }
        if self.role != Role::Primary {
            return self.growth_over("this copy is not primary any more", out);
        }
        // One that took the new size may go: it has it.
        let needed = match led.stage {
            Stage::Room => &led.members,
            _ => &led.waiting,
        };
        let gone = needed
            .iter()
            .find(|(at, session)| !self.peers[*at].on(*session));
        if let Some((at, _)) = gone {
            let why = format!("the connection to copy {} was lost", self.peers[*at].slot.0);
            self.growth_over(&why, out);
        }
    }

    /// Whoever this copy is connected to took it for one of another size.
    fn sizes_meet_again(&mut self, why: &str, out: &mut Actions) {
        for at in 0..self.peers.len() {
            if !matches!(self.peers[at].relation, Relation::Greeting { .. }) {
                self.meet_again(at, why, out);
            }
        }
    }

    /// A `Grow` frame: asked by a primary, or answered to one.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn peer_grows(
        &mut self,
        at: usize,
        session: SessionId,
        volume: VolumeIndex,
        size: u64,
        step: GrowStep,
        text: &str,
        out: &mut Actions,
    ) {
        let volume = volume.0 as usize;
        let Some(v) = self.volumes.get(volume) else {
            self.bad_frame(at, "a growth of a volume that is not there", out);
            return;
        };
        if !size.is_multiple_of(u64::from(v.sector_size)) {
            self.bad_frame(at, "a growth that is not by whole sectors", out);
            return;
        }
        match step {
            GrowStep::MakeRoom | GrowStep::Grow => {
                let (room, now) = (v.room, v.size);
                let led = self.peers[at].is_primary
                    && self.role == Role::Secondary
                    && matches!(self.peers[at].relation, Relation::Established);
                let refused = if !led {
                    "it does not follow the primary that asks".to_owned()
                } else if self.failed {
                    "its disk failed".to_owned()
                } else if size < now {
                    format!("it has {now} bytes already")
                } else if step == GrowStep::Grow && room < size {
                    format!("it has room for {room} bytes only")
                } else {
                    String::new()
                };
                if !refused.is_empty() {
                    return self.send_growth(at, volume, size, GrowStep::Refused, &refused, out);
                }
                let done = match step {
                    GrowStep::MakeRoom => room >= size,
                    _ => now >= size,
                };
                if done {
                    let answer = if step == GrowStep::MakeRoom {
                        GrowStep::Room
                    } else {
                        GrowStep::Grown
                    };
                    return self.send_growth(at, volume, size, answer, "", out);
                }
                self.growing.asked.push(Asked {
                    at,
                    session,
                    volume,
                    size,
                    step,
                });
                match step {
                    GrowStep::MakeRoom => self.make_room(volume, size, out),
                    _ => self.store_size(volume, size, true, out),
                }
            }
            GrowStep::Room | GrowStep::Grown | GrowStep::Refused => {
                let slot = self.peers[at].slot.0;
                // D7: it took a size that this copy gave up meanwhile. None of the two is to serve beside the other like that.
                let smaller = self.volumes[volume].size < size;
                let Some(led) = &mut self.growing.led else {
                    self.growing.unfinished |= step == GrowStep::Grown && smaller;
                    return;
                };
                let stage = match led.stage {
                    Stage::Room => GrowStep::Room,
                    _ => GrowStep::Grown,
                };
                if (led.volume, led.size) != (volume, size) {
                    // An answer to an earlier growth that was given up.
                    return;
                }
                if step == GrowStep::Refused {
                    return self.growth_over(&format!("copy {slot} says: {text}"), out);
                }
                if step == stage {
                    led.waiting.retain(|(waiting, _)| *waiting != at);
                    self.growth_progress(out);
                }
            }
        }
    }

    /// Makes a size durable. `known`: the other copies have it, or are about to be asked for it.
    fn store_size(&mut self, volume: usize, size: u64, known: bool, out: &mut Actions) {
        if self.growing.storing.iter().any(|(at, ..)| *at == volume) {
            return;
        }
        self.growing.storing.push((volume, size, known));
        let keep_room = |room: u64| if room > size { room } else { 0 };
        if volume == 0 {
            self.sb.data_size = size;
            self.sb.room = keep_room(self.sb.room);
            return self.commit(Then::Grown, out);
        }
        let sb = &mut self.volumes[volume].superblock;
        sb.data_size = size;
        sb.room = keep_room(sb.room);
        sb.sequence += 1;
        let (offset, bytes) = match superblock::encode(sb) {
            // D16: the two slots in turn.
            Ok(bytes) => (
                if sb.sequence.is_multiple_of(2) {
                    0
                } else {
                    4096
                },
                bytes,
            ),
            Err(error) => {
                return self.halt(out, &format!("the superblock cannot be encoded: {error}"));
            }
        };
        let op = self.ops.insert(Op::VolumeSuperblock { volume });
        out.push(Action::MetaWrite {
            op: OpId(op as u64),
            place: MetaPlace {
                volume: VolumeIndex(volume as u16),
                offset,
            },
            bytes: bytes.to_vec(),
        });
    }

    pub(crate) fn volume_superblock_done(
        &mut self,
        key: usize,
        result: Result<(), DiskError>,
        out: &mut Actions,
    ) {
        let Op::VolumeSuperblock { volume } = self.ops.remove(key) else {
            return;
        };
        if result.is_err() || self.failed {
            self.growing.storing.clear();
            return self.disk_failed("the superblock could not be written", out);
        }
        self.size_stored(volume, out);
    }

    /// The size of the lead volume is durable.
    pub(crate) fn lead_size_stored(&mut self, out: &mut Actions) {
        self.size_stored(0, out);
    }

    fn size_stored(&mut self, volume: usize, out: &mut Actions) {
        let Some(at) = self.growing.storing.iter().position(|(v, ..)| *v == volume) else {
            return;
        };
        let (_, size, known) = self.growing.storing.swap_remove(at);
        let index = VolumeIndex(volume as u16);
        let before = self.volumes[volume].size;
        self.volumes[volume].size = size;
        self.volumes[volume].superblock.data_size = size;
        // D7: what is new is equal everywhere, so no bit stands for it.
        for peer in &mut self.peers {
            peer.bitmaps[volume].grow(size);
        }
        self.undo.log.grow(index, size);
        out.push(Action::Resized {
            volume: index,
            size,
        });
        let text = format!(
            "volume {volume} has {size} bytes now, {before} before; connections that are open keep the old size"
        );
        self.notice(Level::Info, "grown", None, text, out);
        if !known {
            // They took this copy for a smaller one; and what is written behind their end must not reach them before they grew.
            self.sizes_meet_again("this copy's volume grew", out);
        }
        let asked = std::mem::take(&mut self.growing.asked);
        for ask in asked {
            if ask.step == GrowStep::Grow && ask.volume == volume && ask.size <= size {
                if self.peers[ask.at].on(ask.session) {
                    self.send_growth(ask.at, volume, ask.size, GrowStep::Grown, "", out);
                }
            } else {
                self.growing.asked.push(ask);
            }
        }
        // A larger size was asked for meanwhile.
        let asked = self.growing.asked.iter();
        let larger = asked.filter(|a| a.step == GrowStep::Grow && a.volume == volume);
        let own = self.growing.led.as_ref();
        let own = own.filter(|g| g.stage == Stage::Own && g.volume == volume);
        let larger = larger.map(|a| a.size).chain(own.map(|g| g.size)).max();
        if let Some(larger) = larger.filter(|larger| *larger > size) {
            self.store_size(volume, larger, true, out);
        }
        let finished =
            |g: &mut Growth| g.stage == Stage::Own && (g.volume, g.size) == (volume, size);
        if let Some(led) = self.growing.led.take_if(finished) {
            let text = format!(
                "volume {volume} has {size} bytes on every copy; new connections see them (those that are open keep {before})"
            );
            out.push(Action::AdminDone {
                admin: led.admin,
                result: Ok(text),
            });
        }
    }

    /// Facts are told when the sizes in them are durable.
    pub(crate) fn size_on_its_way(&self) -> bool {
        !self.growing.storing.is_empty()
    }

    /// Before the table of meetings is asked: a growth that one of the two did not hear of is finished.
    pub(crate) fn sizes_meet(
        &mut self,
        mine: &Facts,
        theirs: &Facts,
        out: &mut Actions,
    ) -> SizesMeet {
        let pairs: Vec<(usize, u64, u64, u64, u64)> = mine
            .volumes
            .iter()
            .zip(&theirs.volumes)
            .enumerate()
            .filter(|(_, (m, t))| m.index == t.index && m.volume == t.volume)
            .map(|(at, (m, t))| (at, m.size, m.room, t.size, t.room))
            .collect();
        let sector = |at: usize| u64::from(self.volumes[at].sector_size);
        let grows: Vec<(usize, u64)> = pairs
            .iter()
            .filter(|(at, size, room, other, _)| {
                size < other && room >= other && other.is_multiple_of(sector(*at))
            })
            .map(|(at, _, _, other, _)| (*at, *other))
            .collect();
        if !grows.is_empty() && !self.failed {
            for (at, size) in grows {
                self.store_size(at, size, false, out);
            }
            return SizesMeet::Grows;
        }
        let waits = pairs
            .iter()
            .any(|(_, size, _, other, their_room)| size > other && their_room >= size);
        if waits {
            SizesMeet::Waits
        } else {
            SizesMeet::Go
        }
    }

    /// Whether a volume's metadata may be moved now: the shell feeds nothing more to this core, and its disks are at rest.
    ///
    /// # Errors
    /// Why not; nothing is changed then.
    pub fn may_move(&self, volume: VolumeIndex) -> Result<(), String> {
        let busy = "something of its metadata is still being written";
        if self.volumes.get(volume.0 as usize).is_none() {
            return Err("there is no such volume".into());
        }
        if self.role == Role::Detached || self.detaching.is_some() {
            return Err("the service is stopping".into());
        }
        if self.failed {
            return Err("its disk failed".into());
        }
        if self.sb.target_of != GenerationId(0)
            || self
                .peers
                .iter()
                .any(|p| matches!(p.relation, Relation::Target | Relation::TargetPreparing))
        {
            return Err("it is in the middle of a resync, or about to begin one".into());
        }
        let writing = self.ops.iter().any(|(_, op)| {
            matches!(
                op,
                Op::Superblock
                    | Op::VolumeSuperblock { .. }
                    | Op::ActivityLog { .. }
                    | Op::LogReset
                    | Op::BitmapPage { .. }
                    | Op::BitmapSummary { .. }
                    | Op::Undo { .. }
            )
        });
        if !self.attached || writing || self.commit_pending() || self.size_on_its_way() {
            return Err(busy.into());
        }
        Ok(())
    }

    /// The metadata of a volume lies in a new place, laid out for a larger volume, with this superblock; everything else in it is
    /// as it was. To be called before anything else after [`Core::may_move`].
    ///
    /// # Panics
    /// The superblock makes no layout: it was written, so it does.
    pub fn moved(&mut self, volume: VolumeIndex, written: &Superblock) {
        let v = &mut self.volumes[volume.0 as usize];
        v.layout = Layout::of(written).expect("a superblock that was encoded has a layout");
        let take = |sb: &mut Superblock| {
            sb.sequence = written.sequence;
            sb.room = written.room;
            sb.area_size = written.area_size;
        };
        take(&mut v.superblock);
        if volume.0 == 0 {
            take(&mut self.sb);
        }
    }
}
