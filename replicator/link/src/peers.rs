//! The nodes this node trusts, each by the certificates pinned for it.

use crate::error::LinkError;
use crate::files::{self, HexId};
use crate::identity::Fingerprint;
use holdfast_wire_format::ids::Uuid;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock};

/// Most certificates pinned for one node: the one in use, the next, and leftovers of rotations cut short.
pub(crate) const MAX_FINGERPRINTS: usize = 4;
/// Most addresses kept for one node.
pub(crate) const MAX_ADDRESSES: usize = 16;

/// A node that joined.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Peer {
    pub id: Uuid,
    pub name: String,
    /// Any of these is this node; at least one, at most 4.
    pub fingerprints: Vec<Fingerprint>,
    /// Where its replicator listens, the preferred address first.
    pub addresses: Vec<SocketAddr>,
}

#[derive(Serialize, Deserialize)]
struct StoredPeer {
    node: HexId,
    name: String,
    fingerprints: Vec<Fingerprint>,
    addresses: Vec<SocketAddr>,
}

#[derive(Serialize, Deserialize)]
struct Stored {
    peers: Vec<StoredPeer>,
}

/// `peers.json` of the state directory, and its content in memory. Shared by all shards; changes take the directory's
/// lock, so the command line and the daemon can both make them. Changing waits for the disk, reading never does.
#[derive(Debug)]
pub struct PeerStore {
    dir: PathBuf,
    peers: RwLock<Arc<Vec<Peer>>>,
}

impl PeerStore {
    /// Reads the peers; none if nobody joined yet.
    pub fn load(dir: &Path) -> Result<Self, LinkError> {
        let peers = read(dir)?;
        Ok(PeerStore {
            dir: dir.to_owned(),
            peers: RwLock::new(Arc::new(peers)),
        })
    }

    /// Reads the file again: the command line may have changed it.
    pub fn reload(&self) -> Result<(), LinkError> {
        self.change(|_| Ok(()))
    }

    /// Every peer, as of now.
    pub fn all(&self) -> Arc<Vec<Peer>> {
        self.peers.read().expect("no panic while held").clone()
    }

    /// The peer of this id.
    pub fn get(&self, id: Uuid) -> Option<Peer> {
        self.all().iter().find(|peer| peer.id == id).cloned()
    }

    /// The peer this certificate is pinned for.
    pub fn by_fingerprint(&self, fingerprint: Fingerprint) -> Option<Peer> {
        self.all()
            .iter()
            .find(|peer| peer.fingerprints.contains(&fingerprint))
            .cloned()
    }

    /// Would [`Self::insert`] take this peer? Changes nothing.
    pub fn check(&self, peer: &Peer) -> Result<(), LinkError> {
        conflict(&self.all(), peer)
    }

    /// Adds a peer, or replaces what was known under its id.
    ///
    /// # Errors
    /// Its name or certificate belongs to another node.
    pub fn insert(&self, peer: Peer) -> Result<(), LinkError> {
        self.change(|peers| {
            conflict(peers, &peer)?;
            peers.retain(|known| known.id != peer.id);
            peers.push(peer);
            Ok(())
        })
    }

    /// Pins exactly these certificates for a peer.
    pub fn set_fingerprints(
        &self,
        id: Uuid,
        fingerprints: Vec<Fingerprint>,
    ) -> Result<(), LinkError> {
        self.change(|peers| {
            let mut peer = peers
                .iter()
                .find(|peer| peer.id == id)
                .cloned()
                .ok_or_else(|| LinkError::NotAPeer {
                    id,
                    name: String::new(),
                })?;
            peer.fingerprints = fingerprints;
            conflict(peers, &peer)?;
            peers.retain(|known| known.id != id);
            peers.push(peer);
            peers.sort_by_key(|peer| peer.id);
            Ok(())
        })
    }

    /// Forgets a peer: it is refused from the next connection on. Close the one it has with `Link::forget`.
    pub fn remove(&self, id: Uuid) -> Result<(), LinkError> {
        self.change(|peers| {
            peers.retain(|peer| peer.id != id);
            Ok(())
        })
    }

    fn change(
        &self,
        with: impl FnOnce(&mut Vec<Peer>) -> Result<(), LinkError>,
    ) -> Result<(), LinkError> {
        let _lock = files::lock(&self.dir)?;
        let before = read(&self.dir)?;
        let mut after = before.clone();
        with(&mut after)?;
        if after != before {
            let stored = Stored {
                peers: after
                    .iter()
                    .map(|peer| StoredPeer {
                        node: HexId(peer.id),
                        name: peer.name.clone(),
                        fingerprints: peer.fingerprints.clone(),
                        addresses: peer.addresses.clone(),
                    })
                    .collect(),
            };
            files::replace(&path(&self.dir), &stored)?;
        }
        *self.peers.write().expect("no panic while held") = Arc::new(after);
        Ok(())
    }
}

fn path(dir: &Path) -> PathBuf {
    dir.join("peers.json")
}

fn read(dir: &Path) -> Result<Vec<Peer>, LinkError> {
    let stored: Option<Stored> = files::read(&path(dir))?;
    let peers = stored.map(|stored| stored.peers).unwrap_or_default();
    Ok(peers
        .into_iter()
        .map(|peer| Peer {
            id: peer.node.0,
            name: peer.name,
            fingerprints: peer.fingerprints,
            addresses: peer.addresses,
        })
        .collect())
}

fn conflict(peers: &[Peer], offered: &Peer) -> Result<(), LinkError> {
    for known in peers.iter().filter(|known| known.id != offered.id) {
        if known.name == offered.name {
            return Err(LinkError::NameTaken {
                name: known.name.clone(),
                known: known.id,
                offered: offered.id,
            });
        }
        if let Some(both) = known
            .fingerprints
            .iter()
            .find(|print| offered.fingerprints.contains(print))
        {
            return Err(LinkError::CertificateTaken {
                fingerprint: *both,
                name: known.name.clone(),
                id: known.id,
            });
        }
    }
    Ok(())
}
