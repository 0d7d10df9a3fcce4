//! `argo-streams ctl FILE apply`: a run becomes what its file says by now, without losing, doubling or reordering a record.
//!
//! In this order, each step by the turns of the agent's loop: the sources rest, and everything in flight is finished; programs that the
//! change touches end; the agent's own stages that it touches rest; the broker makes the stages anew ([`Broker::reshape`]); what
//! was touched begins again, and the sources go on. Until the broker begins, everything can be undone, and is when something
//! takes too long. Who asked hears so.

use super::*;
use crate::broker::ChangeError;
use crate::reshape::Reshaping;

/// A pipeline that is being changed.
pub(super) struct Change {
    asked: Option<Asked>,
    plan: Plan,
    reshaping: Reshaping,
    images: HashMap<usize, Image>,
    stand: Stand,
    was_paused: bool,
    since_ns: u64,
    until_ns: u64,
}

impl Change {
    pub(super) fn asked_by(self, asked: Asked) -> Self {
        Self { asked: Some(asked), ..self }
    }

    /// Stages of the present layout that are touched.
    fn touched(&self, old: usize) -> Vec<usize> {
        (0..old).filter(|stage| !self.reshaping.keeps(*stage)).collect()
    }
}

/// How far it has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stand {
    /// Sources rest, and what is in flight is finished.
    Finishing,
    /// Programs end.
    Ending,
    /// The agent's own stages rest.
    Resting,
}

impl Run {
    /// Begins to make the run what a text says; `None`: it is that already.
    pub(super) fn begin_change(&mut self, text: &str, kafka: &KafkaSetup) -> Result<Option<Change>, String> {
        if self.options.state.is_some() {
            return Err(
                "this run outlives its agent (--state), and the next agent would not know of the change: drain it, and run the changed file"
                    .to_owned(),
            );
        }
        if self.is_draining {
            return Err("the run is being drained".to_owned());
        }
        if !self.replacing.is_empty() {
            return Err("programs are being replaced: wait for that".to_owned());
        }
        let stages = self.broker.physical().stages.len();
        if self.step_failure.is_some()
            || (0..stages).any(|stage| matches!(self.broker.phase(stage), Some(Phase::Finished | Phase::Failed)))
        {
            return Err("the run is about to end: some of its steps have finished, or failed".to_owned());
        }
        let name = self.options.file.to_string_lossy().into_owned();
        let plan = argo_streams_pipeline::parse(text.as_bytes(), &name)
            .map_err(|errors| errors.iter().map(|error| format!("{name}: {error}")).collect::<Vec<_>>().join("\n"))?;
        if plan.name() != self.plan.name() {
            return Err(format!(
                "this run is of pipeline {:?}, and the file is of {:?}",
                self.plan.name(),
                plan.name()
            ));
        }
        check_files(&plan, &self.directory).map_err(|error| error.to_string())?;
        kafka.check(&self.plan, &plan).map_err(|error| error.to_string())?;
        let mut images = HashMap::new();
        for (index, step) in plan.steps().iter().enumerate() {
            let StepKind::ParDo(pardo) = step.kind() else { continue };
            let command = command_of(&self.options, step.name(), &step.place(), pardo, &self.directory);
            if command.map_err(|error| error.to_string())?.is_none() {
                let image = self.containers.image(&self.options, self.shim.as_deref(), step, pardo);
                images.insert(index, image.map_err(|error| error.to_string())?);
            }
        }
        let reshaping = Reshaping::new(&self.plan, self.broker.physical(), &plan).map_err(|error| error.to_string())?;
        if reshaping.is_nothing() {
            // Steps may have other places in the file.
            return Ok(None);
        }
        let was_paused = self.broker.is_paused();
        self.broker.pause_sources(true);
        for stage in self.sources() {
            self.ask_to_rest(stage);
        }
        let since_ns = monotonic_ns();
        let until_ns = since_ns + nanoseconds(self.options.grace);
        let stand = Stand::Finishing;
        Ok(Some(Change { asked: None, plan, reshaping, images, stand, was_paused, since_ns, until_ns }))
    }

