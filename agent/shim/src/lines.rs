//! Cuts a program's output into lines.

/// The longest line. Records may be larger; a line is gathered in memory until its newline comes.
pub const LINE_BYTES_MAX: usize = 16 << 20;
const _: () = assert!(LINE_BYTES_MAX <= argo_streams_shm_protocol::limits::RECORD_PAYLOAD_BYTES_MAX);

/// So much is kept of a line that is longer: enough to tell which it is.
pub const LINE_HEAD_BYTES: usize = 64 << 10;

/// One line of output, where it lies in the splitter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Line<'a> {
    /// A whole line, without its newline.
    Whole(&'a [u8]),
    /// A line longer than [`LINE_BYTES_MAX`]; its bytes were dropped as they came, but for the first.
    TooLong {
        /// Its length without its newline.
        len_bytes: u64,
        /// Its first [`LINE_HEAD_BYTES`].
        head: &'a [u8],
    },
}

/// Collects bytes and gives lines. Only `\n` ends a line; a `\r` before it belongs to the line.
#[derive(Debug)]
pub struct LineSplitter {
    buffer: Vec<u8>,
    begin: usize,
    searched: usize,
    dropped: u64,
    /// The beginning of the line whose bytes are being dropped, or of the last one.
    head: Vec<u8>,
    line_bytes_max: usize,
}

impl Default for LineSplitter {
    fn default() -> Self {
        Self::with_limit(LINE_BYTES_MAX)
    }
}

impl LineSplitter {
    /// For lines of at most so many bytes.
    pub(crate) fn with_limit(line_bytes_max: usize) -> Self {
        Self { buffer: Vec::new(), begin: 0, searched: 0, dropped: 0, head: Vec::new(), line_bytes_max }
    }

    /// The next bytes, if so many are there.
    pub(crate) fn peek(&self, len: usize) -> Option<&[u8]> {
        self.buffer.get(self.begin..self.begin + len)
    }

    /// Goes on behind bytes that were peeked at.
    pub(crate) fn skip(&mut self, len: usize) {
        self.begin = (self.begin + len).min(self.buffer.len());
        self.searched = self.begin;
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        *self = Self::with_limit(self.line_bytes_max);
    }

    /// The buffer to read into: bytes are added to its end.
    pub fn take_buffer(&mut self) -> Vec<u8> {
        if self.begin > 0 {
            self.buffer.drain(..self.begin);
            self.searched = self.searched.saturating_sub(self.begin);
            self.begin = 0;
        }
        std::mem::take(&mut self.buffer)
    }

    /// Gives the buffer back with what was read.
    pub fn put_buffer(&mut self, buffer: Vec<u8>) {
        self.buffer = buffer;
    }

    /// Bytes that came and belong to no line that was given out yet.
    #[must_use]
    pub fn pending_bytes(&self) -> u64 {
        (self.buffer.len() - self.begin) as u64 + self.dropped
    }

