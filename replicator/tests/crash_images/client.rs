//! An application that notes what it asks for and what it was promised, in the order of the recording.

use crate::support::Nbd;
use holdfast_disk::record::Recording;
use std::path::Path;
use std::sync::Mutex;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// The metadata was made.
    Made,
    /// That node is about to go; it may leave S.
    Left(usize),
    /// That node is in S again.
    Joined(usize),
    /// What that node is asked for from here on it completes without the other one, not in this generation any more.
    AloneIn(usize, u64),
    /// The other one is about to return.
    Back,
    /// That node serves in this epoch.
    Serves(usize, u64),
}

#[derive(Clone, Copy, Debug)]
pub enum Mark {
    Issued {
        write: usize,
        block: u64,
        stamp: u64,
    },
    Acked {
        write: usize,
        fua: bool,
    },
    FlushIssued(usize),
    FlushAcked(usize),
    Phase(Phase),
}

pub struct Marks {
    recording: Recording,
    marks: Mutex<Vec<Mark>>,
}

impl Marks {
    pub fn begin(root: &Path) -> Marks {
        Marks {
            recording: Recording::begin(root),
            marks: Mutex::default(),
        }
    }

    /// Notes it, and answers its number.
    fn note(&self, make: impl FnOnce(usize) -> Mark) -> usize {
        let mut marks = self.marks.lock().unwrap();
        let number = marks.len();
        marks.push(make(number));
        self.recording.mark(number as u64);
        number
    }

    pub fn phase(&self, phase: Phase) {
        self.note(|_| Mark::Phase(phase));
    }

    pub fn get(&self, number: usize) -> Mark {
        self.marks.lock().unwrap()[number]
    }

    pub fn events(&self) -> Vec<holdfast_disk::record::Recorded> {
        self.recording.so_far()
    }

    pub fn write(&self, nbd: &mut Nbd, block: u64, fua: bool) {
        let mut stamp = 0;
        let write = self.note(|write| {
            stamp = (block << 32 | 1 << 31) + write as u64;
            Mark::Issued {
                write,
                block,
                stamp,
            }
        });
        let bytes: Vec<u8> = stamp.to_le_bytes().repeat(512);
        nbd.write(block * 4096, &bytes, fua).unwrap();
        self.note(|_| Mark::Acked { write, fua });
    }

    pub fn flush(&self, nbd: &mut Nbd) {
        let number = self.note(Mark::FlushIssued);
        nbd.flush().unwrap();
        self.note(|_| Mark::FlushAcked(number));
    }

    /// Three connections that write side by side, each to blocks of its own in every one of `extents`, with a flush and FUA now and
    /// then.
    pub fn load(&self, socket: &Path, rounds: u64, extents: u64) {
        std::thread::scope(|scope| {
            for lane in 0..3u64 {
                scope.spawn(move || {
                    let mut nbd = Nbd::open(socket, "data").unwrap();
                    for round in 0..rounds {
                        let extent = (round * 3 + lane * 2) % extents;
                        let block = extent * 1024 + lane * 8 + round % 3;
                        self.write(&mut nbd, block, (round + lane) % 5 == 4);
                        if (round + lane) % 7 == 6 {
                            self.flush(&mut nbd);
                        }
                    }
                });
            }
        });
    }
}
