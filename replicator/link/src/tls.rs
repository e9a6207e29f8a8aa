//! TLS 1.3 with pinned certificates: who is let in, and why somebody is not.
//!
//! A certificate counts when its fingerprint is pinned, it is within its validity, and the other side proves in the
//! handshake that it holds the key. There is no authority, no name check, and no resumption: a resumed session would
//! skip the check of a pin that was removed since.

use crate::identity::{Fingerprint, Identity, certificate_subject};
use crate::peers::PeerStore;
use holdfast_wire_format::ids::Uuid;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::sign::CertifiedKey;
use rustls::{DigitallySignedStruct, DistinguishedName, OtherError, SignatureScheme};
use std::any::Any;
use std::sync::{Arc, OnceLock};

/// Protocol of replication.
pub(crate) const ALPN_REPLICATION: &[u8] = b"holdfast/1";
/// Protocol of join.
pub(crate) const ALPN_JOIN: &[u8] = b"holdfast-join/1";
/// Sent as server name and never checked: the pin says who it is.
pub(crate) const SERVER_NAME: &str = "replicator.holdfast";

/// AES-128-GCM first: the fastest where the processor has AES, which is everywhere that matters. ChaCha20 is the last
/// resort of processors without it.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    PROVIDER
        .get_or_init(|| {
            use aws_lc_rs::cipher_suite::*;
            Arc::new(CryptoProvider {
                cipher_suites: vec![
                    TLS13_AES_128_GCM_SHA256,
                    TLS13_AES_256_GCM_SHA384,
                    TLS13_CHACHA20_POLY1305_SHA256,
                ],
                ..aws_lc_rs::default_provider()
            })
        })
        .clone()
}

/// Why a certificate was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    #[error(
        "node {name} ({id}) presented certificate {presented}, but {pinned} is pinned for it; refused, nothing was sent. If that node got a new identity, forget it here and join it again; if not, something else answers at its address"
    )]
    WrongNode {
        name: String,
        id: Uuid,
        presented: Fingerprint,
        pinned: String,
    },
    #[error(
        "a node that says it is {name} ({id}) presented certificate {presented}, but {pinned} is pinned for it; refused, nothing was changed. If that node got a new identity, forget it here and join it again"
    )]
    WrongCaller {
        name: String,
        id: Uuid,
        presented: Fingerprint,
        pinned: String,
    },
    #[error(
        "an unknown node presented certificate {presented} ({subject}); refused: it never joined this node, or was forgotten here"
    )]
    Unknown {
        presented: Fingerprint,
        subject: String,
    },
    #[error(
        "the node at the token's address presented certificate {presented}, but the token names {expected}; refused, the token's secret was not used"
    )]
    WrongToken {
        presented: Fingerprint,
        expected: Fingerprint,
    },
    #[error(
        "the certificate {presented} of {whose} expired on {since} (UTC); refused. Give that node a new certificate and join it again, and check both clocks"
    )]
    Expired {
        presented: Fingerprint,
        whose: String,
        since: String,
    },
    #[error(
        "the certificate {presented} of {whose} counts only from {from} (UTC); refused. One of the two clocks is wrong"
    )]
    NotYet {
        presented: Fingerprint,
        whose: String,
        from: String,
    },
    #[error("the certificate {presented} can't be used ({detail}); refused")]
    Malformed {
        presented: Fingerprint,
        detail: String,
    },
}

impl From<Refusal> for rustls::Error {
    fn from(refusal: Refusal) -> Self {
        rustls::Error::Other(OtherError(Arc::new(refusal)))
    }
}

/// Whom to expect at the other end.
#[derive(Debug, Clone)]
pub(crate) enum Expect {
    /// This peer: the dialing side.
    Peer(Uuid),
    /// Any peer: the accepting side.
    AnyPeer,
    /// The node that made the token.
    Exactly(Fingerprint),
    /// Anybody with a sound certificate, who will prove a token's secret: the accepting side of join.
    Joiner,
}

#[derive(Debug)]
struct Verifier {
    expect: Expect,
    peers: Arc<PeerStore>,
    provider: Arc<CryptoProvider>,
}

impl Verifier {
    fn check(&self, der: &CertificateDer<'_>, now: UnixTime) -> Result<(), Refusal> {
        let presented = Fingerprint::of(der);
        let malformed = |detail: String| Refusal::Malformed { presented, detail };
        let whose = match &self.expect {
            Expect::Peer(id) => {
                let Some(peer) = self.peers.get(*id) else {
                    return Err(Refusal::Unknown {
                        presented,
                        subject: certificate_subject(*id),
                    });
                };
                if !peer.fingerprints.contains(&presented) {
                    return Err(Refusal::WrongNode {
                        name: peer.name,
                        id: *id,
                        presented,
                        pinned: list(&peer.fingerprints),
                    });
                }
                format!("node {} ({})", peer.name, peer.id)
            }
            Expect::AnyPeer => match self.peers.by_fingerprint(presented) {
                Some(peer) => format!("node {} ({})", peer.name, peer.id),
                None => return Err(self.unknown_caller(der, presented)),
            },
            Expect::Exactly(expected) => {
                if presented != *expected {
                    return Err(Refusal::WrongToken {
                        presented,
                        expected: *expected,
                    });
                }
                "the node that made the token".into()
            }
            Expect::Joiner => "the joining node".into(),
        };
        let entity = webpki::EndEntityCert::try_from(der).map_err(|e| malformed(e.to_string()))?;
        // Self-signed: the certificate is its own anchor. What this adds to the pin is the validity, and that the
        // certificate is one at all.
        let anchors =
            [webpki::anchor_from_trusted_cert(der).map_err(|e| malformed(e.to_string()))?];
        let checked = entity.verify_for_usage(
            webpki::ALL_VERIFICATION_ALGS,
            &anchors,
            &[],
            now,
            webpki::KeyUsage::server_auth(),
            None,
            None,
        );
        match checked {
            Ok(_) => Ok(()),
            Err(webpki::Error::CertExpired { not_after, .. }) => Err(Refusal::Expired {
                presented,
                whose,
                since: date(not_after.as_secs()),
            }),
            Err(webpki::Error::CertNotValidYet { not_before, .. }) => Err(Refusal::NotYet {
                presented,
                whose,
                from: date(not_before.as_secs()),
            }),
            Err(e) => Err(malformed(e.to_string())),
        }
    }

