//! What another version of a pipeline's file changes in a run: which stages stay as they are, which go on with other rings or
//! another program, which are new, and which end. Pure; [`crate::run`] does it, when nothing is in flight.
//!
//! Steps are the same when they have the same name and the same definition; of those that are left, when they have the same
//! definition (a step that comes in between moves the default names of those behind it), and then programs also by their name
//! alone. Stages are the same when they are the same worker of the same step. Rings are the same when they lead from the same node
//! of the same stage to the same stage. Whatever is the same keeps its id, so that a stage
//! that did not change in any way can be left alone: its neighbours die and are born again, as after a kill.

use std::collections::{HashMap, VecDeque};

use argo_streams_pipeline::{ParDo, Plan, Step, StepKind, Transport};
use argo_streams_shm_protocol::limits::RING_CAPACITY_BYTES;

use crate::physical::{Physical, PhysicalError};

/// What changes.
#[derive(Clone, Debug)]
pub struct Reshaping {
    /// The layout that is to be.
    pub physical: Physical,
    /// For each of its stages, the stage of the present layout that it goes on from.
    pub before: Vec<Option<usize>>,
    /// Whether it stays as it is.
    pub is_kept: Vec<bool>,
    /// Stages of the present layout that end.
    pub ended: Vec<usize>,
    /// Steps whose keyed state is to be dealt out among other workers.
    pub deals: Vec<Deal>,
    /// For each step to be, the step at present that it is.
    pub same: Vec<Option<usize>>,
    /// Names of nodes that are others by now.
    renamed: HashMap<String, String>,
}

/// A step with another number of workers, or another limit of state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Deal {
    /// Its name.
    pub step: String,
    /// Its stages at present.
    pub from: Vec<usize>,
    /// Its stages to be, in the new layout.
    pub to: Vec<usize>,
}

/// Why a run cannot become what a file says.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReshapeError {
    /// The plan does not fit.
    #[error(transparent)]
    Physical(#[from] PhysicalError),
    /// A source is new, gone, or another one.
    #[error(
        "source {name:?} {what}: where a source stands is known to this run only; drain it, and run the changed file"
    )]
    Source {
        /// Its name.
        name: String,
        /// What of it.
        what: &'static str,
    },
}

impl Reshaping {
    /// Compares a run's plan and layout with another plan of the same pipeline.
    ///
    /// # Errors
    /// [`ReshapeError`].
    pub fn new(old_plan: &Plan, old: &Physical, new_plan: &Plan) -> Result<Self, ReshapeError> {
        let same = same_steps(old_plan, new_plan);
        let source = |step: &&Step| matches!(step.kind(), StepKind::Source(_));
        let gone = old_plan.steps().iter().filter(source).find(|step| !same.contains(&Some(step.index())));
        let new = new_plan.steps().iter().filter(source).find(|step| same.get(step.index()) == Some(&None));
        for (step, what) in [(gone, "is gone, or another one"), (new, "is new, or another one")] {
            if let Some(step) = step {
                return Err(ReshapeError::Source { name: step.name().to_owned(), what });
            }
        }
        let renamed = renamed(old_plan, new_plan, &same);
        let mut physical = Physical::new(new_plan)?;
        let before: Vec<Option<usize>> = physical
            .stages
            .iter()
            .map(|stage| {
                let step = same.get(stage.step).copied().flatten()?;
                old.stages.iter().position(|found| found.worker == stage.worker && found.step == step)
            })
            .collect();
        number_as(&mut physical, old, &before, &renamed);
        let deals = deals(old_plan, old, new_plan, &physical, &same);
        let is_kept = physical
            .stages
            .iter()
            .zip(&before)
            .enumerate()
            .map(|(index, (stage, before))| {
                let (Some(before), Some(step)) =
                    (before.and_then(|before| old.stages.get(before)), new_plan.step(stage.step))
                else {
                    return false;
                };
                before.spec == stage.spec
                    && old_plan.step(before.step).is_some_and(|found| starts_as(found, step))
                    && !deals.iter().any(|deal| deal.to.contains(&index))
            })
            .collect();
        let ended = (0..old.stages.len()).filter(|stage| !before.contains(&Some(*stage))).collect();
        Ok(Self { physical, before, is_kept, ended, deals, same, renamed })
    }

