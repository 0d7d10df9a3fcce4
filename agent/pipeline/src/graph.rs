//! How steps hang together: names, what each reads, cycles, and how many rings that takes.

use std::collections::HashMap;

use crate::error::{Report, quote, suggestion};
use crate::fields::join;
use crate::limits::CONTAINERS_MAX;
use crate::plan::{Input, Output, Overflow, Sink, Source, Step, StepKind};
use crate::steps::{Class, RawStep};

/// Joins checked steps to a plan's. None: the report says why not.
pub(crate) fn connect(raw: Vec<RawStep<'_>>, report: &mut Report) -> Option<Vec<Step>> {
    let errors_before = report.len();
    let names = names(&raw, report);
    let dead_letters = dead_letters(&raw, &names, report);
    let inputs: Vec<Vec<Input>> = raw.iter().map(|step| inputs(step, &raw, &names, &dead_letters, report)).collect();
    // What is behind a broken connection would only be reported twice.
    if report.len() == errors_before {
        cycles(&raw, &inputs, report);
    }
    if report.len() == errors_before {
        rings(&raw, &inputs, report);
    }
    stdin_once(&raw, report);
    files(&raw, report);
    let mut steps: Vec<Step> = raw
        .iter()
        .zip(inputs)
        .map(|(step, inputs)| {
            let (index, kind) = (step.index, step.kind.clone()?);
            Some(Step { index, of: index, name: step.name(), kind, inputs })
        })
        .collect::<Option<_>>()?;
    for step in raw.iter().filter(|step| step.overflow != Overflow::Block) {
        let index = steps.len();
        let Some(reader) = steps.get_mut(step.index) else { continue };
        let inputs = std::mem::replace(&mut reader.inputs, vec![Input { step: index, output: Output::Main }]);
        let name = format!("{}.overflow", reader.name);
        steps.push(Step { index, of: step.index, name, kind: StepKind::Overflow(step.overflow), inputs });
    }
    Some(steps)
}

