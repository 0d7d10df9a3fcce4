//! From the checked plan to what runs: which steps become stages, which rings join them, and where each record goes.
//!
//! Sources, sinks and ParDos are stages. A `groupByKey` with a plain path is none: the stages before it take the key and
//! pick the ring, so there is no shuffle process; one with a jq program becomes a router stage in the agent.

use argo_streams_pipeline::{Acknowledgement, Buffering, KeyExpression, Output, Plan, Retry, Source, StepKind};
use argo_streams_shm_protocol::layout::DATA_OFFSET;
use argo_streams_shm_protocol::limits::{
    INPUTS_MAX, LARGE_CAPACITY_BYTES, OUTPUTS_MAX, RECORD_PAYLOAD_BYTES_MAX, RECORD_PAYLOAD_BYTES_MAX_BEFORE,
    RING_CAPACITY_BYTES, RING_CAPACITY_BYTES_MAX, RING_CAPACITY_BYTES_MIN, ring_capacity_bytes,
};
use argo_streams_shm_protocol::{
    GrantInput, GrantOutput, KEY_GROUPS, PageShape, RetryPolicy, RouteEdge, RouteNode, Routes, StageSpec, StateShape,
};

/// Committed counters of every stage: node 0 and 1 of its routes, then one for each further node.
pub const COUNTER_MAIN: usize = 0;
/// The counter of the error output.
pub const COUNTER_ERRORS: usize = 1;

/// Partitions of a topic whose positions a source keeps, in 64 KiB of each slot.
const KAFKA_PARTITIONS_MAX: u32 = 4096;
/// Capacity of a ring into a program whose output is a pipe and who answers line for line: such a program answers when its buffer is
/// full, of 4 to 64 KiB mostly, and until then everything that it was given must stay in the ring.
const BUFFERED_RING_CAPACITY_BYTES: u64 = 4 << 20;

/// One end of a ring: a stage and the index of its input or output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingEnd {
    /// The stage.
    pub stage: usize,
    /// Its input or output.
    pub index: usize,
}

/// One stage to be.
#[derive(Clone, Debug)]
pub struct StagePlan {
    /// The step that it works for.
    pub step: usize,
    /// Which of the step's workers.
    pub worker: usize,
    /// What it is granted.
    pub spec: StageSpec,
    /// Who writes each of its inputs.
    pub producers: Vec<RingEnd>,
    /// Who reads each of its outputs.
    pub consumers: Vec<RingEnd>,
    /// The logical edge of each input: from which step (a groupByKey counts as one), reading errors or not.
    pub input_edges: Vec<(usize, Output)>,
}

/// A counted groupByKey that is no stage: its numbers are counters of the stages before it.
#[derive(Clone, Copy, Debug)]
pub struct CountedStep {
    /// The step.
    pub step: usize,
    /// The stage that counts.
    pub stage: usize,
    /// The counter of its keyed records.
    pub main: usize,
    /// The counter of its refused records.
    pub errors: usize,
    /// The step that it reads from there.
    pub from: usize,
}

/// Everything that runs.
#[derive(Clone, Debug, Default)]
pub struct Physical {
    /// Stages in the order of their steps.
    pub stages: Vec<StagePlan>,
    /// groupByKey steps that are no stages.
    pub counted: Vec<CountedStep>,
    /// The id that the next new stage is given, in a later version of the pipeline.
    pub next_stage: u64,
    /// The same for a ring.
    pub next_ring: u64,
}

/// Why a plan cannot run on one node.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PhysicalError {
    /// More rings than a page has room for.
    #[error(
        "{place}: {rings} rings {direction} one worker of {name:?}; at most {limit}: use fewer containers or fewer readers"
    )]
    TooManyRings {
        /// Where in the file.
        place: String,
        /// The step.
        name: String,
        /// How many.
        rings: usize,
        /// "into" or "out of".
        direction: &'static str,
        /// The limit.
        limit: u32,
    },
    /// More outputs than there are counters.
    #[error("{place}: {nodes} groupByKey outputs hang on {name:?}; at most {limit}")]
    TooManyNodes {
        /// Where in the file.
        place: String,
        /// The step.
        name: String,
        /// How many.
        nodes: usize,
        /// The limit.
        limit: u32,
    },
}

