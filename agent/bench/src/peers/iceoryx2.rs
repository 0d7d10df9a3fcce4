//! iceoryx2: publish-subscribe of byte slices, lossless, polled; blocking with its event service.

use iceoryx2::port::listener::Listener;
use iceoryx2::port::notifier::Notifier;
use iceoryx2::port::publisher::Publisher;
use iceoryx2::port::subscriber::Subscriber;
use iceoryx2::prelude::{
    BackpressureStrategy, LogLevel, Node, NodeBuilder, PortFactory as _, ServiceName, ipc, set_log_level,
};
use iceoryx2::service::port_factory::event::PortFactory as EventFactory;
use iceoryx2::service::port_factory::publish_subscribe::PortFactory;

use crate::bytes_between::records_of;
use crate::case::{Case, Mode, Waiting};
use crate::channel::{BLOCK_NS, Channel, Consume, Fault, Patience};
use crate::role::End;

const TRANSPORT: &str = "iceoryx2";
/// Samples in the subscriber's queue: 1,024 was best (notes of the design).
const BUFFER: usize = 1024;
/// Samples that one look takes at most.
const LOOK_MAX: usize = 512;
const PATIENCE_NS: u64 = 5_000_000_000;

type Service = ipc::Service;
type Bytes = PortFactory<Service, [u8], ()>;

/// One end of a connection.
pub(crate) struct Iceoryx2 {
    out: Option<Out>,
    input: Option<Input>,
    size_bytes: usize,
    is_batched: bool,
    staged: Vec<u8>,
    // Behind its ports, so that it goes last.
    _services: Vec<Bytes>,
    _events: Vec<EventFactory<Service>>,
    _node: Node<Service>,
}

struct Out {
    publisher: Publisher<Service, [u8], ()>,
    notifier: Option<Notifier<Service>>,
}

struct Input {
    subscriber: Subscriber<Service, [u8], ()>,
    listener: Option<Listener<Service>>,
}

impl Iceoryx2 {
    /// The consumer's is opened first; the producer's waits until it is subscribed.
    pub(crate) fn open(case: &Case, end: End, name: &str) -> Result<Self, Fault> {
        set_log_level(LogLevel::Error);
        let node = NodeBuilder::new().create::<Service>().map_err(Fault::of(TRANSPORT))?;
        let mut this = Self {
            out: None,
            input: None,
            size_bytes: case.size_bytes,
            is_batched: case.batch > 1,
            staged: Vec::with_capacity(case.size_bytes * case.batch as usize),
            _services: Vec::new(),
            _events: Vec::new(),
            _node: node,
        };
        let (there, back) = (format!("{name}-there"), format!("{name}-back"));
        let (out, input) = match end {
            End::Producer => (there, back),
            End::Consumer => (back, there),
        };
        let is_round_trip = case.mode == Mode::RoundTrip;
        if end == End::Consumer || is_round_trip {
            this.input = Some(this.subscribe(case, &input)?);
        }
        if end == End::Producer || is_round_trip {
            // The producer of a round trip subscribes after the consumer made its publisher: only it can wait.
            this.out = Some(this.publish(case, &out, end == End::Producer)?);
        }
        Ok(this)
    }

    fn service(&self, name: &str) -> Result<Bytes, Fault> {
        let name: ServiceName = name.try_into().map_err(Fault::of(TRANSPORT))?;
        self._node
            .service_builder(&name)
            .publish_subscribe::<[u8]>()
            .max_publishers(1)
            .max_subscribers(1)
            .history_size(0)
            .subscriber_max_buffer_size(BUFFER)
            .subscriber_max_borrowed_samples(4)
            .enable_safe_overflow(false)
            .open_or_create()
            .map_err(Fault::of(TRANSPORT))
    }

    fn event(&self, name: &str) -> Result<EventFactory<Service>, Fault> {
        let name: ServiceName = format!("{name}-event").as_str().try_into().map_err(Fault::of(TRANSPORT))?;
        self._node.service_builder(&name).event().open_or_create().map_err(Fault::of(TRANSPORT))
    }

