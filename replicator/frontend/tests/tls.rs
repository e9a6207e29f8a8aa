//! TLS: required before anything else, carries everything, and forgets what was said in the clear.

mod support;

use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use holdfast_frontend::nbd::TlsPolicy;
use holdfast_frontend::nbd::wire::{command, export_flag, option, option_reply};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, StreamOwned};
use support::client::{Client, header, info_request};
use support::server::{Running, Setup};

struct Authority {
    pem: String,
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
}

fn authority() -> Authority {
    let key = KeyPair::generate().expect("key");
    let mut params = CertificateParams::new(Vec::new()).expect("parameters");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let root = params.self_signed(&key).expect("root");
    let issuer = Issuer::new(params, key);
    let server_key = KeyPair::generate().expect("key");
    let names = vec!["127.0.0.1".to_owned(), "localhost".to_owned()];
    let server = CertificateParams::new(names)
        .expect("parameters")
        .signed_by(&server_key, &issuer)
        .expect("certificate");
    let secret = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(server_key.serialize_der()));
    let server = ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(vec![server.der().clone()], secret)
        .expect("server configuration");
    let mut roots = RootCertStore::empty();
    roots.add(root.der().clone()).expect("root");
    let client = ClientConfig::builder()
        .with_root_certificates(roots)
        .with_no_client_auth();
    Authority {
        pem: root.pem(),
        server: Arc::new(server),
        client: Arc::new(client),
    }
}

fn start(tls: TlsPolicy) -> Running {
    Running::start(Setup {
        tls,
        tcp: true,
        ..Setup::default()
    })
}

fn connect(server: &Running) -> Client<TcpStream> {
    let stream = TcpStream::connect(server.tcp.expect("TCP")).expect("connect");
    let limit = Some(Duration::from_secs(20));
    stream.set_read_timeout(limit).expect("time-out");
    Client::greet(stream)
}

fn encrypt(
    mut client: Client<TcpStream>,
    authority: &Authority,
) -> Client<StreamOwned<ClientConnection, TcpStream>> {
    let replies = client.option(option::STARTTLS, &[]);
    assert_eq!(replies[0].kind, option_reply::ACK);
    let name = ServerName::try_from("localhost").expect("name");
    let connection = ClientConnection::new(Arc::clone(&authority.client), name).expect("TLS");
    Client {
        stream: StreamOwned::new(connection, client.stream),
        structured: false,
    }
}

#[test]
fn nothing_goes_before_tls_and_everything_after() {
    let authority = authority();
    let server = start(TlsPolicy::Always(Arc::clone(&authority.server)));
    let mut client = connect(&server);
    for (option, data) in [
        (option::LIST, vec![]),
        (option::STRUCTURED_REPLY, vec![]),
        (option::INFO, info_request("disk", &[])),
        (option::GO, info_request("disk", &[])),
    ] {
        let replies = client.option(option, &data);
        assert_eq!(replies[0].kind, option_reply::ERR_TLS_REQUIRED);
    }
    let mut client = encrypt(client, &authority);
    let replies = client.option(option::STARTTLS, &[]);
    assert_eq!(
        replies[0].kind,
        option_reply::ERR_INVALID,
        "TLS runs already"
    );
    client.structured_replies();
    client.go("disk", &[]);
    let payload: Vec<u8> = (0..3_000_000u32).map(|n| (n % 253) as u8).collect();
    let length = payload.len() as u32;
    assert_eq!(
        client
            .call(header(command::WRITE, 1, 77, length), &payload)
            .error,
        0
    );
    for cookie in 2..10 {
        client.send(header(command::READ, cookie, 77, length), &[]);
    }
    for _ in 2..10 {
        assert!(client.reply(length as usize).data == payload);
    }
    // The old way in has no error: it is closed.
    let mut client = connect(&server);
    client.send_option(option::EXPORT_NAME, b"disk");
    client.expect_closed();
}

#[test]
fn what_was_settled_in_the_clear_is_forgotten() {
    let authority = authority();
    let server = start(TlsPolicy::OffLoopback(Arc::clone(&authority.server)));
    // A loopback client may go without.
    let mut clear = connect(&server);
    clear.structured_replies();
    let (_, flags) = clear.go("disk", &[]);
    assert_ne!(flags & export_flag::DF, 0);
    let mut client = connect(&server);
    client.structured_replies();
    let mut client = encrypt(client, &authority);
    let (_, flags) = client.go("disk", &[]);
    assert_eq!(
        flags & export_flag::DF,
        0,
        "structured replies survived from before TLS"
    );
    assert_eq!(
        client.call(header(command::READ, 1, 0, 4), &[]).data,
        [0; 4]
    );
}

#[test]
fn bytes_smuggled_in_before_tls_end_the_connection() {
    let authority = authority();
    let mut setup = Setup {
        tls: TlsPolicy::Always(Arc::clone(&authority.server)),
        tcp: true,
        ..Setup::default()
    };
    // Not the deadline: the bytes themselves.
    setup.limits.handshake_timeout = Duration::from_secs(3600);
    let server = Running::start(setup);
    let mut client = connect(&server);
    let start = holdfast_frontend::nbd::wire::OptionHeader {
        option: option::STARTTLS,
        length: 0,
    };
    let list = holdfast_frontend::nbd::wire::OptionHeader {
        option: option::LIST,
        length: 0,
    };
    let both = [start.encode(), list.encode()].concat();
    std::io::Write::write_all(&mut client.stream, &both).expect("options");
    server.until("it is cut off", |server| {
        server.stats().connections_failed.get() == 1
    });
}

#[test]
fn nbdinfo_and_nbdcopy_speak_tls() {
    let authority = authority();
    let server = start(TlsPolicy::Always(Arc::clone(&authority.server)));
    let directory = server.directory().join("pki");
    std::fs::create_dir(&directory).expect("directory");
    std::fs::write(directory.join("ca-cert.pem"), &authority.pem).expect("certificate");
    let address = server.tcp.expect("TCP");
    let uri = format!(
        "nbds://{address}/disk?tls-certificates={}",
        directory.display()
    );
    let output = match Command::new("nbdinfo").arg("--json").arg(&uri).output() {
        Ok(output) => output,
        Err(error) => return eprintln!("skipped: nbdinfo is not installed ({error})"),
    };
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{text}{errors}");
    assert!(text.contains("\"TLS\": true"), "{text}");
    let bytes = vec![0x3c; 64 << 20];
    let source = server.directory().join("source.raw");
    let back = server.directory().join("back.raw");
    std::fs::write(&source, &bytes).expect("source");
    for (from, to) in [
        (source.display().to_string(), uri.clone()),
        (uri.clone(), back.display().to_string()),
    ] {
        match Command::new("nbdcopy")
            .args([&from, &to])
            .stdin(Stdio::null())
            .status()
        {
            Ok(status) => assert!(status.success(), "nbdcopy {from} {to}: {status}"),
            Err(error) => return eprintln!("skipped: nbdcopy is not installed ({error})"),
        }
    }
    assert!(
        std::fs::read(&back).expect("copy") == bytes,
        "the copy differs"
    );
    // The same without TLS is refused.
    let output = Command::new("nbdinfo")
        .arg(format!("nbd://{address}/disk"))
        .output();
    assert!(!output.expect("nbdinfo").status.success());
}