impl Physical {
    /// Lays a plan out.
    ///
    /// # Errors
    /// [`PhysicalError`] when a stage would need more rings than its page has room for.
    pub fn new(plan: &Plan) -> Result<Self, PhysicalError> {
        let mut this = Self::default();
        for step in plan.steps() {
            for worker in 0..workers_of(step.kind()) {
                let state = match step.kind() {
                    StepKind::ParDo(pardo) => StateShape::with_limit(pardo.state_limit_bytes()),
                    StepKind::Source(_) | StepKind::GroupByKey(_) | StepKind::Sink(_) | StepKind::Overflow(_) => {
                        StateShape::default()
                    }
                };
                let stage = this.stages.len();
                this.stages.push(StagePlan {
                    step: step.index(),
                    worker,
                    spec: StageSpec {
                        stage: stage as u64 + 1,
                        name: step.name().to_owned(),
                        worker: u32::try_from(worker).unwrap_or(0),
                        shape: match step.kind() {
                            StepKind::Source(Source::Kafka(_)) => {
                                PageShape { partitions: KAFKA_PARTITIONS_MAX, ..PageShape::default() }
                            }
                            _ => PageShape::default(),
                        },
                        state,
                        retry: match step.kind() {
                            StepKind::ParDo(pardo) => Some(retry_policy(pardo.retry())),
                            _ => None,
                        },
                        is_kept: false,
                        // A line or a message of a source is bounded by what is gathered in memory.
                        record_bytes_max: if matches!(
                            step.kind(),
                            StepKind::ParDo(_) | StepKind::GroupByKey(_) | StepKind::Overflow(_) | StepKind::Sink(_)
                        ) {
                            RECORD_PAYLOAD_BYTES_MAX as u64
                        } else {
                            RECORD_PAYLOAD_BYTES_MAX_BEFORE as u64
                        },
                        inputs: Vec::new(),
                        outputs: Vec::new(),
                        routes: Routes { table_epoch: 1, nodes: Vec::new() },
                    },
                    producers: Vec::new(),
                    consumers: Vec::new(),
                    input_edges: Vec::new(),
                });
            }
        }
        for stage in 0..this.stages.len() {
            let Some(step) = this.stages.get(stage).map(|stage| stage.step) else { break };
            let name = plan.step(step).map_or("", |step| step.name()).to_owned();
            let main = this.add_node(stage, name.clone());
            let errors = this.add_node(stage, format!("{name}.errors"));
            this.connect(plan, stage, main, step, Output::Main);
            this.connect(plan, stage, errors, step, Output::Errors);
        }
        this.next_stage = this.stages.len() as u64 + 1;
        this.next_ring = this.stages.iter().map(|stage| stage.spec.outputs.len() as u64).sum::<u64>() + 1;
        this.check(plan)?;
        Ok(this)
    }