    /// The stage of the present layout that a stage goes on from.
    #[must_use]
    pub fn before(&self, stage: usize) -> Option<usize> {
        self.before.get(stage).copied().flatten()
    }

    /// Whether a stage stays as it is.
    #[must_use]
    pub fn is_kept(&self, stage: usize) -> bool {
        self.is_kept.get(stage) == Some(&true)
    }

    /// What the stages of the present layout become that go on.
    #[must_use]
    pub fn now(&self) -> HashMap<usize, usize> {
        self.before.iter().enumerate().filter_map(|(now, before)| Some(((*before)?, now))).collect()
    }

    /// The name that a node of the present layout has in the new one.
    #[must_use]
    pub fn name_of<'a>(&'a self, node: &'a str) -> &'a str {
        self.renamed.get(node).map_or(node, String::as_str)
    }

    /// Whether a stage of the present layout stays as it is.
    #[must_use]
    pub fn keeps(&self, old: usize) -> bool {
        self.before.iter().zip(&self.is_kept).any(|(before, is_kept)| *is_kept && *before == Some(old))
    }

    /// Whether anything changes at all.
    #[must_use]
    pub fn is_nothing(&self) -> bool {
        self.ended.is_empty() && self.is_kept.iter().all(|is_kept| *is_kept)
    }

    /// The rings of the present layout that are not in the new one, or to which keys are dealt otherwise: nothing may wait in them.
    #[must_use]
    pub fn rings_to_be_empty(&self, old: &Physical) -> Vec<u64> {
        let kept: HashMap<u64, Vec<u64>> = edges(&self.physical);
        edges(old).into_iter().filter(|(ring, edge)| kept.get(ring) != Some(edge)).map(|(ring, _)| ring).collect()
    }
}

/// Each ring with all rings of its edge, in the order of their owners.
fn edges(physical: &Physical) -> HashMap<u64, Vec<u64>> {
    let mut edges = HashMap::new();
    for stage in &physical.stages {
        for edge in stage.spec.routes.nodes.iter().flat_map(|node| &node.edges) {
            let id = |ring: &u32| stage.spec.outputs.get(*ring as usize).map(|output| output.ring);
            let rings: Vec<u64> = edge.rings.iter().filter_map(id).collect();
            edges.extend(rings.iter().map(|ring| (*ring, rings.clone())));
        }
    }
    edges
}

fn is_program(step: &Step) -> bool {
    matches!(step.kind(), StepKind::ParDo(_))
}

/// For each step of a plan, the step of another one that it is.
fn same_steps(old_plan: &Plan, new_plan: &Plan) -> Vec<Option<usize>> {
    let mut same = vec![None; new_plan.steps().len()];
    let alike: [fn(&Step, &Step) -> bool; 3] = [
        |old, new| old.name() == new.name() && starts_as(old, new),
        starts_as,
        |old, new| old.name() == new.name() && is_program(old) && is_program(new),
    ];
    for alike in alike {
        for step in new_plan.steps() {
            if same.get(step.index()) != Some(&None) {
                continue;
            }
            let found = old_plan.steps().iter().find(|old| !same.contains(&Some(old.index())) && alike(old, step));
            if let (Some(entry), Some(found)) = (same.get_mut(step.index()), found) {
                *entry = Some(found.index());
            }
        }
    }
    same
}

/// Names of nodes that are others by now.
fn renamed(old_plan: &Plan, new_plan: &Plan, same: &[Option<usize>]) -> HashMap<String, String> {
    let mut renamed = HashMap::new();
    for (step, before) in new_plan.steps().iter().zip(same) {
        let Some(before) = before.and_then(|before| old_plan.step(before)) else { continue };
        if before.name() != step.name() {
            renamed.insert(before.name().to_owned(), step.name().to_owned());
            renamed.insert(format!("{}.errors", before.name()), format!("{}.errors", step.name()));
        }
    }
    renamed
}

