use super::*;
use crate::shard::memory::Budgets;
use holdfast_frontend::CompletionQueue;
use proptest::prelude::*;
use std::rc::Rc;

const SIZE: usize = 16 << 10;

/// A core that does everything at once, in the order asked, on one volume in memory.
struct Model {
    disk: Vec<u8>,
    requests: Requests,
    table: BufTable,
    events: VecDeque<Event>,
    memory: Memory,
    shape: Shape,
    locked: Vec<(u64, u64, u64)>,
    queue: Rc<CompletionQueue<ClientBuf>>,
}

impl Model {
    fn new(sector: u32) -> Model {
        Model {
            disk: (0..SIZE).map(|at| at as u8).collect(),
            requests: Requests::default(),
            table: BufTable::default(),
            events: VecDeque::new(),
            memory: Memory::new(Budgets {
                client: 4 << 20,
                internal: 4 << 20,
            })
            .unwrap(),
            shape: Shape {
                volume: VolumeIndex(0),
                sector,
                checksum: true,
            },
            locked: Vec::new(),
            queue: CompletionQueue::new(8),
        }
    }

    fn write_buffer(&self, offset: u64, bytes: &[u8]) -> ClientBuf {
        let (from, to) = covering(offset, bytes.len() as u64, self.shape.sector);
        let mut buf = self.memory.internal((to - from) as usize).unwrap();
        let start = (offset - from) as usize;
        buf.get_mut().unwrap()[start..start + bytes.len()].copy_from_slice(bytes);
        ClientBuf {
            buf,
            start,
            len: bytes.len(),
            receipt: None,
        }
    }

    fn start(&mut self, request: Request<ClientBuf>) -> Result<Output<ClientBuf>, IoError> {
        let mut sink = Sink {
            table: &mut self.table,
            events: &mut self.events,
            memory: &self.memory,
        };
        self.requests.start(
            Time(0),
            self.shape,
            request,
            self.queue.completion(0),
            &mut sink,
        );
        self.run()
    }

    fn run(&mut self) -> Result<Output<ClientBuf>, IoError> {
        while let Some(event) = self.events.pop_front() {
            let mut sink = Sink {
                table: &mut self.table,
                events: &mut self.events,
                memory: &self.memory,
            };
            let done = match event {
                Event::Lock {
                    request,
                    offset,
                    length,
                    ..
                } => {
                    assert_eq!(
                        (offset % u64::from(self.shape.sector), length),
                        (0, self.shape.sector)
                    );
                    self.locked
                        .push((request.0, offset, offset + u64::from(length)));
                    self.requests.granted(Time(0), request, &mut sink).unwrap();
                    continue;
                }
                Event::Unlock { request } => {
                    self.locked.retain(|(holder, ..)| *holder != request.0);
                    continue;
                }
                Event::Write {
                    request,
                    offset,
                    length,
                    buf,
                    crc,
                    ..
                } => {
                    let entry = sink.table.remove(buf).expect("the buffer of a write");
                    assert_eq!(crc32fast::hash(entry.bytes()), crc);
                    assert!(
                        length <= MAX_PAYLOAD
                            && entry.at.is_multiple_of(self.shape.sector as usize)
                    );
                    let at = offset as usize;
                    self.disk[at..at + length as usize].copy_from_slice(entry.bytes());
                    request
                }
                Event::Zero {
                    request,
                    offset,
                    length,
                    ..
                } => {
                    self.disk[offset as usize..(offset + length) as usize].fill(0);
                    request
                }
                Event::Flush { request } => request,
                other => match self.read(other) {
                    Some(request) => request,
                    None => continue,
                },
            };
            let mut sink = Sink {
                table: &mut self.table,
                events: &mut self.events,
                memory: &self.memory,
            };
            self.requests
                .completed(Time(1), done, Status::Ok, &mut sink)
                .unwrap();
        }
        assert!(self.locked.is_empty() && self.table.len() == 0 && self.requests.parts.is_empty());
        let (_, result) = self.queue.pop().expect("an answer");
        assert!(self.queue.pop().is_none());
        result
    }

    /// The disk reads through the kernel in the product; here the old bytes are put where the read would put them.
    fn read(&mut self, event: Event) -> Option<RequestId> {
        let Event::Read {
            request,
            offset,
            length,
            buf,
            ..
        } = event
        else {
            panic!("{event:?}")
        };
        let entry = self.table.get_mut(buf).expect("the buffer of a read");
        let bytes = entry
            .buf
            .get_mut()
            .expect("a read of one sector into its own buffer");
        bytes.copy_from_slice(&self.disk[offset as usize..(offset + u64::from(length)) as usize]);
        Some(request)
    }
}