    /// The stages of a step.
    pub fn stages_of(&self, step: usize) -> impl Iterator<Item = usize> + '_ {
        self.stages.iter().enumerate().filter(move |(_, stage)| stage.step == step).map(|(index, _)| index)
    }

    fn add_node(&mut self, stage: usize, name: String) -> usize {
        let Some(stage) = self.stages.get_mut(stage) else { return 0 };
        let nodes = &mut stage.spec.routes.nodes;
        nodes.push(RouteNode { name, counter: u32::try_from(nodes.len()).unwrap_or(u32::MAX), ..RouteNode::default() });
        nodes.len() - 1
    }

    /// Hangs the readers of a step's output on a node of a stage.
    fn connect(&mut self, plan: &Plan, stage: usize, node: usize, step: usize, output: Output) {
        for reader in plan.readers(step, output) {
            let Some(kind) = plan.step(reader).map(argo_streams_pipeline::Step::kind) else { continue };
            match kind {
                StepKind::GroupByKey(group) if workers_of(kind) == 0 => {
                    let name = plan.step(reader).map_or("", |step| step.name()).to_owned();
                    let main = self.add_node(stage, name.clone());
                    let errors = self.add_node(stage, format!("{name}.errors"));
                    if let Some(node) =
                        self.stages.get_mut(stage).and_then(|stage| stage.spec.routes.nodes.get_mut(node))
                    {
                        let index = |node: usize| u32::try_from(node).unwrap_or(u32::MAX);
                        node.keyed.push((group.key().to_string(), index(main), index(errors)));
                    }
                    self.counted.push(CountedStep { step: reader, stage, main, errors, from: step });
                    self.connect(plan, stage, main, reader, Output::Main);
                    self.connect(plan, stage, errors, reader, Output::Errors);
                }
                _ => self.add_edge(plan, stage, node, reader, (step, output)),
            }
        }
    }

    fn add_edge(&mut self, plan: &Plan, stage: usize, node: usize, reader: usize, (from, output): (usize, Output)) {
        let workers: Vec<usize> = self.stages_of(reader).collect();
        let writers = self.stages.get(stage).map_or(1, |writer| self.stages_of(writer.step).count());
        let capacity = plan
            .step(reader)
            .map_or(RING_CAPACITY_BYTES, |step| capacity_into(step.kind(), writers.saturating_mul(workers.len())));
        let mut rings = Vec::with_capacity(workers.len());
        for worker in &workers {
            let ring_id = self.stages.iter().map(|stage| stage.spec.outputs.len() as u64).sum::<u64>() + 1;
            let from_name = self
                .stages
                .get(stage)
                .and_then(|stage| stage.spec.routes.nodes.get(node))
                .map_or(String::new(), |node| node.name.clone());
            let Some(consumer) = self.stages.get_mut(*worker) else { continue };
            let input = consumer.spec.inputs.len();
            consumer.spec.inputs.push(GrantInput {
                ring: ring_id,
                from: from_name,
                capacity,
                large_capacity: LARGE_CAPACITY_BYTES,
            });
            consumer.input_edges.push((from, output));
            let Some(producer) = self.stages.get_mut(stage) else { continue };
            let index = producer.spec.outputs.len();
            producer.spec.outputs.push(GrantOutput {
                ring: ring_id,
                capacity,
                large_capacity: LARGE_CAPACITY_BYTES,
                free: 0,
            });
            producer.consumers.push(RingEnd { stage: *worker, index: input });
            rings.push(u32::try_from(index).unwrap_or(u32::MAX));
            if let Some(consumer) = self.stages.get_mut(*worker) {
                consumer.producers.push(RingEnd { stage, index });
            }
        }
        let owners = if rings.len() > 1 { owner_table(rings.len()) } else { Vec::new() };
        if let Some(node) = self.stages.get_mut(stage).and_then(|stage| stage.spec.routes.nodes.get_mut(node)) {
            node.edges.push(RouteEdge { rings, owners });
        }
    }

    /// A ring that exists already has the capacity that its segment has room for. A length that no ring has changes nothing.
    pub fn set_ring_len(&mut self, stage: usize, output: usize, len_bytes: u64) {
        let Some(writer) = self.stages.get_mut(stage) else { return };
        let (Some(granted), Some(end)) = (writer.spec.outputs.get_mut(output), writer.consumers.get(output).copied())
        else {
            return;
        };
        let Some(capacity) = len_bytes.checked_sub(DATA_OFFSET as u64 + granted.large_capacity) else { return };
        if !capacity.is_power_of_two() || !(RING_CAPACITY_BYTES_MIN..=RING_CAPACITY_BYTES_MAX).contains(&capacity) {
            return;
        }
        granted.capacity = capacity;
        if let Some(input) = self.stages.get_mut(end.stage).and_then(|reader| reader.spec.inputs.get_mut(end.index)) {
            input.capacity = capacity;
        }
    }

    fn check(&self, plan: &Plan) -> Result<(), PhysicalError> {
        for stage in &self.stages {
            let (place, name) =
                plan.step(stage.step).map(|step| (step.place(), step.name().to_owned())).unwrap_or_default();
            for (rings, direction, limit) in
                [(stage.producers.len(), "into", INPUTS_MAX), (stage.consumers.len(), "out of", OUTPUTS_MAX)]
            {
                if rings > limit as usize {
                    return Err(PhysicalError::TooManyRings { place, name, rings, direction, limit });
                }
            }
            let nodes = stage.spec.routes.nodes.len();
            if nodes > stage.spec.shape.counters as usize {
                return Err(PhysicalError::TooManyNodes { place, name, nodes, limit: stage.spec.shape.counters });
            }
        }
        Ok(())
    }
}