    fn subscribe(&mut self, case: &Case, name: &str) -> Result<Input, Fault> {
        let service = self.service(name)?;
        let listener = if case.waiting == Waiting::Block {
            let event = self.event(name)?;
            let listener = event.listener_builder().create().map_err(Fault::of(TRANSPORT))?;
            self._events.push(event);
            Some(listener)
        } else {
            None
        };
        let subscriber = service.subscriber_builder().buffer_size(BUFFER).create().map_err(Fault::of(TRANSPORT))?;
        self._services.push(service);
        Ok(Input { subscriber, listener })
    }

    fn publish(&mut self, case: &Case, name: &str, waits: bool) -> Result<Out, Fault> {
        let service = self.service(name)?;
        let publisher = service
            .publisher_builder()
            .initial_max_slice_len(case.size_bytes * case.batch as usize)
            .max_loaned_samples(2)
            .backpressure_strategy(BackpressureStrategy::RetryUntilDelivered)
            .create()
            .map_err(Fault::of(TRANSPORT))?;
        let mut notifier = None;
        if case.waiting == Waiting::Block {
            let event = self.event(name)?;
            notifier = Some(event.notifier_builder().create().map_err(Fault::of(TRANSPORT))?);
            self._events.push(event);
        }
        let mut patience = Patience::new(PATIENCE_NS);
        while waits && service.dynamic_config().number_of_subscribers() == 0 {
            patience.spend("its subscriber")?;
        }
        self._services.push(service);
        Ok(Out { publisher, notifier })
    }

    fn publish_sample(out: Option<&Out>, bytes: &[u8]) -> Result<(), Fault> {
        let out =
            out.ok_or_else(|| Fault::Transport { transport: TRANSPORT, text: "this end only receives".into() })?;
        let sample = out.publisher.loan_slice_uninit(bytes.len()).map_err(Fault::of(TRANSPORT))?;
        sample.write_from_slice(bytes).send().map_err(Fault::of(TRANSPORT))?;
        Ok(())
    }

    fn look<C: Consume>(&mut self, consume: &mut C) -> Result<usize, Fault> {
        let Some(input) = &self.input else { return Ok(0) };
        let mut records = 0;
        for _ in 0..LOOK_MAX {
            let Some(sample) = input.subscriber.receive().map_err(Fault::of(TRANSPORT))? else { break };
            records += records_of(sample.payload(), self.size_bytes, consume);
        }
        Ok(records)
    }
}

impl Channel for Iceoryx2 {
    #[inline]
    fn send(&mut self, record: &[u8]) -> Result<(), Fault> {
        if self.is_batched {
            self.staged.extend_from_slice(record);
            return Ok(());
        }
        Self::publish_sample(self.out.as_ref(), record)
    }

    #[inline]
    fn flush(&mut self) -> Result<(), Fault> {
        if !self.staged.is_empty() {
            Self::publish_sample(self.out.as_ref(), &self.staged)?;
            self.staged.clear();
        }
        if let Some(notifier) = self.out.as_ref().and_then(|out| out.notifier.as_ref()) {
            notifier.notify().map_err(Fault::of(TRANSPORT))?;
        }
        Ok(())
    }

    #[inline]
    fn receive<C: Consume>(&mut self, consume: &mut C) -> Result<usize, Fault> {
        let taken = self.look(consume)?;
        let listener = self.input.as_ref().and_then(|input| input.listener.as_ref());
        let (0, Some(listener)) = (taken, listener) else { return Ok(taken) };
        listener.timed_wait(|_| {}, std::time::Duration::from_nanos(BLOCK_NS)).map_err(Fault::of(TRANSPORT))?;
        self.look(consume)
    }

    /// A subscriber that has not looked yet loses what comes (seen in every pass of the design's measurements).
    fn settle(&mut self) -> Result<(), Fault> {
        match &self.input {
            Some(input) => input.subscriber.receive().map(drop).map_err(Fault::of(TRANSPORT)),
            None => Ok(()),
        }
    }
}
