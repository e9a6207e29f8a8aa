//! Asking a peer what it would say of a service, without opening the service's stream: nothing changes on either side.
//!
//! The link carries the answer and does not read it.

use crate::control::Message;
use crate::files::{self, HexId};
use crate::link::PeerLink;
use holdfast_wire_format::ids::Uuid;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::timeout;

/// Longest answer in bytes: as hex it fits a control message.
const MAX_FACTS: usize = 24 << 10;

type Answer = Result<Vec<u8>, String>;

/// Questions to one peer that have no answer yet.
#[derive(Default)]
pub(crate) struct Questions {
    last: Cell<u64>,
    waiting: RefCell<HashMap<u64, oneshot::Sender<Answer>>>,
}

impl Questions {
    pub fn any(&self) -> bool {
        !self.waiting.borrow().is_empty()
    }

    /// An answer came. One that nobody waits for any more is dropped.
    pub fn answered(&self, number: u64, answer: Result<String, String>) {
        if let Some(asker) = self.waiting.borrow_mut().remove(&number) {
            let answer = answer.and_then(|text| {
                files::unhexed(&text, MAX_FACTS).ok_or_else(|| "its answer can't be read".into())
            });
            // Who asked may have given up.
            let _ = asker.send(answer);
        }
    }
}

/// What goes back to a peer that asked.
pub(crate) fn told(number: u64, facts: Answer) -> Message {
    let facts = facts.and_then(|bytes| {
        if bytes.len() > MAX_FACTS {
            return Err(format!(
                "{} bytes are more than a message takes",
                bytes.len()
            ));
        }
        Ok(files::hex(&bytes))
    });
    Message::Facts { number, facts }
}

/// Forgets a question in whatever way its asking ends.
struct Asking<'a> {
    peer: &'a PeerLink,
    number: u64,
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        self.peer
            .questions
            .waiting
            .borrow_mut()
            .remove(&self.number);
        // A connection that was made for this question alone is not needed any more.
        self.peer.bump();
    }
}

/// Asks over the connection there is; where this node dials and there is none, it is made for as long as the question lasts.
pub(crate) async fn ask(peer: &PeerLink, service: Uuid, limit: Duration) -> Answer {
    let questions = &peer.questions;
    questions.last.set(questions.last.get() + 1);
    let number = questions.last.get();
    let (asker, answer) = oneshot::channel();
    questions.waiting.borrow_mut().insert(number, asker);
    let _asking = Asking { peer, number };
    let mut changed = peer.changed.subscribe();
    peer.bump();
    let asked = async {
        loop {
            changed.borrow_and_update();
            if peer.tell(Message::FactsWanted {
                service: HexId(service),
                number,
            }) {
                break;
            }
            // The sender lives in the peer itself.
            let _ = changed.changed().await;
        }
        answer
            .await
            .unwrap_or_else(|_| Err("the question was given up".into()))
    };
    match timeout(limit, asked).await {
        Ok(answer) => answer,
        Err(_) => Err(match (&*peer.last_failure.borrow(), peer.dials) {
            (Some(why), true) => format!("it cannot be reached: {why}"),
            (None, true) => "it does not answer".into(),
            (_, false) => "no connection is there, and it is the one that makes it".into(),
        }),
    }
}
