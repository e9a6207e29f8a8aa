//! The screens of the command line: status, events, and figures people can read.

use super::protocol::*;
use std::fmt::Write as _;

/// Whether to use colours: never where the output is not a terminal, and never against `NO_COLOR`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Style {
    pub colour: bool,
}

impl Style {
    /// For standard output.
    pub fn stdout() -> Self {
        use std::io::IsTerminal as _;
        let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
            || std::env::var_os("TERM").is_some_and(|value| value == "dumb");
        Style {
            colour: !refused && std::io::stdout().is_terminal(),
        }
    }

    fn paint(self, code: &str, text: &str) -> String {
        if self.colour {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_string()
        }
    }
    fn good(self, text: &str) -> String {
        self.paint("32", text)
    }
    fn warn(self, text: &str) -> String {
        self.paint("1;33", text)
    }
    fn bad(self, text: &str) -> String {
        self.paint("1;97;41", text)
    }
    fn bold(self, text: &str) -> String {
        self.paint("1", text)
    }
}

/// Bytes with a binary unit: `512 B`, `1.5 MiB`.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut value = count as f64;
    let mut unit = "B";
    for next in UNITS {
        // Past this it would print as 1024.0 of the smaller unit.
        if value < 1023.95 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    format!("{value:.1} {unit}")
}

