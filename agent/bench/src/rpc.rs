//! What sidecars speak: HTTP/1.1 over loopback, and gRPC over a unix socket, with the usual Rust implementations (hyper,
//! tonic) on one thread a side. gRPC's messages are the records' bytes as they are: no encoding is measured.

use std::convert::Infallible;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::net::{TcpStream, UnixStream};
use tokio::runtime::Runtime;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::transport::{Endpoint, Server};
use tonic::{Status, Streaming};

use crate::bytes_between::records_of;
use crate::case::{Case, Mode, Transport};
use crate::channel::{Channel, Consume, Fault};
use crate::drive::{Found, Pace, produce, tally};
use crate::record::{Order, Tally, blank, is_end, latencies, stamp, stamp_end};
use crate::role::End;

const PATIENCE: Duration = Duration::from_secs(2);
/// How often a server looks whether its client has hung up, when all is measured.
const HANG_UP_LOOK: Duration = Duration::from_millis(1);
/// Messages between the producer and the task that sends them: as many as one batch of anything.
const QUEUE: usize = 1024;
/// Turns of the runtime in which a message gets from the queue to the socket.
const TURNS: usize = 4;
const UNARY: &str = "/argo.streams.bench.Records/One";
const STREAM: &str = "/argo.streams.bench.Records/Many";
/// Of one message on the server's side: a batch of the largest records that make sense here.
const MESSAGE_BYTES_MAX: usize = 1 << 30;

/// One end of a connection, on a runtime of its own.
pub(crate) struct Rpc {
    runtime: Runtime,
    side: Side,
}

enum Side {
    Client(Box<Client>),
    HttpServer(TcpStream),
    GrpcServer(UnixStream),
}

impl Rpc {
    pub(crate) fn open(case: &Case, end: End, descriptors: Vec<OwnedFd>) -> Result<Self, Fault> {
        let transport = case.transport.name();
        let socket = descriptors
            .into_iter()
            .next()
            .ok_or_else(|| Fault::Transport { transport, text: "its socket did not come".into() })?;
        rustix::io::ioctl_fionbio(&socket, true).map_err(Fault::system("making a socket non-blocking"))?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(Fault::system("starting a runtime"))?;
        let entered = runtime.enter();
        let side = if case.transport == Transport::Http {
            let stream = TcpStream::from_std(socket.into()).map_err(Fault::of(transport))?;
            match end {
                End::Producer => Side::Client(Box::new(Client::new(case, runtime.block_on(Connection::http(stream))?))),
                End::Consumer => Side::HttpServer(stream),
            }
        } else {
            let stream = UnixStream::from_std(socket.into()).map_err(Fault::of(transport))?;
            match end {
                End::Producer => {
                    Side::Client(Box::new(Client::new(case, Connection::Grpc(runtime.block_on(channel(stream))?))))
                }
                End::Consumer => Side::GrpcServer(stream),
            }
        };
        drop(entered);
        Ok(Self { runtime, side })
    }

    pub(crate) fn run(self, case: &Case) -> Result<Found, Fault> {
        let Self { runtime, side } = self;
        match side {
            Side::Client(client) if case.transport == Transport::GrpcStream && is_free(case) => {
                runtime.block_on(stream_freely(*client, case))
            }
            Side::Client(client) => {
                let mut caller = Caller { runtime, client: *client };
                let found = produce(&mut caller, case)?;
                caller.finish()?;
                Ok(found)
            }
            Side::HttpServer(stream) => {
                let kept = Kept::new(case);
                runtime.block_on(serve_http(stream, *case, kept.clone()))?;
                kept.found()
            }
            Side::GrpcServer(stream) => {
                let kept = Kept::new(case);
                runtime.block_on(serve_grpc(stream, *case, kept.clone()))?;
                kept.found()
            }
        }
    }
}

fn is_free(case: &Case) -> bool {
    case.mode == Mode::OneWay && case.rate_per_s.is_none()
}

// --- the consumer's side ---

