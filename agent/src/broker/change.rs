//! A changed pipeline: whether everything rests, and the stages as the new layout wants them.
//!
//! What a change touches dies, as by a kill, and is born again with other rings: neighbours that are not touched see nothing
//! else. So nothing here is a new way for records to go; but rings that vanish, and those whose keys are dealt to other workers, must be
//! empty before.

use std::collections::HashMap;

use argo_streams_shm_protocol::{DealtState, StageSpec, deal_state, hash_key, key_group};

use super::*;
use crate::physical::{StagePlan, owner_table};
use crate::reshape::{Deal, Reshaping};

impl Broker {
    /// What is still under way, in words; `None`: every record is finished, and no program has one in hand. Only what sources
    /// or programs do by themselves changes that again.
    #[must_use]
    pub fn under_way(&self) -> Option<String> {
        for (stage, plan) in self.physical.stages.iter().enumerate() {
            let Some(worker) = self.workers.get(stage) else { continue };
            let name = &plan.spec.name;
            let Ok(slot) = worker.incarnation.page().read() else { return Some(format!("step {name} is busy")) };
            if slot.parked > 0 {
                return Some(format!(
                    "step {name} has {} record(s) that wait to be tried again (onError)",
                    slot.parked
                ));
            }
            for (input, producer) in plan.producers.iter().enumerate() {
                let tail =
                    self.workers.get(producer.stage).map_or(0, |worker| worker.incarnation.page().tail(producer.index));
                if slot.inputs.get(input).is_some_and(|entry| entry.acknowledged < tail) {
                    return Some(format!("step {name} has records that it has not finished"));
                }
            }
        }
        None
    }

    /// The first of these rings in which records wait, as the step before it.
    #[must_use]
    pub fn first_not_empty(&self, rings: &[u64]) -> Option<&str> {
        self.physical.stages.iter().enumerate().find_map(|(stage, plan)| {
            let slot = self.slot(stage)?;
            let waits = plan.producers.iter().zip(&plan.spec.inputs).enumerate().any(|(input, (producer, granted))| {
                let tail = self
                    .slot(producer.stage)
                    .and_then(|slot| slot.outputs.get(producer.index).map(|output| output.tail));
                rings.contains(&granted.ring) && slot.inputs.get(input).map(|entry| entry.acknowledged) != tail
            });
            waits.then_some(plan.spec.name.as_str())
        })
    }

    /// Ends a stage's program, as [`Broker::replace_program`] does, and starts none in its place before [`Broker::reshape`].
    pub fn hold_program(&mut self, stage: usize, now_ns: u64, grace: Duration) {
        if let Some(worker) = self.workers.get_mut(stage) {
            worker.is_held = true;
        }
        self.replace_program(stage, now_ns, grace);
    }

    /// Starts again what is held.
    pub fn release_held(&mut self) {
        for worker in &mut self.workers {
            if std::mem::take(&mut worker.is_held) && worker.shim_must_start && worker.replaced_by_ns.is_none() {
                worker.start_at_ns = Some(0);
            }
        }
    }

    /// Whether a program that is held has ended, with its shim.
    #[must_use]
    pub fn has_ended(&self, stage: usize) -> bool {
        self.workers.get(stage).is_some_and(|worker| {
            worker.is_held
                && worker.shim_must_start
                && worker.replaced_by_ns.is_none()
                && worker.phase == Phase::Waiting
        })
    }

    /// Rings a stage's bell, so that its thread looks around.
    pub fn ring(&mut self, stage: usize) {
        if let Some(worker) = self.workers.get_mut(stage) {
            worker.incarnation.publish_session();
        }
    }

