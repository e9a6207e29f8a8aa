//! Who this node is: its id, its name, and the certificate by which its peers know it.

use crate::error::LinkError;
use crate::files::{self, HexId};
use crate::peers::PeerStore;
use crate::tls;
use aws_lc_rs::digest;
use holdfast_wire_format::ids::Uuid;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::sign::CertifiedKey;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// SHA-256 of a certificate in DER.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Fingerprint(pub [u8; 32]);

impl Fingerprint {
    /// Of a certificate's DER bytes.
    pub fn of(der: &[u8]) -> Self {
        let digest = digest::digest(&digest::SHA256, der);
        Fingerprint(digest.as_ref().try_into().expect("SHA-256 has 32 bytes"))
    }

    /// Of 64 hex digits.
    pub fn parse(text: &str) -> Option<Self> {
        files::unhex(text).map(Fingerprint)
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&files::hex(&self.0))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Fingerprint {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Fingerprint {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        Fingerprint::parse(&String::deserialize(d)?)
            .ok_or_else(|| serde::de::Error::custom("a fingerprint has 64 hex digits"))
    }
}

/// From when to when a certificate counts.
#[derive(Clone, Copy, Debug)]
pub struct Validity {
    pub not_before: SystemTime,
    pub not_after: SystemTime,
}

impl Default for Validity {
    /// From yesterday, since the clocks of two machines differ, for ten years.
    fn default() -> Self {
        const DAY: Duration = Duration::from_secs(24 * 3600);
        let now = SystemTime::now();
        Validity {
            not_before: now - DAY,
            not_after: now + 3650 * DAY,
        }
    }
}

#[derive(Serialize, Deserialize, Clone)]
struct StoredCertificate {
    certificate: String,
    key: String,
}

#[derive(Serialize, Deserialize, Clone)]
struct StoredNext {
    #[serde(flatten)]
    stored: StoredCertificate,
    /// Peers that durably pinned it.
    confirmed_by: Vec<HexId>,
}

/// One file, so that certificate and key are replaced together.
#[derive(Serialize, Deserialize, Clone)]
struct Stored {
    node: HexId,
    name: String,
    current: StoredCertificate,
    next: Option<StoredNext>,
}

struct Loaded {
    stored: Stored,
    current: Arc<CertifiedKey>,
    current_fingerprint: Fingerprint,
    next_fingerprint: Option<Fingerprint>,
}

/// This node's identity. Shared by all shards; a rotation is seen by each connection made after it.
pub struct Identity {
    dir: PathBuf,
    id: Uuid,
    name: String,
    loaded: RwLock<Loaded>,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "node {} ({}), certificate {}",
            self.name,
            self.id,
            self.fingerprint()
        )
    }
}

impl Identity {
    fn path(dir: &Path) -> PathBuf {
        dir.join("identity.json")
    }

    /// Gives this node an identity: random id, key, self-signed certificate. Writes `identity.json` (mode 0600).
    ///
    /// # Errors
    /// There is one already; the name is not usable; the file can't be written.
    pub fn init(dir: &Path, name: &str) -> Result<Self, LinkError> {
        Self::init_valid(dir, name, Validity::default())
    }

    /// As [`Self::init`] with a validity of the caller's choice.
    pub fn init_valid(dir: &Path, name: &str, validity: Validity) -> Result<Self, LinkError> {
        check_name(name)?;
        files::create_dir(dir)?;
        let _lock = files::lock(dir)?;
        let path = Self::path(dir);
        if path.exists() {
            return Err(LinkError::IdentityExists { path });
        }
        let id = Uuid(u128::from_le_bytes(random()));
        let stored = Stored {
            node: HexId(id),
            name: name.to_owned(),
            current: make_certificate(id, name, validity)?,
            next: None,
        };
        files::replace(&path, &stored)?;
        Self::from_stored(dir, stored)
    }

