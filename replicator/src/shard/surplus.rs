//! A thread that writes what copies wrote alone and give up to the state directory: no shard waits for that disk.

use crate::surplus::{Writer, remove_partial};
use holdfast_replicator_core::api::{Event, OpId, SurplusAbout};
use std::cell::RefCell;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::Notify;

/// What the thread is asked. The core has a few pieces under way at once, so the queue stays short.
enum Job {
    Begin {
        service: String,
        volumes: Vec<String>,
        about: SurplusAbout,
    },
    Write {
        to: Answer,
        save: u64,
        volume: usize,
        offset: u64,
        bytes: Vec<u8>,
    },
    End {
        to: Answer,
        save: u64,
        keep: bool,
    },
}

/// Index of the service and number of the operation.
type Answer = (usize, OpId);

#[derive(Default)]
struct Answers {
    list: Mutex<Vec<(usize, Event)>>,
    wake: Notify,
}

/// The shard's end of it.
pub(super) struct SurplusPort {
    state_dir: PathBuf,
    jobs: RefCell<Option<Sender<Job>>>,
    answers: Arc<Answers>,
}

impl SurplusPort {
    pub fn new(state_dir: PathBuf) -> Self {
        SurplusPort {
            state_dir,
            jobs: RefCell::new(None),
            answers: Arc::default(),
        }
    }

    pub fn begin(&self, service: &str, volumes: Vec<String>, about: SurplusAbout) {
        let service = service.to_owned();
        self.send(
            None,
            Job::Begin {
                service,
                volumes,
                about,
            },
        );
    }

    pub fn write(&self, to: Answer, save: u64, volume: usize, offset: u64, bytes: Vec<u8>) {
        self.send(
            Some(to),
            Job::Write {
                to,
                save,
                volume,
                offset,
                bytes,
            },
        );
    }

    pub fn end(&self, to: Answer, save: u64, keep: bool) {
        self.send(Some(to), Job::End { to, save, keep });
    }

    /// The thread is started with the first job: most nodes never need it.
    fn send(&self, to: Option<Answer>, job: Job) {
        let mut jobs = self.jobs.borrow_mut();
        if jobs.is_none() {
            let (sender, receiver) = channel();
            let (state_dir, answers) = (self.state_dir.clone(), self.answers.clone());
            let thread = std::thread::Builder::new()
                .name("surplus".into())
                .spawn(move || work(&state_dir, &receiver, &answers));
            *jobs = thread.is_ok().then_some(sender);
        }
        let sent = jobs.as_ref().is_some_and(|jobs| jobs.send(job).is_ok());
        if let (false, Some(to)) = (sent, to) {
            answer(&self.answers, to, Err("no thread could be started".into()));
        }
    }

    /// Answers that came meanwhile.
    pub fn poll(&self) -> Vec<(usize, Event)> {
        let mut list = self
            .answers
            .list
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *list)
    }

    /// Until there may be answers.
    pub async fn ready(&self) {
        self.answers.wake.notified().await;
    }
}

fn answer(answers: &Answers, (service, op): Answer, result: Result<String, String>) {
    let mut list = answers.list.lock().unwrap_or_else(PoisonError::into_inner);
    list.push((service, Event::SurplusDone { op, result }));
    drop(list);
    answers.wake.notify_one();
}

fn work(state_dir: &std::path::Path, jobs: &Receiver<Job>, answers: &Answers) {
    let mut writers: HashMap<u64, Result<Writer, String>> = HashMap::new();
    for job in jobs {
        match job {
            Job::Begin {
                service,
                volumes,
                about,
            } => {
                let writer = remove_partial(state_dir, &service)
                    .and_then(|()| Writer::begin(state_dir, &service, &volumes, &about));
                writers.insert(about.save, writer.map_err(|error| error.to_string()));
            }
            Job::Write {
                to,
                save,
                volume,
                offset,
                bytes,
            } => {
                let result = match writers.get_mut(&save) {
                    Some(Ok(writer)) => writer
                        .write(volume, offset, &bytes)
                        .map_err(|error| error.to_string()),
                    Some(Err(error)) => Err(error.clone()),
                    None => Err("it was not begun".into()),
                };
                answer(answers, to, result.map(|()| String::new()));
            }
            Job::End { to, save, keep } => {
                let result = match writers.remove(&save) {
                    Some(Ok(writer)) if keep => writer
                        .keep()
                        .map(|path| path.display().to_string())
                        .map_err(|error| error.to_string()),
                    Some(Ok(writer)) => {
                        writer.discard();
                        Ok(String::new())
                    }
                    Some(Err(error)) => Err(error),
                    None => Err("it was not begun".into()),
                };
                answer(answers, to, result);
            }
        }
    }
}