    /// Makes the stages as a changed pipeline wants them. Programs of stages that are not kept have ended, and the agent's own threads
    /// of such stages rest. Afterwards the stages have the numbers of the new layout, and the programs that are to be started are
    /// among the actions.
    ///
    /// # Errors
    /// Where keyed state cannot be dealt out, nothing has changed. Everything else means that
    /// the kernel refuses memory or that a page cannot be believed, and the run is over.
    pub fn reshape(
        &mut self,
        reshaping: &Reshaping,
        transports: &[Transport],
        sockets: &[Option<PathBuf>],
    ) -> Result<(), ChangeError> {
        let mut dealt = HashMap::new();
        for deal in &reshaping.deals {
            self.deal(deal, reshaping, &mut dealt)
                .map_err(|error| ChangeError::State { step: deal.step.clone(), error })?;
        }
        // What rings the bell of a stage of the agent's own besides its neighbours goes on doing so.
        let mut bells = HashMap::new();
        for stage in (0..self.workers.len()).filter(|stage| !reshaping.keeps(*stage)) {
            let own = self.workers.get(stage).filter(|worker| worker.transport == Transport::Internal);
            if let Some(worker) = own {
                bells.insert(stage, worker.incarnation.bell().map_err(IncarnationError::from)?);
            }
            self.recover(stage);
            if self.phase(stage) == Some(Phase::Failed) {
                return Err(ChangeError::Page);
            }
        }
        let old = std::mem::replace(&mut self.physical, reshaping.physical.clone());
        let mut workers: Vec<Option<Worker>> = self.workers.drain(..).map(Some).collect();
        for (index, plan) in reshaping.physical.stages.iter().enumerate() {
            let before = reshaping.before(index);
            let worker = before.and_then(|before| workers.get_mut(before)?.take());
            let transport = transports.get(index).copied().unwrap_or(Transport::Internal);
            let worker = match (worker, before.and_then(|before| old.stages.get(before))) {
                (Some(worker), _) if reshaping.is_kept(index) => worker,
                (Some(worker), Some(old)) => {
                    let mut worker = reborn(worker, old, plan, dealt.remove(&index), reshaping)?;
                    if let Some(bell) = before.and_then(|before| bells.remove(&before)) {
                        worker.incarnation.set_bell(bell);
                    }
                    worker.transport = transport;
                    worker
                }
                _ => {
                    let mut slot = Slot::empty(&plan.spec.shape);
                    let positions = vec![ReaderPosition::default(); plan.spec.outputs.len()];
                    let dealt = dealt.remove(&index);
                    say_state(&mut slot, dealt.as_ref());
                    let mut incarnation = Incarnation::create(&plan.spec, 1, slot.clone(), &positions, None)?;
                    if let Some(dealt) = dealt {
                        incarnation.set_state(dealt);
                    }
                    Worker::new(transport, None, incarnation, slot, plan.spec.inputs.len())
                }
            };
            self.workers.push(worker);
            if let Some(worker) = self.workers.last_mut() {
                worker.socket = sockets.get(index).cloned().flatten();
                if self.is_paused && plan.producers.is_empty() {
                    worker.incarnation.session().set_attention(session::ATTENTION_PAUSE);
                    worker.incarnation.publish_session();
                }
                if !reshaping.is_kept(index) && worker.transport != Transport::Internal {
                    worker.shim_must_start = false;
                    self.actions.push(Action::StartShim { stage: index });
                }
            }
        }
        for (ended, plan) in
            reshaping.ended.iter().filter_map(|stage| Some((workers.get_mut(*stage)?.take()?, old.stages.get(*stage)?)))
        {
            let is_same = |stage: &StagePlan| reshaping.same.get(stage.step).copied().flatten() == Some(plan.step);
            let heir = |stage: &StagePlan| is_same(stage) && stage.worker == 0;
            let heir = self.physical.stages.iter().position(heir).and_then(|heir| self.workers.get_mut(heir));
            if let Some(heir) = heir {
                heir.inherit(&ended, plan, reshaping);
            }
        }
        let now = reshaping.now();
        self.clients.retain(|_, (stage, _)| match now.get(stage) {
            Some(now) => {
                *stage = *now;
                true
            }
            None => false,
        });
        self.is_open_to_all.clear();
        Ok(())
    }

