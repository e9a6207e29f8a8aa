//! One-time tokens of join: how they look, and how the node that made them remembers them.
//!
//! The token's secret is the seed of an Ed25519 key. The node keeps only the public key: who reads its state directory
//! can't join with it, and the secret never crosses the network, not even encrypted.

use crate::error::LinkError;
use crate::files;
use crate::identity::{Fingerprint, random};
use aws_lc_rs::digest::{SHA256, digest};
use aws_lc_rs::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// How long a token counts unless said otherwise.
pub const TOKEN_LIFETIME: Duration = Duration::from_secs(15 * 60);
const SECRET_LENGTH: usize = 20;
const PREFIX: &str = "hf1-";
const MAX_TOKEN_ADDRESSES: usize = 8;
const MAX_OPEN_TOKENS: usize = 16;
const SEED_DOMAIN: &[u8] = b"holdfast join token 1\0";

/// What `holdfast token` prints and `holdfast join` takes. Whoever has it can join once, until it expires.
/// `Display` shows the secret; `Debug` does not.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    /// Where the node that made it waits for the joining node.
    pub addresses: Vec<SocketAddr>,
    /// Certificate of that node.
    pub fingerprint: Fingerprint,
    /// When it stops counting, in seconds since 1970 by the clock of the node that made it, which decides.
    pub expires: u64,
    secret: [u8; SECRET_LENGTH],
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token")
            .field("addresses", &self.addresses)
            .field("fingerprint", &self.fingerprint)
            .field("expires", &self.expires)
            .finish_non_exhaustive()
    }
}

impl Token {
    fn key(&self) -> Ed25519KeyPair {
        let seed = digest(&SHA256, &[SEED_DOMAIN, &self.secret].concat());
        Ed25519KeyPair::from_seed_unchecked(seed.as_ref()).expect("a seed has 32 bytes")
    }

    pub(crate) fn public_key(&self) -> [u8; 32] {
        self.key()
            .public_key()
            .as_ref()
            .try_into()
            .expect("a public key has 32 bytes")
    }

    pub(crate) fn sign(&self, message: &[u8]) -> [u8; 64] {
        self.key()
            .sign(message)
            .as_ref()
            .try_into()
            .expect("a signature has 64 bytes")
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = Vec::with_capacity(128);
        bytes.extend_from_slice(&self.secret);
        bytes.extend_from_slice(&self.fingerprint.0);
        bytes.extend_from_slice(&self.expires.to_be_bytes());
        for address in &self.addresses {
            match address.ip() {
                IpAddr::V4(ip) => {
                    bytes.push(4);
                    bytes.extend_from_slice(&ip.octets());
                }
                IpAddr::V6(ip) => {
                    bytes.push(6);
                    bytes.extend_from_slice(&ip.octets());
                }
            }
            bytes.extend_from_slice(&address.port().to_be_bytes());
        }
        // Against typing errors; whether the token is genuine is for the other node to say.
        bytes.extend_from_slice(&crc32fast::hash(&bytes).to_be_bytes());
        write!(f, "{PREFIX}{}", base32(&bytes))
    }
}

impl FromStr for Token {
    type Err = LinkError;

