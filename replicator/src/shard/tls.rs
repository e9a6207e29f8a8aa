//! The certificate with which this node offers its volumes over TCP.

use crate::config::NbdTls;
use holdfast_frontend::nbd::TlsPolicy;
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Why the files of a TLS section cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("[nbd.tls] {}: {problem}. Nothing was started; correct the file or its path", path.display())]
pub struct TlsError {
    path: PathBuf,
    problem: String,
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let fail = |problem: String| TlsError {
        path: path.to_owned(),
        problem,
    };
    let found: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path)
        .map_err(|error| fail(error.to_string()))?
        .collect();
    let found = found.map_err(|error| fail(error.to_string()))?;
    if found.is_empty() {
        Err(fail("there is no certificate in it".into()))
    } else {
        Ok(found)
    }
}

/// Reads the files.
///
/// # Errors
/// A file is missing, not PEM, or certificate and key do not belong together.
pub fn policy(config: &NbdTls) -> Result<TlsPolicy, TlsError> {
    let NbdTls::Certificate {
        certificate,
        key,
        client_ca,
        always,
    } = config
    else {
        return Ok(TlsPolicy::LoopbackOnly);
    };
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let chain = certificates(certificate)?;
    let private = PrivateKeyDer::from_pem_file(key).map_err(|error| TlsError {
        path: key.clone(),
        problem: format!("the private key cannot be read: {error}"),
    })?;
    let wrong = |path: &Path| {
        let path = path.to_owned();
        move |error: rustls::Error| TlsError {
            path,
            problem: error.to_string(),
        }
    };
    let builder = rustls::ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(wrong(certificate))?;
    let builder = match client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let mut roots = RootCertStore::empty();
            for root in certificates(path)? {
                roots.add(root).map_err(wrong(path))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                .build()
                .map_err(|error| TlsError {
                    path: path.clone(),
                    problem: error.to_string(),
                })?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let config = Arc::new(
        builder
            .with_single_cert(chain, private)
            .map_err(wrong(certificate))?,
    );
    Ok(if *always {
        TlsPolicy::Always(config)
    } else {
        TlsPolicy::OffLoopback(config)
    })
}