    fn deal(
        &self,
        deal: &Deal,
        reshaping: &Reshaping,
        dealt: &mut HashMap<usize, DealtState>,
    ) -> Result<(), IncarnationError> {
        let mut from = Vec::with_capacity(deal.from.len());
        for stage in &deal.from {
            if let (Some(worker), Some(plan)) = (self.workers.get(*stage), self.physical.stages.get(*stage)) {
                from.push((&worker.incarnation, &plan.spec, worker.incarnation.page().read()?.epoch));
            }
        }
        let to: Vec<_> = deal
            .to
            .iter()
            .filter_map(|stage| {
                let plan = reshaping.physical.stages.get(*stage)?;
                let before = reshaping.before(*stage).and_then(|before| self.workers.get(before));
                let epoch =
                    before.and_then(|worker| worker.incarnation.page().read().ok()).map_or(0, |slot| slot.epoch);
                Some((&plan.spec, before.map_or(1, |worker| worker.incarnation.generation()), epoch))
            })
            .collect();
        let owners = owner_table(to.len());
        let owner = |key: &[u8]| owners.get(key_group(hash_key(key))).copied().map_or(0, usize::from);
        dealt.extend(deal.to.iter().copied().zip(deal_state(&from, &to, owner)?));
        Ok(())
    }
}

/// Why a pipeline could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    /// Keyed state could not be dealt out: nothing has changed.
    #[error("step {step}: {error}")]
    State {
        /// The step.
        step: String,
        /// Why.
        error: IncarnationError,
    },
    /// A stage left a page that cannot be believed; the stage has said so.
    #[error("a stage left a page that cannot be believed")]
    Page,
    /// The kernel refused memory.
    #[error(transparent)]
    Incarnation(#[from] IncarnationError),
}

/// A worker that goes on with other rings, or another program.
fn reborn(
    mut worker: Worker,
    old: &StagePlan,
    plan: &StagePlan,
    dealt: Option<DealtState>,
    reshaping: &Reshaping,
) -> Result<Worker, IncarnationError> {
    let mut slot = moved(&worker.slot_at_start, old, plan, reshaping);
    worker.gone.rename(reshaping);
    say_state(&mut slot, dealt.as_ref());
    let before = &worker.incarnation;
    // What readers wrote was looked at when this one was made; what they have read since, they say themselves.
    let positions: Vec<_> = plan.spec.outputs.iter().map(|output| before.reader_position(output.ring)).collect();
    // The one before was made a moment ago and never shown to anybody: this one has its number.
    let mut next = Incarnation::create(&plan.spec, before.generation(), slot.clone(), &positions, Some(before))?;
    if let Some(dealt) = dealt {
        next.set_state(dealt);
    }
    let lost = old.spec.inputs.iter().zip(&worker.slot_at_start.inputs);
    for (input, entry) in lost.filter(|(input, _)| !plan.spec.inputs.iter().any(|known| known.ring == input.ring)) {
        worker.gone.add_input(reshaping.name_of(&input.from), entry.records, entry.bytes);
    }
    let latencies = plan.spec.inputs.iter().map(|input| {
        let index = old.spec.inputs.iter().position(|known| known.ring == input.ring);
        index.and_then(|index| worker.latencies.get(index).cloned()).unwrap_or_default()
    });
    worker.latencies = latencies.collect();
    worker.progress_at_start = progress_of(&slot);
    worker.restarts_in_a_row = 0;
    worker.slot_at_start = slot;
    worker.incarnation = next;
    worker.is_held = false;
    worker.start_at_ns = None;
    // Another program may not open the library, or may.
    worker.has_opened_itself = false;
    Ok(worker)
}

/// What was done over rings, and by workers, that are gone since: the numbers of a step count on. Everything by name.
#[derive(Clone, Debug, Default)]
pub(super) struct Gone {
    /// Records and bytes from each node.
    inputs: BTreeMap<String, (u64, u64)>,
    /// Records to each node.
    nodes: BTreeMap<String, u64>,
}

impl Gone {
    fn add_input(&mut self, from: &str, records: u64, bytes: u64) {
        let sums = self.inputs.entry(from.to_owned()).or_default();
        *sums = (sums.0 + records, sums.1 + bytes);
    }

    /// Nodes have the names of the new layout from now on.
    fn rename(&mut self, reshaping: &Reshaping) {
        let rename = |name: String| reshaping.name_of(&name).to_owned();
        self.inputs = std::mem::take(&mut self.inputs).into_iter().map(|(name, sums)| (rename(name), sums)).collect();
        self.nodes = std::mem::take(&mut self.nodes).into_iter().map(|(name, sum)| (rename(name), sum)).collect();
    }

