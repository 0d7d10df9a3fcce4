//! Which part of a record is its key: a plain path, or a jq program.

use std::fmt;
use std::sync::Arc;

use argo_streams_key::{KeyError, KeyPath, check_json};
use jaq_core::load::{self, Arena, File, Loader};
use jaq_core::{Compiler, Ctx, Vars, data::JustLut};
use jaq_json::{Val, read, write};

use crate::error::{quote, shorten};
use crate::limits::{KEY_BYTES_MAX, KEY_DEPTH_MAX};

/// Which part of a record is its key. Cheap to clone; one value may be used by several threads.
///
/// Both forms give the same key for the same line, or refuse it both: a plain path is only the faster one.
#[derive(Clone, Debug)]
pub enum KeyExpression {
    /// A plain path, evaluated in one scan over the line.
    Path(KeyPath),
    /// Anything else that is jq, run by jaq.
    Program(KeyProgram),
}

/// The same text: programs that differ in it and give the same keys are another expression.
impl PartialEq for KeyExpression {
    fn eq(&self, other: &Self) -> bool {
        self.to_string() == other.to_string()
    }
}

impl KeyExpression {
    /// Reads a key expression: `.licenseId`, or any jq program without input and output.
    ///
    /// # Errors
    /// Where and why the text is no program.
    pub fn parse(text: &str) -> Result<Self, KeyExpressionError> {
        if text.len() > KEY_BYTES_MAX {
            return Err(KeyExpressionError::TooLong { length_bytes: text.len() });
        }
        KeyPath::parse(text).map_or_else(|| KeyProgram::parse(text).map(Self::Program), |path| Ok(Self::Path(path)))
    }

    /// Writes the key of `line` to `key_out`, which is cleared first. See [`KeyPath::evaluate`] and [`KeyProgram::evaluate`].
    ///
    /// # Errors
    /// Why the line has no key; `key_out` is then empty.
    pub fn evaluate(&self, line: &[u8], key_out: &mut Vec<u8>) -> Result<(), KeyError> {
        match self {
            Self::Path(path) => path.evaluate(line, key_out),
            Self::Program(program) => program.evaluate(line, key_out),
        }
    }
}

impl fmt::Display for KeyExpression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => path.fmt(f),
            Self::Program(program) => program.fmt(f),
        }
    }
}

/// Why a text is no key expression. `Display` completes "found ...".
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyExpressionError {
    /// Longer than [`KEY_BYTES_MAX`].
    #[error("a key of {length_bytes} bytes")]
    TooLong {
        /// How long it is.
        length_bytes: usize,
    },
    /// More brackets open at once than [`KEY_DEPTH_MAX`].
    #[error("a jq program with more than {KEY_DEPTH_MAX} brackets open at once")]
    TooDeep,
    /// Not jq.
    #[error("{program}, which does not compile: at character {character}, {reason}")]
    Syntax {
        /// The text, in quotes and shortened.
        program: String,
        /// The place, from 1.
        character: usize,
        /// What is wrong there.
        reason: String,
    },
}

/// A jq program whose result is the key.
///
/// It gets the line only if [`check_json`] lets it through. There is no input and output in it, no clock, no environment and
/// no modules. A second result ends it.
///
/// # What is not bounded
/// Time and memory of one evaluation. `range(infinite)` and `repeat(.)` end at their second result; a program that computes
/// without end and gives nothing (`def f: f; f`, `last(range(infinite))`) keeps its thread, and one that recurses without end
/// outside a tail position exhausts its stack. The programs are the pipeline author's own, like the programs in ParDos.
#[derive(Clone)]
pub struct KeyProgram {
    text: Arc<str>,
    filter: Arc<jaq_core::Filter<JustLut<Val>>>,
}

/// Filters of jaq that would read the world or leave the program.
const LEFT_OUT: [&str; 10] = [
    "debug",
    "debug_empty",
    "env",
    "halt",
    "halt_error",
    "localtime",
    "now",
    "stderr",
    "stderr_empty",
    "strflocaltime",
];

impl KeyProgram {
    /// Compiles a program.
    ///
    /// # Errors
    /// Where and why it does not compile.
    pub fn parse(text: &str) -> Result<Self, KeyExpressionError> {
        if text.len() > KEY_BYTES_MAX {
            return Err(KeyExpressionError::TooLong { length_bytes: text.len() });
        }
        if brackets_open_max(text) > KEY_DEPTH_MAX {
            return Err(KeyExpressionError::TooDeep);
        }
        let syntax = |(part, reason): (&str, String)| {
            let before = text.get(..load::span(text, part).start).unwrap_or(text);
            KeyExpressionError::Syntax { program: quote(text), character: before.chars().count() + 1, reason }
        };
        let definitions = jaq_core::defs().chain(jaq_std::defs()).chain(jaq_json::defs());
        let natives = jaq_core::funs().chain(jaq_std::funs()).chain(jaq_json::funs());
        let arena = Arena::default();
        let modules = Loader::new(definitions.filter(|definition| !LEFT_OUT.contains(&definition.name)))
            .load(&arena, File { code: text, path: () })
            .map_err(|errors| syntax(loading_failed(errors, text)))?;
        let filter = Compiler::default()
            .with_funs(natives.filter(|(name, ..)| !LEFT_OUT.contains(name)))
            .compile(modules)
            .map_err(|errors| syntax(compiling_failed(errors, text)))?;
        Ok(Self { text: text.into(), filter: Arc::new(filter) })
    }

