//! `transport: socket`: the program connects to the unix stream socket `$AGS_RECORDS`, and frames go both ways.
//!
//! A frame, all numbers little-endian: u32 length of what follows, u8 kind, u8 flags, u16 attempt, u64 number, i64 event time in
//! ns since 1970, u32 length of the key, u32 length of the attributes, key, attributes, payload. Attributes are u16 length of the
//! name, u32 length of the value, name, value, again and again. docs/pardo.md has it for users.

use std::io;
use std::path::Path;
use std::time::Duration;

use argo_streams_shm_protocol::attributes_iter;
use argo_streams_shm_protocol::limits::{ATTRIBUTES_BYTES_MAX, KEY_BYTES_MAX, RECORD_PAYLOAD_BYTES_MAX};
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixListener;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc::{Receiver, Sender, channel};

use super::{Answer, Carrier, Outcome, Output, Request, reason_of};
use crate::framing::AnswerKey;

/// Names the socket to the program.
const VARIABLE: &str = "AGS_RECORDS";
/// A record.
const KIND_RECORD: u8 = 1;
/// An output of the record of this number; more may follow.
const KIND_OUTPUT: u8 = 2;
/// The record is finished.
const KIND_DONE: u8 = 3;
/// Its last output, and with it it is finished.
const KIND_LAST_OUTPUT: u8 = 4;
/// The record is wrong: the payload says why.
const KIND_REFUSED: u8 = 5;
/// Not now: the payload says why.
const KIND_LATER: u8 = 6;
const FLAG_KEY: u8 = 1;
const FLAG_EVENT_TIME: u8 = 2;
/// What stands between the length and the key.
const HEAD_BYTES: usize = 28;
const FRAME_BYTES_MAX: usize = HEAD_BYTES + KEY_BYTES_MAX + ATTRIBUTES_BYTES_MAX + RECORD_PAYLOAD_BYTES_MAX;
/// Records that are under way at once.
const WINDOW: usize = 1024;
/// Answers that are read before somebody has room for them; more wait in the socket.
const ANSWERS_UNHEARD_MAX: usize = 16;
/// Outputs of one record, so that a program that never finishes one holds a bounded number ...
const OUTPUTS_MAX: usize = 64 << 10;
/// ... and bytes of them.
const OUTPUT_BYTES_MAX: usize = 128 << 20;
/// Frames go out in blocks of about this size.
const BLOCK_BYTES: usize = 64 << 10;
/// How long a program may take to connect.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(60);

/// Listens beside the agent's socket.
pub(super) fn listen(beside: &Path) -> io::Result<Carrier> {
    let path = beside.with_extension("records");
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&path)?;
    let (requests, queue) = channel::<Vec<Request>>(WINDOW);
    let (say, answers) = channel(ANSWERS_UNHEARD_MAX);
    let environment = vec![(VARIABLE.to_owned(), path.to_string_lossy().into_owned())];
    let task = tokio::task::spawn_local(async move {
        let connected = tokio::time::timeout(CONNECT_TIMEOUT, listener.accept()).await;
        let stream = match connected {
            Ok(Ok((stream, _))) => stream,
            Ok(Err(error)) => {
                let _nobody_asks_any_more = say.send(Answer::Broken(format!("could not connect: {error}"))).await;
                return;
            }
            Err(_elapsed) => {
                let seconds = CONNECT_TIMEOUT.as_secs();
                let text = format!("did not connect to ${VARIABLE} within {seconds} s");
                let _nobody_asks_any_more = say.send(Answer::Broken(text)).await;
                return;
            }
        };
        let _nobody_asks_any_more = say.send(Answer::Ready).await;
        let (reader, writer) = stream.into_split();
        tokio::join!(write(writer, queue), read(reader, say));
    });
    Ok(Carrier {
        requests: Some(requests),
        answers,
        window: WINDOW,
        batching: None,
        environment,
        ends_by_itself: true,
        tasks: vec![task],
    })
}

