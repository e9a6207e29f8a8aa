//! A node with a valid, pinned certificate that says on the wire whatever a test wants: no man in the middle, but the peer itself.

use crate::support::TestNode;
use holdfast_link::Identity;
use holdfast_wire_format::frame::*;
use holdfast_wire_format::frame_codec::{decode_body, decode_header, encode_body, encode_header};
use holdfast_wire_format::ids::*;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(20);
pub const SERVICE: Uuid = Uuid(0x5e51_ce00_0000_0000_0000_0000_0000_0001);

/// Takes whatever certificate the server has: it is the rogue that is on trial.
#[derive(Debug)]
struct TrustsAnybody(Arc<rustls::crypto::CryptoProvider>);

impl rustls::client::danger::ServerCertVerifier for TrustsAnybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &rustls::pki_types::ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.3 only".into()))
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// A connection under the node's own certificate.
pub struct Rogue {
    connection: quinn::Connection,
    // Both live as long as the connection: their end would close it.
    _control: (quinn::SendStream, quinn::RecvStream),
    _endpoint: quinn::Endpoint,
}

/// One life of the service's stream.
pub struct Session {
    pub send: quinn::SendStream,
    recv: quinn::RecvStream,
}

fn message(json: &str) -> Vec<u8> {
    let mut bytes = (json.len() as u32).to_be_bytes().to_vec();
    bytes.extend(json.as_bytes());
    bytes
}

/// A connection and nothing said on it yet.
pub async fn connect_silently(
    node: &TestNode,
    address: SocketAddr,
) -> (quinn::Connection, quinn::Endpoint) {
    let stored: serde_json::Value =
        serde_json::from_slice(&std::fs::read(node.state().join("identity.json")).unwrap())
            .unwrap();
    let text = |key: &str| stored["current"][key].as_str().unwrap().as_bytes().to_vec();
    let certificate = CertificateDer::from_pem_slice(&text("certificate")).unwrap();
    let key = PrivateKeyDer::from_pem_slice(&text("key")).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(TrustsAnybody(provider)))
        .with_client_auth_cert(vec![certificate], key)
        .unwrap();
    config.alpn_protocols = vec![b"holdfast/1".to_vec()];
    let quic = quinn::crypto::rustls::QuicClientConfig::try_from(config).unwrap();
    let mut endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    endpoint.set_default_client_config(quinn::ClientConfig::new(Arc::new(quic)));
    let connecting = endpoint.connect(address, "holdfast").unwrap();
    let connection = tokio::time::timeout(PATIENCE, connecting)
        .await
        .expect("a connection in time")
        .unwrap();
    (connection, endpoint)
}

impl Rogue {
    pub async fn connect(node: &TestNode, address: SocketAddr) -> Rogue {
        let (connection, endpoint) = connect_silently(node, address).await;
        let identity = Identity::load(&node.state()).unwrap();
        let mut send = connection.open_uni().await.unwrap();
        let hello = format!(
            "{{\"Hello\":{{\"newest\":1,\"oldest\":1,\"fingerprints\":[\"{}\"]}}}}",
            identity.fingerprint()
        );
        send.write_all(&message(&hello)).await.unwrap();
        let mut recv = connection.accept_uni().await.unwrap();
        let mut length = [0; 4];
        recv.read_exact(&mut length).await.unwrap();
        let mut body = vec![0; u32::from_be_bytes(length) as usize];
        recv.read_exact(&mut body).await.unwrap();
        assert!(body.starts_with(b"{\"Hello\""));
        Rogue {
            connection,
            _control: (send, recv),
            _endpoint: endpoint,
        }
    }

    /// A stream that begins with these words; nothing was answered yet.
    pub async fn open(&self, words: &[u8]) -> Session {
        let (mut send, recv) = self.connection.open_bi().await.unwrap();
        send.write_all(words).await.unwrap();
        Session { send, recv }
    }

    /// The service's stream, once the node wants it.
    pub async fn session(&self) -> Session {
        let words = [&b"HFS1"[..], &SERVICE.0.to_be_bytes()].concat();
        let start = std::time::Instant::now();
        loop {
            let mut session = self.open(&words).await;
            let mut length = [0; 2];
            session.recv.read_exact(&mut length).await.unwrap();
            if length == [0; 2] {
                return session;
            }
            assert!(start.elapsed() < PATIENCE, "the service is never taken");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

impl Session {
    /// The next frame, or why there is none.
    pub async fn frame(&mut self) -> Result<(FrameHeader, Body), String> {
        let read = async {
            let mut header = [0; HEADER_LENGTH];
            let text = |e: quinn::ReadExactError| e.to_string();
            self.recv.read_exact(&mut header).await.map_err(text)?;
            let header = decode_header(&header).unwrap();
            let mut payload = vec![0; header.payload_length as usize];
            self.recv.read_exact(&mut payload).await.map_err(text)?;
            let body = if header.kind.carries_data() {
                Body::Empty
            } else {
                decode_body(header.kind, &payload).unwrap()
            };
            Ok((header, body))
        };
        tokio::time::timeout(PATIENCE, read)
            .await
            .expect("a frame, or an end, in time")
    }

    /// The first frame of that kind; what comes before it is passed over.
    pub async fn until(&mut self, kind: FrameKind) -> (FrameHeader, Body) {
        loop {
            let (header, body) = self
                .frame()
                .await
                .unwrap_or_else(|end| panic!("{end}, before {kind:?} came"));
            if header.kind == kind {
                return (header, body);
            }
        }
    }

    /// What the node answers to the opening of a stream before it ends it.
    pub async fn refusal(&mut self) -> String {
        let read = self.recv.read_to_end(4096);
        let bytes = tokio::time::timeout(PATIENCE, read).await.expect("in time");
        String::from_utf8_lossy(&bytes.unwrap()[2..]).into_owned()
    }

    /// Waits until the node closes the stream, whatever it still says before.
    pub async fn closed(&mut self) -> String {
        loop {
            match self.frame().await {
                Ok(_) => {}
                Err(end) => return end,
            }
        }
    }

    /// Writes bytes; a stream that was closed meanwhile takes none, which the caller finds out by reading.
    pub async fn write(&mut self, bytes: &[u8]) {
        let _ = self.send.write_all(bytes).await;
    }

    /// A frame with this header; lengths, checksum and service are filled in.
    pub async fn say(&mut self, header: FrameHeader, body: &Body) {
        let bytes = framed(header, &encode_body(body));
        self.write(&bytes).await;
    }
}

/// A well-formed frame.
pub fn framed(mut header: FrameHeader, payload: &[u8]) -> Vec<u8> {
    header.service_tag = holdfast_wire_format::frame::service_tag(SERVICE);
    header.payload_length = payload.len() as u32;
    header.payload_crc = if payload.is_empty() {
        0
    } else {
        crc32fast::hash(payload)
    };
    if header.kind.carries_data() {
        header.length = payload.len() as u32;
    }
    [&encode_header(&header)[..], payload].concat()
}
