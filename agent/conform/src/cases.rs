//! How each clause is tried: what is sent when, what is done to the program, and what must come of it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::attempt::{Attempt, Place, Setup};
use crate::contract::{Clause, Expect, Framing, Transport, Trial};
use crate::judge::{Demand, Finding, Judge, Verdicts};
use crate::record::{Sequence, Shape};

/// How long an answer may take when one record is sent at a time, on a busy machine as well.
const PROMPT: Duration = Duration::from_secs(4);
/// So many records must be answered one behind before it is the program and not the machine.
const HELD_BACK_ROUNDS: u64 = 3;
const BRIEFLY: Duration = Duration::from_millis(300);

/// What a case came to.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) sent: String,
    pub(crate) expected: String,
    pub(crate) result: Result<String, Finding>,
}

/// The program that is tried, and what was learnt of it.
#[derive(Debug)]
pub(crate) struct Trier {
    pub(crate) place: Place,
    pub(crate) expect: Expect,
    pub(crate) transport: Transport,
    pub(crate) framing: Framing,
    pub(crate) strict_bytes: bool,
    /// With `Filter`: what was done with each record so far.
    pub(crate) verdicts: Verdicts,
}

/// Whether records may be missing when the program was killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Loss {
    /// No.
    None,
    /// Those that it had read and not answered, unless `ack` keeps them.
    Read,
}

impl Trier {
    pub(crate) fn try_clause(&mut self, clause: &Clause) -> Outcome {
        let sequence = Arc::new(match clause.trial {
            Trial::Send(records) | Trial::SendBytes(records, _) => records(),
            Trial::Silent => Sequence::listed(["the first a", "the second"]),
            Trial::OneByOne => numbered(64),
            Trial::Bursts => numbered(6000),
            Trial::Idle => numbered(400),
            Trial::Backlog => numbered(20_000),
            Trial::Stays | Trial::EndsWell => numbered(300),
            Trial::Drain => numbered(2000),
            Trial::Killed | Trial::Terminated => numbered(6000),
            Trial::KilledFirst => numbered(500),
            Trial::KilledIdle => numbered(8),
            Trial::Pipe => numbered(50_000),
            Trial::AckRead => numbered(20_000),
            Trial::Twice => numbered(2000),
            Trial::AtOnceAndSlowly => numbered(300),
            Trial::TwoProcesses => numbered(20_000),
            Trial::KilledBehindOutputs => numbered(5000),
        });
        let (sent, mut expected) = (sequence.describe(), self.expected(clause, &sequence));
        let result = match clause.trial {
            Trial::SendBytes(_, as_text) if !self.strict_bytes && self.transport != Transport::Shm => {
                expected.push_str(", or what a program that works on text makes of it");
                self.send_bytes(&sequence, as_text)
            }
            trial => self.run_trial(trial, &sequence),
        };
        Outcome { sent, expected, result }
    }

    fn expected(&self, clause: &Clause, sequence: &Sequence) -> String {
        let count = sequence.count();
        let what = match self.expect {
            Expect::Identity if count == 0 => "no line".to_owned(),
            Expect::Identity => format!("{count} lines, each as it was sent, in order"),
            Expect::Filter => {
                format!("some of {count} records, each as it was sent, in order, the same ones each time")
            }
            Expect::Flatmap => "any lines, the same each time, and no failure".to_owned(),
        };
        format!("{}: {what}", clause.says)
    }

