//! States in the words that people read. Copies are called `copy N` or `slot N` by their number, the only name the
//! core knows; the shell puts the node's name there ([`named`]).

use crate::api::Role;
use crate::handshake::PromotionKind;
use holdfast_wire_format::frame::GoodbyeCode;
use holdfast_wire_format::ids::{Slot, SlotSet};
use holdfast_wire_format::metadata::{CopyState, GenerationCause, Mode, OnPeerLoss};

pub(crate) fn state(state: CopyState) -> &'static str {
    match state {
        CopyState::Blank => "blank",
        CopyState::Inconsistent => "inconsistent",
        CopyState::Outdated => "outdated",
        CopyState::Consistent => "consistent",
        CopyState::Complete => "complete",
        CopyState::UpToDate => "up-to-date",
        CopyState::Failed => "failed",
    }
}

pub(crate) fn cause(cause: GenerationCause) -> &'static str {
    match cause {
        GenerationCause::Created => "creation",
        GenerationCause::Promotion => "promotion",
        GenerationCause::Restart => "restart",
        GenerationCause::PeerLost => "loss of a peer",
        GenerationCause::DiskLost => "loss of a disk",
        GenerationCause::Force => "force",
    }
}

pub(crate) fn mode(mode: Mode) -> &'static str {
    match mode {
        Mode::Sync => "sync",
        Mode::SemiSync => "semi-sync",
        Mode::Async => "async",
    }
}

pub(crate) fn role(role: Role) -> &'static str {
    match role {
        Role::Secondary => "secondary",
        Role::Promoting => "about to become primary",
        Role::Primary => "primary",
        Role::Demoting => "about to become secondary",
        Role::Detached => "detached",
    }
}

pub(crate) fn policy(policy: OnPeerLoss) -> &'static str {
    match policy {
        OnPeerLoss::Suspend => "suspend",
        OnPeerLoss::Continue => "continue",
    }
}

pub(crate) fn promotion(kind: PromotionKind) -> &'static str {
    match kind {
        PromotionKind::Planned => "planned, the other copy agrees",
        PromotionKind::Solo => "this copy went on without the others before",
        PromotionKind::AfterSuspended => "the other copy was primary and completes nothing alone",
        PromotionKind::ByRecord => "the cluster store names it as in sync",
        PromotionKind::First => "the service starts from this copy",
        PromotionKind::Forced => "forced",
        PromotionKind::ForcedAfterRollback => "forced, after its unfinished resync was undone",
    }
}

/// Why a side closed a session.
pub fn goodbye(code: GoodbyeCode) -> &'static str {
    match code {
        GoodbyeCode::Disconnect => "disconnected by a person, or for silence",
        GoodbyeCode::Refused => "refused",
        GoodbyeCode::SplitBrain => "split brain",
        GoodbyeCode::Unrelated => "unrelated copies",
        GoodbyeCode::BadFrame => "a damaged or impossible frame",
        GoodbyeCode::OldEpoch => "an old epoch",
        GoodbyeCode::DiskFailed => "its disk failed",
        GoodbyeCode::Shutdown => "it stops",
        GoodbyeCode::Defect => "a defect",
        GoodbyeCode::Again => "its facts changed, it meets again",
    }
}

/// `copy 0 and copy 2`; `no copy` for an empty set.
pub(crate) fn copies(set: SlotSet) -> String {
    let names: Vec<String> = set.iter().map(|slot| format!("copy {}", slot.0)).collect();
    match names.as_slice() {
        [] => "no copy".into(),
        [one] => one.clone(),
        [first @ .., last] => format!("{} and {last}", first.join(", ")),
    }
}

/// Puts node names where a text of the core calls a copy by number. What `name` does not know stays as it is.
pub fn named(text: &str, name: &dyn Fn(Slot) -> Option<String>) -> String {
    replace(text, &["copy ", "slot "], &|number| {
        u8::try_from(number)
            .ok()
            .and_then(|number| name(Slot(number)))
    })
}

/// Puts `volume NAME` where a text of the core calls a volume by its index.
pub fn named_volumes(text: &str, name: &dyn Fn(usize) -> Option<String>) -> String {
    replace(text, &["volume "], &|number| {
        let name = usize::try_from(number).ok().and_then(name)?;
        Some(format!("volume {name}"))
    })
}

fn replace(text: &str, words: &[&str], name: &dyn Fn(u64) -> Option<String>) -> String {
    let mut out = String::with_capacity(text.len() + 16);
    let mut rest = text;
    loop {
        let found = words
            .iter()
            .filter_map(|word| rest.find(word).map(|at| (at, at + word.len())))
            .min();
        let Some((at, after)) = found else {
            out.push_str(rest);
            return out;
        };
        let begins = !rest[..at].ends_with(char::is_alphanumeric);
        let digits = rest[after..]
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(rest.len() - after);
        let known = rest[after..after + digits]
            .parse()
            .ok()
            .filter(|_| begins)
            .and_then(name);
        match known {
            Some(known) => {
                out.push_str(&rest[..at]);
                out.push_str(&known);
            }
            None => out.push_str(&rest[..after + digits]),
        }
        rest = &rest[after + digits..];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_become_names_and_nothing_else_changes() {
        let name = |slot: Slot| {
            ["alpha", "beta"]
                .get(slot.0 as usize)
                .map(|name| (*name).to_owned())
        };
        let text =
            "copy 0 takes it from slot 1; copy 7 and a copy of 1, backslot 1, slot 10: full copy 1";
        assert_eq!(
            named(text, &name),
            "alpha takes it from beta; copy 7 and a copy of 1, backslot 1, slot 10: full beta"
        );
        assert_eq!(named("copy ", &name), "copy ");
        let volume = |index: usize| (index == 1).then(|| "log".to_owned());
        assert_eq!(
            named_volumes("volume 1 has 5 bytes, volume 10 has 1", &volume),
            "volume log has 5 bytes, volume 10 has 1"
        );
        assert_eq!(named("no copy 1", &name), "no beta");
    }

    #[test]
    fn sets_are_lists_of_copies() {
        let set = SlotSet::only(Slot(0)).with(Slot(2)).with(Slot(5));
        assert_eq!(copies(set), "copy 0, copy 2 and copy 5");
        assert_eq!(copies(SlotSet::EMPTY), "no copy");
    }
}