/// Writes what comes; at its end the program reads the end of the stream.
async fn write(mut writer: OwnedWriteHalf, mut queue: Receiver<Vec<Request>>) {
    let mut block = Vec::with_capacity(BLOCK_BYTES);
    while let Some(requests) = queue.recv().await {
        block.clear();
        requests.iter().for_each(|request| encode(request, &mut block));
        while block.len() < BLOCK_BYTES
            && let Ok(requests) = queue.try_recv()
        {
            requests.iter().for_each(|request| encode(request, &mut block));
        }
        if writer.write_all(&block).await.is_err() {
            // The reading side says what happened.
            return;
        }
    }
    let _gone_already = writer.shutdown().await;
}

fn encode(request: &Request, to: &mut Vec<u8>) {
    let begin = to.len();
    to.extend_from_slice(&[0; 4]);
    to.push(KIND_RECORD);
    to.push(FLAG_EVENT_TIME | if request.key.is_some() { FLAG_KEY } else { 0 });
    to.extend_from_slice(&u16::try_from(request.attempt).unwrap_or(u16::MAX).to_le_bytes());
    to.extend_from_slice(&request.number.to_le_bytes());
    to.extend_from_slice(&request.event_time_ns.to_le_bytes());
    let key = request.key.as_deref().unwrap_or_default();
    // Both are within the limits of the protocol, far below 4 GiB.
    to.extend_from_slice(&u32::try_from(key.len()).unwrap_or(0).to_le_bytes());
    to.extend_from_slice(&u32::try_from(request.attributes.len()).unwrap_or(0).to_le_bytes());
    to.extend_from_slice(key);
    to.extend_from_slice(&request.attributes);
    to.extend_from_slice(&request.payload);
    let len = u32::try_from(to.len() - begin - 4).unwrap_or(0);
    if let Some(first) = to.get_mut(begin..).and_then(|frame| frame.first_chunk_mut()) {
        *first = len.to_le_bytes();
    }
}

/// Reads answers until the end of the stream, or until one cannot be.
async fn read(reader: OwnedReadHalf, say: Sender<Answer>) {
    let mut reader = BufReader::with_capacity(BLOCK_BYTES, reader);
    let mut open = Open::default();
    let mut frame = Vec::new();
    loop {
        let text = match next_frame(&mut reader, &mut frame).await {
            Ok(true) => match open.take(&frame) {
                Ok(None) => continue,
                Ok(Some(answer)) => {
                    if say.send(answer).await.is_err() {
                        return;
                    }
                    continue;
                }
                Err(text) => text,
            },
            Ok(false) => "closed its connection".to_owned(),
            Err(error) => format!("closed its connection: {error}"),
        };
        let _nobody_asks_any_more = say.send(Answer::Broken(text)).await;
        return;
    }
}

/// `false`: the stream has ended between two frames. What the program had not written whole is no answer.
async fn next_frame(reader: &mut BufReader<OwnedReadHalf>, frame: &mut Vec<u8>) -> io::Result<bool> {
    let mut len = [0; 4];
    match reader.read_exact(&mut len).await {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
        Err(error) => return Err(error),
    }
    let len = usize::try_from(u32::from_le_bytes(len)).unwrap_or(usize::MAX);
    if !(HEAD_BYTES..=FRAME_BYTES_MAX).contains(&len) {
        return Err(io::Error::other(format!(
            "a frame of {len} bytes, expected {HEAD_BYTES} to {FRAME_BYTES_MAX}: is its length little-endian and without itself?"
        )));
    }
    frame.clear();
    // Memory is taken as bytes come, not as a length promises.
    let taken = reader.take(len as u64).read_to_end(frame).await?;
    if taken < len {
        return Ok(false);
    }
    Ok(true)
}