    fn from_str(text: &str) -> Result<Self, LinkError> {
        let damaged = LinkError::BadToken;
        let text = text
            .trim()
            .strip_prefix(PREFIX)
            .ok_or(damaged("it does not begin with hf1-"))?;
        if text.len() > 512 {
            return Err(damaged("it is too long"));
        }
        let bytes = unbase32(text).ok_or(damaged("it holds a character that no token has"))?;
        let (bytes, crc) = bytes
            .split_last_chunk::<4>()
            .ok_or(damaged("it is too short"))?;
        if crc32fast::hash(bytes) != u32::from_be_bytes(*crc) {
            return Err(damaged("it was changed or cut off on the way"));
        }
        let short = damaged("it is too short");
        let Some((secret, rest)) = bytes.split_first_chunk::<SECRET_LENGTH>() else {
            return Err(short);
        };
        let Some((fingerprint, rest)) = rest.split_first_chunk::<32>() else {
            return Err(short);
        };
        let Some((expires, mut rest)) = rest.split_first_chunk::<8>() else {
            return Err(short);
        };
        let mut addresses = Vec::new();
        while let Some((family, after)) = rest.split_first() {
            let (ip, after): (IpAddr, &[u8]) = match family {
                4 => {
                    let (ip, after) = after
                        .split_first_chunk::<4>()
                        .ok_or(damaged("an address is cut off"))?;
                    ((*ip).into(), after)
                }
                6 => {
                    let (ip, after) = after
                        .split_first_chunk::<16>()
                        .ok_or(damaged("an address is cut off"))?;
                    ((*ip).into(), after)
                }
                _ => return Err(damaged("it holds an unknown kind of address")),
            };
            let (port, after) = after
                .split_first_chunk::<2>()
                .ok_or(damaged("an address is cut off"))?;
            addresses.push(SocketAddr::new(ip, u16::from_be_bytes(*port)));
            rest = after;
        }
        if addresses.is_empty() || addresses.len() > MAX_TOKEN_ADDRESSES {
            return Err(damaged("it names no address, or too many"));
        }
        Ok(Token {
            addresses,
            fingerprint: Fingerprint(*fingerprint),
            expires: u64::from_be_bytes(*expires),
            secret: *secret,
        })
    }
}

#[derive(Serialize, Deserialize, Clone)]
struct OpenToken {
    public_key: String,
    expires: u64,
}

#[derive(Serialize, Deserialize, Default)]
struct Stored {
    tokens: Vec<OpenToken>,
}

/// The tokens of this node that were not used yet: `tokens.json` of the state directory. All of it waits for the disk.
#[derive(Debug, Clone)]
pub struct TokenStore {
    dir: PathBuf,
}

/// What became of a token that somebody presents.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Consumed {
    Yes,
    Expired,
    /// Never made here, or used before.
    Unknown,
}

impl TokenStore {
    pub fn new(dir: &Path) -> Self {
        TokenStore {
            dir: dir.to_owned(),
        }
    }

    /// Makes a token. `addresses` (1 to 8) are those of the [`crate::JoinServer`], as the other node can reach them.
    ///
    /// # Errors
    /// 16 tokens are open; the file can't be written.
    pub fn create(
        &self,
        addresses: Vec<SocketAddr>,
        fingerprint: Fingerprint,
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<Token, LinkError> {
        if addresses.is_empty() || addresses.len() > MAX_TOKEN_ADDRESSES {
            return Err(LinkError::BadToken("a token names 1 to 8 addresses"));
        }
        let token = Token {
            addresses,
            fingerprint,
            expires: seconds(now) + lifetime.as_secs(),
            secret: random(),
        };
        let public_key = files::hex(&token.public_key());
        self.change(|tokens| {
            tokens.retain(|open| seconds(now) < open.expires);
            if tokens.len() >= MAX_OPEN_TOKENS {
                return Err(LinkError::TooManyTokens {
                    count: tokens.len(),
                });
            }
            tokens.push(OpenToken {
                public_key,
                expires: token.expires,
            });
            Ok(())
        })?;
        Ok(token)
    }

    /// Tokens that still count.
    pub fn open(&self, now: SystemTime) -> Result<usize, LinkError> {
        let stored: Stored = files::read(&self.path())?.unwrap_or_default();
        Ok(stored
            .tokens
            .iter()
            .filter(|open| seconds(now) < open.expires)
            .count())
    }

    /// Durably uses the token up: a second caller with the same one gets `Unknown`, even after a crash.
    pub(crate) fn consume(
        &self,
        public_key: &[u8; 32],
        now: SystemTime,
    ) -> Result<Consumed, LinkError> {
        let wanted = files::hex(public_key);
        let mut consumed = Consumed::Unknown;
        self.change(|tokens| {
            if let Some(at) = tokens.iter().position(|open| open.public_key == wanted) {
                let open = tokens.remove(at);
                consumed = if seconds(now) < open.expires {
                    Consumed::Yes
                } else {
                    Consumed::Expired
                };
            }
            Ok(())
        })?;
        Ok(consumed)
    }

    fn path(&self) -> PathBuf {
        self.dir.join("tokens.json")
    }

    fn change(
        &self,
        with: impl FnOnce(&mut Vec<OpenToken>) -> Result<(), LinkError>,
    ) -> Result<(), LinkError> {
        let _lock = files::lock(&self.dir)?;
        let mut stored: Stored = files::read(&self.path())?.unwrap_or_default();
        with(&mut stored.tokens)?;
        files::replace(&self.path(), &stored)
    }
}

/// Did the holder of this key's seed sign the message?
pub(crate) fn verify(public_key: &[u8; 32], message: &[u8], signature: &[u8]) -> bool {
    UnparsedPublicKey::new(&ED25519, public_key)
        .verify(message, signature)
        .is_ok()
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs()
}

/// RFC 4648 letters in lower case, without padding: a double click selects it, and it can be read over a telephone.
const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";

fn base32(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len().div_ceil(5) * 8);
    let (mut held, mut bits) = (0u32, 0);
    for byte in bytes {
        held = held << 8 | u32::from(*byte);
        bits += 8;
        while bits >= 5 {
            bits -= 5;
            text.push(ALPHABET[(held >> bits & 31) as usize] as char);
        }
        held &= (1 << bits) - 1;
    }
    if bits > 0 {
        text.push(ALPHABET[(held << (5 - bits) & 31) as usize] as char);
    }
    text
}

