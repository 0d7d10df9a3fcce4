//! One stage says of its neighbour that it wrote something impossible: is it so? Looked at by the agent itself, on the
//! accused one's pages and ring, while both may go on writing.
//!
//! What a reader has not freed stays as it is, so a look at one reading of the positions is enough, unless they moved on
//! meanwhile. What this cannot see: a reader that says it freed up to the middle of a batch, on its page and in its mirrors
//! alike, makes an honest producer's ring look torn; and a producer that takes its tail back likewise makes an honest reader look ahead.

use argo_streams_shm_protocol::layout::BATCH_ALIGN;
use argo_streams_shm_protocol::{
    CommitError, Consumer, Incarnation, Kind, ReadPosition, Segment, SegmentError, Slot, StageSpec,
};

/// How often the agent looks. Who writes nonsense at full speed is not sane in each of them.
const LOOKS: usize = 8;

/// One end of the ring that an accusation is about.
#[derive(Clone, Copy, Debug)]
pub(crate) struct End<'a> {
    /// Its stage's incarnation.
    pub incarnation: &'a Incarnation,
    /// What its stage was granted.
    pub spec: &'a StageSpec,
    /// Its output or input.
    pub index: usize,
}

/// What the agent saw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Finding {
    /// Something that no stage writes.
    Impossible(String),
    /// Nothing wrong, in every look.
    Possible,
    /// The positions moved on in some looks, or do not say whose they are.
    Unsure,
}

/// Looks at the producer that its reader accuses.
pub(crate) fn look_at_producer(producer: End<'_>, reader: End<'_>) -> Finding {
    let index = u32::try_from(producer.index).unwrap_or(u32::MAX);
    let (_, descriptors) = producer.incarnation.as_producer(index, 0);
    let segments =
        [descriptors.first().map(|page| (page, Kind::Commit)), descriptors.get(2).map(|ring| (ring, Kind::Data))];
    look(|| {
        for (descriptor, kind) in segments.iter().flatten() {
            if let Some(finding) = refused_segment(descriptor, *kind) {
                return finding;
            }
        }
        look_at_ring(producer, reader)
    })
}

/// Looks at the reader that its producer accuses.
pub(crate) fn look_at_reader(reader: End<'_>, producer: End<'_>) -> Finding {
    let index = u32::try_from(reader.index).unwrap_or(u32::MAX);
    let (_, descriptors) = reader.incarnation.as_consumer(index, 0);
    look(|| {
        if let Some(finding) = descriptors.first().and_then(|page| refused_segment(page, Kind::Commit)) {
            return finding;
        }
        look_at_acknowledgement(reader, producer)
    })
}

fn look(once: impl Fn() -> Finding) -> Finding {
    let mut all = Finding::Possible;
    for _ in 0..LOOKS {
        match once() {
            Finding::Possible => {}
            Finding::Unsure => all = Finding::Unsure,
            impossible @ Finding::Impossible(_) => return impossible,
        }
    }
    all
}

fn refused_segment(descriptor: &std::os::fd::BorrowedFd<'_>, kind: Kind) -> Option<Finding> {
    match Segment::adopt(descriptor.try_clone_to_owned().ok()?, kind) {
        Ok(_) => None,
        // No more descriptors, or the like: it says nothing of the accused one.
        Err(SegmentError::System(_)) => Some(Finding::Unsure),
        Err(error) => Some(Finding::Impossible(error.to_string())),
    }
}

fn slot_of(end: End<'_>) -> Result<Slot, Finding> {
    end.incarnation.page().read().map_err(|error| match error {
        CommitError::Busy => Finding::Unsure,
        CommitError::Impossible { .. } => Finding::Impossible(error.to_string()),
    })
}

fn look_at_ring(producer: End<'_>, reader: End<'_>) -> Finding {
    // The reader's first: what it frees meanwhile can only make the range longer than what is looked at here.
    let (_, free) = reader.incarnation.page().acknowledgement(reader.index);
    let tail = producer.incarnation.page().tail(producer.index);
    // Read after the mirror, which is stored after it: an honest one is not behind.
    let committed = match slot_of(producer) {
        Ok(slot) => slot.outputs.get(producer.index).map_or(0, |output| output.tail),
        Err(finding) => return finding,
    };
    let Some(output) = producer.spec.outputs.get(producer.index) else { return Finding::Unsure };
    let has_moved = || reader.incarnation.page().acknowledgement(reader.index).1 != free;
    if tail > committed || !tail.is_multiple_of(BATCH_ALIGN) {
        return Finding::Impossible(format!("its mirrored tail is {tail}, its committed one {committed}"));
    }
    // The accuser's own numbers, and as in `look_at_acknowledgement` its slot is not behind its mirror.
    let is_accuser_possible = match slot_of(reader) {
        Ok(slot) => slot.inputs.get(reader.index).is_some_and(|input| free <= input.batch),
        Err(finding) => finding == Finding::Unsure,
    };
    if !is_accuser_possible || !free.is_multiple_of(BATCH_ALIGN) {
        return Finding::Possible;
    }
    if free > tail {
        return Finding::Unsure;
    }
    if tail - free > output.capacity {
        let text = format!("its tail {tail} is more than the ring's {} bytes beyond the free {free}", output.capacity);
        return if has_moved() { Finding::Unsure } else { Finding::Impossible(text) };
    }
    let Ok(Some(ring)) = producer.incarnation.map_output(producer.spec, producer.index) else { return Finding::Unsure };
    let walked =
        Consumer::new(ring, ReadPosition { acknowledged: free, batch: free }, tail).and_then(|mut consumer| {
            while consumer.next()?.is_some() {}
            Ok(())
        });
    match walked {
        Ok(()) => Finding::Possible,
        Err(_) if has_moved() => Finding::Unsure,
        Err(violation) => Finding::Impossible(violation.to_string()),
    }
}

fn look_at_acknowledgement(reader: End<'_>, producer: End<'_>) -> Finding {
    let mirrors = || reader.incarnation.page().acknowledgement(reader.index);
    let (acknowledged, free) = mirrors();
    let input = match slot_of(reader) {
        Ok(slot) => slot.inputs.get(reader.index).copied().unwrap_or_default(),
        Err(finding) => return finding,
    };
    // As in `Incarnation::recover`: a mirror is stored after its slot.
    if acknowledged > input.acknowledged || free > input.batch || input.batch > input.acknowledged {
        return Finding::Impossible(format!(
            "it mirrors {acknowledged} acknowledged and {free} free, its slot says {} and {}",
            input.acknowledged, input.batch
        ));
    }
    if !free.is_multiple_of(BATCH_ALIGN) {
        return Finding::Impossible(format!("it freed up to {free}, which is in the middle of a line"));
    }
    let tail = producer.incarnation.page().tail(producer.index);
    let Ok(slot) = slot_of(producer) else { return Finding::Possible };
    let committed = slot.outputs.get(producer.index).map_or(0, |output| output.tail);
    if acknowledged.max(free) > committed {
        return Finding::Impossible(format!("it acknowledged {acknowledged} of {committed} published"));
    }
    let capacity = producer.spec.outputs.get(producer.index).map_or(0, |output| output.capacity);
    if tail.saturating_sub(free) > capacity && mirrors() == (acknowledged, free) {
        return Finding::Impossible(format!("it freed up to {free} only, {tail} are published"));
    }
    Finding::Possible
}