/// A time span: `0 ms`, `2.5 s`, `3 min 05 s`, `2 h 10 min`, `4 d 3 h`.
pub fn span(ms: u64) -> String {
    let seconds = ms / 1000;
    match seconds {
        0 => format!("{ms} ms"),
        1..60 => format!("{seconds}.{} s", ms % 1000 / 100),
        60..3600 => format!("{} min {:02} s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{} h {:02} min", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{} d {} h", seconds / 86_400, seconds % 86_400 / 3600),
    }
}

/// One screen for a person.
pub fn status(node: &NodeStatus, style: Style) -> String {
    let mut out = String::new();
    let _ = writeln!(
        out,
        "node {}   holdfast {}   running for {}   pid {}",
        style.bold(&node.node),
        node.version,
        span(node.uptime_ms),
        node.pid
    );
    if node.services.is_empty() {
        out.push_str("\nno services; `holdfast volume create` makes one\n");
    }
    for service in &node.services {
        out.push('\n');
        service_screen(&mut out, node, service, style);
    }
    out
}

fn service_screen(out: &mut String, node: &NodeStatus, service: &ServiceReport, style: Style) {
    let worst = service
        .problems
        .iter()
        .map(|problem| problem.severity)
        .max();
    let health = match worst {
        None => style.good("healthy"),
        Some(Severity::Degraded) => style.warn("DEGRADED"),
        Some(Severity::Critical) => style.bad("CRITICAL"),
    };
    let _ = writeln!(out, "service {}   {health}", style.bold(&service.name));
    for problem in &service.problems {
        let mark = match problem.severity {
            Severity::Degraded => style.warn("  ! "),
            Severity::Critical => style.bad(" !! "),
        };
        let _ = writeln!(out, "{mark}{}", problem.text);
    }
    let _ = writeln!(out, "  role        {}", service.role);
    let _ = writeln!(out, "  writes      {}", writer(node, service));
    let names: Vec<String> = service
        .in_sync
        .iter()
        .map(|slot| slot_name(node, service, *slot))
        .collect();
    let mut in_sync = if names.is_empty() {
        "none".to_string()
    } else {
        names.join(", ")
    };
    let pending: Vec<String> = service
        .in_sync_pending
        .iter()
        .filter(|slot| !service.in_sync.contains(slot))
        .map(|slot| slot_name(node, service, *slot))
        .collect();
    if !pending.is_empty() {
        let _ = write!(in_sync, " (joining: {})", pending.join(", "));
    }
    let _ = writeln!(out, "  in sync     {in_sync}");
    let _ = writeln!(out, "  peer loss   {}", policy(service.on_peer_loss));
    if let Some(undo) = service.undo.as_ref().filter(|undo| undo.intact) {
        let _ = writeln!(
            out,
            "  undo        back to position {} of generation {}; {} of {} used",
            undo.position,
            undo.generation,
            bytes(undo.used_bytes),
            bytes(undo.capacity_bytes)
        );
    }
    for volume in &service.volumes {
        let offered = if service.role == RoleName::Primary && !volume.nbd_uris.is_empty() {
            format!("   {}", volume.nbd_uris.join("  "))
        } else {
            String::new()
        };
        let _ = writeln!(
            out,
            "  volume      {}   {}{offered}",
            volume.name,
            bytes(volume.size)
        );
    }
    let _ = writeln!(
        out,
        "  {:<12}{:<14}{:<13}{:<11}lag",
        "copy", "state", "link", "mode"
    );
    let _ = writeln!(
        out,
        "  {:<12}{}{:<13}{:<11}-",
        node.node,
        state_cell(Some(service.state), style),
        "this node",
        "-"
    );
    for peer in &service.peers {
        peer_rows(out, peer, style);
    }
}

fn peer_rows(out: &mut String, peer: &PeerReport, style: Style) {
    let link = format!("{:<13}", peer.link);
    let link = match peer.link {
        LinkName::Established => style.good(&link),
        LinkName::Off | LinkName::Connecting => style.bad(&link),
        LinkName::Handshake | LinkName::Resync => style.warn(&link),
    };
    let _ = writeln!(
        out,
        "  {:<12}{}{link}{:<11}{}",
        peer.name,
        state_cell(peer.state, style),
        peer.mode,
        lag(peer)
    );
    if let Some(resync) = &peer.resync {
        let _ = writeln!(out, "    resync    {}", resync_line(resync));
    }
    if let Some(verify) = &peer.verify {
        let _ = writeln!(out, "    verify    {}", verify_line(verify));
    }
    let connected = matches!(peer.link, LinkName::Resync | LinkName::Established);
    if !connected && !peer.handshake.is_empty() {
        let text = format!("{}\n{}", met(peer), peer.handshake.trim_end());
        let _ = writeln!(
            out,
            "    handshake {}",
            text.replace('\n', "\n              ")
        );
    }
    if !connected && !peer.last_error.is_empty() {
        let _ = writeln!(out, "    error     {}", peer.last_error);
    }
}

/// When what the last handshake says was decided, and whether that still is how things stand.
pub fn met(peer: &PeerReport) -> String {
    let when = match peer.met_ms_ago {
        Some(ms) => format!("they last met {} ago", span(ms)),
        None => "when they met is not known".into(),
    };
    match peer.link {
        LinkName::Connecting => format!(
            "{when}; {} cannot be reached now, and may have changed since:",
            peer.name
        ),
        LinkName::Off => format!("{when}; the link is off now:"),
        LinkName::Handshake => format!("{when}, and are meeting now:"),
        LinkName::Resync | LinkName::Established => format!("{when} and are connected:"),
    }
}

/// Pads before painting: escape codes have no width on the screen.
fn state_cell(state: Option<StateName>, style: Style) -> String {
    let text = match state {
        Some(state) => format!("{state:<14}"),
        None => format!("{:<14}", "unknown"),
    };
    match state {
        Some(StateName::UpToDate | StateName::Complete) => style.good(&text),
        Some(StateName::Failed | StateName::Inconsistent) => style.bad(&text),
        Some(_) | None => style.warn(&text),
    }
}

fn slot_name(node: &NodeStatus, service: &ServiceReport, slot: u8) -> String {
    if slot == service.slot {
        return node.node.clone();
    }
    service
        .peers
        .iter()
        .find(|peer| peer.slot == slot)
        .map_or_else(|| format!("slot-{slot}"), |peer| peer.name.clone())
}

fn writer(node: &NodeStatus, service: &ServiceReport) -> String {
    let epoch = service.epoch.number;
    match (service.role, service.epoch.owner) {
        (RoleName::Primary, _) if service.parked => {
            format!("{} may write (epoch {epoch}), but I/O is parked", node.node)
        }
        (RoleName::Primary, _) if service.suspended => {
            format!(
                "{} may write (epoch {epoch}), but I/O is held on request",
                node.node
            )
        }
        (RoleName::Primary, _) => format!("{} may write (epoch {epoch})", node.node),
        (RoleName::Promoting, _) => format!("nobody yet: {} is being promoted", node.node),
        (RoleName::Demoting, _) => format!("nobody new: {} is being demoted", node.node),
        (_, None) => "nobody: no copy was ever promoted".to_string(),
        (_, Some(_)) => {
            if let Some(peer) = service.peers.iter().find(|peer| peer.is_primary) {
                let connected = matches!(
                    peer.link,
                    LinkName::Handshake | LinkName::Resync | LinkName::Established
                );
                let certainty = if connected {
                    "may write"
                } else {
                    "could write when last seen"
                };
                format!("{} {certainty} (epoch {epoch})", peer.name)
            } else {
                let owner = service.epoch.owner_node.clone().unwrap_or_else(|| {
                    slot_name(node, service, service.epoch.owner.unwrap_or_default())
                });
                format!("nobody known here (epoch {epoch} belongs to {owner})")
            }
        }
    }
}

fn policy(policy: PeerLossPolicy) -> &'static str {
    match policy {
        PeerLossPolicy::Suspend => "suspend (the primary never completes a write alone)",
        PeerLossPolicy::Continue => "continue (the primary goes on alone)",
    }
}