    fn sources(&self) -> Vec<usize> {
        let stages = self.broker.physical().stages.iter().enumerate();
        stages.filter(|(_, stage)| stage.producers.is_empty()).map(|(index, _)| index).collect()
    }

    fn ask_to_rest(&mut self, stage: usize) {
        if let Some(handover) = self.handovers.get(&stage) {
            handover.ask();
            self.broker.ring(stage);
        }
    }

    fn all_rest(&self, stages: &[usize]) -> bool {
        stages.iter().all(|stage| self.handovers.get(stage).is_none_or(|handover| handover.is_resting()))
    }

    /// Does the next step of a change, if it can be done by now.
    pub(super) fn turn_change(&mut self, now: u64, kafka: &KafkaSetup) {
        let Some(mut change) = self.change.take() else { return };
        let stages = self.broker.physical().stages.len();
        if (0..stages).any(|stage| matches!(self.broker.phase(stage), Some(Phase::Finished | Phase::Failed))) {
            self.change = Some(change);
            return self.abandon_change("a step has finished or failed meanwhile, and the run is about to end");
        }
        let touched = change.touched(stages);
        let (programs, own): (Vec<usize>, Vec<usize>) =
            touched.iter().partition(|stage| !self.handovers.contains_key(stage));
        let waits_for = match change.stand {
            Stand::Finishing => {
                let rests = self.all_rest(&self.sources());
                match self.broker.under_way() {
                    None if rests => {
                        for stage in &programs {
                            self.broker.hold_program(*stage, now, self.options.grace / 2);
                        }
                        change.stand = Stand::Ending;
                        change.until_ns = now + nanoseconds(self.options.grace);
                        None
                    }
                    None => Some("a source still reads".to_owned()),
                    under_way => under_way,
                }
            }
            Stand::Ending => {
                let empty = change.reshaping.rings_to_be_empty(self.broker.physical());
                if programs.iter().any(|stage| !self.broker.has_ended(*stage)) || !self.removals.is_empty() {
                    Some("a program has not ended".to_owned())
                } else if let Some(step) = self.broker.first_not_empty(&empty) {
                    Some(format!(
                        "records came late to step {step}, from a program that keeps answers back until it ends"
                    ))
                } else {
                    for stage in own {
                        self.ask_to_rest(stage);
                    }
                    change.stand = Stand::Resting;
                    None
                }
            }
            Stand::Resting => match own.iter().find(|stage| !self.all_rest(&[**stage])) {
                None => return self.make_change(change, kafka),
                Some(stage) => {
                    let name = self.broker.physical().stages.get(*stage).map_or("", |stage| stage.spec.name.as_str());
                    Some(format!("step {name} has something in hand"))
                }
            },
        };
        let is_late = now >= change.until_ns;
        self.change = Some(change);
        if let (true, Some(waits_for)) = (is_late, waits_for) {
            let grace_s = self.options.grace.as_secs();
            self.abandon_change(&format!(
                "the pipeline did not come to rest within {grace_s} s (--grace): {waits_for}"
            ));
        }
    }

    /// Lets everything go on as it was, and tells who asked why.
    pub(super) fn abandon_change(&mut self, why: &str) {
        let Some(change) = self.change.take() else { return };
        for handover in self.handovers.values() {
            handover.tell(GoesOn::Same);
        }
        self.broker.release_held();
        self.broker.pause_sources(change.was_paused);
        tracing::warn!("the pipeline is not changed: {why}");
        if let Some(asked) = change.asked {
            asked.answer(Answer::refused(format!("{why}\nnothing was changed, and the run goes on as it was")));
        }
    }

    /// Everything rests: the stages become what the new plan says.
    fn make_change(&mut self, change: Change, kafka: &KafkaSetup) {
        let step = "agent".to_owned();
        match self.try_change(change, kafka) {
            Ok(()) => {}
            Err(Undone::Abandoned(change, why)) => {
                self.change = Some(*change);
                self.abandon_change(&why);
            }
            Err(Undone::Over(text)) => {
                self.fail(RunError::Failed { step, text: format!("the pipeline could not be changed: {text}") });
            }
        }
    }

