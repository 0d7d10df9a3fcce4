//! What conform does not try: attributes, several inputs, an interrupted wait. tests/languages.rs runs it. That bytes are not kept too
//! long holds the compiler (sdk-c/rust/src/lib.rs has an example that it refuses).
use std::collections::BTreeSet;

use argo_streams_sdk::{Emit, Error, Key, Stage};

fn one(stage: &mut Stage, file: &str) -> Result<(), Error> {
    let interrupter = stage.interrupter();
    let thread = std::thread::spawn(move || interrupter.interrupt());
    match stage.next().map(|_record| ()) {
        Err(error) if error.is_interrupted() => drop(std::fs::File::create(file)),
        other => other?,
    }
    let _joined = thread.join();
    let how = Emit {
        key: Key::Set("k".into()),
        event_time_ns: Some(5),
        attributes: &[("hop", b"one"), ("empty", b"")],
        to_errors: false,
    };
    let mut inputs = BTreeSet::new();
    while let Some(record) = stage.next()? {
        inputs.insert(record.input());
        record.emit_with(record.payload(), &how)?;
    }
    stage.emit_with(&format!("inputs {} kept unchecked", inputs.len()), &how)
}

fn other(stage: &mut Stage) -> Result<(), Error> {
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap_or_default();
    while let Some(record) = stage.next()? {
        let hop = text(record.attribute("hop")?.unwrap_or_default());
        let (empty, missing) = (record.attribute("empty")? == Some(Vec::new()), record.attribute("missing")?.is_none());
        let key = text(record.key().map_or_else(Vec::new, |key| key.to_vec()));
        let payload = text(record.payload().to_vec());
        record.emit(&format!("{hop} {empty} {missing} {key} {} {payload}", record.event_time_ns()))?;
    }
    Ok(())
}

fn fails(stage: &mut Stage) -> Result<(), Error> {
    while let Some(record) = stage.next()? {
        let text = String::from_utf8(record.payload().to_vec()).unwrap_or_default();
        let fails: u32 = text.split(' ').next().and_then(|number| number.parse().ok()).unwrap_or(0);
        if record.attempts() < fails {
            record.fail("not today")?;
        } else {
            record.emit(record.payload())?;
        }
    }
    Ok(())
}

fn main() -> Result<(), Error> {
    let mut stage = Stage::open()?;
    if stage.name() == "one" {
        one(&mut stage, &std::env::args().nth(1).unwrap_or_default())?;
    } else if stage.name() == "fails" {
        fails(&mut stage)?;
    } else {
        other(&mut stage)?;
    }
    stage.close()
}