/// What would be lost if the primary vanished now: bytes and seconds.
fn lag(peer: &PeerReport) -> String {
    let lacks = peer.dirty_bytes + peer.unacknowledged_bytes;
    if lacks == 0 && peer.lag_ms == 0 {
        return "none".to_string();
    }
    let at_least = if peer.lag_at_least { "at least " } else { "" };
    let mut text = format!("{}, {at_least}{}", bytes(lacks), span(peer.lag_ms));
    if peer.dirty_bytes > 0 && peer.unacknowledged_bytes > 0 {
        let _ = write!(
            text,
            " ({} dirty, {} unacknowledged)",
            bytes(peer.dirty_bytes),
            bytes(peer.unacknowledged_bytes)
        );
    }
    text
}

/// `to go 1.2 GiB of 4.0 GiB (70 %), 210.0 MiB/s, about 6 s left`.
pub fn resync_line(resync: &ResyncReport) -> String {
    let done = percent(
        resync.total_bytes.saturating_sub(resync.left_bytes),
        resync.total_bytes,
    );
    let direction = if resync.is_source {
        "sending"
    } else {
        "receiving"
    };
    if !resync.is_source {
        // How much is left is known to the copy that sends.
        let pace = if resync.paused {
            "paused".into()
        } else {
            format!("{}/s", bytes(resync.rate))
        };
        return format!("{direction}, {} so far, {pace}", bytes(resync.done_bytes));
    }
    let pace = if resync.paused {
        "paused; `holdfast resume` lets it go on".to_string()
    } else {
        let eta = match (resync.eta_ms, resync.gain) {
            (Some(eta), _) => format!("about {} left", span(eta)),
            (None, Some(..=0)) => {
                "no end in sight: the application writes over what is to be copied as fast as it is copied".into()
            }
            (None, _) => "time left not known yet".to_string(),
        };
        let held = match resync.rate_limit {
            Some(limit) => format!(" (held to {}/s)", bytes(limit)),
            None => String::new(),
        };
        format!("{}/s{held}, {eta}", bytes(resync.rate))
    };
    format!(
        "{direction}, {} of {} to go ({done} % done), {pace}",
        bytes(resync.left_bytes),
        bytes(resync.total_bytes)
    )
}

