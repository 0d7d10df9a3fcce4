//! `transport: http`: the program serves `POST /messages` on the port `$PORT` of 127.0.0.1, over HTTP/1.1 with keep-alive.
//!
//! 2xx with a body is an output, 204 is none; 4xx refuses the record for good, everything else for now. Before the first record
//! `GET /ready` is asked until it succeeds. docs/pardo.md has it for users.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use argo_streams_shm_protocol::limits::{ATTRIBUTES_BYTES_MAX, KEY_BYTES_MAX, RECORD_PAYLOAD_BYTES_MAX};
use argo_streams_shm_protocol::{attributes_encode, attributes_iter};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::{CONTENT_LENGTH, CONTENT_TYPE, HOST, HeaderMap, HeaderValue};
use hyper::{Request as HttpRequest, StatusCode};
use hyper_util::rt::TokioIo;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, percent_encode};
use tokio::net::TcpStream;
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::sync::{Mutex, Notify};

use super::{Answer, Batching, Carrier, Outcome, Output, Request, reason_of};
use crate::batch::BatchLimits;
use crate::framing::{AnswerKey, Frame, frame_of_json, write_json};
use crate::lines::Line;

/// Connections, each with one request at a time.
const CONNECTIONS: usize = 8;
/// Records under way in batches, all together.
const RECORDS_MAX: usize = 64 << 10;
/// Outputs of one record.
const OUTPUTS_MAX: usize = 64 << 10;
/// How long a program may take until `GET /ready` succeeds.
const READY_TIMEOUT: Duration = Duration::from_secs(60);
/// Between two looks whether it is ready.
const READY_INTERVAL: Duration = Duration::from_millis(20);
/// Before a broken connection is made again.
const RECONNECT_AFTER: Duration = Duration::from_millis(20);
/// The same at most, where nothing listens.
const RECONNECT_AFTER_MAX: Duration = Duration::from_millis(500);
/// Where an answer takes longer, connections without a request are closed: the server may serve one after the other.
const IDLE_AFTER: Duration = Duration::from_millis(250);
/// A record's id, the same for every attempt.
const HEADER_ID: &str = "ags-id";
/// Its key, percent-encoded.
const HEADER_KEY: &str = "ags-key";
/// Its event time in ns since 1970.
const HEADER_EVENT_TIME: &str = "ags-event-time";
/// Its attributes, as `name=value&name=value`, both percent-encoded.
const HEADER_ATTRIBUTES: &str = "ags-attributes";
/// How often it was sent before and refused for now.
const HEADER_ATTEMPT: &str = "ags-attempt";
/// In a request of several: how many.
const HEADER_RECORDS: &str = "ags-records";
/// The longest answer to a request of several.
const BATCH_ANSWER_BYTES_MAX: usize = 128 << 20;
/// In an answer: how the body is cut into outputs.
const HEADER_FRAMING: &str = "ags-framing";
/// What stays as it is in percent-encoding (RFC 3986, 2.3).
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// Picks a port for the program.
pub(super) fn connect(batch: Option<BatchLimits>) -> io::Result<Carrier> {
    // Free now; if somebody else takes it before the program does, that ends with an error and is started again on another.
    let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let (requests, queue) = channel::<Vec<Request>>(CONNECTIONS);
    let (say, answers) = channel(CONNECTIONS);
    let queue = Rc::new(Mutex::new(queue));
    let idle = Rc::new(Notify::new());
    let mut tasks = vec![tokio::task::spawn_local(await_ready(address, say.clone()))];
    for _ in 0..CONNECTIONS {
        let (queue, idle) = (Rc::clone(&queue), Rc::clone(&idle));
        tasks.push(tokio::task::spawn_local(connection(address, queue, say.clone(), idle, batch.is_some())));
    }
    let environment = [("PORT", port.to_string()), ("AGS_HTTP_PORT", port.to_string())];
    Ok(Carrier {
        requests: Some(requests),
        answers,
        window: batch.map_or(CONNECTIONS, |batch| CONNECTIONS.saturating_mul(batch.records).min(RECORDS_MAX)),
        batching: batch.map(|limits| Batching { limits, requests_max: CONNECTIONS }),
        environment: environment.map(|(name, value)| (name.to_owned(), value)).to_vec(),
        ends_by_itself: false,
        tasks,
    })
}