/// Whether a worker of a step is started as before.
fn starts_as(old: &Step, new: &Step) -> bool {
    match (old.kind(), new.kind()) {
        (StepKind::ParDo(old), StepKind::ParDo(new)) => old.with_containers(new.containers()) == *new,
        (old, new) => old == new,
    }
}

/// Whether a step's programs may keep state: only with the library.
fn may_have_state(pardo: &ParDo) -> bool {
    matches!(pardo.transport(), Transport::Auto | Transport::Shm)
}

fn deals(old_plan: &Plan, old: &Physical, new_plan: &Plan, new: &Physical, same: &[Option<usize>]) -> Vec<Deal> {
    let mut deals = Vec::new();
    for step in new_plan.steps() {
        let found = same.get(step.index()).copied().flatten().and_then(|before| old_plan.step(before));
        let (StepKind::ParDo(pardo), Some(found)) = (step.kind(), found) else { continue };
        let StepKind::ParDo(before) = found.kind() else { continue };
        let is_same =
            pardo.containers() == before.containers() && pardo.state_limit_bytes() == before.state_limit_bytes();
        if !is_same && (may_have_state(before) || may_have_state(pardo)) {
            deals.push(Deal {
                step: step.name().to_owned(),
                from: old.stages_of(found.index()).collect(),
                to: new.stages_of(step.index()).collect(),
            });
        }
    }
    deals
}

/// Writer and reader of a ring, its kind, and the node that it leads from.
type Ends<'a> = (usize, usize, u64, &'a str);

