//! What two copies would agree on if they met now, for a person who asks before they do. Nothing here changes anything.

use crate::api::*;
use crate::handshake;
use crate::meeting::{Third, waits_for_primary};
use crate::service::Core;
use holdfast_wire_format::frame::Hello;
use holdfast_wire_format::ids::Slot;

impl Core {
    /// What this copy would tell that one if they met now. Changes nothing.
    ///
    /// # Errors
    /// It knows no copy there, or nothing that would be true in a moment.
    pub fn would_tell(&self, slot: Slot) -> Result<Hello, String> {
        let at = self.peer_index(slot).ok_or("there is no such copy")?;
        if self.role == Role::Detached {
            return Err("the copy is detached".into());
        }
        if !self.facts_are_true() {
            return Err(
                "something that a meeting goes by is on its way to its disk: ask again in a moment"
                    .into(),
            );
        }
        let facts = self.facts(at);
        Ok(Hello::new(self.sb.node, self.slot, self.sb.service, facts))
    }

    /// What would be decided if this copy met that one now, which would tell it this, in words. Changes nothing.
    ///
    /// # Errors
    /// They would not understand each other, or the answer is of another copy.
    pub fn would_decide(&self, slot: Slot, theirs: &Hello) -> Result<String, String> {
        if theirs.slot != slot || theirs.service != self.sb.service {
            return Err("the answer is of another copy".into());
        }
        theirs.negotiate().map_err(|error| error.to_string())?;
        let mine = self.would_tell(slot)?.facts;
        let record = self.store.known();
        let decision = handshake::decide(&mine, &theirs.facts, record);
        let text = handshake::explain(&decision, &|slot| format!("copy {}", slot.0));
        let waits = match self.third_primary(&mine, &theirs.facts) {
            Third::No
                if self.store.is_cluster()
                    && !(mine.follows_third || theirs.facts.follows_third) =>
            {
                waits_for_primary(&mine, &theirs.facts, record.is_some(), &decision)
                    .map(String::from)
            }
            Third::No => None,
            third => Some(third.words()),
        };
        Ok(match waits {
            Some(why) => format!("They wait: {why}. Without that:\n{text}"),
            None => text,
        })
    }
}