    /// Runs the program on `line` and writes its one result to `key_out`, which is cleared first: a string's bytes, or any
    /// other value's compact JSON. Allocates. May never return for a program that computes without end.
    ///
    /// # Errors
    /// Why the line has no key; `key_out` is then empty.
    pub fn evaluate(&self, line: &[u8], key_out: &mut Vec<u8>) -> Result<(), KeyError> {
        key_out.clear();
        check_json(line)?;
        let input = read::parse_single(line).map_err(|_| KeyError::NotJson { offset: 0 })?;
        let context = Ctx::<JustLut<Val>>::new(&self.filter.lut, Vars::new([]));
        let mut results = self.filter.id.run((context, input));
        let failed = |reason: &dyn fmt::Display| KeyError::Program(shorten(&reason.to_string(), FAILURE_LENGTH_MAX));
        let Some(first) = results.next() else { return Err(KeyError::NotOneResult { count: 0 }) };
        let first = first.map_err(|exception| match exception.get_err() {
            Ok(error) => failed(&error),
            Err(_) => failed(&"it left without a result"),
        })?;
        if results.next().is_some() {
            return Err(KeyError::NotOneResult { count: 2 });
        }
        match first {
            Val::Null => return Err(KeyError::Null),
            Val::TStr(text) | Val::BStr(text) => key_out.extend_from_slice(&text),
            value => {
                if let Err(error) = write::write(key_out, &write::Pp::default(), 0, &value) {
                    key_out.clear();
                    return Err(failed(&error));
                }
            }
        }
        Ok(())
    }
}

/// Characters of a failed program's own message: it may hold the whole record.
const FAILURE_LENGTH_MAX: usize = 200;

impl fmt::Debug for KeyProgram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyProgram").field("text", &self.text).finish_non_exhaustive()
    }
}

impl fmt::Display for KeyProgram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// The first place where loading failed, and why.
fn loading_failed<'a>(errors: load::Errors<&'a str, ()>, text: &'a str) -> (&'a str, String) {
    let reason = |expected: &str, found: &str| match (expected, found) {
        ("nothing", _) => format!("{} does not belong there", quote(found)),
        (_, "") => format!("{expected} is missing at the end"),
        _ => format!("{expected} is missing before {}", quote(found)),
    };
    match errors.into_iter().next().map(|(_, error)| error) {
        Some(load::Error::Lex(errors)) => {
            errors.into_iter().next().map(|(expected, found)| (found, reason(expected.as_str(), found)))
        }
        Some(load::Error::Parse(errors)) => {
            errors.into_iter().next().map(|(expected, found)| (found, reason(expected.as_str(), found)))
        }
        Some(load::Error::Io(_)) => Some((text, "a module is asked for, and a key has none".to_owned())),
        None => None,
    }
    .unwrap_or((text, "it is not jq".to_owned()))
}

/// The first name that is not known.
fn compiling_failed<'a>(errors: jaq_core::compile::Errors<&'a str, ()>, text: &'a str) -> (&'a str, String) {
    let first = errors.into_iter().flat_map(|(_, errors)| errors).next();
    first.map_or((text, "it is not jq".to_owned()), |(name, undefined)| {
        let reason = if LEFT_OUT.contains(&name) || matches!(name, "input" | "inputs" | "$ENV" | "input_filename") {
            format!("{} reads the world outside the record, which a key may not", quote(name))
        } else {
            format!("there is no {} {}", undefined.as_str(), quote(name))
        };
        (name, reason)
    })
}

/// How many brackets are open at most. Those in strings count too: a bound needs no lexer.
fn brackets_open_max(text: &str) -> usize {
    let mut open = 0_usize;
    let mut open_max = 0;
    for byte in text.bytes() {
        match byte {
            b'(' | b'[' | b'{' => open += 1,
            b')' | b']' | b'}' => open = open.saturating_sub(1),
            _ => {}
        }
        open_max = open_max.max(open);
    }
    open_max
}

/// Key expressions move to the threads that use them.
const fn assert_send_sync<T: Send + Sync>() {}
const _: () = assert_send_sync::<KeyExpression>();