/// Gives stages and rings the ids of those that they are, and all others new ones, which nothing of this run has had before.
fn number_as(physical: &mut Physical, old: &Physical, before: &[Option<usize>], renamed: &HashMap<String, String>) {
    let (mut next_stage, mut next_ring) = (old.next_stage, old.next_ring);
    let take = |next: &mut u64| std::mem::replace(next, *next + 1);
    for (stage, before) in physical.stages.iter_mut().zip(before) {
        stage.spec.stage = match before.and_then(|before| old.stages.get(before)) {
            Some(old) => old.spec.stage,
            None => take(&mut next_stage),
        };
    }
    // A ring that is used whole is another one than a usual one. Of those one keeps its capacity: how many lead to a step is no reason to
    // make those anew that lead there already.
    let kind = |capacity: u64| if capacity > RING_CAPACITY_BYTES { capacity } else { 0 };
    // Two rings may lead from nodes of the same name, where a groupByKey reads two outputs of one step.
    let mut known: HashMap<Ends<'_>, VecDeque<(u64, u64)>> = HashMap::new();
    for (consumer, stage) in old.stages.iter().enumerate() {
        for (producer, input) in stage.producers.iter().zip(&stage.spec.inputs) {
            let from = renamed.get(&input.from).unwrap_or(&input.from);
            let ends = (producer.stage, consumer, kind(input.capacity), from.as_str());
            known.entry(ends).or_default().push_back((input.ring, input.capacity));
        }
    }
    let mut numbered = Vec::new();
    for (consumer, stage) in physical.stages.iter().enumerate() {
        for (input, (producer, granted)) in stage.producers.iter().zip(&stage.spec.inputs).enumerate() {
            let ends = before.get(producer.stage).copied().flatten().zip(before.get(consumer).copied().flatten());
            let same = ends.and_then(|(producer, consumer)| {
                known.get_mut(&(producer, consumer, kind(granted.capacity), granted.from.as_str()))?.pop_front()
            });
            let numbers = same.unwrap_or_else(|| (take(&mut next_ring), granted.capacity));
            numbered.push((consumer, input, *producer, numbers));
        }
    }
    for (consumer, input, producer, (ring, capacity)) in numbered {
        if let Some(granted) = physical.stages.get_mut(consumer).and_then(|stage| stage.spec.inputs.get_mut(input)) {
            (granted.ring, granted.capacity) = (ring, capacity);
        }
        if let Some(granted) =
            physical.stages.get_mut(producer.stage).and_then(|stage| stage.spec.outputs.get_mut(producer.index))
        {
            (granted.ring, granted.capacity) = (ring, capacity);
        }
    }
    (physical.next_stage, physical.next_ring) = (next_stage, next_ring);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(steps: &str) -> Plan {
        let text = format!("apiVersion: argoproj.io/v1alpha1\nkind: Pipeline\nmetadata:\n  name: x\nspec:\n{steps}");
        argo_streams_pipeline::parse(text.as_bytes(), "x.yaml").expect("a good plan")
    }

    fn reshape(old: &str, new: &str) -> Result<Reshaping, ReshapeError> {
        let (old, new) = (plan(old), plan(new));
        Reshaping::new(&old, &Physical::new(&old).expect("it fits"), &new)
    }

    /// Of each stage that will be: its step and worker, and what becomes of it.
    fn told(reshaping: &Reshaping) -> Vec<String> {
        let stages = reshaping.physical.stages.iter().zip(&reshaping.before).zip(&reshaping.is_kept);
        stages
            .map(|((stage, before), is_kept)| {
                let what = match (before, is_kept) {
                    (None, _) => "new",
                    (Some(_), true) => "kept",
                    (Some(_), false) => "goes on",
                };
                format!("{}/{} {what}", stage.spec.name, stage.worker)
            })
            .collect()
    }

    const CHAIN: &str = "  - stdin: {}\n    name: in\n  - groupByKey: {key: .k}\n    name: g\n  - parDo: a\n    name: a\n    transport: stdio\n  - parDo: b\n    name: b\n  - log: {}\n    name: out\n";

    #[test]
    fn the_same_file_changes_nothing() {
        let same = reshape(CHAIN, CHAIN).expect("possible");
        assert!(same.is_nothing() && same.deals.is_empty());
        let old = Physical::new(&plan(CHAIN)).expect("it fits");
        assert!(same.rings_to_be_empty(&old).is_empty());
        assert_eq!((same.physical.next_stage, same.physical.next_ring), (old.next_stage, old.next_ring));
    }

    #[test]
    fn more_workers_leave_those_alone_that_neither_write_to_them_nor_read_from_them() {
        let more = CHAIN.replace("transport: stdio", "transport: stdio\n    containers: 3");
        let reshaping = reshape(CHAIN, &more).expect("possible");
        let expected = ["in/0 goes on", "a/0 kept", "a/1 new", "a/2 new", "b/0 goes on", "out/0 kept"];
        assert_eq!(told(&reshaping), expected);
        assert!(reshaping.deals.is_empty(), "a program on lines keeps no state");
        let ids: Vec<u64> = reshaping.physical.stages.iter().map(|stage| stage.spec.stage).collect();
        assert_eq!(ids, [1, 2, 5, 6, 3, 4]);
        // The ring to its first worker is the same, and its keys are dealt otherwise.
        let old = Physical::new(&plan(CHAIN)).expect("it fits");
        assert_eq!(reshaping.rings_to_be_empty(&old), [1]);
        let fewer = Reshaping::new(&plan(&more), &reshaping.physical, &plan(CHAIN)).expect("possible");
        assert_eq!(told(&fewer), ["in/0 goes on", "a/0 kept", "b/0 goes on", "out/0 kept"]);
        assert_eq!(fewer.ended, [2, 3]);
        // So many that rings made now are shorter: the one that was there stays as it is.
        let many = reshape(CHAIN, &CHAIN.replace("transport: stdio", "transport: stdio\n    containers: 9"))
            .expect("possible");
        assert_eq!(told(&many)[..3], ["in/0 goes on", "a/0 kept", "a/1 new"]);
        let capacities: Vec<_> = many.physical.stages[0].spec.outputs.iter().map(|ring| ring.capacity >> 10).collect();
        assert_eq!(capacities, [vec![2048], vec![512; 8]].concat());
        // What is gone is never the id of something else.
        let again = Reshaping::new(&plan(CHAIN), &fewer.physical, &plan(&more)).expect("possible");
        assert_eq!(again.physical.stages.iter().map(|stage| stage.spec.stage).max(), Some(8));
    }

    #[test]
    fn the_state_of_a_step_with_the_library_is_dealt_out_among_all_its_workers() {
        let more = CHAIN.replace("name: b\n", "name: b\n    containers: 2\n");
        let reshaping = reshape(CHAIN, &more).expect("possible");
        assert_eq!(reshaping.deals, [Deal { step: "b".to_owned(), from: vec![2], to: vec![2, 3] }]);
        assert_eq!(told(&reshaping), ["in/0 kept", "a/0 goes on", "b/0 goes on", "b/1 new", "out/0 goes on"]);
    }

    #[test]
    fn a_step_comes_in_between_and_goes_again() {
        let with = CHAIN.replace("  - parDo: b\n", "  - parDo: c\n    name: c\n  - parDo: b\n");
        let reshaping = reshape(CHAIN, &with).expect("possible");
        assert_eq!(told(&reshaping), ["in/0 kept", "a/0 goes on", "c/0 new", "b/0 goes on", "out/0 kept"]);
        let back = Reshaping::new(&plan(&with), &reshaping.physical, &plan(CHAIN)).expect("possible");
        assert_eq!(told(&back), ["in/0 kept", "a/0 goes on", "b/0 goes on", "out/0 kept"]);
        assert_eq!(back.ended, [2]);
        for reshaping in [&reshaping, &back] {
            for stage in &reshaping.physical.stages {
                for (end, input) in stage.producers.iter().zip(&stage.spec.inputs) {
                    let output = &reshaping.physical.stages[end.stage].spec.outputs[end.index];
                    assert_eq!(output.ring, input.ring, "both ends name the same ring");
                }
            }
        }
    }

    #[test]
    fn another_program_goes_on_where_the_old_one_was_and_another_sink_begins_afresh() {
        let other = CHAIN.replace("parDo: a\n", "parDo: a2\n").replace("  - log: {}", "  - discard: {}");
        let reshaping = reshape(CHAIN, &other).expect("possible");
        assert_eq!(told(&reshaping), ["in/0 kept", "a/0 goes on", "b/0 goes on", "out/0 new"]);
        assert_eq!(reshaping.ended, [3]);
        let reader = format!("{CHAIN}  - discard: {{}}\n    name: too\n    from: [a]\n");
        let reshaping = reshape(CHAIN, &reader).expect("possible");
        assert_eq!(told(&reshaping), ["in/0 kept", "a/0 goes on", "b/0 kept", "out/0 kept", "too/0 new"]);
    }

    #[test]
    fn default_names_that_move_take_nothing_from_their_steps() {
        let begin = "  - stdin: {}\n  - parDo: a\n  - file: {path: out, truncate: true}\n";
        let with = begin.replace("  - parDo: a\n", "  - parDo: c\n  - parDo: a\n");
        let reshaping = reshape(begin, &with).expect("possible");
        // pardo-1 was the name of a, and is that of c.
        assert_eq!(told(&reshaping), ["stdin-0/0 goes on", "pardo-1/0 new", "pardo-2/0 goes on", "file-3/0 goes on"]);
        assert_eq!(reshaping.name_of("pardo-1.errors"), "pardo-2.errors");
        let ring = reshaping.physical.stages[3].spec.inputs[0].ring;
        assert_eq!(ring, 2, "the ring from a to its file is the one that it was");
        assert!(reshaping.ended.is_empty());
    }

    #[test]
    fn sources_are_what_they_were() {
        for other in [
            CHAIN.replace("  - stdin: {}\n    name: in\n", "  - generate: {}\n    name: in\n"),
            CHAIN.replace("stdin: {}", "file: {path: in}"),
            format!("{CHAIN}  - generate: {{}}\n    name: more\n    from: []\n  - discard: {{}}\n    from: [more]\n"),
        ] {
            assert!(matches!(reshape(CHAIN, &other), Err(ReshapeError::Source { .. })), "{other}");
        }
    }
}