/// As a stage is granted it.
fn retry_policy(retry: &Retry) -> RetryPolicy {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "the plan holds 1 to 100 and 0 to 1")]
    let thousandths = |share: f64| (share * 1000.0).round() as u32;
    RetryPolicy {
        is_declared: retry.is_declared(),
        attempts: retry.attempts(),
        initial_ns: retry.initial_ns(),
        max_ns: retry.max_ns(),
        factor_thousandths: thousandths(retry.factor()),
        jitter_thousandths: thousandths(retry.jitter()),
    }
}

/// Capacity of each of so many rings into a step.
fn capacity_into(kind: &StepKind, rings: usize) -> u64 {
    match kind {
        StepKind::ParDo(pardo)
            if pardo.buffering() == Buffering::Block
                && matches!(pardo.acknowledgement(), Acknowledgement::Line | Acknowledgement::Auto) =>
        {
            BUFFERED_RING_CAPACITY_BYTES
        }
        _ => ring_capacity_bytes(rings),
    }
}

/// How many stages a step becomes.
fn workers_of(kind: &StepKind) -> usize {
    match kind {
        StepKind::Source(_) | StepKind::Sink(_) | StepKind::Overflow(_) => 1,
        StepKind::ParDo(pardo) => usize::from(pardo.containers()),
        StepKind::GroupByKey(group) => match group.key() {
            KeyExpression::Path(_) => 0,
            KeyExpression::Program(_) => 1,
        },
    }
}

