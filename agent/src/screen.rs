//! The terminal: words, records and the live view share it without tearing one another.

use std::io::{IsTerminal, Write};
use std::sync::Mutex;

use tracing_subscriber::fmt::MakeWriter;

/// Standard error, and standard output for records.
#[derive(Debug)]
pub struct Screen {
    is_live: bool,
    records_to_stderr: bool,
    drawn_lines: Mutex<usize>,
}

impl Screen {
    /// A screen; the live view is drawn only when `wants_live` and standard error is a terminal.
    #[must_use]
    pub fn new(wants_live: bool, records_to_stderr: bool) -> Self {
        Self { is_live: wants_live && std::io::stderr().is_terminal(), records_to_stderr, drawn_lines: Mutex::new(0) }
    }

    /// Whether a live view is drawn.
    #[must_use]
    pub fn is_live(&self) -> bool {
        self.is_live
    }

    /// Writes words for people.
    pub fn words(&self, text: &[u8]) {
        self.with_clean_screen(|| {
            // Nobody can be told that standard error is broken.
            let _unheard = std::io::stderr().write_all(text);
        });
    }

    /// Writes records of a `log` step.
    ///
    /// # Errors
    /// What the kernel says: the reader may be gone.
    pub fn records(&self, lines: &[u8]) -> std::io::Result<()> {
        self.with_clean_screen(|| {
            if self.records_to_stderr {
                std::io::stderr().write_all(lines)
            } else {
                let mut output = std::io::stdout().lock();
                output.write_all(lines).and_then(|()| output.flush())
            }
        })
    }

    /// Draws the live view in place of the last one.
    pub fn draw(&self, text: &str) {
        if self.is_live {
            self.with_clean_screen(|| {
                let _unheard = std::io::stderr().write_all(text.as_bytes());
            });
            if let Ok(mut lines) = self.drawn_lines.lock() {
                *lines = text.lines().count();
            }
        }
    }

    fn with_clean_screen<R>(&self, write: impl FnOnce() -> R) -> R {
        let mut drawn = self.drawn_lines.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if *drawn > 0 {
            let _unheard = write!(std::io::stderr(), "\x1b[{}F\x1b[J", *drawn);
            *drawn = 0;
        }
        write()
    }
}

/// Lets tracing write through a screen.
#[derive(Clone, Debug)]
pub struct ScreenWriter(pub std::sync::Arc<Screen>);

impl Write for ScreenWriter {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.words(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for ScreenWriter {
    type Writer = Self;

    fn make_writer(&'a self) -> Self::Writer {
        self.clone()
    }
}
