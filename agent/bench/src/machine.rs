//! What machine this is: a figure without it says nothing.

use serde::Serialize;

use crate::processor::{Burst, cores};

/// The fingerprint of the machine, at the start of a benchmark.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// The processor as the kernel names it, with its family and model: hypervisors hide the name.
    pub processor: String,
    /// Cores that this process may use.
    pub cores: usize,
    /// The kernel's release.
    pub kernel: String,
    /// Processor architecture.
    pub architecture: &'static str,
    /// The mean number of runnable threads in the last minute.
    pub load: f64,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// This program's version.
    pub version: &'static str,
    /// `fifo`: nothing ordinary could take a spinning role's core away. `ordinary`: roles competed like any program.
    pub scheduling: &'static str,
}

impl Machine {
    /// Looks at the machine.
    #[must_use]
    pub fn look() -> Self {
        let information = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let field = |name: &str| {
            information
                .lines()
                .find_map(|line| line.split_once(':').filter(|(key, _)| key.trim() == name))
                .map_or("unknown", |(_, value)| value.trim())
        };
        let uname = rustix::system::uname();
        let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let memory_kib: u64 = memory
            .lines()
            .find_map(|line| line.strip_prefix("MemTotal:"))
            .and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse().ok())
            .unwrap_or(0);
        Self {
            processor: format!("{} (family {}, model {})", field("model name"), field("cpu family"), field("model")),
            cores: cores().map_or(0, |cores| cores.len()),
            kernel: uname.release().to_string_lossy().into_owned(),
            architecture: std::env::consts::ARCH,
            load: load(),
            memory_bytes: memory_kib * 1024,
            version: env!("CARGO_PKG_VERSION"),
            scheduling: if Burst::is_permitted() { "fifo" } else { "ordinary" },
        }
    }
}

fn load() -> f64 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|first| first.parse().ok()).unwrap_or(0.0)
}