    fn try_change(&mut self, change: Change, kafka: &KafkaSetup) -> Result<(), Undone> {
        let reshaping = &change.reshaping;
        let stages = reshaping.physical.stages.len();
        let mut transports = Vec::with_capacity(stages);
        let mut sockets = Vec::with_capacity(stages);
        let mut listeners = Vec::new();
        let gone: Vec<PathBuf> =
            reshaping.ended.iter().filter_map(|stage| self.broker.socket(*stage).cloned()).collect();
        for (index, stage) in reshaping.physical.stages.iter().enumerate() {
            let transport = transport_of(&change.plan, stage.step);
            let socket = (transport != Transport::Internal).then(|| socket_of(&self.sockets, stage.spec.stage));
            let is_new = reshaping.before(index).is_none();
            if let (Some(path), true) = (&socket, is_new) {
                match listen_for_pardo(path, change.images.contains_key(&stage.step)) {
                    Ok(listener) => listeners.push((index, listener)),
                    Err(error) => {
                        forget(&listeners, &sockets);
                        return Err(Undone::Abandoned(Box::new(change), error.to_string()));
                    }
                }
            }
            transports.push(transport);
            sockets.push(socket);
        }
        let old_physical = self.broker.physical().clone();
        match self.broker.reshape(reshaping, &transports, &sockets) {
            Ok(()) => {}
            Err(error @ ChangeError::State { .. }) => {
                forget(&listeners, &sockets);
                return Err(Undone::Abandoned(Box::new(change), error.to_string()));
            }
            Err(error) => return Err(Undone::Over(error.to_string())),
        }
        self.follow(change, listeners, &transports, &old_physical, kafka)
            .map_err(|error| Undone::Over(error.to_string()))?;
        for path in gone {
            // A directory that is cleared with the run.
            let _left = std::fs::remove_file(path);
        }
        Ok(())
    }

    /// The broker has the new layout: everything that goes by the numbers of stages and steps follows.
    fn follow(
        &mut self,
        change: Change,
        listeners: Vec<(usize, OwnedFd)>,
        transports: &[Transport],
        old_physical: &Physical,
        kafka: &KafkaSetup,
    ) -> Result<(), RunError> {
        let Change { asked, plan, reshaping, images, was_paused, since_ns, .. } = change;
        let now = reshaping.now();
        let old_plan = std::mem::replace(&mut self.plan, Arc::new(plan));
        self.containers.images = images;
        open_containers(&mut self.broker, &self.containers);
        self.shims = std::mem::take(&mut self.shims)
            .into_iter()
            .filter_map(|(stage, shim)| Some((*now.get(&stage)?, shim)))
            .collect();
        self.listeners = std::mem::take(&mut self.listeners)
            .into_iter()
            .filter_map(|(stage, listener)| Some((*now.get(&stage)?, listener)))
            .chain(listeners)
            .collect();
        let mut latencies = std::mem::take(&mut self.latencies);
        self.latencies = reshaping
            .before
            .iter()
            .map(|before| before.and_then(|before| latencies.get_mut(before)).map(std::mem::take).unwrap_or_default())
            .collect();
        for tracker in &mut self.trackers {
            // Sources are what they were.
            tracker.rebase(now.get(&tracker.source()).copied().unwrap_or(usize::MAX));
        }
        let said = std::mem::take(&mut self.said_dropped);
        self.said_dropped = reshaping
            .same
            .iter()
            .map(|before| before.and_then(|before| said.get(before).copied()).unwrap_or(0))
            .collect();
        // A command that was put in the place of a step's own stays for as long as the file does not say something else of it.
        let mut replaced = std::mem::take(&mut self.replaced);
        for (step, before) in self.plan.steps().iter().zip(&reshaping.same) {
            let Some(before) = before.and_then(|before| old_plan.step(before)) else { continue };
            if let (StepKind::ParDo(old), StepKind::ParDo(new)) = (before.kind(), step.kind())
                && old.with_containers(new.containers()) == *new
                && let Some(command) = replaced.remove(before.name())
            {
                self.replaced.insert(step.name().to_owned(), command);
            }
        }
        self.go_on(old_physical, &reshaping, &now, kafka)?;
        self.broker.pause_sources(was_paused);
        let is_program = |stage: &usize| transports.get(*stage).is_some_and(|found| *found != Transport::Internal);
        let started: Vec<usize> = (0..reshaping.physical.stages.len())
            .filter(|stage| !reshaping.is_kept(*stage))
            .filter(is_program)
            .collect();
        let what = describe(&old_plan, &self.plan, &reshaping.same);
        tracing::info!("the pipeline is changed: {what}");
        if let Some(asked) = asked {
            let until_ns = monotonic_ns() + nanoseconds(self.options.grace) + END_PATIENCE_NS;
            self.replacing.push(Replacing { asked, what, stages: started, since_ns, until_ns });
        }
        Ok(())
    }