/// At a boundary of sectors as often as anywhere.
fn place() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..SIZE as u64 - 1,
        (0..SIZE as u64 / 512).prop_map(|sector| sector * 512)
    ]
}

fn length() -> impl Strategy<Value = u64> {
    prop_oneof![
        1..9000u64,
        1..600u64,
        (1..18u64).prop_map(|sectors| sectors * 512)
    ]
}

proptest! {
    /// Whatever the alignment, exactly the asked-for bytes change.
    #[test]
    fn writes_and_zeroes_of_any_alignment_change_exactly_their_bytes(
        sector in prop::sample::select(vec![512u32, 4096]),
        steps in prop::collection::vec((place(), length(), any::<u8>(), 0..3u8), 1..12),
    ) {
        let mut model = Model::new(sector);
        for (offset, len, byte, kind) in steps {
            let len = len.min(SIZE as u64 - offset);
            let mut expected = model.disk.clone();
            let range = offset as usize..(offset + len) as usize;
            let result = match kind {
                0 => {
                    expected[range].fill(byte);
                    let buffer = model.write_buffer(offset, &vec![byte; len as usize]);
                    model.start(Request::Write { offset, buffer, fua: false })
                }
                1 => {
                    expected[range].fill(0);
                    model.start(Request::WriteZeroes { offset, len, fua: true, may_unmap: true, fast: false })
                }
                _ => {
                    let (from, to) = inside(offset, len, sector);
                    if from < to {
                        expected[from as usize..to as usize].fill(0);
                    }
                    model.start(Request::Discard { offset, len, fua: false })
                }
            };
            prop_assert!(matches!(result, Ok(Output::Done)), "{result:?}");
            prop_assert!(model.disk == expected);
        }
    }
}

#[test]
fn a_large_write_is_split_and_answered_once_with_its_first_failure() {
    let mut model = Model::new(512);
    let buffer = model.write_buffer(0, &vec![7; (5 << 20) / 2]);
    let mut sink = Sink {
        table: &mut model.table,
        events: &mut model.events,
        memory: &model.memory,
    };
    let request = Request::Write {
        offset: 0,
        buffer,
        fua: true,
    };
    model.requests.start(
        Time(5),
        model.shape,
        request,
        model.queue.completion(3),
        &mut sink,
    );
    let lengths: Vec<(RequestId, u32)> = sink
        .events
        .drain(..)
        .map(|event| match event {
            Event::Write {
                request,
                length,
                fua: true,
                ..
            } => (request, length),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(
        lengths
            .iter()
            .map(|(_, length)| *length)
            .collect::<Vec<_>>(),
        [1 << 20, 1 << 20, 1 << 19]
    );
    for (index, status) in [(1, Status::Ok), (0, Status::NotPrimary)] {
        let ended = model
            .requests
            .completed(Time(9), lengths[index].0, status, &mut sink)
            .unwrap();
        assert!(ended.is_none() && model.queue.pop().is_none());
    }
    let ended = model
        .requests
        .completed(Time(9), lengths[2].0, Status::Ok, &mut sink)
        .unwrap()
        .unwrap();
    assert_eq!(
        (ended.nanoseconds, ended.bytes, ended.ok),
        (4, (5 << 20) / 2, false)
    );
    let (slot, result) = model.queue.pop().unwrap();
    assert_eq!(
        (slot, result.unwrap_err().kind),
        (3, IoErrorKind::ShuttingDown)
    );
}

#[test]
fn a_refused_lock_answers_the_request_and_unlocks_nothing() {
    let mut model = Model::new(512);
    let buffer = model.write_buffer(10, &[1; 20]);
    let mut sink = Sink {
        table: &mut model.table,
        events: &mut model.events,
        memory: &model.memory,
    };
    let request = Request::Write {
        offset: 10,
        buffer,
        fua: false,
    };
    model.requests.start(
        Time(0),
        model.shape,
        request,
        model.queue.completion(0),
        &mut sink,
    );
    let Some(Event::Lock { request, .. }) = sink.events.pop_front() else {
        panic!()
    };
    model
        .requests
        .completed(Time(0), request, Status::NotPrimary, &mut sink)
        .unwrap();
    assert!(sink.events.is_empty());
    assert!(model.queue.pop().unwrap().1.is_err());
}