    fn run_trial(&mut self, trial: Trial, sequence: &Arc<Sequence>) -> Result<String, Finding> {
        match trial {
            Trial::Send(_) | Trial::SendBytes(..) => self.send(sequence, self.setup()),
            Trial::Silent => self.silent(sequence),
            Trial::OneByOne => self.one_by_one(sequence),
            Trial::Bursts => self.with(sequence, self.setup(), Loss::None, |attempt| {
                for burst in 1..=12 {
                    attempt.allow(burst * 500);
                    attempt.pass(Duration::from_millis(30))?;
                }
                attempt.finish()
            }),
            Trial::Idle => self.with(sequence, self.setup(), Loss::None, |attempt| {
                attempt.allow(200);
                attempt.pass(BRIEFLY * 4)?;
                attempt.finish()
            }),
            Trial::Backlog => self.with(sequence, self.setup(), Loss::None, |attempt| {
                attempt.allow(10);
                attempt.until(None, |attempt| attempt.starts() > 0 && attempt.is_all_taken())?;
                attempt.signal_program(Signal::STOP);
                attempt.allow(20_000);
                let passed = attempt.pass(BRIEFLY);
                attempt.signal_program(Signal::CONT);
                passed?;
                attempt.finish()
            }),
            Trial::Stays => self.with(sequence, self.setup(), Loss::None, |attempt| {
                attempt.allow(300);
                attempt.until(None, Attempt::is_all_taken)?;
                // An end in this time is one that we did not cause, and so a finding.
                attempt.pass(BRIEFLY * 4)?;
                attempt.finish()
            }),
            Trial::EndsWell => self.ends_well(sequence),
            Trial::Drain => self.with(sequence, self.setup(), Loss::None, |attempt| {
                attempt.allow(2000);
                attempt.until(None, |attempt| attempt.starts() > 0 && attempt.is_all_taken())?;
                attempt.stop_run();
                attempt.wait_for_end()
            }),
            Trial::Killed => self.with(sequence, self.setup(), Loss::Read, |attempt| killed(attempt, Signal::KILL)),
            Trial::Terminated => self.with(sequence, self.setup(), Loss::Read, |attempt| killed(attempt, Signal::TERM)),
            Trial::KilledFirst => self.with(sequence, self.setup(), Loss::Read, |attempt| {
                attempt.until(None, |attempt| attempt.starts() > 0)?;
                attempt.end_program(Signal::KILL)?;
                attempt.finish()
            }),
            Trial::KilledIdle => self.with(sequence, self.setup(), Loss::Read, |attempt| {
                for records in [2, 4, 6] {
                    attempt.allow(records);
                    // Programs that keep their answers back until the end have them taken from them here, and are asked again.
                    attempt.until(Some(PROMPT), |attempt| attempt.lines() == records)?;
                    let was_answered = attempt.lines() == records;
                    attempt.end_program(Signal::KILL)?;
                    if !was_answered {
                        break;
                    }
                }
                attempt.finish()
            }),
            Trial::Pipe => self.send(sequence, Setup { is_block_buffered: true, ..self.setup() }),
            Trial::AckRead => self.send(sequence, Setup { ack: Some("read"), ..self.setup() }),
            Trial::TwoProcesses => self.two_processes(sequence),
            Trial::KilledBehindOutputs => self.killed_behind_outputs(sequence),
            Trial::Twice => self.alike(sequence, Attempt::finish, Attempt::finish),
            Trial::AtOnceAndSlowly => self.alike(sequence, Attempt::finish, |attempt| {
                for record in (0..=300).step_by(15) {
                    attempt.allow(record);
                    attempt.pass(Duration::from_millis(15))?;
                }
                attempt.finish()
            }),
        }
    }

    fn setup(&self) -> Setup {
        let ack = match (self.transport, self.expect) {
            (Transport::Exit, _) => Some("exit"),
            (Transport::Shm | Transport::Http | Transport::Socket | Transport::File, _) => None,
            (_, Expect::Identity) => Some("line"),
            (_, Expect::Filter | Expect::Flatmap) => Some("read"),
        };
        Setup {
            command: None,
            transport: if self.transport == Transport::Exit { "stdio" } else { self.transport.name() },
            ack,
            // `grep` says 1 when nothing of a batch is left.
            success: (self.transport == Transport::Exit && self.expect == Expect::Filter).then_some(&[0, 1]),
            framing: self.framing.name(),
            is_block_buffered: false,
            containers: 1,
        }
    }

    /// Starts an attempt, does something with it, and keeps what was learnt.
    fn with(
        &mut self,
        sequence: &Arc<Sequence>,
        setup: Setup,
        loss: Loss,
        drive: impl FnOnce(&mut Attempt) -> Result<String, Finding>,
    ) -> Result<String, Finding> {
        let demand = match (self.expect, loss) {
            (Expect::Identity, _) => Demand::Each,
            (Expect::Filter, Loss::None) => Demand::Some(std::mem::take(&mut self.verdicts)),
            (Expect::Filter, Loss::Read) => Demand::SomeOf,
            (Expect::Flatmap, _) => Demand::Anything(Vec::new()),
        };
        self.with_demand(sequence, &setup, demand, drive).0
    }