fn unbase32(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len() * 5 / 8);
    let (mut held, mut bits) = (0u32, 0);
    for letter in text.bytes() {
        let value = ALPHABET
            .iter()
            .position(|known| *known == letter.to_ascii_lowercase())?;
        held = held << 5 | value as u32;
        bits += 5;
        if bits >= 8 {
            bits -= 8;
            bytes.push((held >> bits) as u8);
            held &= (1 << bits) - 1;
        }
    }
    // Left-over bits are padding and must be zero, or two texts would mean one token.
    (held == 0 && bits < 5).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn base32_round_trip(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert_eq!(unbase32(&base32(&bytes)), Some(bytes));
        }

        #[test]
        fn any_text_is_refused_or_parsed(text in "hf1-[a-z2-7]{0,300}") {
            let _ = text.parse::<Token>();
        }
    }

    #[test]
    fn text_round_trip_and_typing_errors() {
        let token = Token {
            addresses: vec![
                "10.1.2.3:7789".parse().unwrap(),
                "[fd00::1]:7790".parse().unwrap(),
            ],
            fingerprint: Fingerprint([7; 32]),
            expires: 1_800_000_000,
            secret: [9; SECRET_LENGTH],
        };
        let text = token.to_string();
        assert_eq!(text.parse::<Token>().unwrap(), token);
        assert!(
            !format!("{token:?}").contains("9, 9"),
            "Debug hides the secret"
        );
        for at in PREFIX.len()..text.len() {
            let mut changed = text.clone().into_bytes();
            changed[at] = if changed[at] == b'a' { b'b' } else { b'a' };
            assert!(
                String::from_utf8(changed)
                    .unwrap()
                    .parse::<Token>()
                    .is_err(),
                "letter {at}"
            );
        }
    }

    #[test]
    fn single_use_and_expiry() {
        let dir = tempfile::tempdir().unwrap();
        let store = TokenStore::new(dir.path());
        let now = SystemTime::now();
        let make = |lifetime| {
            store
                .create(
                    vec!["127.0.0.1:1".parse().unwrap()],
                    Fingerprint([0; 32]),
                    lifetime,
                    now,
                )
                .unwrap()
        };
        let token = make(TOKEN_LIFETIME);
        let on_disk = std::fs::read_to_string(store.path()).unwrap();
        assert!(
            !on_disk.contains(&files::hex(&token.secret)),
            "the secret is not stored"
        );
        assert_eq!(
            store.consume(&token.public_key(), now).unwrap(),
            Consumed::Yes
        );
        assert_eq!(
            store.consume(&token.public_key(), now).unwrap(),
            Consumed::Unknown
        );
        let token = make(TOKEN_LIFETIME);
        assert_eq!(
            store
                .consume(&token.public_key(), now + TOKEN_LIFETIME)
                .unwrap(),
            Consumed::Expired
        );
    }
}