    /// A refused caller says who it is, if only to make the message helpful.
    fn unknown_caller(&self, der: &CertificateDer<'_>, presented: Fingerprint) -> Refusal {
        let subject = webpki::EndEntityCert::try_from(der)
            .ok()
            .and_then(|cert| cert.valid_dns_names().next().map(str::to_owned))
            .unwrap_or_else(|| "no name".into());
        match self
            .peers
            .all()
            .iter()
            .find(|peer| certificate_subject(peer.id) == subject)
        {
            Some(peer) => Refusal::WrongCaller {
                name: peer.name.clone(),
                id: peer.id,
                presented,
                pinned: list(&peer.fingerprints),
            },
            None => Refusal::Unknown {
                presented,
                subject: subject.chars().take(80).collect(),
            },
        }
    }

    fn signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            cert,
            signed,
            &self.provider.signature_verification_algorithms,
        )
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.check(end_entity, now)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("only TLS 1.3 is spoken".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.signature(message, cert, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.check(end_entity, now)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("only TLS 1.3 is spoken".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.signature(message, cert, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

/// This node's certificate, as of the moment of each handshake.
#[derive(Debug)]
struct OwnCertificate(Arc<Identity>);

impl rustls::server::ResolvesServerCert for OwnCertificate {
    fn resolve(&self, _hello: rustls::server::ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.certified())
    }
}

impl rustls::client::ResolvesClientCert for OwnCertificate {
    fn resolve(&self, _hints: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.0.certified())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

pub(crate) fn client(
    identity: &Arc<Identity>,
    peers: &Arc<PeerStore>,
    expect: Expect,
    alpn: &[u8],
) -> Result<quinn::ClientConfig, rustls::Error> {
    let verifier = Arc::new(Verifier {
        expect,
        peers: peers.clone(),
        provider: provider(),
    });
    let mut config = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_cert_resolver(Arc::new(OwnCertificate(identity.clone())));
    config.alpn_protocols = vec![alpn.to_vec()];
    config.resumption = rustls::client::Resumption::disabled();
    config.enable_early_data = false;
    let quic = quinn::crypto::rustls::QuicClientConfig::try_from(config)
        .map_err(|_| rustls::Error::General("AES-128-GCM is missing".into()))?;
    Ok(quinn::ClientConfig::new(Arc::new(quic)))
}

pub(crate) fn server(
    identity: &Arc<Identity>,
    peers: &Arc<PeerStore>,
    expect: Expect,
    alpn: &[u8],
) -> Result<quinn::ServerConfig, rustls::Error> {
    let verifier = Arc::new(Verifier {
        expect,
        peers: peers.clone(),
        provider: provider(),
    });
    let mut config = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(OwnCertificate(identity.clone())));
    config.alpn_protocols = vec![alpn.to_vec()];
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    let quic = quinn::crypto::rustls::QuicServerConfig::try_from(config)
        .map_err(|_| rustls::Error::General("AES-128-GCM is missing".into()))?;
    Ok(quinn::ServerConfig::with_crypto(Arc::new(quic)))
}

/// Fingerprint of the certificate the other side proved to hold the key of.
pub(crate) fn fingerprint(identity: Option<Box<dyn Any>>) -> Option<Fingerprint> {
    let chain = identity?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    chain.first().map(|der| Fingerprint::of(der))
}

fn list(fingerprints: &[Fingerprint]) -> String {
    fingerprints
        .iter()
        .map(Fingerprint::to_string)
        .collect::<Vec<_>>()
        .join(" or ")
}

/// Day and time of `seconds` since 1970, in UTC (Gregorian calendar).
fn date(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Years are counted from March, so that the leap day is a year's last; an era is 400 years.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 {
        month_from_march + 3
    } else {
        month_from_march - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02} {:02}:{:02}",
        rest / 3600,
        rest % 3600 / 60
    )
}

#[cfg(test)]
mod tests {
    use super::date;

    #[test]
    fn dates() {
        assert_eq!(date(0), "1970-01-01 00:00");
        assert_eq!(date(951_782_399), "2000-02-28 23:59");
        assert_eq!(date(951_868_800), "2000-03-01 00:00");
        assert_eq!(date(1_798_761_599), "2026-12-31 23:59");
    }
}
