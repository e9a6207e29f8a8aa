//! `service.tuning`: limits and intervals, each within its range.

use super::*;

/// Every limit that may be set, with the core's default where it is not.
#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub(super) struct RawTuning {
    heartbeat_ms: Option<u64>,
    peer_timeout_ms: Option<u64>,
    stable_interval_ms: Option<u64>,
    stable_bytes: Option<u64>,
    async_queue_bytes: Option<u64>,
    async_lag_ms: Option<u64>,
    async_block: Option<bool>,
    resync_window_bytes: Option<u64>,
    resync_chunk_bytes: Option<u32>,
    resync_rate_min: Option<u64>,
    resync_rate_max: Option<u64>,
    receive_bytes: Option<u64>,
    bitmap_pages: Option<usize>,
    undo_full_pauses: Option<bool>,
    surplus_bytes: Option<u64>,
    activity_log: Option<bool>,
}

impl Reader<'_> {
    pub(super) fn tuning(&self, key: &str, raw: RawTuning) -> Result<Tuning, ConfigError> {
        let default = Tuning::default();
        let tuning = Tuning {
            heartbeat_ms: raw.heartbeat_ms.unwrap_or(default.heartbeat_ms),
            peer_timeout_ms: raw.peer_timeout_ms.unwrap_or(default.peer_timeout_ms),
            stable_interval_ms: raw.stable_interval_ms.unwrap_or(default.stable_interval_ms),
            stable_bytes: raw.stable_bytes.unwrap_or(default.stable_bytes),
            async_queue_bytes: raw.async_queue_bytes.unwrap_or(default.async_queue_bytes),
            async_lag_ms: raw.async_lag_ms.unwrap_or(default.async_lag_ms),
            async_block: raw.async_block.unwrap_or(default.async_block),
            resync_window_bytes: raw
                .resync_window_bytes
                .unwrap_or(default.resync_window_bytes),
            resync_chunk_bytes: raw.resync_chunk_bytes.unwrap_or(default.resync_chunk_bytes),
            resync_rate_min: raw.resync_rate_min.unwrap_or(default.resync_rate_min),
            resync_rate_max: raw.resync_rate_max.unwrap_or(default.resync_rate_max),
            receive_bytes: raw.receive_bytes.unwrap_or(default.receive_bytes),
            bitmap_pages: raw.bitmap_pages.unwrap_or(default.bitmap_pages),
            undo_full_pauses: raw.undo_full_pauses.unwrap_or(default.undo_full_pauses),
            surplus_bytes: raw.surplus_bytes.unwrap_or(default.surplus_bytes),
            activity_log: raw.activity_log.unwrap_or(default.activity_log),
            log_extents: default.log_extents,
        };
        let chunk = tuning.resync_chunk_bytes;
        let range = |name: &str, fits: bool, range: String| {
            if fits {
                Ok(())
            } else {
                Err(self.wrong(
                    format!("{key}.{name}"),
                    "the value is out of range",
                    format!("use {range}"),
                ))
            }
        };
        range(
            "heartbeat_ms",
            (10..=60_000).contains(&tuning.heartbeat_ms),
            "10 to 60000 ms".into(),
        )?;
        range(
            "peer_timeout_ms",
            tuning.peer_timeout_ms >= 2 * tuning.heartbeat_ms && tuning.peer_timeout_ms <= 600_000,
            "at least twice heartbeat_ms, at most 600000 ms".into(),
        )?;
        range(
            "stable_interval_ms",
            (10..=60_000).contains(&tuning.stable_interval_ms),
            "10 to 60000 ms".into(),
        )?;
        range(
            "resync_chunk_bytes",
            (4096..=MAX_PAYLOAD).contains(&chunk) && chunk.is_power_of_two(),
            format!("a power of two from 4096 to {MAX_PAYLOAD}"),
        )?;
        range(
            "resync_window_bytes",
            (u64::from(chunk)..=1 << 30).contains(&tuning.resync_window_bytes),
            "resync_chunk_bytes to 1 GiB".into(),
        )?;
        range(
            "resync_rate_min",
            (4096..=1 << 40).contains(&tuning.resync_rate_min),
            "bytes per second, 4096 to 1 TiB".into(),
        )?;
        range(
            "resync_rate_max",
            tuning.resync_rate_max == 0
                || (tuning.resync_rate_min..=1 << 40).contains(&tuning.resync_rate_max),
            "bytes per second, resync_rate_min to 1 TiB, or 0 for no maximum".into(),
        )?;
        range(
            "async_queue_bytes",
            (u64::from(MAX_PAYLOAD)..=16 << 30).contains(&tuning.async_queue_bytes),
            "1 MiB to 16 GiB".into(),
        )?;
        range(
            "receive_bytes",
            (2 * u64::from(MAX_PAYLOAD)..=16 << 30).contains(&tuning.receive_bytes),
            "2 MiB to 16 GiB".into(),
        )?;
        range(
            "bitmap_pages",
            (16..=1 << 22).contains(&tuning.bitmap_pages),
            "16 to 4194304 pages".into(),
        )?;
        Ok(tuning)
    }
}
