//! Tasks that can be run at once instead of waiting for their turn.
//!
//! When packets came, the sessions that they are for are run inside the turn that took them (`quic/endpoint.rs`): what they answer leaves before
//! anything else of this thread has its turn. So each session's task is kept here beside the runtime's task that stands for it,
//! and [`at_once`] runs those that were woken.

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};

/// Looks for tasks woken by one another; what is left after them has its turn with the runtime.
const ROUNDS: u32 = 3;

thread_local! {
    static TASKS: RefCell<Vec<Rc<Task>>> = const { RefCell::new(Vec::new()) };
    /// Tasks are being run here: whoever is woken needs no turn of the runtime.
    static RUNNING: Cell<bool> = const { Cell::new(false) };
}

struct Task {
    /// None while it is being run, and once it ended.
    future: Cell<Option<Pin<Box<dyn Future<Output = ()>>>>>,
    signal: Arc<Signal>,
    waker: Waker,
}

/// Wakes the runtime's task that stands for one.
struct Signal {
    woken: AtomicBool,
    runtime: Mutex<Waker>,
}

impl Wake for Signal {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.woken.swap(true, Ordering::AcqRel) && !RUNNING.get() {
            self.ask();
        }
    }
}

impl Signal {
    /// Asks the runtime for a turn.
    fn ask(&self) {
        let runtime = self
            .runtime
            .lock()
            .unwrap_or_else(|broken| broken.into_inner());
        runtime.wake_by_ref();
    }
}

impl Task {
    /// Runs it if it was woken. False: it was not.
    fn run(&self) -> bool {
        if !self.signal.woken.swap(false, Ordering::AcqRel) {
            return false;
        }
        let Some(mut future) = self.future.take() else {
            return false;
        };
        if future
            .as_mut()
            .poll(&mut Context::from_waker(&self.waker))
            .is_pending()
        {
            self.future.set(Some(future));
        } else {
            // What stands for it ends too.
            self.signal.ask();
        }
        true
    }
}

/// Does `work`, then runs the tasks that were woken by it or before. Not within one of them.
pub(crate) fn at_once<R>(work: impl FnOnce() -> R) -> R {
    if RUNNING.replace(true) {
        return work();
    }
    let done = work();
    let mut at = 0;
    for _ in 0..ROUNDS {
        let mut any = false;
        at = 0;
        // Looked up anew each time: a task may begin others.
        while let Some(task) = TASKS.with_borrow(|tasks| tasks.get(at).cloned()) {
            any |= task.run();
            at += 1;
        }
        if !any {
            break;
        }
    }
    RUNNING.set(false);
    for at in 0..at {
        TASKS.with_borrow(|tasks| {
            if let Some(task) = tasks.get(at)
                && task.signal.woken.load(Ordering::Acquire)
            {
                task.signal.ask();
            }
        });
    }
    done
}

/// What stands for a task in the runtime.
pub(crate) fn stand_in(future: Pin<Box<dyn Future<Output = ()>>>) -> impl Future<Output = ()> {
    let signal = Arc::new(Signal {
        woken: AtomicBool::new(true),
        runtime: Mutex::new(Waker::noop().clone()),
    });
    let task = Rc::new(Task {
        future: Cell::new(Some(future)),
        waker: signal.clone().into(),
        signal,
    });
    TASKS.with_borrow_mut(|tasks| tasks.push(task.clone()));
    let listed = Listed(task);
    poll_fn(move |cx| {
        let task = &listed.0;
        {
            let mut runtime = task
                .signal
                .runtime
                .lock()
                .unwrap_or_else(|broken| broken.into_inner());
            runtime.clone_from(cx.waker());
        }
        at_once(|| ());
        let future = task.future.take();
        let ended = future.is_none();
        task.future.set(future);
        if ended {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    })
}

/// Takes the task off the list when the runtime drops what stands for it.
struct Listed(Rc<Task>);

impl Drop for Listed {
    fn drop(&mut self) {
        // At the end of the thread the list may be gone first.
        let _ =
            TASKS.try_with(|tasks| tasks.borrow_mut().retain(|task| !Rc::ptr_eq(task, &self.0)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::sync::mpsc;
    use tokio::task::{LocalSet, yield_now};
    use tokio::time::timeout;

    const PATIENCE: Duration = Duration::from_secs(5);

    fn listed() -> usize {
        TASKS.with_borrow(Vec::len)
    }

    /// A task that passes on what it gets, and ends with its source.
    fn relay<T: Send + 'static>() -> (mpsc::UnboundedSender<T>, mpsc::UnboundedReceiver<T>) {
        let (to, mut source) = mpsc::unbounded_channel();
        let (sink, from) = mpsc::unbounded_channel();
        tokio::task::spawn_local(stand_in(Box::pin(async move {
            while let Some(something) = source.recv().await {
                let _ = sink.send(something);
            }
        })));
        (to, from)
    }

    #[tokio::test(flavor = "current_thread")]
    async fn tasks_run_at_once_when_asked_and_by_the_runtime_otherwise() {
        let all = async {
            let (to, mut from) = relay();
            // Its first turn, in which it begins to wait.
            yield_now().await;
            at_once(|| to.send(1).unwrap());
            assert_eq!(from.try_recv().unwrap(), 1, "it ran inside the call");
            to.send(2).unwrap();
            assert!(from.try_recv().is_err(), "nobody asked");
            let got = timeout(PATIENCE, from.recv()).await;
            assert_eq!(got.expect("the runtime gives it a turn"), Some(2));
            // Woken again after a turn at once: no wake-up is lost between the two ways.
            at_once(|| to.send(3).unwrap());
            to.send(4).unwrap();
            assert_eq!(from.recv().await, Some(3));
            let got = timeout(PATIENCE, from.recv()).await;
            assert_eq!(got.expect("the runtime gives it a turn"), Some(4));
        };
        LocalSet::new().run_until(all).await;
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_row_longer_than_the_rounds_goes_on_with_the_runtime() {
        let all = async {
            let (first, mut last) = relay();
            // Each link was begun after the one it feeds, so a round takes it one link further.
            let mut first = first;
            for _ in 0..3 * ROUNDS {
                let (to, mut from) = relay();
                let next = std::mem::replace(&mut first, to);
                tokio::task::spawn_local(stand_in(Box::pin(async move {
                    while let Some(something) = from.recv().await {
                        let _ = next.send(something);
                    }
                })));
            }
            for _ in 0..2 {
                yield_now().await;
            }
            at_once(|| first.send(7).unwrap());
            let got = timeout(PATIENCE, last.recv()).await;
            assert_eq!(got.expect("who is left over is woken"), Some(7));
        };
        LocalSet::new().run_until(all).await;
    }

    #[tokio::test(flavor = "current_thread")]
    async fn ended_and_dropped_tasks_leave_the_list() {
        let local = LocalSet::new();
        let all = async {
            let (to, mut from) = relay::<u8>();
            let (_kept, _waits) = relay::<u8>();
            yield_now().await;
            assert_eq!(listed(), 2);
            drop(to);
            let end = timeout(PATIENCE, from.recv()).await;
            assert_eq!(end.expect("it ends"), None);
            while listed() > 1 {
                yield_now().await;
            }
        };
        local.run_until(timeout(PATIENCE, all)).await.unwrap();
        drop(local);
        assert_eq!(listed(), 0);
    }
}