/// One line for a verification, running or finished.
pub fn verify_line(verify: &VerifyReport) -> String {
    let different = match verify.different_bytes {
        0 => "no difference".to_string(),
        count => format!("{} DIFFERENT", bytes(count)),
    };
    if verify.running {
        let done = percent(verify.done_bytes, verify.total_bytes);
        format!(
            "{} of {} compared ({done} %), {different} so far",
            bytes(verify.done_bytes),
            bytes(verify.total_bytes)
        )
    } else {
        format!(
            "finished: {} compared, {different}",
            bytes(verify.done_bytes)
        )
    }
}

/// Never 100 before all is done.
fn percent(done: u64, total: u64) -> u64 {
    if total == 0 {
        100
    } else {
        (u128::from(done.min(total)) * 100 / u128::from(total)) as u64
    }
}

/// One line of the event log.
pub fn event(event: &EventReport, style: Style) -> String {
    let level = format!("{:<7}", event.level);
    let level = match event.level {
        LevelName::Info => level,
        LevelName::Warning => style.warn(&level),
        LevelName::Error => style.bad(&level),
    };
    let about = match (&event.service, &event.peer) {
        (service, _) if service.is_empty() => String::new(),
        (service, Some(peer)) => format!("{service}/{peer} "),
        (service, None) => format!("{service} "),
    };
    format!(
        "{} {level} {about}{}: {}",
        timestamp(event.time_ms),
        event.kind,
        event.text
    )
}