/// What the server's tasks share; they run on one thread, so it is never waited for.
#[derive(Clone)]
struct Kept(Arc<(Mutex<State>, Notify)>);

struct State {
    tally: Tally,
    fault: Option<Fault>,
}

impl Kept {
    fn new(case: &Case) -> Self {
        let in_flight = case.transport == Transport::GrpcUnary && case.batch > 1;
        let order = if in_flight { Order::Any } else { Order::Exact };
        Self(Arc::new((Mutex::new(State { tally: tally(case, order, 1), fault: None }), Notify::new())))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a message; after the last one the server ends.
    fn take(&self, case: &Case, message: &[u8]) {
        if case.mode == Mode::RoundTrip {
            if is_end(message) {
                self.0.1.notify_one();
            }
            return;
        }
        let mut state = self.lock();
        records_of(message, case.size_bytes, &mut state.tally);
        match state.tally.looked() {
            Ok(false) => return,
            Ok(true) => {}
            Err(fault) => state.fault = Some(fault),
        }
        self.0.1.notify_one();
    }

    async fn is_over(&self) {
        self.0.1.notified().await;
    }

    fn found(&self) -> Result<Found, Fault> {
        let mut state = self.lock();
        if let Some(fault) = state.fault.take() {
            return Err(fault);
        }
        let empty = Tally::new(Order::Exact, 1, 0, 0, None);
        let tally = std::mem::replace(&mut state.tally, empty);
        Ok(Found {
            records: tally.received(),
            records_per_s: tally.records_per_s(),
            round_trip_ns: 0.0,
            latencies: tally.into_latencies(),
        })
    }
}

async fn serve_http(stream: TcpStream, case: Case, kept: Kept) -> Result<(), Fault> {
    let service = hyper::service::service_fn(move |request: Request<Incoming>| {
        let kept = kept.clone();
        async move {
            let body = request.into_body().collect().await?.to_bytes();
            kept.take(&case, &body);
            let answer = if case.mode == Mode::RoundTrip { body } else { Bytes::new() };
            Ok::<_, hyper::Error>(Response::new(Full::new(answer)))
        }
    });
    // It ends when the client closes its connection, which it does after the answer to the last request.
    let connection = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
    within(case.time_ms, connection).await?.map_err(Fault::of("http"))
}

async fn serve_grpc(stream: UnixStream, case: Case, kept: Kept) -> Result<(), Fault> {
    let over = kept.clone();
    let service = tower::service_fn(move |request: Request<tonic::body::Body>| {
        let kept = kept.clone();
        async move {
            let mut grpc = tonic::server::Grpc::new(Raw)
                .apply_max_message_size_config(Some(MESSAGE_BYTES_MAX), Some(MESSAGE_BYTES_MAX));
            let is_echo = case.mode == Mode::RoundTrip;
            let response = match (request.uri().path() == UNARY, is_echo) {
                (true, _) => {
                    let one = tower::service_fn(|request: tonic::Request<Bytes>| {
                        let message = request.into_inner();
                        kept.take(&case, &message);
                        let answer = if is_echo { message } else { Bytes::new() };
                        async move { Ok::<_, Status>(tonic::Response::new(answer)) }
                    });
                    grpc.unary(one, request).await
                }
                (false, true) => {
                    let many = tower::service_fn(|request: tonic::Request<Streaming<Bytes>>| {
                        let kept = kept.clone();
                        let answers = request.into_inner().map(move |message| {
                            if let Ok(message) = &message {
                                kept.take(&case, message);
                            }
                            message
                        });
                        let answers: Pin<Box<dyn Stream<Item = Result<Bytes, Status>> + Send>> = Box::pin(answers);
                        async move { Ok::<_, Status>(tonic::Response::new(answers)) }
                    });
                    grpc.streaming(many, request).await
                }
                (false, false) => {
                    let many = tower::service_fn(|request: tonic::Request<Streaming<Bytes>>| {
                        let kept = kept.clone();
                        async move {
                            let mut messages = request.into_inner();
                            while let Some(message) = messages.message().await? {
                                kept.take(&case, &message);
                            }
                            Ok::<_, Status>(tonic::Response::new(Bytes::new()))
                        }
                    });
                    grpc.client_streaming(many, request).await
                }
            };
            Ok::<_, Infallible>(response)
        }
    });
    // The client ends the connection, when it has the last answer: a server that closes first can fail it. The client's next frame
    // finds no reader then, and of what it has not read yet it takes nothing more.
    let peer = stream.as_fd().try_clone_to_owned().map_err(Fault::of("grpc"))?;
    let end = async move {
        over.is_over().await;
        hung_up(&peer).await;
    };
    let incoming = tokio_stream::once(Ok::<_, std::io::Error>(stream)).chain(tokio_stream::pending());
    let serving = Server::builder().serve_with_incoming_shutdown(service, incoming, end);
    within(case.time_ms, serving).await?.map_err(Fault::of("grpc"))
}

/// Waits until the other end of a socket has closed it.
async fn hung_up(socket: &OwnedFd) {
    loop {
        let mut look = [PollFd::new(socket, PollFlags::RDHUP)];
        if poll(&mut look, Some(&Timespec::default())) != Ok(0) {
            return;
        }
        tokio::time::sleep(HANG_UP_LOOK).await;
    }
}

async fn within<T>(time_ms: u64, future: impl Future<Output = T>) -> Result<T, Fault> {
    let patience = PATIENCE + Duration::from_millis(time_ms);
    tokio::time::timeout(patience, future).await.map_err(|_elapsed| Fault::Stalled {
        at: "a server",
        patience_ns: u64::try_from(patience.as_nanos()).unwrap_or(u64::MAX),
    })
}

// --- the producer's side ---

enum Connection {
    Http(hyper::client::conn::http1::SendRequest<Full<Bytes>>),
    Grpc(tonic::transport::Channel),
}

impl Connection {
    async fn http(stream: TcpStream) -> Result<Self, Fault> {
        let (sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(Fault::of("http"))?;
        // Its error is the next request's error too.
        tokio::spawn(async move { drop(connection.await) });
        Ok(Self::Http(sender))
    }
}

async fn channel(stream: UnixStream) -> Result<tonic::transport::Channel, Fault> {
    let stream = Mutex::new(Some(TokioIo::new(stream)));
    let connector = tower::service_fn(move |_| {
        let taken = stream.lock().unwrap_or_else(PoisonError::into_inner).take();
        // There is one connection a run: a second one would hide that the first broke.
        async move { taken.ok_or_else(|| std::io::Error::from(std::io::ErrorKind::ConnectionReset)) }
    });
    let endpoint = Endpoint::from_static("http://bench.invalid");
    endpoint.connect_with_connector(connector).await.map_err(Fault::of("grpc"))
}

struct Client {
    transport: Transport,
    connection: Connection,
    in_flight_max: usize,
    in_flight: JoinSet<Result<(), Fault>>,
    stream: Option<OpenStream>,
    is_echo: bool,
    staged: Vec<u8>,
    answer: Option<Bytes>,
}

/// A gRPC stream under way.
struct OpenStream {
    messages: mpsc::Sender<Bytes>,
    answers: Answers,
}

enum Answers {
    /// One for each message.
    Each(Box<Streaming<Bytes>>),
    /// One at the end; until then there are not even headers.
    One(tokio::task::JoinHandle<Result<(), Fault>>),
}

impl Client {
    fn new(case: &Case, connection: Connection) -> Self {
        let is_unary = case.transport == Transport::GrpcUnary;
        Self {
            transport: case.transport,
            connection,
            in_flight_max: if is_unary { case.batch as usize } else { 1 },
            in_flight: JoinSet::new(),
            stream: None,
            is_echo: case.mode == Mode::RoundTrip,
            staged: Vec::new(),
            answer: None,
        }
    }

