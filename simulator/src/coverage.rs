//! What was reached: counts of everything that happened, over all seeds.

use holdfast_replicator_core::api::{Role, Status};
use holdfast_replicator_core::probe::Probe;
use std::collections::BTreeMap;

/// Sums over runs.
#[derive(Clone, Debug)]
pub struct Coverage {
    pub seeds: u64,
    pub steps: u64,
    pub requests: u64,
    pub faults: u64,
    pub connections: u64,
    pub lost_sectors: u64,
    pub power_cuts: u64,
    pub virtual_ns: u64,
    pub disk_ops: [u64; 5],
    pub frames: [u64; 128],
    /// Client requests by outcome.
    pub answers: [u64; 5],
    /// By group, then by name.
    pub counts: BTreeMap<&'static str, BTreeMap<String, u64>>,
}

impl Default for Coverage {
    fn default() -> Self {
        Coverage {
            seeds: 0,
            steps: 0,
            requests: 0,
            faults: 0,
            connections: 0,
            lost_sectors: 0,
            power_cuts: 0,
            virtual_ns: 0,
            disk_ops: [0; 5],
            frames: [0; 128],
            answers: [0; 5],
            counts: BTreeMap::new(),
        }
    }
}

impl Coverage {
    pub(crate) fn count(&mut self, group: &'static str, name: &str) {
        let group = self.counts.entry(group).or_default();
        match group.get_mut(name) {
            Some(n) => *n += 1,
            None => {
                group.insert(name.to_owned(), 1);
            }
        }
    }

    pub(crate) fn status(&mut self, status: Status) {
        self.answers[match status {
            Status::Ok => 0,
            Status::Io => 1,
            Status::Invalid => 2,
            Status::NotPrimary => 3,
            Status::NoSpace => 4,
        }] += 1;
    }

    pub(crate) fn transition(&mut self, before: (u8, u8), after: &Probe) {
        let name = |state: u8, role: u8| {
            const STATES: [&str; 7] = [
                "Blank",
                "Inconsistent",
                "Outdated",
                "Consistent",
                "Complete",
                "UpToDate",
                "Failed",
            ];
            let role = [
                Role::Secondary,
                Role::Promoting,
                Role::Primary,
                Role::Demoting,
                Role::Detached,
            ]
            .into_iter()
            .find(|r| *r as u8 == role);
            match (STATES.get(state as usize), role) {
                (Some(state), Some(role)) => format!("{state}/{role:?}"),
                _ => "start".to_owned(),
            }
        };
        let text = format!(
            "{} → {}",
            name(before.0, before.1),
            name(after.state as u8, after.role as u8)
        );
        self.count("transitions", &text);
    }

    /// Requests and disk operations, frames of data: what counts as an event of a run.
    #[must_use]
    pub fn io(&self) -> u64 {
        self.requests + self.disk_ops.iter().sum::<u64>()
    }

    /// How often a copy began to serve.
    #[must_use]
    pub fn promotions(&self) -> u64 {
        self.counts
            .get("promotions")
            .map_or(0, |c| c.values().sum())
    }

    /// Adds another run's counts.
    pub fn add(&mut self, other: &Coverage) {
        self.seeds += other.seeds;
        self.steps += other.steps;
        self.requests += other.requests;
        self.faults += other.faults;
        self.connections += other.connections;
        self.lost_sectors += other.lost_sectors;
        self.power_cuts += other.power_cuts;
        self.virtual_ns += other.virtual_ns;
        let pairs = |a: &mut [u64], b: &[u64]| {
            for (a, b) in a.iter_mut().zip(b) {
                *a += b;
            }
        };
        pairs(&mut self.disk_ops, &other.disk_ops);
        pairs(&mut self.frames, &other.frames);
        pairs(&mut self.answers, &other.answers);
        for (group, names) in &other.counts {
            let mine = self.counts.entry(group).or_default();
            for (name, n) in names {
                *mine.entry(name.clone()).or_default() += n;
            }
        }
    }

    /// For a person.
    #[must_use]
    pub fn report(&self) -> String {
        let mut text = String::new();
        let [reads, writes, flushes, meta, meta_reads] = self.disk_ops;
        text += &format!(
            "client requests {}: ok {}, not primary {}, I/O error {}, refused {}\n",
            self.requests,
            self.answers[0],
            self.answers[3],
            self.answers[1],
            self.answers[2] + self.answers[4]
        );
        text += &format!(
            "disk: reads {reads}, writes {writes}, flushes {flushes}, metadata writes {meta}, metadata reads {meta_reads}; sectors lost from caches {}\n",
            self.lost_sectors
        );
        text += &format!(
            "connections {}, frames {}\n",
            self.connections,
            self.frames.iter().sum::<u64>()
        );
        for (group, names) in &self.counts {
            text += &format!("{group}:");
            for (name, n) in names {
                text += &format!(" {name} {n},");
            }
            text.pop();
            text.push('\n');
        }
        text
    }
}
