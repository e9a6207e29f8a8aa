//! Settings of the transport, each with its measured reason (docs/link.md).

use quinn::congestion::{BbrConfig, CubicConfig};
use quinn::{EndpointConfig, IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt};
use std::sync::Arc;
use std::time::Duration;

/// Which network lies between two nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    /// Short and clean: round trips well below a millisecond, hardly any loss.
    Lan,
    /// Long: windows follow from the product of the two numbers.
    Wan {
        /// Bytes per second to fill.
        bandwidth: u64,
        /// Typical round trip.
        round_trip: Duration,
        congestion: Congestion,
    },
}

/// How sending speed is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Congestion {
    /// Backs off at each loss; fair to others on a shared line.
    Cubic,
    /// Goes by measured bandwidth: keeps a lossy long line full.
    Bbr,
}

/// Times and sizes of one link.
#[derive(Clone, Copy, Debug)]
pub struct Tuning {
    pub profile: Profile,
    /// Largest UDP payload to look for, 1200..=65507 bytes. Nothing larger than the route's interface carries is tried, and
    /// what the path really carries is discovered, so a large value does no harm.
    pub udp_payload: u16,
    /// Something is sent at least this often.
    pub keep_alive: Duration,
    /// A path that brought nothing for this long is dead. QUIC stretches it to three retransmission timeouts.
    pub silence: Duration,
    /// A connection attempt, and each step of a handshake, may take this long.
    pub attempt: Duration,
}

impl Default for Tuning {
    fn default() -> Self {
        Tuning {
            profile: Profile::Lan,
            udp_payload: LARGEST_UDP_PAYLOAD,
            keep_alive: Duration::from_millis(250),
            silence: Duration::from_secs(1),
            attempt: Duration::from_secs(1),
        }
    }
}

/// Most bytes that one UDP packet over IPv4 has room for.
const LARGEST_UDP_PAYLOAD: u16 = 65_507;
/// What is looked for where the route does not tell: jumbo frames of 9000 bytes over IPv4.
const JUMBO_UDP_PAYLOAD: u16 = 8972;
/// More gains nothing on a LAN, and bounds what one connection may pin in memory.
const STREAM_WINDOW: u64 = 2 << 20;
const CONNECTION_WINDOW: u64 = 4 << 20;
/// Enough for 10 Gbit/s at 200 ms, and a bound on what a wrong setting can cost.
const MAX_WAN_WINDOW: u64 = 256 << 20;

impl Tuning {
    fn udp_payload(&self) -> u16 {
        self.udp_payload.clamp(1200, LARGEST_UDP_PAYLOAD)
    }

    /// Bytes that one connection may hold for sending, besides the queues.
    pub fn send_window(&self) -> u64 {
        self.connection_window()
    }

    fn connection_window(&self) -> u64 {
        match self.profile {
            Profile::Lan => CONNECTION_WINDOW,
            Profile::Wan {
                bandwidth,
                round_trip,
                ..
            } => {
                let product = u128::from(bandwidth) * round_trip.as_micros() / 1_000_000;
                // Twice: loss recovery takes a second round trip.
                u64::try_from(product * 2)
                    .unwrap_or(u64::MAX)
                    .clamp(CONNECTION_WINDOW, MAX_WAN_WINDOW)
            }
        }
    }

    /// Most bytes of one packet that is taken.
    pub(crate) fn largest_packet(&self) -> u16 {
        self.udp_payload().max(1472)
    }

    pub(crate) fn endpoint(&self) -> EndpointConfig {
        let mut config = EndpointConfig::default();
        config
            .max_udp_payload_size(self.largest_packet())
            .expect("at least 1200");
        config
    }

    /// For one connection. `route`: largest UDP payload that the interface toward the peer carries, if that is known.
    pub(crate) fn transport(&self, route: Option<u16>) -> Arc<TransportConfig> {
        let mut transport = TransportConfig::default();
        let window = self.connection_window();
        let stream = if window == CONNECTION_WINDOW {
            STREAM_WINDOW
        } else {
            window
        };
        let varint = |value: u64| VarInt::from_u64(value).expect("windows are below 2^62");
        let mut discovery = MtuDiscoveryConfig::default();
        let route = route.unwrap_or(JUMBO_UDP_PAYLOAD);
        discovery.upper_bound(self.udp_payload().min(route));
        transport
            .stream_receive_window(varint(stream))
            .receive_window(varint(window))
            .send_window(window)
            .send_fairness(false)
            .mtu_discovery_config(Some(discovery))
            .keep_alive_interval(Some(self.keep_alive))
            .max_idle_timeout(Some(
                IdleTimeout::try_from(self.silence).expect("far below 2^62 ms"),
            ))
            // A stream per service; unidirectional only for control.
            .max_concurrent_bidi_streams(VarInt::from_u32(1024))
            .max_concurrent_uni_streams(VarInt::from_u32(2))
            .datagram_receive_buffer_size(None)
            .allow_spin(false);
        match self.profile {
            Profile::Lan => {
                transport
                    .initial_rtt(Duration::from_millis(50))
                    .congestion_controller_factory(Arc::new(CubicConfig::default()));
            }
            Profile::Wan {
                round_trip,
                congestion,
                ..
            } => {
                transport.initial_rtt(round_trip.max(Duration::from_millis(1)));
                match congestion {
                    Congestion::Cubic => {
                        transport.congestion_controller_factory(Arc::new(CubicConfig::default()))
                    }
                    Congestion::Bbr => {
                        transport.congestion_controller_factory(Arc::new(BbrConfig::default()))
                    }
                };
            }
        }
        Arc::new(transport)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wan_window_is_twice_the_product_within_bounds() {
        let window = |bandwidth, millis| {
            let profile = Profile::Wan {
                bandwidth,
                round_trip: Duration::from_millis(millis),
                congestion: Congestion::Bbr,
            };
            Tuning {
                profile,
                ..Tuning::default()
            }
            .connection_window()
        };
        assert_eq!(window(125_000_000, 40), 10_000_000);
        assert_eq!(window(1_000_000, 1), CONNECTION_WINDOW);
        assert_eq!(window(u64::MAX, 1_000_000), MAX_WAN_WINDOW);
    }
}