async fn await_ready(address: SocketAddr, say: Sender<Answer>) {
    let mut last = "nothing listened on its port".to_owned();
    let ready = async {
        loop {
            match ask_ready(address).await {
                // Who serves no such path is ready when it serves at all.
                Ok(status) if status.is_success() || status == StatusCode::NOT_FOUND => return,
                Ok(status) => last = format!("the last answer was {status}"),
                Err(error) => last = format!("the last attempt: {error}"),
            }
            tokio::time::sleep(READY_INTERVAL).await;
        }
    };
    let answer = match tokio::time::timeout(READY_TIMEOUT, ready).await {
        Ok(()) => Answer::Ready,
        Err(_elapsed) => Answer::Broken(format!(
            "did not answer `GET /ready` on 127.0.0.1:$PORT with success within {} s; {last}",
            READY_TIMEOUT.as_secs()
        )),
    };
    let _nobody_asks_any_more = say.send(answer).await;
}

async fn ask_ready(address: SocketAddr) -> Result<StatusCode, Box<dyn std::error::Error>> {
    let mut connection = open(address).await?;
    let request = HttpRequest::get("/ready").header(HOST, address.to_string()).body(Full::default())?;
    Ok(connection.sender.send_request(request).await?.status())
}

struct Connection {
    sender: SendRequest<Full<Bytes>>,
    /// The same socket as hyper's.
    socket: OwnedFd,
}

async fn open(address: SocketAddr) -> Result<Connection, Box<dyn std::error::Error>> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let socket = stream.as_fd().try_clone_to_owned()?;
    let (sender, connection) = handshake(TokioIo::new(stream)).await?;
    // It ends with its sender, or with the program; either is seen by who sends.
    tokio::task::spawn_local(connection);
    Ok(Connection { sender, socket })
}

/// Sends one request after the other over one connection.
async fn connection(
    address: SocketAddr,
    queue: Rc<Mutex<Receiver<Vec<Request>>>>,
    say: Sender<Answer>,
    idle: Rc<Notify>,
    is_batched: bool,
) {
    let mut kept: Option<Connection> = None;
    loop {
        let next = async { queue.lock().await.recv().await };
        let requests = tokio::select! {
            requests = next => requests,
            // A server that serves one connection after the other reads on in this one, while others wait for it.
            () = idle.notified(), if kept.is_some() => {
                kept = None;
                continue;
            }
        };
        let Some(requests) = requests else { return };
        let numbers: Vec<u64> = requests.iter().map(|request| request.number).collect();
        let mut open = match kept.take().filter(|connection| !connection.sender.is_closed()) {
            Some(connection) => connection,
            None => match open_patiently(address, &queue).await {
                Ok(connection) => connection,
                // The program has ended, and what was not sent to it has no answer.
                Err(None) => return,
                Err(Some(error)) => {
                    let text = format!(
                        "served on its port at first, and then did not for {} s: {error}",
                        READY_TIMEOUT.as_secs()
                    );
                    let _nobody_asks_any_more = say.send(Answer::Broken(text)).await;
                    return;
                }
            },
        };
        let outcomes = {
            let asked = async {
                if is_batched {
                    return exchange_batch(&mut open, address, &requests).await;
                }
                match requests.into_iter().next() {
                    Some(request) => exchange(&mut open, address, request).await.map(|outcome| vec![outcome]),
                    None => Some(Vec::new()),
                }
            };
            let mut asked = std::pin::pin!(asked);
            loop {
                match tokio::time::timeout(IDLE_AFTER, &mut asked).await {
                    Ok(answered) => break answered,
                    Err(_elapsed) => idle.notify_waiters(),
                }
            }
        };
        // A server that closes after each answer is allowed to.
        if outcomes.is_some() && open.sender.ready().await.is_ok() {
            kept = Some(open);
        }
        let outcomes = match outcomes {
            Some(outcomes) => outcomes,
            None => {
                tokio::time::sleep(RECONNECT_AFTER).await;
                unanswered(numbers.len())
            }
        };
        let mut outcomes = numbers.into_iter().zip(outcomes);
        let answer = match (is_batched, outcomes.len()) {
            (false, 1) => outcomes.next().map(|(number, outcome)| Answer::Record { number, outcome }),
            _ => Some(Answer::Batch(outcomes.collect())),
        };
        let Some(answer) = answer else { continue };
        if say.send(answer).await.is_err() {
            return;
        }
    }
}