/// Every name with its step; a name that two steps have is reported.
fn names(raw: &[RawStep<'_>], report: &mut Report) -> HashMap<String, usize> {
    let mut names: HashMap<String, usize> = HashMap::new();
    for (position, step) in raw.iter().enumerate() {
        let name = step.name();
        let Some(other) = names.get(&name).and_then(|other| raw.get(*other)) else {
            names.insert(name, position);
            continue;
        };
        // The one to change is a given name; two defaults can't clash, because the index is part of them.
        let (given, taken_by) = if step.name.is_some() { (step, other) } else { (other, step) };
        let node = given.name.map_or(given.node, |(_, node)| node);
        let found = match taken_by.name {
            Some(_) => format!("the name {}, which {} has too", quote(&name), taken_by.place),
            None => format!("the name {}, which {} has by default", quote(&name), taken_by.place),
        };
        report.node(node, &join(&given.place, "name"), &found, "a name of its own for every step");
    }
    names
}

/// Which steps' failed records each step reads because a `deadLetter` names it, by the step's index.
fn dead_letters(
    raw: &[RawStep<'_>],
    names: &HashMap<String, usize>,
    report: &mut Report,
) -> HashMap<usize, Vec<Input>> {
    let mut readers: HashMap<usize, Vec<Input>> = HashMap::new();
    for step in raw {
        let Some(on_error) = &step.on_error else { continue };
        let Some((name, node)) = on_error.dead_letter else { continue };
        let path = &on_error.dead_letter_path;
        match names.get(name).and_then(|position| raw.get(*position)) {
            None => {
                let meant = suggestion(name, names.keys().map(String::as_str));
                let found = format!("{}, and no step has that name", quote(name));
                let expected = "the name of a step that takes the failed records, such as a kafka or file sink";
                report.at(node.line, node.column, path, &found, expected, meant);
            }
            Some(reader) if reader.class == Class::Source => {
                let found = format!("{}, a source, which reads nothing", quote(name));
                let expected = "the name of a sink, a parDo or a groupByKey";
                report.node(node, path, &found, expected);
            }
            Some(reader) => {
                readers.entry(reader.index).or_default().push(Input { step: step.index, output: Output::Errors });
            }
        }
    }
    readers
}

/// What a step reads: what `from` says or the step before it, and the failed records of those that name it. A step that is named so and has
/// no `from` reads only these.
fn inputs(
    step: &RawStep<'_>,
    raw: &[RawStep<'_>],
    names: &HashMap<String, usize>,
    dead_letters: &HashMap<usize, Vec<Input>>,
    report: &mut Report,
) -> Vec<Input> {
    let failed = dead_letters.get(&step.index).map_or(&[][..], Vec::as_slice);
    let Some(from) = &step.from else {
        if !failed.is_empty() {
            return failed.to_vec();
        }
        return input_before(step, raw, report).into_iter().collect();
    };
    let mut inputs = Vec::new();
    for (index, item) in from.items.iter().enumerate() {
        let Some((text, node)) = *item else { continue };
        if report.is_full() {
            break;
        }
        let path = format!("{}[{index}]", join(&step.place, "from"));
        let resolved = resolve(text, raw, names);
        match resolved {
            Ok(input) if inputs.contains(&input) => {
                report.node(node, &path, &format!("{} a second time", quote(text)), "every input once");
            }
            Ok(input) => inputs.push(input),
            Err(problem) => report.at(node.line, node.column, &path, &problem.found, &problem.expected, problem.meant),
        }
    }
    // Named both ways it is read once.
    for input in failed {
        if !inputs.contains(input) {
            inputs.push(*input);
        }
    }
    inputs
}

/// What a step without `from` reads.
fn input_before(step: &RawStep<'_>, raw: &[RawStep<'_>], report: &mut Report) -> Option<Input> {
    // Sources read nothing; a source kind in the wrong place was reported, and so was a `from` that can't be read.
    if step.class == Class::Source || step.from_is_broken {
        return None;
    }
    let before = raw.get(step.index.checked_sub(1)?)?;
    if before.class != Class::Sink {
        return Some(Input { step: before.index, output: Output::Main });
    }
    let found = format!(
        "no \"from\" behind {} ({}), which is a sink and gives nothing on",
        quote(&before.name()),
        before.place
    );
    let readable = raw.iter().take(step.index).rev().find(|step| step.class != Class::Sink).map(RawStep::name);
    let example = readable.map_or_else(String::new, |name| format!(", as from: [{name}]"));
    let back = match before.kind_name {
        "kafka" => "; to read the topic back, add a second kafka step with from: []",
        _ => "",
    };
    let source = if matches!(step.kind_name, "kafka" | "file") { "; or from: [] if it is a new source" } else { "" };
    report.node(
        step.node,
        &step.place,
        &found,
        &format!("\"from\" with the name of a step to read{example}{source}{back}"),
    );
    None
}

/// Why an item of `from` is nothing to read.
struct Problem {
    found: String,
    expected: String,
    meant: Option<String>,
}

/// The output that an item of `from` names.
fn resolve(text: &str, raw: &[RawStep<'_>], names: &HashMap<String, usize>) -> Result<Input, Problem> {
    let (name, output) = match (names.contains_key(text), text.rsplit_once('.')) {
        (false, Some((name, output))) => (name, Some(output)),
        _ => (text, None),
    };
    let Some(step) = names.get(name).and_then(|position| raw.get(*position)) else {
        return Err(dangling(text, name, output, raw));
    };
    match output {
        None if step.class == Class::Sink => {
            let again = match step.kind_name {
                "kafka" => {
                    "; to read its topic, add a second kafka step with from: []; what the topic refuses is in NAME.errors"
                }
                "file" => "; to read its file, use a pipeline of its own",
                _ => "",
            };
            Err(Problem {
                found: format!("{}, a sink, which gives nothing on", quote(text)),
                expected: format!("a source, a groupByKey or a parDo{again}"),
                meant: None,
            })
        }
        None => Ok(Input { step: step.index, output: Output::Main }),
        Some("errors") if step.has_errors() => Ok(Input { step: step.index, output: Output::Errors }),
        Some("errors") => Err(Problem {
            found: format!("{}, but {} has no errors output", quote(text), step.kind_name),
            expected: "NAME.errors of a groupByKey, a parDo, kafka, or a file or stdin source: only in these can single records fail"
                .to_owned(),
            meant: None,
        }),
        Some(other) => Err(Problem {
            found: format!("the output {} of {}", quote(other), quote(name)),
            expected: match (step.class, step.has_errors()) {
                (Class::Sink, true) => format!("{name}.errors"),
                (Class::Sink, false) => "another step: a sink gives nothing on".to_owned(),
                (_, true) => format!("{name} or {name}.errors"),
                (_, false) => name.to_owned(),
            },
            meant: suggestion(other, ["errors"]).filter(|_| step.has_errors()).map(|output| format!("{name}.{output}")),
        }),
    }
}

fn dangling(text: &str, name: &str, output: Option<&str>, raw: &[RawStep<'_>]) -> Problem {
    const NAMES_SHOWN_MAX: usize = 8;
    let readable: Vec<String> = raw.iter().filter(|step| step.class != Class::Sink).map(RawStep::name).collect();
    let more = if readable.len() > NAMES_SHOWN_MAX { " ..." } else { "" };
    let shown: Vec<&str> = readable.iter().take(NAMES_SHOWN_MAX).map(String::as_str).collect();
    let output = output.map_or_else(String::new, |output| format!(".{output}"));
    Problem {
        found: format!("{}, and no step has that name", quote(text)),
        expected: format!("the name of a step to read: {}{more}", shown.join(", ")),
        meant: suggestion(name, readable.iter().map(String::as_str)).map(|name| format!("{name}{output}")),
    }
}

/// Reports every cycle once, by the step of it that comes first in the file.
fn cycles(raw: &[RawStep<'_>], inputs: &[Vec<Input>], report: &mut Report) {
    #[derive(Clone, Copy, PartialEq)]
    enum Seen {
        Not,
        OnTheWay,
        Done,
    }
    let mut seen = vec![Seen::Not; raw.len()];
    for start in 0..raw.len() {
        // The way back from `start` towards its sources: each step with how many of its inputs are done.
        let mut way = vec![(start, 0)];
        if seen.get(start) != Some(&Seen::Not) {
            continue;
        }
        while let Some((step, done)) = way.last_mut() {
            let step = *step;
            if let Some(state) = seen.get_mut(step) {
                *state = Seen::OnTheWay;
            }
            let Some(input) = inputs.get(step).and_then(|inputs| inputs.get(*done)).map(|input| input.step) else {
                if let Some(state) = seen.get_mut(step) {
                    *state = Seen::Done;
                }
                way.pop();
                continue;
            };
            *done += 1;
            match seen.get(input) {
                Some(Seen::Not) => way.push((input, 0)),
                Some(Seen::OnTheWay) => {
                    let from = way.iter().position(|(step, _)| *step == input).unwrap_or(0);
                    let members: Vec<usize> = way.iter().skip(from).map(|(step, _)| *step).collect();
                    report_cycle(raw, members, report);
                }
                _ => {}
            }
        }
    }
}

/// `members` each read the next, and the last the first.
fn report_cycle(raw: &[RawStep<'_>], mut members: Vec<usize>, report: &mut Report) {
    const NAMES_SHOWN_MAX: usize = 12;
    // As records go, from the first in the file.
    members.reverse();
    let first = members.iter().enumerate().min_by_key(|(_, step)| **step).map_or(0, |(place, _)| place);
    members.rotate_left(first);
    let Some(step) = members.first().and_then(|step| raw.get(*step)) else { return };
    let mut chain: Vec<String> = members.iter().filter_map(|step| raw.get(*step)).map(RawStep::name).collect();
    if chain.len() > NAMES_SHOWN_MAX {
        chain.truncate(NAMES_SHOWN_MAX);
        chain.push("...".to_owned());
    }
    chain.push(step.name());
    let node = step.from.as_ref().map_or(step.node, |from| from.node);
    let expected =
        "a from or deadLetter that does not lead back to the step itself; records go one way, from sources to sinks";
    report.node(node, &join(&step.place, "from"), &format!("a cycle: {}", chain.join(" -> ")), expected);
}

/// Checks that no worker has more rings than its commit page has room for.
///
/// A groupByKey is no worker of its own: it is evaluated where its records come from, so that its readers' rings come from
/// there too. Counting it as such also holds for an agent that does give it a worker.
fn rings(raw: &[RawStep<'_>], inputs: &[Vec<Input>], report: &mut Report) {
    let ring_count_max = u64::from(CONTAINERS_MAX);
    let workers = |step: usize| match raw.get(step).map(|step| &step.kind) {
        Some(Some(StepKind::ParDo(par_do))) => u64::from(par_do.containers),
        _ => 1,
    };
    let is_group = |step: usize| matches!(raw.get(step).map(|step| &step.kind), Some(Some(StepKind::GroupByKey(_))));
    let order = sources_first(inputs);
    let mut into = vec![0_u64; raw.len()];
    for step in &order {
        let sum = inputs.get(*step).into_iter().flatten().map(|input| {
            if is_group(input.step) { into.get(input.step).copied().unwrap_or(0) } else { workers(input.step) }
        });
        let sum = sum.fold(0, u64::saturating_add);
        if let Some(place) = into.get_mut(*step) {
            *place = sum;
        }
    }
    let mut out_of = vec![0_u64; raw.len()];
    for step in order.iter().rev() {
        let rings = if is_group(*step) { out_of.get(*step).copied().unwrap_or(0) } else { workers(*step) };
        for input in inputs.get(*step).into_iter().flatten() {
            if let Some(sum) = out_of.get_mut(input.step) {
                *sum = sum.saturating_add(rings);
            }
        }
    }
    for step in raw {
        let into = into.get(step.index).copied().unwrap_or(0);
        if into > ring_count_max {
            let found = format!("{into} workers that feed {}", quote(&step.name()));
            let expected = format!("at most {ring_count_max} (containers of the steps it reads, added up)");
            report.node(step.node, &step.place, &found, &expected);
        }
        let out_of = out_of.get(step.index).copied().unwrap_or(0);
        if out_of > ring_count_max && !is_group(step.index) {
            let found = format!("{out_of} workers that read {}", quote(&step.name()));
            let expected = format!("at most {ring_count_max} (containers of the steps that read it, added up)");
            report.node(step.node, &step.place, &found, &expected);
        }
    }
}

/// Every step behind all that it reads. There is no cycle.
fn sources_first(inputs: &[Vec<Input>]) -> Vec<usize> {
    let mut waiting_for: Vec<usize> = inputs.iter().map(Vec::len).collect();
    let mut order: Vec<usize> = (0..inputs.len()).filter(|step| inputs.get(*step).is_some_and(Vec::is_empty)).collect();
    let mut next = 0;
    while let Some(done) = order.get(next).copied() {
        next += 1;
        for (reader, inputs) in inputs.iter().enumerate() {
            let count = inputs.iter().filter(|input| input.step == done).count();
            if let Some(waiting) = waiting_for.get_mut(reader).filter(|_| count > 0) {
                *waiting = waiting.saturating_sub(count);
                if *waiting == 0 {
                    order.push(reader);
                }
            }
        }
    }
    order
}

/// Two readers of standard input would each get some of the lines.
fn stdin_once(raw: &[RawStep<'_>], report: &mut Report) {
    let mut readers = raw.iter().filter(|step| matches!(step.kind, Some(StepKind::Source(Source::Stdin))));
    let Some(first) = readers.next() else { return };
    for second in readers {
        let expected = format!("one stdin in a pipeline; several steps may read it, as from: [{}]", first.name());
        report.node(
            second.node,
            &join(&second.place, "stdin"),
            &format!("a second stdin; the first is {}", first.place),
            &expected,
        );
    }
}

/// Two writers of one file would mix their lines; a writer of a file that is read would feed itself.
fn files(raw: &[RawStep<'_>], report: &mut Report) {
    let mut written: HashMap<String, &RawStep<'_>> = HashMap::new();
    let read: HashMap<String, &RawStep<'_>> = raw
        .iter()
        .filter_map(|step| match &step.kind {
            Some(StepKind::Source(Source::File(file))) => Some((plain_path(&file.path), step)),
            _ => None,
        })
        .collect();
    for step in raw {
        let Some(StepKind::Sink(Sink::File(file))) = &step.kind else { continue };
        let path = join(&join(&step.place, "file"), "path");
        let plain = plain_path(&file.path);
        if let Some(source) = read.get(&plain) {
            let found = format!("{}, which {} reads", quote(&file.path), source.place);
            report.node(step.node, &path, &found, "another file: a pipeline that writes what it reads never ends");
        }
        if let Some(first) = written.get(&plain) {
            let found = format!("{}, which {} writes too", quote(&file.path), first.place);
            let expected = "a file of its own for every sink; one sink may read several steps, as from: [a, b]";
            report.node(step.node, &path, &found, expected);
        } else {
            written.insert(plain, step);
        }
    }
}

/// The path without what changes nothing. Links are not known here.
fn plain_path(path: &str) -> String {
    let parts: Vec<&str> = path.split('/').filter(|part| !matches!(*part, "" | ".")).collect();
    format!("{}{}", if path.starts_with('/') { "/" } else { "" }, parts.join("/"))
}
