//! Metrics in the Prometheus text format, over HTTP on loopback.
//!
//! What happens often (requests, their latencies) is counted where it happens, in handles made once; what a copy
//! knows anyway (lag, dirty bytes, states) is taken from a status snapshot when somebody asks. `docs/process.md`
//! lists every name.

use crate::control::node::Node;
use crate::control::protocol::{LinkName, NodeStatus, RoleName, StateName};
use metrics::{Counter, Histogram, Unit, with_local_recorder};
use metrics_exporter_prometheus::{
    BuildError, Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder,
};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

/// Upper bounds of the latency buckets in seconds: 10 µs to 30 s.
const LATENCY_BUCKETS: [f64; 20] = [
    0.000_01, 0.000_02, 0.000_05, 0.000_1, 0.000_2, 0.000_35, 0.000_5, 0.000_75, 0.001, 0.002,
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0,
];
/// A scraper that has not sent its request or taken its answer after this long is dropped.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(5);
/// Scrapes at the same time.
const CLIENTS: usize = 4;
/// Bytes of request line and headers together.
const REQUEST_BYTES: u64 = 8 << 10;
/// How often samples are folded into the buckets, so that they do not pile up when nobody scrapes: 16 bytes each, three for a
/// mirrored write.
const UPKEEP: Duration = Duration::from_secs(1);

/// All metrics of one process.
#[derive(Clone)]
pub struct Metrics {
    recorder: Arc<PrometheusRecorder>,
    handle: PrometheusHandle,
}

/// Handles of one volume, made once.
pub struct VolumeMetrics {
    pub reads: Leg,
    pub writes: Leg,
    pub flushes: Leg,
    pub zeroes: Leg,
    pub disk_reads: Histogram,
    pub disk_writes: Histogram,
    pub disk_flushes: Histogram,
    pub disk_metadata: Histogram,
    pub disk_errors: Counter,
}

/// One kind of request.
pub struct Leg {
    pub count: Counter,
    pub bytes: Counter,
    pub errors: Counter,
    pub seconds: Histogram,
}

/// Handles of one peer of a service.
pub struct PeerMetrics {
    /// From giving a write to the link to its acknowledgement.
    pub acknowledged: Histogram,
    pub sent_bytes: Counter,
    pub received_bytes: Counter,
    pub sessions: Counter,
}

impl Metrics {
    /// An empty set. Not global: two replicators in one process do not mix. It is looked after by a task of its own, whether or not anybody
    /// can scrape it.
    ///
    /// # Errors
    /// Never with these buckets; the exporter's builder returns a result.
    ///
    /// # Panics
    /// Outside of a tokio runtime with time.
    pub fn new() -> Result<Metrics, BuildError> {
        Metrics::folded(UPKEEP)
    }