/// Connects again and again: what was not sent is not held against its record. `Err(None)`: nothing more is asked for.
async fn open_patiently(
    address: SocketAddr,
    queue: &Mutex<Receiver<Vec<Request>>>,
) -> Result<Connection, Option<String>> {
    let deadline = tokio::time::Instant::now() + READY_TIMEOUT;
    let mut wait = RECONNECT_AFTER;
    loop {
        let error = match open(address).await {
            Ok(connection) => return Ok(connection),
            Err(error) => error.to_string(),
        };
        if queue.try_lock().is_ok_and(|queue| queue.is_closed()) {
            return Err(None);
        }
        if tokio::time::Instant::now() >= deadline {
            return Err(Some(error));
        }
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(RECONNECT_AFTER_MAX);
    }
}

/// A connection broke. Of several records nobody knows which one did it.
fn unanswered(records: usize) -> Vec<Outcome> {
    match records {
        1 => vec![Outcome::Unanswered],
        _ => {
            (0..records).map(|_| Outcome::NotAlone("the connection was closed without an answer".to_owned())).collect()
        }
    }
}

/// Sends several records in one request, as lines of JSON. `None`: the connection broke, or what came is no HTTP.
async fn exchange_batch(
    connection: &mut Connection,
    address: SocketAddr,
    requests: &[Request],
) -> Option<Vec<Outcome>> {
    let mut body = Vec::new();
    let mut outcomes: Vec<Option<Outcome>> = Vec::with_capacity(requests.len());
    for request in requests {
        let Request { id, attempt, key, event_time_ns, attributes, payload, .. } = request;
        let written = write_json((id, *attempt), key.as_deref(), *event_time_ns, attributes, payload, &mut body);
        match written {
            Ok(()) => {
                body.push(b'\n');
                outcomes.push(None);
            }
            Err(reason) => outcomes.push(Some(Outcome::Refused(reason.to_owned()))),
        }
    }
    let sent: Vec<&Request> =
        requests.iter().zip(&outcomes).filter(|(_, outcome)| outcome.is_none()).map(|(request, _)| request).collect();
    if !sent.is_empty() {
        let http = HttpRequest::post("/messages")
            .header(HOST, address.to_string())
            .header(CONTENT_TYPE, "application/x-ndjson")
            .header(CONTENT_LENGTH, body.len())
            .header(HEADER_RECORDS, sent.len().to_string())
            .body(Full::new(Bytes::from(body)))
            .ok()?;
        let response = connection.sender.send_request(http).await.ok()?;
        let _slow = rustix::net::sockopt::set_tcp_quickack(&connection.socket, true);
        let status = response.status();
        let body = match collect(response.into_body(), BATCH_ANSWER_BYTES_MAX).await {
            Err(Body::Broken) => return None,
            Err(Body::TooLong) => Err(format!("its answer has more than the limit of {BATCH_ANSWER_BYTES_MAX} bytes")),
            Ok(body) => Ok(body),
        };
        let mut answered = match body {
            Ok(body) => batch_outcomes(status, &body, &sent),
            Err(reason) => blame(sent.len(), Outcome::Refused(reason)),
        }
        .into_iter();
        for outcome in outcomes.iter_mut().filter(|outcome| outcome.is_none()) {
            *outcome = answered.next();
        }
    }
    outcomes.into_iter().collect()
}

