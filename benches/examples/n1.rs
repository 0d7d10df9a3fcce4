//! N1 in Rust: a line of JSON in, a running sum for each licenseId, a line out; `n1 HOW [one]` as in benches/n1/n1.c.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a benchmark fails by a panic")]

use std::collections::HashMap;
use std::io::{BufRead, BufReader, BufWriter, IsTerminal, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use argo_streams_sdk::Stage;
use memchr::memmem::Finder;

struct Sums {
    key: Finder<'static>,
    amount: Finder<'static>,
    sums: HashMap<Vec<u8>, u64>,
}

impl Sums {
    fn new() -> Self {
        Self { key: Finder::new("\"licenseId\":\""), amount: Finder::new("\"amount\":"), sums: HashMap::new() }
    }

    fn step(&mut self, line: &[u8], out: &mut Vec<u8>) {
        let begin = self.key.find(line).expect("licenseId") + 13;
        let key = &line[begin..begin + memchr::memchr(b'"', &line[begin..]).expect("its end")];
        let digits = &line[self.amount.find(line).expect("amount") + 9..];
        let amount = digits
            .iter()
            .take_while(|byte| byte.is_ascii_digit())
            .fold(0, |number, digit| number * 10 + u64::from(digit - b'0'));
        let sum = match self.sums.get_mut(key) {
            Some(sum) => sum,
            None => self.sums.entry(key.to_vec()).or_default(),
        };
        *sum += amount;
        out.extend_from_slice(b"{\"licenseId\":\"");
        out.extend_from_slice(key);
        out.extend_from_slice(b"\",\"sum\":");
        write!(out, "{sum}}}").unwrap();
    }

    fn lines(&mut self, source: impl Read, mut sink: impl Write, one: bool) {
        let mut source = BufReader::with_capacity(64 << 10, source);
        let (mut line, mut out) = (Vec::new(), Vec::new());
        while source.read_until(b'\n', &mut line).unwrap() > 0 {
            out.clear();
            self.step(&line, &mut out);
            out.push(b'\n');
            sink.write_all(&out).unwrap();
            if one {
                sink.flush().unwrap();
            }
            line.clear();
        }
        sink.flush().unwrap();
    }

    fn socket(&mut self) {
        let mut connection = UnixStream::connect(std::env::var_os("AGS_RECORDS").unwrap()).unwrap();
        let mut data = vec![0; 1 << 20];
        let (mut have, mut out) = (0, Vec::new());
        let u32_at = |data: &[u8], at: usize| u32::from_le_bytes(data[at..at + 4].try_into().unwrap()) as usize;
        loop {
            let got = connection.read(&mut data[have..]).unwrap();
            if got == 0 {
                return;
            }
            have += got;
            let mut at = 0;
            out.clear();
            while have - at >= 4 && have - at - 4 >= u32_at(&data, at) {
                let end = at + 4 + u32_at(&data, at);
                let payload = at + 32 + u32_at(&data, at + 24) + u32_at(&data, at + 28);
                let frame = out.len();
                out.extend_from_slice(&[0, 0, 0, 0, 4, 0, 0, 0]);
                out.extend_from_slice(&data[at + 8..at + 16]);
                out.extend_from_slice(&[0; 16]);
                self.step(&data[payload..end], &mut out);
                let len = u32::try_from(out.len() - frame - 4).unwrap();
                out[frame..frame + 4].copy_from_slice(&len.to_le_bytes());
                at = end;
            }
            data.copy_within(at..have, 0);
            have -= at;
            connection.write_all(&out).unwrap();
        }
    }

    fn file(&mut self) {
        let (from, to) =
            (std::env::var("AGS_INPUT_DIRECTORY").unwrap(), std::env::var("AGS_OUTPUT_DIRECTORY").unwrap());
        loop {
            let mut is_idle = true;
            for entry in std::fs::read_dir(&from).unwrap() {
                let name = entry.unwrap().file_name().into_string().unwrap();
                if name.starts_with('.') {
                    continue;
                }
                is_idle = false;
                let (batch, made) = (format!("{from}/{name}"), format!("{to}/{name}.tmp"));
                let sink = BufWriter::with_capacity(64 << 10, std::fs::File::create(&made).unwrap());
                self.lines(std::fs::File::open(&batch).unwrap(), sink, false);
                std::fs::rename(&made, format!("{to}/{name}")).unwrap();
                std::fs::remove_file(&batch).unwrap();
            }
            if is_idle {
                std::thread::sleep(Duration::from_micros(500));
            }
        }
    }

    /// A thread for each connection, as a server would; the sums are everybody's.
    fn http(self) {
        let port = std::env::var("PORT").unwrap().parse().unwrap();
        let sums = Arc::new(Mutex::new(self));
        for connection in TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap().incoming() {
            let (connection, sums) = (connection.unwrap(), Arc::clone(&sums));
            connection.set_nodelay(true).unwrap();
            std::thread::spawn(move || answer_requests(connection, &sums));
        }
    }

    fn shm(&mut self) -> Result<(), argo_streams_sdk::Error> {
        let mut stage = Stage::open()?;
        let (mut line, mut out) = (Vec::new(), Vec::new());
        while let Some(record) = stage.next()? {
            line.clear();
            record.payload().append_to(&mut line);
            out.clear();
            self.step(&line, &mut out);
            record.emit(out.as_slice())?;
        }
        stage.close()
    }
}

/// Until the connection ends.
fn answer_requests(connection: TcpStream, sums: &Mutex<Sums>) {
    let mut writer = connection.try_clone().unwrap();
    let mut reader = BufReader::with_capacity(64 << 10, connection);
    let (mut line, mut body, mut out) = (String::new(), Vec::new(), Vec::new());
    loop {
        let (mut len, mut is_batch, mut is_before) = (0, false, true);
        loop {
            line.clear();
            if reader.read_line(&mut line).unwrap_or(0) == 0 {
                return;
            }
            let Some((name, value)) = line.trim_end().split_once(':') else {
                if line.trim_end().is_empty() && !is_before {
                    break;
                }
                is_before = false;
                continue;
            };
            if name.eq_ignore_ascii_case("content-length") {
                len = value.trim().parse().unwrap();
            }
            is_batch |= name.eq_ignore_ascii_case("ags-records");
        }
        body.resize(len, 0);
        reader.read_exact(&mut body).unwrap();
        out.clear();
        let mut sums = sums.lock().unwrap();
        if is_batch {
            for line in body.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
                out.extend_from_slice(b"{\"value\":");
                sums.step(line, &mut out);
                out.extend_from_slice(b"}\n");
            }
        } else if !body.is_empty() {
            sums.step(&body, &mut out);
        }
        drop(sums);
        let mut answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", out.len()).into_bytes();
        answer.extend_from_slice(&out);
        writer.write_all(&answer).unwrap();
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let one = arguments.get(1).is_some_and(|word| word == "one");
    let mut sums = Sums::new();
    match arguments.first().map_or("", String::as_str) {
        "socket" => sums.socket(),
        "file" => sums.file(),
        "http" => sums.http(),
        "shm" => sums.shm().unwrap(),
        "lines" => match (std::env::var_os("AGS_INPUT"), std::env::var_os("AGS_OUTPUT")) {
            (Some(from), Some(to)) => {
                let sink = std::fs::OpenOptions::new().write(true).open(to).unwrap();
                sums.lines(std::fs::File::open(from).unwrap(), BufWriter::with_capacity(64 << 10, sink), one);
            }
            _ => {
                let stdout = std::io::stdout();
                let one = one || stdout.is_terminal();
                sums.lines(std::io::stdin(), BufWriter::with_capacity(64 << 10, stdout), one);
            }
        },
        how => panic!("lines, socket, file, http or shm, and not {how:?}"),
    }
}