    fn with_demand(
        &mut self,
        sequence: &Arc<Sequence>,
        setup: &Setup,
        demand: Demand,
        drive: impl FnOnce(&mut Attempt) -> Result<String, Finding>,
    ) -> (Result<String, Finding>, Vec<u64>) {
        let judge = Judge::new(demand, Arc::clone(sequence));
        let mut attempt = match Attempt::start(&self.place, setup, Arc::clone(sequence), judge) {
            Ok(attempt) => attempt,
            Err(error) => {
                let finding = Finding::new(
                    format!("argo-streams run cannot be started: {error}"),
                    "This is no fault of the program: is there room in the temporary folder, and may processes be started?",
                );
                return (Err(finding), Vec::new());
            }
        };
        let result = drive(&mut attempt);
        let mut lines = Vec::new();
        match attempt.into_judge().into_demand() {
            Demand::Some(verdicts) => self.verdicts = verdicts,
            Demand::Anything(all) => lines = all,
            Demand::Each | Demand::EachInAnyOrder(_) | Demand::SomeOf => {}
        }
        (result, lines)
    }

    fn send(&mut self, sequence: &Arc<Sequence>, setup: Setup) -> Result<String, Finding> {
        self.with(sequence, setup, Loss::None, Attempt::finish)
    }

    /// What a program that works on text may do with bytes that are no text, or with returns.
    fn send_bytes(&mut self, sequence: &Arc<Sequence>, as_text: Option<fn() -> Sequence>) -> Result<String, Finding> {
        let before = self.verdicts.clone();
        let finding = match self.send(sequence, self.setup()) {
            Ok(got) => return Ok(got),
            Err(finding) if finding.is_timeout => return Err(finding),
            Err(finding) => finding,
        };
        self.verdicts = before;
        let seen = format!("not demanded of a program that works on text; seen: {}", finding.got);
        let (Expect::Identity, Some(as_text)) = (self.expect, as_text) else { return Ok(seen) };
        // Text is read line by line, and then each end of a line is a newline: no more than that may have changed.
        let setup = self.setup();
        let ack = if self.transport == Transport::Exit { setup.ack } else { Some("read") };
        let setup = Setup { ack, ..setup };
        let judge = Judge::of_reading(Arc::new(as_text()));
        let attempt = Attempt::start(&self.place, &setup, Arc::clone(sequence), judge);
        let Ok(mut attempt) = attempt else { return Err(finding) };
        match attempt.finish() {
            Ok(_) => Ok(format!("{seen}; its lines are those that reading as text gives")),
            Err(_) => Err(finding),
        }
    }

    fn silent(&mut self, sequence: &Arc<Sequence>) -> Result<String, Finding> {
        self.with(sequence, self.setup(), Loss::None, |attempt| {
            attempt.until(None, |attempt| attempt.starts() > 0)?;
            attempt.pass(BRIEFLY * 2)?;
            if attempt.lines() > 0 {
                return Err(Finding::new(
                    format!("{} lines before any record was sent", attempt.lines()),
                    "Greetings and logs belong on standard error.",
                ));
            }
            attempt.finish()
        })
    }

    /// Each answer before the next record, or all of them when the input ends: what is neither keeps a record back.
    fn one_by_one(&mut self, sequence: &Arc<Sequence>) -> Result<String, Finding> {
        let count = sequence.count();
        self.with(sequence, self.setup(), Loss::None, |attempt| {
            attempt.until(None, |attempt| attempt.starts() > 0)?;
            let mut behind_in_a_row = 0;
            for record in 1..=count {
                attempt.allow(record);
                if attempt.until(Some(PROMPT), |attempt| attempt.lines() >= record)? {
                    behind_in_a_row = 0;
                    continue;
                }
                behind_in_a_row += 1;
                if behind_in_a_row < HELD_BACK_ROUNDS {
                    continue;
                }
                if attempt.lines() > 0 {
                    return Err(held_back(record, attempt.lines()));
                }
                // No answer at all: it fills a buffer first.
                let got = attempt.finish()?;
                return Ok(format!(
                    "{got}; but the first {HELD_BACK_ROUNDS} had no answer until others came or the input ended: it fills a buffer first. That is allowed; for prompt answers flush after each line"
                ));
            }
            let got = attempt.finish()?;
            Ok(format!("{got}; each before the next was sent"))
        })
    }

    fn ends_well(&mut self, sequence: &Arc<Sequence>) -> Result<String, Finding> {
        let is_filter = self.expect == Expect::Filter;
        self.with(sequence, self.setup(), Loss::None, |attempt| {
            let got = attempt.finish()?;
            match attempt.bad_end() {
                // What `grep` does when nothing matched.
                Some(end) if !is_filter => Err(Finding::new(
                    format!("{end}, after all records were answered"),
                    "At the end of its input a program ends by itself, within a quarter of `--grace`, and exits with code 0.",
                )),
                Some(end) => Ok(format!("{got}; {end}, which a filter may")),
                None => Ok(format!("{got}; it ended by itself with code 0")),
            }
        })
    }