    fn folded(every: Duration) -> Result<Metrics, BuildError> {
        let recorder = PrometheusBuilder::new()
            .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &LATENCY_BUCKETS)?
            .build_recorder();
        let handle = recorder.handle();
        let fold = handle.clone();
        tokio::spawn(async move {
            let mut interval = tokio::time::interval(every);
            loop {
                interval.tick().await;
                fold.run_upkeep();
            }
        });
        Ok(Metrics {
            recorder: Arc::new(recorder),
            handle,
        })
    }

    /// Handles for a volume.
    pub fn volume(&self, service: &str, volume: &str) -> VolumeMetrics {
        with_local_recorder(&*self.recorder, || {
            let labels = |kind: &'static str| {
                [
                    ("service", service.to_owned()),
                    ("volume", volume.to_owned()),
                    ("kind", kind.to_owned()),
                ]
            };
            let leg = |kind: &'static str| Leg {
                count: metrics::counter!("holdfast_requests_total", &labels(kind)),
                bytes: metrics::counter!("holdfast_request_bytes_total", &labels(kind)),
                errors: metrics::counter!("holdfast_request_errors_total", &labels(kind)),
                seconds: metrics::histogram!("holdfast_request_seconds", &labels(kind)),
            };
            let disk =
                |kind: &'static str| metrics::histogram!("holdfast_disk_seconds", &labels(kind));
            let place = [
                ("service", service.to_owned()),
                ("volume", volume.to_owned()),
            ];
            VolumeMetrics {
                reads: leg("read"),
                writes: leg("write"),
                flushes: leg("flush"),
                zeroes: leg("zero"),
                disk_reads: disk("read"),
                disk_writes: disk("write"),
                disk_flushes: disk("flush"),
                disk_metadata: disk("metadata"),
                disk_errors: metrics::counter!("holdfast_disk_errors_total", &place),
            }
        })
    }

    /// Handles for a peer.
    pub fn peer(&self, service: &str, peer: &str) -> PeerMetrics {
        with_local_recorder(&*self.recorder, || {
            let labels = [("service", service.to_owned()), ("peer", peer.to_owned())];
            PeerMetrics {
                acknowledged: metrics::histogram!("holdfast_peer_acknowledge_seconds", &labels),
                sent_bytes: metrics::counter!("holdfast_peer_sent_bytes_total", &labels),
                received_bytes: metrics::counter!("holdfast_peer_received_bytes_total", &labels),
                sessions: metrics::counter!("holdfast_peer_sessions_total", &labels),
            }
        })
    }

    /// The text of all metrics, with `status` folded in.
    pub fn render(&self, status: &NodeStatus) -> String {
        with_local_recorder(&*self.recorder, || describe(status));
        self.handle.render()
    }

    /// Answers `GET /metrics` on `listener` until the process ends.
    pub async fn serve<N: Node>(self, listener: TcpListener, node: N) {
        let clients = Arc::new(Semaphore::new(CLIENTS));
        loop {
            // One scrape more than allowed waits in the backlog.
            let Ok(place) = clients.clone().acquire_owned().await else {
                return;
            };
            match listener.accept().await {
                Ok((stream, _)) => {
                    let (metrics, node) = (self.clone(), node.clone());
                    tokio::spawn(async move {
                        // A scraper that went away is its own affair.
                        let _ =
                            tokio::time::timeout(CLIENT_TIMEOUT, answer(stream, &metrics, &node))
                                .await;
                        drop(place);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "a metrics connection could not be accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }
}

async fn answer<N: Node>(stream: TcpStream, metrics: &Metrics, node: &N) -> std::io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut lines = BufReader::new(read.take(REQUEST_BYTES)).lines();
    let request = lines.next_line().await?.unwrap_or_default();
    // The headers are read so that closing does not reset the connection before the answer arrives.
    while lines
        .next_line()
        .await?
        .is_some_and(|line| !line.is_empty())
    {}
    let mut words = request.split(' ');
    let (status, body) = match (words.next(), words.next()) {
        (Some("GET" | "HEAD"), Some("/metrics")) => {
            ("200 OK", metrics.render(&node.status().await))
        }
        (Some("GET" | "HEAD"), _) => ("404 Not Found", "metrics are at /metrics\n".to_owned()),
        _ => ("405 Method Not Allowed", "only GET\n".to_owned()),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n",
        body.len()
    );
    write.write_all(head.as_bytes()).await?;
    if !request.starts_with("HEAD") {
        write.write_all(body.as_bytes()).await?;
    }
    write.shutdown().await
}

fn describe(status: &NodeStatus) {
    metrics::describe_histogram!(
        "holdfast_request_seconds",
        Unit::Seconds,
        "Requests of the application, from arrival to answer"
    );
    metrics::describe_histogram!(
        "holdfast_disk_seconds",
        Unit::Seconds,
        "Requests to the local disk, from submission to completion"
    );
    metrics::describe_histogram!(
        "holdfast_peer_acknowledge_seconds",
        Unit::Seconds,
        "Writes sent to a peer, until it acknowledged them"
    );
    metrics::describe_gauge!(
        "holdfast_lag_seconds",
        Unit::Seconds,
        "Age of the oldest write the peer has not acknowledged"
    );
    metrics::describe_gauge!(
        "holdfast_lag_bytes",
        Unit::Bytes,
        "Bytes the peer lacks or has not acknowledged"
    );
    metrics::gauge!("holdfast_up_seconds").set(status.uptime_ms as f64 / 1000.0);
    for service in &status.services {
        let name = service.name.as_str();
        let set = |metric: &'static str, value: f64| {
            metrics::gauge!(metric, "service" => name.to_owned()).set(value);
        };
        set("holdfast_primary", flag(service.role == RoleName::Primary));
        set("holdfast_epoch", service.epoch.number as f64);
        set("holdfast_position", service.position as f64);
        set("holdfast_stable_position", service.stable_position as f64);
        set("holdfast_in_sync_copies", service.in_sync.len() as f64);
        set("holdfast_parked", flag(service.parked));
        set("holdfast_suspended", flag(service.suspended));
        set("holdfast_hot_extents", service.hot_extents as f64);
        set("holdfast_problems", service.problems.len() as f64);
        for state in [
            StateName::Blank,
            StateName::Inconsistent,
            StateName::Outdated,
            StateName::Consistent,
            StateName::Complete,
            StateName::UpToDate,
            StateName::Failed,
        ] {
            let labels = [("service", name.to_owned()), ("state", state.to_string())];
            metrics::gauge!("holdfast_copy_state", &labels).set(flag(service.state == state));
        }
        let count = |metric: &'static str, value: u64| {
            metrics::counter!(metric, "service" => name.to_owned()).absolute(value);
        };
        count(
            "holdfast_replicated_writes_total",
            service.counters.replicated_writes,
        );
        count(
            "holdfast_replicated_bytes_total",
            service.counters.replicated_bytes,
        );
        count("holdfast_resync_bytes_total", service.counters.resync_bytes);
        count(
            "holdfast_resync_equal_bytes_total",
            service.counters.resync_equal_bytes,
        );
        count(
            "holdfast_activity_log_writes_total",
            service.counters.al_transactions,
        );
        count(
            "holdfast_bitmap_writes_total",
            service.counters.bitmap_writes,
        );
        count(
            "holdfast_superblock_writes_total",
            service.counters.superblock_writes,
        );
        count(
            "holdfast_refused_frames_total",
            service.counters.refused_frames,
        );
        for volume in &service.volumes {
            let labels = [
                ("service", name.to_owned()),
                ("volume", volume.name.clone()),
            ];
            metrics::gauge!("holdfast_volume_bytes", &labels).set(volume.size as f64);
        }
        for peer in &service.peers {
            let set = |metric: &'static str, value: f64| {
                let labels = [("service", name.to_owned()), ("peer", peer.name.clone())];
                metrics::gauge!(metric, &labels).set(value);
            };
            set("holdfast_dirty_bytes", peer.dirty_bytes as f64);
            set(
                "holdfast_unacknowledged_bytes",
                peer.unacknowledged_bytes as f64,
            );
            set(
                "holdfast_lag_bytes",
                (peer.dirty_bytes + peer.unacknowledged_bytes) as f64,
            );
            set("holdfast_lag_seconds", peer.lag_ms as f64 / 1000.0);
            for link in [
                LinkName::Off,
                LinkName::Connecting,
                LinkName::Handshake,
                LinkName::Resync,
                LinkName::Established,
            ] {
                let labels = [
                    ("service", name.to_owned()),
                    ("peer", peer.name.clone()),
                    ("state", link.to_string()),
                ];
                metrics::gauge!("holdfast_link_state", &labels).set(flag(peer.link == link));
            }
            let resync = peer.resync.as_ref();
            set(
                "holdfast_resync_total_bytes",
                resync.map_or(0.0, |resync| resync.total_bytes as f64),
            );
            set(
                "holdfast_resync_left_bytes",
                resync.map_or(0.0, |resync| resync.left_bytes as f64),
            );
            let verify = peer.verify.as_ref();
            set(
                "holdfast_verify_different_bytes",
                verify.map_or(0.0, |verify| verify.different_bytes as f64),
            );
        }
    }
}

fn flag(on: bool) -> f64 {
    f64::from(u8::from(on))
}

impl Leg {
    /// One request ended.
    pub fn record(&self, bytes: u64, seconds: f64, ok: bool) {
        self.count.increment(1);
        self.bytes.increment(bytes);
        if !ok {
            self.errors.increment(1);
        }
        self.seconds.record(seconds);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::protocol::EventReport;
    use holdfast_replicator_core::api::{AdminResult, Command, Refusal};
    use tokio::sync::broadcast;

    #[derive(Clone)]
    struct Idle;

    impl Node for Idle {
        fn name(&self) -> String {
            "alpha".into()
        }
        async fn status(&self) -> NodeStatus {
            NodeStatus {
                node: "alpha".into(),
                version: "1".into(),
                pid: 1,
                uptime_ms: 1500,
                services: Vec::new(),
            }
        }
        async fn command(&self, _: &str, _: Command) -> AdminResult {
            Ok(String::new())
        }
        async fn attach(&self, _: &str, _: bool) -> AdminResult {
            unreachable!("metrics attach nothing")
        }
        async fn reload(&self) -> AdminResult {
            Ok(String::new())
        }
        async fn explain_handshake(&self, _: &str, _: &str) -> Result<String, Refusal> {
            Ok(String::new())
        }
        fn events(&self) -> (Vec<EventReport>, broadcast::Receiver<EventReport>) {
            (Vec::new(), broadcast::channel(1).1)
        }
    }

    async fn get(address: std::net::SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    fn resident_kib() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status
            .lines()
            .find(|line| line.starts_with("VmRSS:"))
            .unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    #[tokio::test]
    async fn what_nobody_scrapes_does_not_pile_up() {
        let every = Duration::from_millis(1);
        let metrics = Metrics::folded(every).unwrap();
        let writes = metrics.volume("db", "data").writes;
        let before = resident_kib();
        for _ in 0..12 {
            for _ in 0..1_000_000 {
                writes.seconds.record(0.000_3);
            }
            tokio::time::sleep(2 * every).await;
        }
        // All of them are 190 MiB.
        let grown = resident_kib().saturating_sub(before) >> 10;
        assert!(grown < 100, "{grown} MiB");
        let text = metrics.handle.render();
        let count = "holdfast_request_seconds_count{service=\"db\",volume=\"data\",kind=\"write\"} 12000000";
        assert!(text.contains(count), "{text}");
    }

    #[tokio::test]
    async fn a_scrape_has_latencies_by_volume_and_a_wrong_path_is_refused() {
        let metrics = Metrics::new().unwrap();
        metrics
            .volume("db", "data")
            .writes
            .record(4096, 0.000_3, true);
        metrics.peer("db", "beta").acknowledged.record(0.000_4);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(metrics.serve(listener, Idle));
        let text = get(address, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await;
        for line in [
            "HTTP/1.1 200 OK",
            "holdfast_request_seconds_bucket{service=\"db\",volume=\"data\",kind=\"write\",le=\"0.00035\"} 1",
            "holdfast_request_bytes_total{service=\"db\",volume=\"data\",kind=\"write\"} 4096",
            "holdfast_peer_acknowledge_seconds_count{service=\"db\",peer=\"beta\"} 1",
            "holdfast_up_seconds 1.5",
        ] {
            assert!(text.contains(line), "{line} in:\n{text}");
        }
        assert!(
            get(address, "GET / HTTP/1.1\r\n\r\n")
                .await
                .starts_with("HTTP/1.1 404")
        );
        assert!(
            get(address, "POST /metrics HTTP/1.1\r\n\r\n")
                .await
                .starts_with("HTTP/1.1 405")
        );
        server.abort();
    }
}