    /// Tells the threads of the agent's own stages how they go on, and starts those of new ones.
    fn go_on(
        &mut self,
        old_physical: &Physical,
        reshaping: &Reshaping,
        now: &HashMap<usize, usize>,
        kafka: &KafkaSetup,
    ) -> Result<(), RunError> {
        let handovers = std::mem::take(&mut self.handovers);
        for (old, handover) in handovers {
            let Some(stage) = now.get(&old).copied() else {
                handover.tell(GoesOn::Not);
                continue;
            };
            let goes_on = if reshaping.is_kept(stage) {
                GoesOn::Same
            } else {
                GoesOn::Anew(self.broker.internal_client(stage).map_err(system("cannot make a control socket"))?)
            };
            handover.tell(goes_on);
            self.handovers.insert(stage, handover);
        }
        for (old, thread) in std::mem::take(&mut self.threads) {
            match now.get(&old) {
                Some(stage) => self.threads.push((*stage, thread)),
                None => {
                    let step = old_physical.stages.get(old).map_or(String::new(), |stage| stage.spec.name.clone());
                    self.leaving.push((step, thread));
                }
            }
        }
        let new = (0..reshaping.before.len()).filter(|stage| reshaping.before(*stage).is_none());
        self.to_start = new.collect();
        self.start_new_threads(kafka)
    }

    /// Starts the threads of new steps, when those of steps that are gone have let go of what they had: it may be the same file.
    pub(super) fn start_new_threads(&mut self, kafka: &KafkaSetup) -> Result<(), RunError> {
        if self.leaving.is_empty() {
            for stage in std::mem::take(&mut self.to_start) {
                self.start_thread(stage, kafka)?;
            }
        }
        Ok(())
    }
}

/// Takes sockets away that nobody will connect to: the next try has the same names.
fn forget(listeners: &[(usize, OwnedFd)], sockets: &[Option<PathBuf>]) {
    for path in listeners.iter().filter_map(|(index, _)| sockets.get(*index)?.as_ref()) {
        // It was made a moment ago, in a directory of our own.
        let _gone = std::fs::remove_file(path);
    }
}

/// How a change ended that was not made.
enum Undone {
    /// Nothing has changed.
    Abandoned(Box<Change>, String),
    /// The run cannot go on.
    Over(String),
}

/// What of the steps is new, gone or another.
fn describe(old: &Plan, new: &Plan, same: &[Option<usize>]) -> String {
    let mut words = Vec::new();
    for (step, before) in new.steps().iter().zip(same) {
        match before.and_then(|before| old.step(before)) {
            None => words.push(format!("{} is new", step.name())),
            Some(before) if before.kind() != step.kind() => words.push(format!("{} is changed", step.name())),
            Some(before) if before.name() != step.name() => {
                words.push(format!("{} is called {} now", before.name(), step.name()));
            }
            Some(_) => {}
        }
    }
    let gone = old.steps().iter().filter(|step| !same.contains(&Some(step.index())));
    words.extend(gone.map(|step| format!("{} is gone", step.name())));
    if words.is_empty() { "steps read from other steps".to_owned() } else { words.join(", ") }
}