    /// Reads the identity that [`Self::init`] wrote.
    ///
    /// # Errors
    /// There is none, or it is damaged or newer than this software.
    pub fn load(dir: &Path) -> Result<Self, LinkError> {
        let path = Self::path(dir);
        let stored = files::read(&path)?.ok_or(LinkError::NoIdentity { path })?;
        Self::from_stored(dir, stored)
    }

    fn from_stored(dir: &Path, stored: Stored) -> Result<Self, LinkError> {
        let (id, name) = (stored.node.0, stored.name.clone());
        let loaded = Loaded::new(dir, stored)?;
        Ok(Identity {
            dir: dir.to_owned(),
            id,
            name,
            loaded: RwLock::new(loaded),
        })
    }

    /// This node's id.
    pub fn id(&self) -> Uuid {
        self.id
    }

    /// This node's name, for people.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The state directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Fingerprint of the certificate in use.
    pub fn fingerprint(&self) -> Fingerprint {
        self.loaded
            .read()
            .expect("no panic while held")
            .current_fingerprint
    }

    /// Fingerprints that peers should accept for this node: the one in use and, during a rotation, the next.
    pub fn fingerprints(&self) -> Vec<Fingerprint> {
        let loaded = self.loaded.read().expect("no panic while held");
        std::iter::once(loaded.current_fingerprint)
            .chain(loaded.next_fingerprint)
            .collect()
    }

    pub(crate) fn certified(&self) -> Arc<CertifiedKey> {
        self.loaded
            .read()
            .expect("no panic while held")
            .current
            .clone()
    }

    /// Makes the next certificate, or finds the one already prepared, and returns its fingerprint. The current one
    /// goes on to be used. Each link announces the next one to its peers (`Link::announce_identity`).
    /// Waits for the disk: not for the shard's thread.
    pub fn prepare_rotation(&self, validity: Validity) -> Result<Fingerprint, LinkError> {
        self.change(|stored| {
            if stored.next.is_none() {
                let made = make_certificate(stored.node.0, &stored.name, validity)?;
                stored.next = Some(StoredNext {
                    stored: made,
                    confirmed_by: Vec::new(),
                });
            }
            Ok(())
        })?;
        let loaded = self.loaded.read().expect("no panic while held");
        Ok(loaded.next_fingerprint.expect("just prepared"))
    }

    /// A peer says which of our fingerprints it durably holds. Waits for the disk when that is news.
    pub fn confirmed(&self, peer: Uuid, fingerprints: &[Fingerprint]) -> Result<(), LinkError> {
        let news = {
            let loaded = self.loaded.read().expect("no panic while held");
            match (&loaded.stored.next, loaded.next_fingerprint) {
                (Some(next), Some(print)) => {
                    fingerprints.contains(&print) && !next.confirmed_by.contains(&HexId(peer))
                }
                _ => false,
            }
        };
        if !news {
            return Ok(());
        }
        self.change(|stored| {
            if let Some(next) = &mut stored.next
                && fingerprint_of(&next.stored).is_some_and(|print| fingerprints.contains(&print))
                && !next.confirmed_by.contains(&HexId(peer))
            {
                next.confirmed_by.push(HexId(peer));
            }
            Ok(())
        })
    }

    /// Uses the prepared certificate from now on; connections that exist keep theirs.
    ///
    /// # Errors
    /// None is prepared, or a peer has not confirmed it and `force` is not given: that peer would refuse this node.
    pub fn activate_rotation(&self, peers: &PeerStore, force: bool) -> Result<(), LinkError> {
        self.change(|stored| {
            let next = stored.next.as_ref().ok_or(LinkError::NoRotation)?;
            let waiting: Vec<String> = peers
                .all()
                .iter()
                .filter(|peer| !next.confirmed_by.contains(&HexId(peer.id)))
                .map(|peer| format!("{} ({})", peer.name, peer.id))
                .collect();
            if !waiting.is_empty() && !force {
                return Err(LinkError::RotationIncomplete {
                    waiting: waiting.join(", "),
                });
            }
            stored.current = next.stored.clone();
            stored.next = None;
            Ok(())
        })
    }