/// Something is wrong with a whole answer: with one record it is that one's fault, of several nobody's yet.
fn blame(records: usize, outcome: Outcome) -> Vec<Outcome> {
    match (records, outcome) {
        (1, outcome) => vec![outcome],
        (_, Outcome::Refused(reason) | Outcome::Later(reason)) => {
            (0..records).map(|_| Outcome::NotAlone(reason.clone())).collect()
        }
        _ => unanswered(records),
    }
}

/// What a program said to a request of several records: lines that name their record by `id`, or one line for each in order.
fn batch_outcomes(status: StatusCode, body: &[u8], requests: &[&Request]) -> Vec<Outcome> {
    if status == StatusCode::NO_CONTENT {
        return requests.iter().map(|_| Outcome::Outputs(Vec::new())).collect();
    }
    if !status.is_success() {
        return blame(requests.len(), failure(status, body));
    }
    match read_batch(body, requests) {
        Ok(outcomes) => outcomes,
        Err(reason) => blame(requests.len(), Outcome::Refused(reason)),
    }
}

fn read_batch(body: &[u8], requests: &[&Request]) -> Result<Vec<Outcome>, String> {
    let lines: Vec<&[u8]> = body.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).collect();
    let mut outcomes: Vec<Outcome> = requests.iter().map(|_| Outcome::Outputs(Vec::new())).collect();
    let places: std::collections::HashMap<&str, usize> =
        requests.iter().enumerate().map(|(place, request)| (request.id.as_str(), place)).collect();
    let mut without_id = 0;
    for (number, line) in lines.iter().enumerate() {
        let (id, outcome) = match frame_of_json(Line::Whole(line)) {
            Frame::Whole(mut answer) => {
                let id = answer.id.take();
                let output = Output {
                    key: answer.key,
                    event_time_ns: answer.event_time_ns,
                    attributes: answer.attributes,
                    payload: answer.payload,
                };
                (id, Outcome::Outputs(vec![output]))
            }
            Frame::Failed { reason, id, is_final: true } => (id, Outcome::Refused(reason)),
            Frame::Failed { reason, id, is_final: false } => (id, Outcome::Later(reason)),
            Frame::Unreadable { reason, .. } => return Err(format!("line {}: {reason}", number + 1)),
            Frame::TooLong { len_bytes } => return Err(format!("line {} has {len_bytes} bytes", number + 1)),
            Frame::Nonsense(text) => return Err(text),
        };
        let place = match id {
            Some(id) => *places
                .get(id.as_str())
                .ok_or_else(|| format!("line {} is for the record {id:?}, which was not in the request", number + 1))?,
            None => {
                without_id += 1;
                number
            }
        };
        match (outcomes.get_mut(place), outcome) {
            (Some(Outcome::Outputs(outputs)), Outcome::Outputs(more)) => outputs.extend(more),
            (Some(place @ Outcome::Outputs(_)), failed) => *place = failed,
            // It has failed already.
            (Some(_), _) => {}
            (None, _) => {}
        }
    }
    // An answer that was forgotten would be a record without outputs.
    if without_id > 0 && (without_id != lines.len() || lines.len() != requests.len()) {
        return Err(format!(
            "its answer has {} lines, {without_id} of them without `id`, to {} records: expected one line for each in order, or `id` in every line",
            lines.len(),
            requests.len()
        ));
    }
    Ok(outcomes)
}

