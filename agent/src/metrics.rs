//! `--metrics-listen`: the numbers of the live view over HTTP, for Prometheus and whatever reads OpenMetrics.
//!
//! A thread of its own answers connections; each scrape is handed to the agent's loop, which looks at the stages then and there,
//! so a scrape is never older than itself, and costs nothing while nobody asks. What a client can do is bounded: connections,
//! scrapes that wait, the time of each.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use argo_streams_shm_protocol::Bell;
use crossbeam::channel::{Receiver, Sender, TrySendError, bounded};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};
use tokio::sync::{Semaphore, oneshot};

use crate::status::{EdgeSummary, StepSummary};

/// Connections at a time; the next one waits in the kernel's queue.
const CONNECTIONS_MAX: usize = 16;
/// Scrapes that wait for the agent's loop; the next one is told to come again.
const SCRAPES_MAX: usize = 16;
/// How long the headers of a request, and the agent's answer, may take.
const REQUEST_PATIENCE: Duration = Duration::from_secs(5);
/// How long a connection may last, so that idle ones do not keep others out.
const CONNECTION_TIME: Duration = Duration::from_secs(120);
/// How long to wait when the system has no descriptor for another connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The address at which metrics are served, and the scrapes that wait for an answer.
#[derive(Debug)]
pub struct Metrics {
    address: SocketAddr,
    bell: Arc<Bell>,
    scrapes: Receiver<oneshot::Sender<String>>,
}

impl Metrics {
    /// Listens at an address and begins to answer, until the process ends.
    ///
    /// # Errors
    /// When the address cannot be listened at, or there is no thread to be had.
    pub fn listen(address: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        let address = listener.local_addr()?;
        listener.set_nonblocking(true)?;
        let bell = Arc::new(Bell::new()?);
        let (ask, scrapes) = bounded(SCRAPES_MAX);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let rung = Arc::clone(&bell);
        std::thread::Builder::new().name("metrics".to_owned()).spawn(move || {
            if let Err(error) = runtime.block_on(serve(listener, ask, rung)) {
                tracing::warn!("metrics are not served any more: {error}");
            }
        })?;
        Ok(Self { address, bell, scrapes })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Readable when somebody waits.
    #[must_use]
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.bell.descriptor()
    }

    /// Answers everybody who waits with the same text. Does not block.
    pub fn answer(&self, text: impl FnOnce() -> String) {
        self.bell.silence();
        let waiting: Vec<_> = self.scrapes.try_iter().collect();
        if waiting.is_empty() {
            return;
        }
        let text = text();
        for scrape in waiting {
            // Whoever has gone away meanwhile needs no answer.
            let _gone = scrape.send(text.clone());
        }
    }
}

async fn serve(listener: TcpListener, ask: Sender<oneshot::Sender<String>>, bell: Arc<Bell>) -> io::Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return Ok(()) };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::debug!("a scrape's connection was not accepted: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let (ask, bell) = (ask.clone(), Arc::clone(&bell));
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let (ask, bell) = (ask.clone(), Arc::clone(&bell));
                async move { Ok::<_, std::convert::Infallible>(answer(&request, &ask, &bell).await) }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(REQUEST_PATIENCE)
                .serve_connection(TokioIo::new(stream), service);
            // A client that breaks off, or takes too long, has only itself to tell.
            let _ended = tokio::time::timeout(CONNECTION_TIME, connection).await;
            drop(place);
        });
    }
}