    /// Reads the file again: the command line may have changed it.
    pub fn reload(&self) -> Result<(), LinkError> {
        self.change(|_| Ok(()))
    }

    fn change(
        &self,
        with: impl FnOnce(&mut Stored) -> Result<(), LinkError>,
    ) -> Result<(), LinkError> {
        let _lock = files::lock(&self.dir)?;
        let path = Self::path(&self.dir);
        let mut stored: Stored =
            files::read(&path)?.ok_or(LinkError::NoIdentity { path: path.clone() })?;
        if stored.node.0 != self.id {
            return Err(LinkError::Damaged {
                path,
                detail: "it belongs to another node now".into(),
            });
        }
        let before = serde_json::to_vec(&stored).expect("plain strings");
        with(&mut stored)?;
        let loaded = Loaded::new(&self.dir, stored)?;
        if before != serde_json::to_vec(&loaded.stored).expect("plain strings") {
            files::replace(&path, &loaded.stored)?;
        }
        *self.loaded.write().expect("no panic while held") = loaded;
        Ok(())
    }
}

impl Loaded {
    fn new(dir: &Path, stored: Stored) -> Result<Self, LinkError> {
        let damaged = |detail: String| LinkError::Damaged {
            path: Identity::path(dir),
            detail,
        };
        let der = CertificateDer::from_pem_slice(stored.current.certificate.as_bytes())
            .map_err(|e| damaged(format!("certificate: {e}")))?;
        let key = PrivatePkcs8KeyDer::from_pem_slice(stored.current.key.as_bytes())
            .map_err(|_| damaged("the private key can't be read".into()))?;
        let current_fingerprint = Fingerprint::of(&der);
        let certified =
            CertifiedKey::from_der(vec![der], PrivateKeyDer::Pkcs8(key), &tls::provider())?;
        let next_fingerprint = match &stored.next {
            Some(next) => Some(
                fingerprint_of(&next.stored).ok_or_else(|| damaged("next certificate".into()))?,
            ),
            None => None,
        };
        Ok(Loaded {
            stored,
            current: Arc::new(certified),
            current_fingerprint,
            next_fingerprint,
        })
    }
}

fn fingerprint_of(stored: &StoredCertificate) -> Option<Fingerprint> {
    CertificateDer::from_pem_slice(stored.certificate.as_bytes())
        .ok()
        .map(|der| Fingerprint::of(&der))
}

/// Refuses names that would be confusing in messages, file names or certificates.
pub(crate) fn check_name(name: &str) -> Result<(), LinkError> {
    let fine = (1..=64).contains(&name.len())
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'));
    if fine {
        Ok(())
    } else {
        Err(LinkError::BadName {
            name: name.chars().take(80).collect(),
        })
    }
}

/// What a certificate says it belongs to; believed only together with a pinned fingerprint.
pub(crate) fn certificate_subject(id: Uuid) -> String {
    format!("{id}.node.holdfast")
}

fn make_certificate(
    id: Uuid,
    name: &str,
    validity: Validity,
) -> Result<StoredCertificate, LinkError> {
    let mut params = rcgen::CertificateParams::new(vec![certificate_subject(id)])?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    params
        .distinguished_name
        .push(rcgen::DnType::CommonName, name);
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    let since = |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap_or_default();
    params.not_before = epoch + since(validity.not_before);
    params.not_after = epoch + since(validity.not_after);
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
    let certificate = params.self_signed(&key)?;
    Ok(StoredCertificate {
        certificate: certificate.pem(),
        key: key.serialize_pem(),
    })
}

/// `N` bytes from the system's random source.
pub(crate) fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    aws_lc_rs::rand::fill(&mut bytes)
        .expect("the system's random source answers once it is seeded");
    bytes
}