/// `None`: the connection broke, or what came is no HTTP.
async fn exchange(connection: &mut Connection, address: SocketAddr, request: Request) -> Option<Outcome> {
    let mut building = HttpRequest::post("/messages")
        .header(HOST, address.to_string())
        .header(CONTENT_TYPE, "application/octet-stream")
        // Of an empty body hyper says none, and many servers then fail to read it.
        .header(CONTENT_LENGTH, request.payload.len())
        .header(HEADER_ID, request.id)
        .header(HEADER_EVENT_TIME, request.event_time_ns.to_string());
    if request.attempt > 0 {
        building = building.header(HEADER_ATTEMPT, request.attempt.to_string());
    }
    if let Some(key) = &request.key {
        building = building.header(HEADER_KEY, percent_encode(key, ENCODED).to_string());
    }
    if !request.attributes.is_empty() {
        let pairs = attributes_iter(&request.attributes)
            .map(|(name, value)| format!("{}={}", percent_encode(name, ENCODED), percent_encode(value, ENCODED)));
        building = building.header(HEADER_ATTRIBUTES, pairs.collect::<Vec<_>>().join("&"));
        if let Some(parent) = attribute(&request.attributes, b"traceparent") {
            building = building.header("traceparent", parent);
        }
    }
    // All header values are made of visible ASCII.
    let http = building.body(Full::new(Bytes::from(request.payload))).ok()?;
    let response = connection.sender.send_request(http).await.ok()?;
    // Many small servers write head and body apart and let the kernel hold the body back until the head is acknowledged, which
    // we would do 40 ms later: Python's own served 240 records a second so. A refusal only makes it slow again.
    let _slow = rustix::net::sockopt::set_tcp_quickack(&connection.socket, true);
    let (status, headers) = (response.status(), response.headers().clone());
    let body = collect(response.into_body(), RECORD_PAYLOAD_BYTES_MAX).await;
    Some(match body {
        Err(Body::Broken) => return None,
        Err(Body::TooLong) => {
            Outcome::Refused(format!("its answer has more than the limit of {RECORD_PAYLOAD_BYTES_MAX} bytes"))
        }
        Ok(body) => outcome(status, &headers, body),
    })
}

fn attribute(attributes: &[u8], wanted: &[u8]) -> Option<HeaderValue> {
    let (_, value) = attributes_iter(attributes).find(|(name, _)| *name == wanted)?;
    HeaderValue::from_bytes(value).ok()
}

enum Body {
    Broken,
    TooLong,
}

async fn collect(body: Incoming, bytes_max: usize) -> Result<Bytes, Body> {
    match Limited::new(body, bytes_max).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<http_body_util::LengthLimitError>() => Err(Body::TooLong),
        Err(_) => Err(Body::Broken),
    }
}

fn outcome(status: StatusCode, headers: &HeaderMap, body: Bytes) -> Outcome {
    if status == StatusCode::NO_CONTENT {
        return Outcome::Outputs(Vec::new());
    }
    if status.is_success() {
        return match outputs(headers, &body) {
            Ok(outputs) => Outcome::Outputs(outputs),
            Err(text) => Outcome::Refused(format!("its answer cannot be taken: {text}")),
        };
    }
    failure(status, &body)
}

/// What a status other than success says of a record.
fn failure(status: StatusCode, body: &[u8]) -> Outcome {
    let reason = reason_of(body);
    let text = if reason.is_empty() { status.to_string() } else { format!("{status}: {reason}") };
    let is_for_now =
        [StatusCode::REQUEST_TIMEOUT, StatusCode::TOO_EARLY, StatusCode::TOO_MANY_REQUESTS].contains(&status);
    if status.is_client_error() && !is_for_now { Outcome::Refused(text) } else { Outcome::Later(text) }
}