    /// Adds everything to a slot, and says how many records came from what is not read any more.
    pub(super) fn add_to(&self, slot: &mut Slot, spec: &StageSpec) -> u64 {
        let mut from_elsewhere = 0;
        for (from, (records, bytes)) in &self.inputs {
            let input = spec.inputs.iter().position(|input| input.from == *from);
            match input.and_then(|input| slot.inputs.get_mut(input)) {
                Some(entry) => {
                    // Every stage says its own number, whatever it may be.
                    entry.records = entry.records.saturating_add(*records);
                    entry.bytes = entry.bytes.saturating_add(*bytes);
                }
                None => from_elsewhere += records,
            }
        }
        for (name, records) in &self.nodes {
            let node = spec.routes.nodes.iter().find(|node| node.name == *name);
            if let Some(counter) = node.and_then(|node| slot.counters.get_mut(node.counter as usize)) {
                *counter = counter.saturating_add(*records);
            }
        }
        from_elsewhere
    }
}

impl Worker {
    /// Another worker of the same step is gone, and its numbers are this one's from now on.
    fn inherit(&mut self, ended: &Self, plan: &StagePlan, reshaping: &Reshaping) {
        let name_of = |name: &str| reshaping.name_of(name).to_owned();
        let slot = &ended.slot_at_start;
        for (input, entry) in plan.spec.inputs.iter().zip(&slot.inputs) {
            self.gone.add_input(&name_of(&input.from), entry.records, entry.bytes);
        }
        for (from, (records, bytes)) in &ended.gone.inputs {
            self.gone.add_input(&name_of(from), *records, *bytes);
        }
        let counted = plan
            .spec
            .routes
            .nodes
            .iter()
            .map(|node| (&node.name, slot.counters.get(node.counter as usize).copied().unwrap_or(0)));
        for (name, records) in counted.chain(ended.gone.nodes.iter().map(|(name, records)| (name, *records))) {
            *self.gone.nodes.entry(name_of(name)).or_default() += records;
        }
        self.restarts += ended.restarts;
        self.violations += ended.violations;
        self.uncertain_records += ended.uncertain_records;
        self.state_full += ended.state_full;
    }
}

/// A slot with its entries where the new layout has them.
fn moved(slot: &Slot, old: &StagePlan, plan: &StagePlan, reshaping: &Reshaping) -> Slot {
    let mut moved = Slot { state: StageState::Running, ..slot.clone() };
    moved.inputs.fill_with(Default::default);
    moved.outputs.fill_with(Default::default);
    moved.counters.fill(0);
    for (index, input) in plan.spec.inputs.iter().enumerate() {
        let before = old.spec.inputs.iter().position(|known| known.ring == input.ring);
        if let (Some(to), Some(from)) = (moved.inputs.get_mut(index), before.and_then(|before| slot.inputs.get(before)))
        {
            *to = *from;
        }
    }
    for (index, output) in plan.spec.outputs.iter().enumerate() {
        let before = old.spec.outputs.iter().position(|known| known.ring == output.ring);
        if let (Some(to), Some(from)) =
            (moved.outputs.get_mut(index), before.and_then(|before| slot.outputs.get(before)))
        {
            *to = *from;
        }
    }
    // Counters behind those of the nodes are the stage's own.
    let nodes = [&old.spec.routes.nodes, &plan.spec.routes.nodes];
    let own = slot.counters.iter().skip(nodes[0].len());
    for (to, from) in moved.counters.iter_mut().skip(nodes[1].len()).zip(own) {
        *to = *from;
    }
    let mut taken = vec![false; nodes[0].len()];
    for node in nodes[1] {
        let before = nodes[0]
            .iter()
            .zip(&taken)
            .position(|(known, taken)| reshaping.name_of(&known.name) == node.name && !taken);
        let Some(before) = before else { continue };
        if let Some(taken) = taken.get_mut(before) {
            *taken = true;
        }
        let from = nodes[0].get(before).and_then(|known| slot.counters.get(known.counter as usize));
        if let (Some(to), Some(from)) = (moved.counters.get_mut(node.counter as usize), from) {
            *to = *from;
        }
    }
    moved
}

fn say_state(slot: &mut Slot, dealt: Option<&DealtState>) {
    if let Some(dealt) = dealt {
        slot.epoch = dealt.epoch;
        slot.state_extents = dealt.extents();
        slot.state_used_bytes = dealt.used_bytes;
    }
}