    fn two_processes(&mut self, sequence: &Arc<Sequence>) -> Result<String, Finding> {
        let setup = Setup { containers: 2, ..self.setup() };
        let demand = Demand::EachInAnyOrder(HashMap::new());
        let (result, _) = self.with_demand(sequence, &setup, demand, |attempt| {
            attempt.until(None, |attempt| attempt.starts() >= 2)?;
            attempt.finish()
        });
        result
    }

    /// A shell runs the program in the place of itself, or, one time in three, kills itself behind it.
    fn killed_behind_outputs(&mut self, sequence: &Arc<Sequence>) -> Result<String, Finding> {
        const KILLING: &str = "count=0; [ ! -e \"$0\" ] || read -r count <\"$0\"; echo $((count + 1)) >\"$0\"; [ $((count % 3)) = 0 ] || exec \"$@\"; \"$@\"; kill -KILL $$";
        let count = self.place.scratch.join("starts");
        // Not there is as well.
        let _of_an_earlier_attempt = std::fs::remove_file(&count);
        let mut command: Vec<String> = ["sh", "-c", KILLING].map(str::to_owned).to_vec();
        command.push(count.to_string_lossy().into_owned());
        command.extend(self.place.command.iter().cloned());
        let setup = Setup { command: Some(command), ..self.setup() };
        self.with(sequence, setup, Loss::None, |attempt| {
            attempt.expect_ends();
            // In parts, so that there are batches of several lengths.
            for part in (500..=5000).step_by(500) {
                attempt.allow(part);
                attempt.pass(Duration::from_millis(15))?;
            }
            let got = attempt.finish()?;
            match attempt.ends() {
                0 => {
                    Err(Finding::new("no process was killed".to_owned(), "This is no fault of the program: try again."))
                }
                ends => Ok(format!("{got}; {ends} processes were killed behind their outputs")),
            }
        })
    }

    /// Two attempts that must come to the same.
    fn alike(
        &mut self,
        sequence: &Arc<Sequence>,
        first: impl FnOnce(&mut Attempt) -> Result<String, Finding>,
        second: impl FnOnce(&mut Attempt) -> Result<String, Finding>,
    ) -> Result<String, Finding> {
        if self.expect != Expect::Flatmap {
            // Both are judged against the records themselves, or against what was done with them before.
            self.with(sequence, self.setup(), Loss::None, first)?;
            let got = self.with(sequence, self.setup(), Loss::None, second)?;
            return Ok(format!("{got}; both times"));
        }
        let setup = self.setup();
        let (result, lines) = self.with_demand(sequence, &setup, Demand::Anything(Vec::new()), first);
        result?;
        let (result, again) = self.with_demand(sequence, &setup, Demand::Anything(Vec::new()), second);
        let got = result?;
        match lines.iter().zip(&again).position(|(line, again)| line != again) {
            Some(at) => Err(Finding::new(
                format!("line {at} was another one the second time"),
                "It makes other lines of the same records: look for clocks, random numbers, process numbers, or an order that is left to chance. After a failure records are sent again, and must give the same.",
            )),
            None if lines.len() != again.len() => Err(Finding::new(
                format!("{} lines the first time and {} the second time", lines.len(), again.len()),
                "It makes another number of lines of the same records. After a failure records are sent again, and must give the same.",
            )),
            None => Ok(format!("{got}; the same ones both times")),
        }
    }
}

/// Kills the program while it works: each time when it has answered something more. One that answers only at its end is
/// killed once.
fn killed(attempt: &mut Attempt, signal: Signal) -> Result<String, Finding> {
    let begin = Instant::now();
    for round in 1..=5 {
        attempt.allow(round * 1000);
        let lines = attempt.lines();
        let has_answered = attempt.until(Some(BRIEFLY * 3), |attempt| attempt.lines() > lines + 20)?;
        attempt.end_program(signal)?;
        if !has_answered || begin.elapsed() > PROMPT * 5 {
            break;
        }
    }
    let ends = attempt.ends();
    let got = attempt.finish()?;
    Ok(format!("{got}; it was ended {} times", ends.max(attempt.ends())))
}

fn held_back(sent: u64, lines: u64) -> Finding {
    Finding::new(
        format!(
            "{lines} of {sent} records were answered, and nothing more for {} s, while the input was open",
            PROMPT.as_secs()
        ),
        "It keeps answers back until another record comes: the last ones wait for ever when the stream pauses. Write and flush the answer of each record before you read the next one.",
    )
}

fn numbered(count: u64) -> Sequence {
    Sequence::Numbered { count, shape: Shape::Varied }
}