    async fn call(&mut self, message: Bytes) -> Result<(), Fault> {
        match (&mut self.connection, self.transport) {
            (Connection::Http(sender), _) => {
                let failed = Fault::of::<hyper::Error>("http");
                let request = Request::post("/records")
                    .header("host", "bench")
                    .body(Full::new(message))
                    .map_err(Fault::of("http"))?;
                let response = sender.send_request(request).await.map_err(&failed)?;
                let answer = response.into_body().collect().await.map_err(&failed)?.to_bytes();
                sender.ready().await.map_err(&failed)?;
                self.answer = self.is_echo.then_some(answer);
            }
            (Connection::Grpc(channel), Transport::GrpcUnary) if self.in_flight_max == 1 => {
                let answer = one(channel.clone(), message).await?;
                self.answer = self.is_echo.then_some(answer);
            }
            (Connection::Grpc(channel), Transport::GrpcUnary) => {
                while self.in_flight.len() >= self.in_flight_max {
                    joined(self.in_flight.join_next().await)?;
                }
                let channel = channel.clone();
                self.in_flight.spawn(async move { one(channel, message).await.map(drop) });
            }
            (Connection::Grpc(channel), _) => {
                let stream = match &mut self.stream {
                    Some(stream) => stream,
                    none => none.insert(open_stream(channel.clone(), self.is_echo).await?),
                };
                let gone =
                    |_closed| Fault::Transport { transport: "grpc-stream", text: "the server ended the call".into() };
                stream.messages.send(message).await.map_err(gone)?;
                match &mut stream.answers {
                    Answers::Each(answers) => {
                        self.answer = answers.message().await.map_err(Fault::of("grpc-stream"))?;
                    }
                    Answers::One(_) => turns().await,
                }
            }
        }
        Ok(())
    }