/// UTC in the form of RFC 3339, with milliseconds.
pub fn timestamp(ms: u64) -> String {
    let (days, day_ms) = (ms / 86_400_000, ms % 86_400_000);
    // Gregorian date from days since 1970-03-01, in eras of 400 years, so that the leap day comes last.
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_index = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_index + 2) / 5 + 1;
    let month = if month_index < 10 {
        month_index + 3
    } else {
        month_index - 9
    };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:03}Z",
        day_ms / 3_600_000,
        day_ms / 60_000 % 60,
        day_ms / 1000 % 60,
        day_ms % 1000
    )
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    const PLAIN: Style = Style { colour: false };

    /// A healthy primary with one synchronous peer.
    pub(crate) fn sample() -> NodeStatus {
        NodeStatus {
            node: "alpha".into(),
            version: "0.1.0".into(),
            pid: 42,
            uptime_ms: 61_000,
            services: vec![ServiceReport {
                name: "db".into(),
                service: "1".repeat(32),
                slot: 0,
                role: RoleName::Primary,
                epoch: EpochReport {
                    number: 3,
                    owner: Some(0),
                    owner_node: Some("alpha".into()),
                },
                state: StateName::UpToDate,
                generations: vec![],
                position: 7,
                stable_position: 7,
                in_sync: vec![0, 1],
                in_sync_pending: vec![],
                on_peer_loss: PeerLossPolicy::Suspend,
                parked: false,
                parked_reason: String::new(),
                suspended: false,
                unclean_start: false,
                volumes: vec![VolumeReport {
                    index: 0,
                    name: "data".into(),
                    size: 256 << 20,
                    sector_size: 4096,
                    disk: "2".repeat(32),
                    nbd_uris: vec!["nbd://127.0.0.1:10809/data".into()],
                    unread: false,
                }],
                peers: vec![PeerReport {
                    slot: 1,
                    name: "beta".into(),
                    node: "3".repeat(32),
                    mode: ReplicationMode::Sync,
                    link: LinkName::Established,
                    state: Some(StateName::UpToDate),
                    is_primary: false,
                    dirty_bytes: 0,
                    unacknowledged_bytes: 0,
                    lag_ms: 0,
                    lag_at_least: false,
                    unread_volumes: vec![],
                    resync: None,
                    verify: None,
                    handshake: String::new(),
                    met_ms_ago: None,
                    last_error: String::new(),
                }],
                hot_extents: 1,
                undo: None,
                counters: CountersReport::default(),
                problems: vec![],
            }],
        }
    }

    #[test]
    fn the_screen_answers_the_questions_of_the_night() {
        let screen = status(&sample(), PLAIN);
        for part in [
            "service db   healthy",
            "alpha may write (epoch 3)",
            "in sync     alpha, beta",
            "nbd://127.0.0.1:10809/data",
        ] {
            assert!(screen.contains(part), "{part} is missing in:\n{screen}");
        }
        assert!(!screen.contains('\x1b'));
    }

    #[test]
    fn trouble_is_loud_and_a_resync_has_a_rate_and_an_end() {
        let mut node = sample();
        let service = &mut node.services[0];
        service.peers[0].link = LinkName::Resync;
        service.peers[0].dirty_bytes = 1 << 30;
        service.peers[0].lag_ms = 90_000;
        service.peers[0].resync = Some(ResyncReport {
            is_source: true,
            total_bytes: 4 << 30,
            left_bytes: 1 << 30,
            done_bytes: 3 << 30,
            paused: false,
            started_ms_ago: 15_000,
            rate: 200 << 20,
            gain: Some(200 << 20),
            eta_ms: Some(5120),
            rate_limit: Some(250 << 20),
            undo_intact: true,
        });
        service.state = StateName::Inconsistent;
        service.undo = Some(UndoReport {
            intact: false,
            generation: "0".repeat(16),
            position: 7,
            used_bytes: 0,
            capacity_bytes: 1 << 30,
            why_lost: "its record at byte 4096 of the undo area is damaged".into(),
        });
        service.problems = super::super::health::problems(service);
        let screen = status(&node, PLAIN);
        for part in [
            "DEGRADED",
            "1.0 GiB, 1 min 30 s",
            "1.0 GiB of 4.0 GiB to go (75 % done), 200.0 MiB/s (held to 250.0 MiB/s), about 5.1 s left",
            "byte 4096 of the undo area is damaged",
        ] {
            assert!(screen.contains(part), "{part} is missing in:\n{screen}");
        }
        if let Some(resync) = &mut node.services[0].peers[0].resync {
            (resync.eta_ms, resync.gain) = (None, None);
            assert!(resync_line(resync).ends_with("time left not known yet"));
            resync.gain = Some(-4096);
            assert!(resync_line(resync).contains("no end in sight"));
            resync.is_source = false;
            assert_eq!(
                resync_line(resync),
                "receiving, 3.0 GiB so far, 200.0 MiB/s"
            );
        }
        node.services[0].peers[0].lag_at_least = true;
        assert!(status(&node, PLAIN).contains("1.0 GiB, at least 1 min 30 s"));
        assert!(status(&node, Style { colour: true }).contains("\x1b[1;33mDEGRADED\x1b[0m"));
    }

    #[test]
    fn figures_stay_readable() {
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1024), "1.0 KiB");
        assert_eq!(bytes((1 << 20) - 1), "1.0 MiB");
        assert_eq!(bytes(u64::MAX), "16.0 EiB");
        assert_eq!(span(999), "999 ms");
        assert_eq!(span(59_999), "59.9 s");
        assert_eq!(span(185_000), "3 min 05 s");
        assert_eq!(span(u64::MAX / 2), "106751991167 d 7 h");
        assert_eq!(percent(999, 1000), 99);
    }

    #[test]
    fn timestamps_know_leap_years() {
        assert_eq!(timestamp(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(timestamp(951_782_400_000), "2000-02-29T00:00:00.000Z");
        assert_eq!(timestamp(1_709_251_199_999), "2024-02-29T23:59:59.999Z");
        assert_eq!(timestamp(4_107_542_400_000), "2100-03-01T00:00:00.000Z");
    }
}
