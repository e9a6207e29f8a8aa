//! How a volume tells its sessions that they are over.

use std::borrow::Cow;
use std::cell::{OnceCell, RefCell};
use std::rc::Rc;
use std::task::{Context, Waker};

/// Why sessions end; sent to clients with `ESHUTDOWN` and written to the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CloseReason {
    /// A newer epoch has taken over this export. A client that replayed old writes would overwrite newer data.
    Superseded,
    /// This node is no longer primary of the volume.
    Demoted,
    /// The export was removed by a person.
    Removed,
    /// The replicator is stopping or being upgraded.
    Stopping,
    /// Anything else, in a sentence.
    Other(Cow<'static, str>),
}

impl CloseReason {
    /// One sentence for the client's log.
    pub fn as_str(&self) -> &str {
        match self {
            CloseReason::Superseded => {
                "superseded by a newer epoch; reconnect to the current primary, do not replay"
            }
            CloseReason::Demoted => "this node is no longer primary; reconnect to the current one",
            CloseReason::Removed => "the export was removed",
            CloseReason::Stopping => "the replicator is stopping",
            CloseReason::Other(text) => text,
        }
    }
}

#[derive(Default)]
struct Shared {
    reason: OnceCell<CloseReason>,
    /// One place per watch; `None` where a watch was dropped and its place may be taken again.
    waiters: RefCell<Vec<Option<Waker>>>,
}

/// Raised once, by the volume; watched by every session. Cloning shares the signal.
#[derive(Clone, Default)]
pub struct CloseSignal {
    shared: Rc<Shared>,
}

impl CloseSignal {
    pub fn new() -> Self {
        Self::default()
    }

    /// Ends every session that watches this signal. The first reason stays; later calls change nothing.
    pub fn close(&self, reason: CloseReason) {
        if self.shared.reason.set(reason).is_err() {
            return;
        }
        // Woken outside the borrow: a waker may run code that registers or drops a watch.
        let waiters: Vec<Waker> = self
            .shared
            .waiters
            .borrow_mut()
            .iter_mut()
            .filter_map(|place| place.clone())
            .collect();
        for waker in waiters {
            waker.wake();
        }
    }

    /// The reason, once [`close`](Self::close) was called.
    pub fn reason(&self) -> Option<&CloseReason> {
        self.shared.reason.get()
    }

    /// A place to wait in; dropping it gives the place back.
    pub fn watch(&self) -> CloseWatch {
        CloseWatch {
            shared: Rc::clone(&self.shared),
            place: None,
        }
    }
}

/// One session's interest in a [`CloseSignal`].
pub struct CloseWatch {
    shared: Rc<Shared>,
    place: Option<usize>,
}

impl CloseWatch {
    /// The reason if the signal was raised; otherwise the task of `cx` is woken when it is.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Option<&CloseReason> {
        if self.shared.reason.get().is_none() {
            let mut waiters = self.shared.waiters.borrow_mut();
            match self.place {
                Some(place) => match &mut waiters[place] {
                    Some(waker) => waker.clone_from(cx.waker()),
                    empty => *empty = Some(cx.waker().clone()),
                },
                None => {
                    let waker = Some(cx.waker().clone());
                    let free = waiters.iter().position(Option::is_none);
                    self.place = Some(match free {
                        Some(place) => {
                            waiters[place] = waker;
                            place
                        }
                        None => {
                            waiters.push(waker);
                            waiters.len() - 1
                        }
                    });
                }
            }
        }
        self.shared.reason.get()
    }

    /// Resolves when the signal is raised.
    pub async fn closed(&mut self) -> CloseReason {
        std::future::poll_fn(|cx| match self.poll(cx) {
            Some(reason) => std::task::Poll::Ready(reason.clone()),
            None => std::task::Poll::Pending,
        })
        .await
    }
}

impl Drop for CloseWatch {
    fn drop(&mut self) {
        if let Some(place) = self.place {
            self.shared.waiters.borrow_mut()[place] = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_watch_gives_its_place_to_the_next() {
        let signal = CloseSignal::new();
        let mut cx = Context::from_waker(Waker::noop());
        for _ in 0..100 {
            assert!(signal.watch().poll(&mut cx).is_none());
        }
        assert_eq!(signal.shared.waiters.borrow().len(), 1);
    }

    #[test]
    fn the_first_reason_stays() {
        let signal = CloseSignal::new();
        let mut watch = signal.watch();
        signal.close(CloseReason::Superseded);
        signal.close(CloseReason::Stopping);
        let mut cx = Context::from_waker(Waker::noop());
        assert_eq!(watch.poll(&mut cx), Some(&CloseReason::Superseded));
    }
}