    async fn finish(&mut self) -> Result<(), Fault> {
        while !self.in_flight.is_empty() {
            joined(self.in_flight.join_next().await)?;
        }
        let Some(OpenStream { messages, answers }) = self.stream.take() else { return Ok(()) };
        drop(messages);
        match answers {
            Answers::Each(mut answers) => {
                while answers.message().await.map_err(Fault::of("grpc-stream"))?.is_some() {}
                Ok(())
            }
            Answers::One(call) => call.await.map_err(Fault::of("grpc-stream"))?,
        }
    }
}

fn joined(result: Option<Result<Result<(), Fault>, tokio::task::JoinError>>) -> Result<(), Fault> {
    match result {
        None => Ok(()),
        Some(Ok(called)) => called,
        Some(Err(error)) => Err(Fault::of("grpc-unary")(error)),
    }
}

async fn one(channel: tonic::transport::Channel, message: Bytes) -> Result<Bytes, Fault> {
    let mut grpc = tonic::client::Grpc::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
    grpc.ready().await.map_err(Fault::of("grpc-unary"))?;
    let path = hyper::http::uri::PathAndQuery::from_static(UNARY);
    let answer = grpc.unary(tonic::Request::new(message), path, Raw).await.map_err(Fault::of("grpc-unary"))?;
    Ok(answer.into_inner())
}

async fn open_stream(channel: tonic::transport::Channel, is_echo: bool) -> Result<OpenStream, Fault> {
    let (messages, queue) = mpsc::channel(QUEUE);
    let mut grpc = tonic::client::Grpc::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
    grpc.ready().await.map_err(Fault::of("grpc-stream"))?;
    let path = hyper::http::uri::PathAndQuery::from_static(STREAM);
    let request = tonic::Request::new(ReceiverStream::new(queue));
    let answers = if is_echo {
        let answers = grpc.streaming(request, path, Raw).await.map_err(Fault::of("grpc-stream"))?;
        Answers::Each(Box::new(answers.into_inner()))
    } else {
        Answers::One(tokio::spawn(async move {
            let answered = grpc.client_streaming::<_, Bytes, Bytes, _>(request, path, Raw).await;
            answered.map(drop).map_err(Fault::of("grpc-stream"))
        }))
    };
    Ok(OpenStream { messages, answers })
}

async fn turns() {
    for _ in 0..TURNS {
        tokio::task::yield_now().await;
    }
}

/// One call that streams records as fast as they are taken, made by an iterator: no queue is between it and the connection.
async fn stream_freely(client: Client, case: &Case) -> Result<Found, Fault> {
    let Connection::Grpc(channel) = client.connection else {
        return Err(Fault::Transport { transport: "grpc-stream", text: "it was given another connection".into() });
    };
    let mut grpc = tonic::client::Grpc::new(channel);
    grpc.ready().await.map_err(Fault::of("grpc-stream"))?;
    let sent = Arc::new(Mutex::new(0_u64));
    let messages = Messages {
        case: *case,
        pace: Pace::new(case.time_ms * 1_000_000),
        number: 0,
        is_over: false,
        sent: Arc::clone(&sent),
        record: blank(case.size_bytes),
    };
    let path = hyper::http::uri::PathAndQuery::from_static(STREAM);
    let request = tonic::Request::new(tokio_stream::iter(messages));
    grpc.client_streaming(request, path, Raw).await.map_err(Fault::of("grpc-stream"))?;
    let records = *sent.lock().unwrap_or_else(PoisonError::into_inner);
    Ok(Found { records, records_per_s: 0.0, latencies: latencies(), round_trip_ns: 0.0 })
}

struct Messages {
    case: Case,
    pace: Pace,
    number: u64,
    is_over: bool,
    sent: Arc<Mutex<u64>>,
    record: Vec<u8>,
}

impl Iterator for Messages {
    type Item = Bytes;