fn outputs(headers: &HeaderMap, body: &[u8]) -> Result<Vec<Output>, String> {
    let text = |name: &str| {
        let value = headers.get(name).map(|value| value.to_str().map_err(|_| format!("{name} is not visible ASCII")));
        value.transpose()
    };
    let key = text(HEADER_KEY)?.map(|key| percent_decode_str(key).collect::<Vec<u8>>());
    if let Some(key) = key.as_ref().filter(|key| key.len() > KEY_BYTES_MAX) {
        return Err(format!("{HEADER_KEY} has {} bytes, the limit is {KEY_BYTES_MAX}", key.len()));
    }
    let event_time_ns = text(HEADER_EVENT_TIME)?
        .map(|time| {
            time.parse::<i64>().map_err(|_| {
                format!("{HEADER_EVENT_TIME} is {time:?}, expected nanoseconds since 1970 as a whole number")
            })
        })
        .transpose()?;
    let mut attributes = Vec::new();
    for pair in text(HEADER_ATTRIBUTES)?.unwrap_or_default().split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) =
            pair.split_once('=').ok_or_else(|| format!("{HEADER_ATTRIBUTES} has {pair:?}, expected name=value"))?;
        let name = percent_decode_str(name)
            .decode_utf8()
            .map_err(|_| format!("{HEADER_ATTRIBUTES}: {name:?} is not UTF-8"))?;
        let value: Vec<u8> = percent_decode_str(value).collect();
        attributes_encode([(&*name, &*value)], &mut attributes);
    }
    if attributes.len() > ATTRIBUTES_BYTES_MAX {
        return Err(format!("the attributes have {} bytes, the limit is {ATTRIBUTES_BYTES_MAX}", attributes.len()));
    }
    let output = |payload: &[u8]| Output {
        key: key.clone().map_or(AnswerKey::Unsaid, AnswerKey::Some),
        event_time_ns,
        attributes: attributes.clone(),
        payload: payload.to_vec(),
    };
    match text(HEADER_FRAMING)?.unwrap_or("none") {
        "none" => Ok(vec![output(body)]),
        "lines" => {
            let body = body.strip_suffix(b"\n").map_or(body, |body| body);
            let count = memchr::memchr_iter(b'\n', body).count() + 1;
            if count > OUTPUTS_MAX {
                return Err(format!("its answer has {count} outputs, and may have {OUTPUTS_MAX}"));
            }
            if body.is_empty() { Ok(Vec::new()) } else { Ok(body.split(|byte| *byte == b'\n').map(output).collect()) }
        }
        "length" => {
            let (mut outputs, mut rest) = (Vec::new(), body);
            while !rest.is_empty() {
                if outputs.len() == OUTPUTS_MAX {
                    return Err(format!("its answer has more than {OUTPUTS_MAX} outputs"));
                }
                let cut = rest
                    .split_first_chunk::<4>()
                    .and_then(|(len, rest)| rest.split_at_checked(usize::try_from(u32::from_le_bytes(*len)).ok()?));
                let (payload, behind) = cut.ok_or_else(|| {
                    format!("{HEADER_FRAMING} is length, and the body ends {} bytes into an output", rest.len())
                })?;
                outputs.push(output(payload));
                rest = behind;
            }
            Ok(outputs)
        }
        other => Err(format!("{HEADER_FRAMING} is {other:?}, expected none, lines or length")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.parse().unwrap(), HeaderValue::from_static(value))).collect()
    }

    fn payloads(outcome: Outcome) -> Vec<Vec<u8>> {
        let Outcome::Outputs(outputs) = outcome else { panic!("{outcome:?}") };
        outputs.into_iter().map(|output| output.payload).collect()
    }

    #[test]
    fn a_status_says_what_becomes_of_a_record() {
        let none = HeaderMap::new();
        assert!(payloads(outcome(StatusCode::NO_CONTENT, &none, Bytes::new())).is_empty());
        assert_eq!(payloads(outcome(StatusCode::CREATED, &none, Bytes::from("a\nb"))), [b"a\nb"]);
        assert_eq!(payloads(outcome(StatusCode::OK, &none, Bytes::new())), [b""], "an empty output is one");
        let lines = headers(&[("ags-framing", "lines")]);
        assert_eq!(payloads(outcome(StatusCode::OK, &lines, Bytes::from("a\n\nb\n"))), [b"a".as_slice(), b"", b"b"]);
        let length = headers(&[("ags-framing", "length")]);
        assert_eq!(
            payloads(outcome(StatusCode::OK, &length, Bytes::from("\x02\0\0\0a\n\0\0\0\0"))),
            [b"a\n".as_slice(), b""]
        );
        for (status, is_final) in
            [(400, true), (404, true), (422, true), (408, false), (429, false), (500, false), (302, false)]
        {
            let said = outcome(StatusCode::from_u16(status).unwrap(), &none, Bytes::from("why"));
            match said {
                Outcome::Refused(text) => assert!(is_final && text.contains("why"), "{status} {text}"),
                Outcome::Later(text) => assert!(!is_final && text.contains("why"), "{status} {text}"),
                other => panic!("{status}: {other:?}"),
            }
        }
    }

    fn requests(count: u64) -> Vec<Request> {
        let request = |number| Request {
            number,
            id: format!("1-{number}-0"),
            key: None,
            event_time_ns: 0,
            attributes: Vec::new(),
            payload: Vec::new(),
            attempt: 0,
        };
        (0..count).map(request).collect()
    }

    #[test]
    fn an_answer_to_several_names_its_records_or_has_a_line_for_each() {
        let requests = requests(3);
        let requests: Vec<&Request> = requests.iter().collect();
        let said = |status: u16, body: &str| {
            let outcomes = batch_outcomes(StatusCode::from_u16(status).unwrap(), body.as_bytes(), &requests);
            outcomes
                .into_iter()
                .map(|outcome| match outcome {
                    Outcome::Outputs(outputs) => outputs
                        .iter()
                        .map(|output| String::from_utf8_lossy(&output.payload).into_owned())
                        .collect::<Vec<_>>()
                        .join("+"),
                    Outcome::Refused(reason) => format!("refused {reason}"),
                    Outcome::Later(reason) => format!("later {reason}"),
                    Outcome::NotAlone(reason) => format!("alone {reason}"),
                    Outcome::Unanswered => "unanswered".to_owned(),
                })
                .collect::<Vec<String>>()
        };
        assert_eq!(said(200, "{\"value\":1}\n{\"error\":\"no\"}\n{\"value\":3}"), ["1", "later no", "3"]);
        let by_id = "{\"id\":\"1-2-0\",\"value\":1}\n{\"id\":\"1-0-0\",\"error\":\"bad\",\"retry\":false}\n\n{\"id\":\"1-2-0\",\"text\":\"x\"}\n";
        assert_eq!(said(201, by_id), ["refused bad", "", "1+x"]);
        assert_eq!(said(204, ""), ["", "", ""]);
        // What is wrong with all of it is found by sending them one by one.
        for (status, body, expected) in [
            (200, "{\"value\":1}\n", "1 lines, 1 of them without `id`, to 3 records"),
            (200, "{\"id\":\"9\",\"value\":1}", "not in the request"),
            (200, "{\"value\":1}\nno json\n", "line 2"),
            (500, "out of order", "out of order"),
            (422, "wrong", "wrong"),
        ] {
            let outcomes = said(status, body);
            assert!(
                outcomes.iter().all(|outcome| outcome.starts_with("alone ") && outcome.contains(expected)),
                "{outcomes:?}"
            );
        }
        let one = [requests[0]];
        assert!(matches!(batch_outcomes(StatusCode::IM_A_TEAPOT, b"no", &one).as_slice(), [Outcome::Refused(_)]));
        assert!(matches!(batch_outcomes(StatusCode::BAD_GATEWAY, b"no", &one).as_slice(), [Outcome::Later(_)]));
        assert!(
            matches!(batch_outcomes(StatusCode::OK, b"", &one).as_slice(), [Outcome::Outputs(none)] if none.is_empty())
        );
    }

    #[test]
    fn what_an_answer_says_of_its_outputs() {
        let all = headers(&[("ags-key", "a%00b"), ("ags-event-time", "-5"), ("ags-attributes", "n%3D=v%26&m=")]);
        let Outcome::Outputs(outputs) = outcome(StatusCode::OK, &all, Bytes::from("x")) else { panic!() };
        assert_eq!((&outputs[0].key, outputs[0].event_time_ns), (&AnswerKey::Some(b"a\0b".to_vec()), Some(-5)));
        let attributes: Vec<_> = argo_streams_shm_protocol::attributes_iter(&outputs[0].attributes).collect();
        assert_eq!(attributes, [(b"n=".as_slice(), b"v&".as_slice()), (b"m".as_slice(), b"".as_slice())]);
        for (wrong, expected) in [
            (headers(&[("ags-event-time", "soon")]), "nanoseconds"),
            (headers(&[("ags-attributes", "n")]), "name=value"),
            (headers(&[("ags-framing", "json")]), "expected none, lines or length"),
            (headers(&[("ags-framing", "length")]), "into an output"),
        ] {
            let Outcome::Refused(text) = outcome(StatusCode::OK, &wrong, Bytes::from("x")) else { panic!() };
            assert!(text.contains(expected), "{text}");
        }
    }
}