    /// The next line, if there is a whole one.
    pub fn next_line(&mut self) -> Option<Line<'_>> {
        let rest = self.buffer.get(self.searched..).unwrap_or_default();
        match memchr::memchr(b'\n', rest) {
            Some(at) => {
                let (begin, end) = (self.begin, self.searched + at);
                self.begin = end + 1;
                self.searched = self.begin;
                Some(self.line(begin, end))
            }
            None => {
                self.searched = self.buffer.len();
                if self.buffer.len() - self.begin > self.line_bytes_max {
                    if self.dropped == 0 {
                        self.keep_head(self.begin, self.buffer.len());
                    }
                    self.dropped += (self.buffer.len() - self.begin) as u64;
                    self.buffer.clear();
                    self.begin = 0;
                    self.searched = 0;
                }
                None
            }
        }
    }

    /// What is left behind the last newline, at the end of the output. Nothing is left then.
    pub fn take_unterminated(&mut self) -> Option<Line<'_>> {
        let (begin, end) = (self.begin, self.buffer.len());
        if begin == end && self.dropped == 0 {
            return None;
        }
        self.begin = end;
        self.searched = end;
        Some(self.line(begin, end))
    }

    fn line(&mut self, begin: usize, end: usize) -> Line<'_> {
        let dropped = std::mem::take(&mut self.dropped);
        let len_bytes = (end - begin) as u64 + dropped;
        if len_bytes > self.line_bytes_max as u64 {
            if dropped == 0 {
                self.keep_head(begin, end);
            }
            return Line::TooLong { len_bytes, head: &self.head };
        }
        Line::Whole(self.buffer.get(begin..end).unwrap_or_default())
    }

    #[cold]
    fn keep_head(&mut self, begin: usize, end: usize) {
        let end = end.min(begin + LINE_HEAD_BYTES);
        self.head.clear();
        self.head.extend_from_slice(self.buffer.get(begin..end).unwrap_or_default());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lines as texts, or how long one was that is too long.
    fn feed(splitter: &mut LineSplitter, bytes: &[u8]) -> Vec<Result<Vec<u8>, u64>> {
        let mut buffer = splitter.take_buffer();
        buffer.extend_from_slice(bytes);
        splitter.put_buffer(buffer);
        let mut lines = Vec::new();
        while let Some(line) = splitter.next_line() {
            lines.push(match line {
                Line::Whole(line) => Ok(line.to_vec()),
                Line::TooLong { len_bytes, head } => {
                    assert!(!head.is_empty() && head.len() <= LINE_HEAD_BYTES);
                    Err(len_bytes)
                }
            });
        }
        lines
    }

    fn whole(text: &str) -> Result<Vec<u8>, u64> {
        Ok(text.as_bytes().to_vec())
    }

    #[test]
    fn lines_come_out_whole_however_they_are_cut() {
        let text = b"one\r\n\ntwo\n\0three\xff\nlast";
        for step in 1..=text.len() {
            let mut splitter = LineSplitter::default();
            let lines: Vec<_> = text.chunks(step).flat_map(|chunk| feed(&mut splitter, chunk)).collect();
            assert_eq!(
                lines,
                [whole("one\r"), whole(""), whole("two"), Ok(b"\0three\xff".to_vec())],
                "chunks of {step}"
            );
            assert_eq!(splitter.take_unterminated(), Some(Line::Whole(b"last")));
            assert_eq!(splitter.take_unterminated(), None);
        }
    }

    #[test]
    fn the_beginning_of_a_line_beyond_the_limit_is_kept() {
        for (len, piece) in
            [(LINE_BYTES_MAX + 1, usize::MAX), (LINE_BYTES_MAX + 1, 1 << 20), (3 * LINE_BYTES_MAX, 5 << 20)]
        {
            let mut text: Vec<u8> = (0..len).map(|at| b'a' + u8::try_from(at % 23).unwrap()).collect();
            let head = text[..LINE_HEAD_BYTES].to_vec();
            text.push(b'\n');
            let mut splitter = LineSplitter::default();
            for piece in text.chunks(piece) {
                assert_eq!(splitter.next_line(), None);
                let mut buffer = splitter.take_buffer();
                buffer.extend_from_slice(piece);
                splitter.put_buffer(buffer);
            }
            assert_eq!(splitter.next_line(), Some(Line::TooLong { len_bytes: len as u64, head: &head }));
        }
    }

    #[test]
    fn a_line_beyond_the_limit_is_counted_and_not_kept() {
        let mut splitter = LineSplitter::default();
        let chunk = vec![b'x'; 1 << 20];
        for round in 1..=20 {
            assert_eq!(feed(&mut splitter, &chunk), []);
            assert_eq!(splitter.pending_bytes(), round << 20);
        }
        assert!(splitter.buffer.len() <= LINE_BYTES_MAX);
        assert_eq!(feed(&mut splitter, b"\nnext\n"), [Err(20 << 20), whole("next")]);
        let longest = [vec![b'y'; LINE_BYTES_MAX], b"\n".to_vec()].concat();
        assert_eq!(feed(&mut splitter, &longest), [Ok(vec![b'y'; LINE_BYTES_MAX])]);
    }
}