    fn next(&mut self) -> Option<Bytes> {
        if self.is_over {
            return None;
        }
        if self.pace.is_over() {
            self.is_over = true;
            *self.sent.lock().unwrap_or_else(PoisonError::into_inner) = self.number;
            stamp_end(&mut self.record, self.number);
            return Some(Bytes::copy_from_slice(&self.record));
        }
        if self.case.batch == 1 {
            stamp(&mut self.record, self.number, 0);
            self.number += 1;
            return Some(Bytes::copy_from_slice(&self.record));
        }
        let mut message = Vec::with_capacity(self.case.batch as usize * self.record.len());
        for _ in 0..self.case.batch {
            stamp(&mut self.record, self.number, 0);
            self.number += 1;
            message.extend_from_slice(&self.record);
        }
        Some(message.into())
    }
}

/// A client as one end of a connection: its runtime turns while a call is under way.
struct Caller {
    runtime: Runtime,
    client: Client,
}

impl Caller {
    fn finish(&mut self) -> Result<(), Fault> {
        self.runtime.block_on(self.client.finish())
    }
}

impl Channel for Caller {
    fn send(&mut self, record: &[u8]) -> Result<(), Fault> {
        let Self { runtime, client } = self;
        if client.transport == Transport::GrpcUnary {
            return runtime.block_on(client.call(Bytes::copy_from_slice(record)));
        }
        client.staged.extend_from_slice(record);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Fault> {
        let Self { runtime, client } = self;
        if client.staged.is_empty() {
            return Ok(());
        }
        let message = std::mem::take(&mut client.staged);
        client.staged.reserve(message.len());
        runtime.block_on(client.call(message.into()))
    }

    fn receive<C: Consume>(&mut self, consume: &mut C) -> Result<usize, Fault> {
        match self.client.answer.take() {
            Some(answer) => {
                consume.record(0, &answer.as_ref());
                Ok(1)
            }
            None => Ok(0),
        }
    }

    /// What comes last must have arrived before the producer says that it is done; for a paced one it is on its way.
    fn idle(&mut self) -> Result<(), Fault> {
        let Self { runtime, client } = self;
        runtime.block_on(async {
            if client.stream.is_some() {
                turns().await;
            }
        });
        Ok(())
    }
}

// --- gRPC messages that are just bytes ---

#[derive(Clone, Copy, Debug)]
struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        to.put(item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining())))
    }
}