/// Equal, contiguous slices of the key groups: which worker has each.
#[must_use]
pub fn owner_table(workers: usize) -> Vec<u16> {
    (0..KEY_GROUPS).map(|group| u16::try_from(group * workers / KEY_GROUPS).unwrap_or(0)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn physical(steps: &str) -> Physical {
        let text = format!("apiVersion: argoproj.io/v1alpha1\nkind: Pipeline\nmetadata:\n  name: x\nspec:\n{steps}");
        Physical::new(&argo_streams_pipeline::parse(text.as_bytes(), "x.yaml").unwrap()).unwrap()
    }

    #[test]
    fn a_plain_key_is_taken_by_the_stage_before_it() {
        let physical =
            physical("  - stdin: {}\n  - groupByKey:\n      key: .k\n  - parDo: a\n    containers: 3\n  - log: {}\n");
        assert_eq!(physical.stages.len(), 5, "a source, three workers, a sink");
        let source = &physical.stages[0];
        let nodes = &source.spec.routes.nodes;
        assert_eq!(nodes[0].keyed, [(".k".to_owned(), 2, 3)]);
        assert_eq!(nodes[2].edges[0].rings, [0, 1, 2]);
        assert_eq!(nodes[2].edges[0].owners.iter().filter(|owner| **owner == 1).count(), 85);
        let sink = &physical.stages[4];
        assert_eq!(sink.producers, (1..4).map(|stage| RingEnd { stage, index: 0 }).collect::<Vec<_>>());
        for (index, stage) in physical.stages.iter().enumerate() {
            for (input, producer) in stage.producers.iter().enumerate() {
                assert_eq!(
                    physical.stages[producer.stage].consumers[producer.index],
                    RingEnd { stage: index, index: input }
                );
                let ring = physical.stages[producer.stage].spec.outputs[producer.index].ring;
                assert_eq!(ring, stage.spec.inputs[input].ring, "both ends name the same ring");
            }
        }
    }

    #[test]
    fn a_ring_has_the_same_capacity_at_both_ends_and_many_have_less() {
        let text = |copies: usize| {
            format!(
                "  - stdin: {{}}\n  - parDo: a\n    containers: {copies}\n  - parDo: b\n    containers: {copies}\n  - log: {{}}\n"
            )
        };
        let capacities = |physical: &Physical| -> Vec<u64> {
            let inputs = physical.stages.iter().flat_map(|stage| &stage.spec.inputs);
            for (stage, index, output) in physical.stages.iter().enumerate().flat_map(|(stage, plan)| {
                plan.spec.outputs.iter().enumerate().map(move |(index, ring)| (stage, index, ring))
            }) {
                let end = physical.stages[stage].consumers[index];
                assert_eq!(physical.stages[end.stage].spec.inputs[end.index].capacity, output.capacity);
            }
            inputs.map(|input| input.capacity >> 10).collect()
        };
        assert_eq!(capacities(&physical(&text(1))), [2048, 2048, 2048]);
        let mut many = physical(&text(4));
        assert_eq!(capacities(&many), [vec![2048; 4], vec![512; 16], vec![2048; 4]].concat());

        // As an older agent had made it: a stage in the middle, its second ring.
        many.set_ring_len(1, 1, DATA_OFFSET as u64 + (256 << 10) + LARGE_CAPACITY_BYTES);
        let changed = capacities(&many).iter().filter(|capacity| **capacity == 256).count();
        assert_eq!(changed, 1, "that ring and no other");
        for nonsense in [0, LARGE_CAPACITY_BYTES, DATA_OFFSET as u64 + 3000 + LARGE_CAPACITY_BYTES, u64::MAX] {
            many.set_ring_len(1, 0, nonsense);
        }
        assert_eq!(capacities(&many).iter().filter(|capacity| **capacity == 512).count(), 15);
    }

    #[test]
    fn each_worker_of_a_pardo_may_have_the_state_that_the_step_says() {
        let physical = physical(
            "  - stdin: {}\n  - parDo: a\n    containers: 2\n    state: {limit: 3Gi}\n  - parDo: b\n  - log: {}\n",
        );
        let limits: Vec<_> = physical.stages.iter().map(|stage| stage.spec.state.limit_bytes).collect();
        assert_eq!(limits, [0, 3 << 30, 3 << 30, 1 << 30, 0]);
        assert!(physical.stages.iter().all(|stage| stage.spec.state.is_possible()));
    }

    #[test]
    fn a_program_as_key_is_a_router_stage() {
        let physical = physical(
            "  - stdin: {}\n  - groupByKey:\n      key: .a + .b\n  - parDo: a\n  - log: {}\n    from: [pardo-2, groupbykey-1.errors]\n",
        );
        assert_eq!(physical.stages.len(), 4);
        assert_eq!(physical.stages[1].spec.routes.nodes[1].edges.len(), 1, "the router's error output is read");
        assert!(physical.counted.is_empty());
    }

    #[test]
    fn readers_of_errors_and_flattened_inputs_have_their_own_rings() {
        let physical = physical(
            "  - stdin: {}\n  - groupByKey:\n      key: .k\n    name: g\n  - parDo: a\n    name: a\n  - log: {}\n    from: [a, a.errors, g.errors]\n  - discard: {}\n    from: [a]\n",
        );
        let names: Vec<_> = physical.stages[2].spec.inputs.iter().map(|input| input.from.as_str()).collect();
        assert_eq!(names, ["g.errors", "a", "a.errors"]);
        assert_eq!(physical.stages[1].spec.routes.nodes[0].edges.len(), 2, "two steps read `a`");
    }
}