async fn answer(
    request: &Request<Incoming>,
    ask: &Sender<oneshot::Sender<String>>,
    bell: &Bell,
) -> Response<Full<Bytes>> {
    match (request.method(), request.uri().path()) {
        (&Method::GET, "/metrics") => {}
        (_, "/metrics") => {
            let mut refused = said(StatusCode::METHOD_NOT_ALLOWED, "metrics are read with GET\n");
            refused.headers_mut().insert(ALLOW, hyper::header::HeaderValue::from_static("GET"));
            return refused;
        }
        _ => return said(StatusCode::NOT_FOUND, "there is only /metrics here\n"),
    }
    let (answer, answered) = oneshot::channel();
    match ask.try_send(answer) {
        Ok(()) => bell.ring(),
        Err(TrySendError::Full(_)) => {
            return said(StatusCode::SERVICE_UNAVAILABLE, "more scrapes wait than are answered: scrape less often\n");
        }
        Err(TrySendError::Disconnected(_)) => return said(StatusCode::SERVICE_UNAVAILABLE, "the run is ending\n"),
    }
    match tokio::time::timeout(REQUEST_PATIENCE, answered).await {
        Ok(Ok(text)) => {
            let mut response = Response::new(Full::new(Bytes::from(text)));
            response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(OPENMETRICS));
            response
        }
        Ok(Err(_)) => said(StatusCode::SERVICE_UNAVAILABLE, "the run is ending\n"),
        Err(_) => said(StatusCode::SERVICE_UNAVAILABLE, "the agent did not look at its stages within 5 s\n"),
    }
}