/// Outputs of records that are not finished yet.
#[derive(Debug, Default)]
struct Open {
    outputs: std::collections::HashMap<u64, Vec<Output>>,
    bytes: usize,
}

impl Open {
    /// An answer that a frame completes. The error says what is wrong with the frame, as "it ...".
    fn take(&mut self, frame: &[u8]) -> Result<Option<Answer>, String> {
        let Some((head, rest)) = frame.split_first_chunk::<HEAD_BYTES>() else {
            return Err(format!("sent a frame of {} bytes, expected {HEAD_BYTES} and more", frame.len()));
        };
        let [kind, flags, ..] = *head;
        let number = u64_at(head, 4);
        let event_time_ns = u64_at(head, 12).cast_signed();
        let (key_len, attributes_len) = (u32_at(head, 20), u32_at(head, 24));
        if key_len > KEY_BYTES_MAX || attributes_len > ATTRIBUTES_BYTES_MAX || key_len + attributes_len > rest.len() {
            return Err(format!(
                "sent a frame for record {number} with a key of {key_len} bytes and attributes of {attributes_len} bytes in {} bytes; the limits are {KEY_BYTES_MAX} and {ATTRIBUTES_BYTES_MAX}",
                rest.len()
            ));
        }
        let (key, rest) = rest.split_at(key_len);
        let (attributes, payload) = rest.split_at(attributes_len);
        let len = attributes_iter(attributes).fold(0, |len, (name, value)| len + 6 + name.len() + value.len());
        if len != attributes.len() {
            return Err(format!("sent a frame for record {number} whose attributes end in the middle of one"));
        }
        let outcome = match kind {
            KIND_OUTPUT | KIND_LAST_OUTPUT => {
                let output = Output {
                    key: if flags & FLAG_KEY != 0 { AnswerKey::Some(key.to_vec()) } else { AnswerKey::Unsaid },
                    event_time_ns: (flags & FLAG_EVENT_TIME != 0).then_some(event_time_ns),
                    attributes: attributes.to_vec(),
                    payload: payload.to_vec(),
                };
                self.bytes += frame.len();
                let outputs = self.outputs.entry(number).or_default();
                outputs.push(output);
                if outputs.len() > OUTPUTS_MAX || self.bytes > OUTPUT_BYTES_MAX {
                    return Err(format!(
                        "sent {} outputs for record {number}, and {} bytes for records that it has not finished; the limits are {OUTPUTS_MAX} and {OUTPUT_BYTES_MAX}",
                        outputs.len(),
                        self.bytes
                    ));
                }
                if kind == KIND_OUTPUT {
                    return Ok(None);
                }
                Outcome::Outputs(self.finish(number))
            }
            KIND_DONE => Outcome::Outputs(self.finish(number)),
            KIND_REFUSED | KIND_LATER => {
                self.finish(number);
                let reason = reason_of(payload);
                if kind == KIND_REFUSED { Outcome::Refused(reason) } else { Outcome::Later(reason) }
            }
            _ => {
                return Err(format!(
                    "sent a frame of kind {kind} for record {number}, expected 2 (output), 3 (done), 4 (last output), 5 (refused) or 6 (later)"
                ));
            }
        };
        Ok(Some(Answer::Record { number, outcome }))
    }

    fn finish(&mut self, number: u64) -> Vec<Output> {
        let outputs = self.outputs.remove(&number).unwrap_or_default();
        let bytes = |output: &Output| {
            let key_len = if let AnswerKey::Some(key) = &output.key { key.len() } else { 0 };
            HEAD_BYTES + key_len + output.attributes.len() + output.payload.len()
        };
        self.bytes = self.bytes.saturating_sub(outputs.iter().map(bytes).sum());
        outputs
    }
}

fn u64_at(head: &[u8; HEAD_BYTES], at: usize) -> u64 {
    head.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |word| u64::from_le_bytes(*word))
}

