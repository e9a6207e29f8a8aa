//! What two nodes tell each other beside the services: one stream in each direction, and the opening words of a
//! service's stream.

use crate::files::HexId;
use crate::identity::Fingerprint;
use crate::quic::{RecvStream, SendStream};
use holdfast_wire_format::ids::Uuid;
use serde::{Deserialize, Serialize};

/// Newest and oldest version of these messages spoken here.
pub(crate) const VERSION: u32 = 1;
pub(crate) const OLDEST: u32 = 1;
/// Longest message in bytes.
const MAX_MESSAGE: usize = 64 << 10;
/// Longest reason of a refusal in bytes.
const MAX_REASON: usize = 1024;
/// Begins each service stream; the digit is its version.
const OPENING: [u8; 4] = *b"HFS1";

/// A control message. Unknown fields are ignored: a newer node may say more.
#[derive(Serialize, Deserialize, Debug)]
pub(crate) enum Message {
    /// First on each connection, and again when the fingerprints change.
    Hello {
        newest: u32,
        oldest: u32,
        fingerprints: Vec<Fingerprint>,
    },
    /// These fingerprints of the receiver are durably pinned at the sender.
    Pinned { fingerprints: Vec<Fingerprint> },
    /// The sender, who does not dial, wants this service now: open its stream.
    Wanted { service: HexId },
    /// What the receiver would say of this service to the sender, if they met now. Changes nothing.
    FactsWanted { service: HexId, number: u64 },
    /// The answer to the question with this number: bytes in hex, or why not.
    Facts {
        number: u64,
        facts: Result<String, String>,
    },
}

/// The newest version that both sides speak. Both send their range first, so both find the same.
///
/// # Errors
/// None: the sentence follows the other node's name.
pub(crate) fn common_version(oldest: u32, newest: u32) -> Result<u32, String> {
    let version = newest.min(VERSION);
    if version < OLDEST || version < oldest {
        return Err(format!(
            "it speaks link versions {oldest} to {newest}, this node {OLDEST} to {VERSION}: upgrade the older of the two"
        ));
    }
    Ok(version)
}

pub(crate) async fn send(stream: &mut SendStream, message: &Message) -> Result<(), String> {
    let body = serde_json::to_vec(message).expect("plain values");
    let length = u32::try_from(body.len()).expect("messages are short");
    stream
        .write_all(&[&length.to_be_bytes(), &body[..]].concat())
        .await
        .map_err(|e| e.to_string())
}

pub(crate) async fn receive(stream: &mut RecvStream) -> Result<Message, String> {
    let mut length = [0; 4];
    stream
        .read_exact(&mut length)
        .await
        .map_err(|e| e.to_string())?;
    let length = u32::from_be_bytes(length) as usize;
    if length > MAX_MESSAGE {
        return Err(format!("a control message of {length} bytes is too long"));
    }
    let mut body = vec![0; length];
    stream
        .read_exact(&mut body)
        .await
        .map_err(|e| e.to_string())?;
    serde_json::from_slice(&body).map_err(|e| format!("a control message can't be read: {e}"))
}

/// Asks for a service on a fresh stream. The inner error is the peer's refusal.
pub(crate) async fn ask(
    send: &mut SendStream,
    recv: &mut RecvStream,
    service: Uuid,
) -> Result<Result<(), String>, String> {
    let words = [&OPENING[..], &service.0.to_be_bytes()].concat();
    send.write_all(&words).await.map_err(|e| e.to_string())?;
    let mut length = [0; 2];
    recv.read_exact(&mut length)
        .await
        .map_err(|e| e.to_string())?;
    // No reason against it: it is open.
    let length = u16::from_be_bytes(length) as usize;
    if length == 0 {
        return Ok(Ok(()));
    }
    let mut reason = vec![0; length.min(MAX_REASON)];
    recv.read_exact(&mut reason)
        .await
        .map_err(|e| e.to_string())?;
    Ok(Err(String::from_utf8_lossy(&reason).into_owned()))
}

/// Reads which service a fresh stream is for.
pub(crate) async fn asked(recv: &mut RecvStream) -> Result<Uuid, String> {
    let mut words = [0; OPENING.len() + 16];
    recv.read_exact(&mut words)
        .await
        .map_err(|e| e.to_string())?;
    let (opening, service) = words.split_at(OPENING.len());
    if opening != OPENING {
        return Err(
            "a stream begins with unknown words: is the other node's software newer?".into(),
        );
    }
    Ok(Uuid(u128::from_be_bytes(
        service.try_into().expect("16 bytes remain"),
    )))
}

/// Answers [`ask`].
pub(crate) async fn answer(send: &mut SendStream, answer: Result<(), &str>) -> Result<(), String> {
    let reason = match answer {
        Ok(()) => "",
        Err("") => "refused",
        Err(reason) => {
            let cut = (0..=reason.len().min(MAX_REASON))
                .rev()
                .find(|at| reason.is_char_boundary(*at));
            &reason[..cut.unwrap_or(0)]
        }
    };
    let length = u16::try_from(reason.len()).expect("cut to 1024");
    send.write_all(&[&length.to_be_bytes(), reason.as_bytes()].concat())
        .await
        .map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_agree_on_the_newest_version_both_speak_or_say_why_not() {
        assert_eq!(common_version(1, 1), Ok(1));
        assert_eq!(common_version(1, 9), Ok(VERSION));
        for (oldest, newest) in [(VERSION + 1, VERSION + 2), (0, OLDEST - 1), (2, 1)] {
            let error = common_version(oldest, newest).unwrap_err();
            let range = format!("versions {oldest} to {newest}");
            assert!(
                error.contains(&range) && error.contains("upgrade"),
                "{error}"
            );
        }
    }

    #[test]
    fn a_newer_node_may_say_more_in_its_hello() {
        let words = r#"{"Hello":{"newest":2,"oldest":1,"fingerprints":[],"added_later":[1,2]}}"#;
        let message = serde_json::from_str::<Message>(words).unwrap();
        assert!(matches!(
            message,
            Message::Hello {
                newest: 2,
                oldest: 1,
                ..
            }
        ));
    }
}