fn said(status: StatusCode, text: &'static str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from_static(text.as_bytes())));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

/// A number of a step that not every step has.
type NumberOf = fn(&StepSummary) -> Option<u64>;
type Labels = Vec<(&'static str, String)>;
type Count = Family<Labels, Counter>;
type Whole = Family<Labels, Gauge<i64>>;
type Seconds = Family<Labels, Gauge<f64, AtomicU64>>;

/// What a scrape shows of a run.
#[derive(Debug)]
pub struct Numbers {
    /// The pipeline's name.
    pub pipeline: String,
    /// Every step, and its records that were read and not finished.
    pub steps: Vec<(StepSummary, u64)>,
    /// Every edge, and the bytes that wait in its rings.
    pub edges: Vec<(EdgeSummary, u64)>,
    /// What is off, or less than it could be.
    pub degradations: usize,
}

impl Numbers {
    /// As OpenMetrics text. Names and units: docs/metrics.md.
    #[must_use]
    pub fn encode(&self) -> String {
        let mut registry = Registry::with_prefix("argo_streams");
        registry.register(
            "agent",
            "The agent that runs the pipeline",
            Info::new(vec![("version", env!("CARGO_PKG_VERSION").to_owned()), ("pipeline", self.pipeline.clone())]),
        );
        let degradations: Gauge<i64> = Gauge::default();
        degradations.set(whole(self.degradations as u64));
        registry.register(
            "degradations",
            "What is off, or less than it could be; the summary's placement says what and why",
            degradations,
        );
        self.encode_steps(&mut registry);
        self.encode_edges(&mut registry);
        let mut text = String::new();
        // Writing into a String does not fail.
        let _infallible = encode(&mut text, &registry);
        text
    }

    fn encode_steps(&self, registry: &mut Registry) {
        let counters: [(&str, &str, NumberOf); 9] = [
            ("step_records_in", "Records that a step has read and finished", |step| Some(step.records_in)),
            ("step_records_out", "Records that a step has given on", |step| Some(step.records_out)),
            ("step_errors", "Records on a step's error output", |step| Some(step.errors)),
            ("step_errors_unread", "Records on an error output that no step reads: they are dropped", |step| {
                Some(step.errors_unread)
            }),
            ("step_restarts", "How often a step's programs were started again", |step| Some(step.restarts)),
            ("step_violations", "Impossible things that a step's programs wrote or sent", |step| Some(step.violations)),
            (
                "step_uncertain_records",
                "Records that a restart may have lost or doubled, because acknowledgement was not declared or is read",
                |step| Some(step.uncertain_records_total),
            ),
            ("step_failed_attempts", "Attempts on records that failed, and were or are tried again", |step| {
                Some(step.retries.map_or(0, |retries| retries.failed_attempts_total))
            }),
            ("step_state_full", "Puts and deletes that found the keyed state full", |step| {
                step.state.map(|state| state.full_total)
            }),
        ];
        for (name, help, number) in counters {
            let family = Count::default();
            for (step, _) in &self.steps {
                if let Some(number) = number(step) {
                    family.get_or_create(&self.of_step(step)).inc_by(number);
                }
            }
            registry.register(name, help, family);
        }
        let dropped = Count::default();
        for (step, _) in &self.steps {
            if let Some(numbers) = step.dropped {
                let labels = [self.of_step(step), vec![("reason", numbers.policy.to_owned())]].concat();
                dropped.get_or_create(&labels).inc_by(numbers.records);
            }
        }
        registry.register("step_dropped", "Records that an overflow dropped", dropped);
        let (undone, failed, keys) = (Whole::default(), Whole::default(), Whole::default());
        let parked = Whole::default();
        let (state, limit) = (Whole::default(), Whole::default());
        let quantiles = Seconds::default();
        for (step, step_undone) in &self.steps {
            let labels = self.of_step(step);
            undone.get_or_create(&labels).set(whole(*step_undone));
            parked.get_or_create(&labels).set(whole(step.retries.map_or(0, |retries| retries.parked)));
            failed.get_or_create(&labels).set(i64::from(step.failed.is_some()));
            if let Some(numbers) = step.state {
                keys.get_or_create(&labels).set(whole(numbers.keys));
                state.get_or_create(&labels).set(whole(numbers.bytes));
                limit.get_or_create(&labels).set(whole(numbers.limit_bytes));
            }
            show_quantiles(&quantiles, &labels, step.end_to_end_p50_us, step.end_to_end_p99_us);
        }
        registry.register("step_undone_records", "Records that a step has read and not finished", undone);
        registry.register(
            "step_parked_records",
            "Records that wait to be tried again, or behind one of their key that does",
            parked,
        );
        registry.register("step_failed", "1 when a step has ended for good before its work was done", failed);
        registry.register("step_state_keys", "Keys with a value in a step's keyed state", keys);
        registry.register_with_unit("step_state", "Room that a step's keyed state takes", Unit::Bytes, state);
        registry.register_with_unit("step_state_limit", "Room that it may take", Unit::Bytes, limit);
        registry.register_with_unit(
            "end_to_end",
            "From entering the pipeline to this sink, since the run began",
            Unit::Seconds,
            quantiles,
        );
    }

    fn encode_edges(&self, registry: &mut Registry) {
        let (records, bytes) = (Count::default(), Count::default());
        let (depth, quantiles) = (Whole::default(), Seconds::default());
        for (edge, edge_depth) in &self.edges {
            let labels =
                vec![("pipeline", self.pipeline.clone()), ("from", edge.from.clone()), ("to", edge.to.clone())];
            records.get_or_create(&labels).inc_by(edge.records);
            bytes.get_or_create(&labels).inc_by(edge.bytes);
            depth.get_or_create(&labels).set(whole(*edge_depth));
            show_quantiles(&quantiles, &labels, edge.p50_us, edge.p99_us);
        }
        registry.register("edge_records", "Records that an edge's reader has finished", records);
        registry.register_with_unit("edge_payload", "Their payloads", Unit::Bytes, bytes);
        registry.register_with_unit("edge_depth", "What is published on an edge and not read", Unit::Bytes, depth);
        registry.register_with_unit(
            "edge_wait",
            "From publishing to reading, since the run began",
            Unit::Seconds,
            quantiles,
        );
    }

    fn of_step(&self, step: &StepSummary) -> Labels {
        vec![("pipeline", self.pipeline.clone()), ("step", step.name.clone())]
    }
}

fn show_quantiles(family: &Seconds, labels: &Labels, p50_us: Option<f64>, p99_us: Option<f64>) {
    for (quantile, us) in [("0.5", p50_us), ("0.99", p99_us)] {
        if let Some(us) = us {
            let labels = [labels.as_slice(), &[("quantile", quantile.to_owned())]].concat();
            family.get_or_create(&labels).set(us / 1e6);
        }
    }
}

fn whole(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