fn u32_at(head: &[u8; HEAD_BYTES], at: usize) -> usize {
    let word = head.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |word| u32::from_le_bytes(*word));
    usize::try_from(word).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, flags: u8, number: u64, key: &[u8], attributes: &[u8], payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![kind, flags, 0, 0];
        frame.extend_from_slice(&number.to_le_bytes());
        frame.extend_from_slice(&7_i64.to_le_bytes());
        frame.extend_from_slice(&u32::try_from(key.len()).unwrap().to_le_bytes());
        frame.extend_from_slice(&u32::try_from(attributes.len()).unwrap().to_le_bytes());
        [frame.as_slice(), key, attributes, payload].concat()
    }

    #[test]
    fn outputs_are_collected_until_their_record_is_finished() {
        let mut open = Open::default();
        assert!(open.take(&frame(KIND_OUTPUT, FLAG_KEY, 1, b"k", b"", b"first")).unwrap().is_none());
        assert!(open.take(&frame(KIND_OUTPUT, 0, 2, b"", b"", b"other")).unwrap().is_none());
        let answer = open.take(&frame(KIND_LAST_OUTPUT, FLAG_EVENT_TIME, 1, b"", b"", b"second")).unwrap();
        let Some(Answer::Record { number: 1, outcome: Outcome::Outputs(outputs) }) = answer else {
            panic!("{answer:?}")
        };
        assert_eq!((&outputs[0].key, outputs[0].event_time_ns), (&AnswerKey::Some(b"k".to_vec()), None));
        assert_eq!((&outputs[1].key, outputs[1].event_time_ns), (&AnswerKey::Unsaid, Some(7)));
        assert_eq!((&*outputs[0].payload, &*outputs[1].payload), (b"first".as_slice(), b"second".as_slice()));
        let answer = open.take(&frame(KIND_REFUSED, 0, 2, b"", b"", b" no good \n")).unwrap();
        assert!(
            matches!(&answer, Some(Answer::Record { number: 2, outcome: Outcome::Refused(why) }) if why == "no good")
        );
        assert_eq!((open.outputs.len(), open.bytes), (0, 0), "what a record left behind when it was refused is gone");
    }

    #[test]
    fn frames_that_cannot_be_are_refused_with_what_was_expected() {
        let good = frame(KIND_DONE, 0, 3, b"", b"", b"");
        let mut wrong_key = good.clone();
        wrong_key[20] = 1;
        let torn_attributes = frame(KIND_OUTPUT, 0, 3, b"", b"\x01\0\0\0\0\0", b"");
        for (bad, expected) in [
            (good[..20].to_vec(), "expected 28"),
            (wrong_key, "a key of 1 bytes"),
            (torn_attributes, "in the middle"),
            (frame(9, 0, 3, b"", b"", b""), "kind 9"),
            (frame(KIND_RECORD, 0, 3, b"", b"", b""), "expected 2 (output)"),
        ] {
            let refused = Open::default().take(&bad).unwrap_err();
            assert!(refused.contains(expected), "{refused}");
        }
    }

    #[test]
    fn a_record_goes_out_as_the_contract_says() {
        let request = Request {
            number: 5,
            id: String::new(),
            key: Some(b"key".to_vec()),
            event_time_ns: -1,
            attributes: b"\x04\0\x05\0\0\0namevalue".to_vec(),
            payload: b"payload".to_vec(),
            attempt: 2,
        };
        let mut encoded = b"before".to_vec();
        encode(&request, &mut encoded);
        let expected = [
            b"before".as_slice(),
            &53_u32.to_le_bytes(),
            &[1, 3, 2, 0],
            &5_u64.to_le_bytes(),
            &(-1_i64).to_le_bytes(),
            &3_u32.to_le_bytes(),
            &15_u32.to_le_bytes(),
            b"key",
            b"\x04\0\x05\0\0\0namevalue",
            b"payload",
        ];
        assert_eq!(encoded, expected.concat());
    }
}
