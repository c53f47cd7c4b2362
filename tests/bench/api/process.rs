//! What a process spends, as Linux tells it. Never here: starting processes.

use anyhow::Context as _;
use std::fs;

/// Parts of a second in which Linux tells CPU time to programs, on every architecture.
const TICKS_PER_SECOND: f64 = 100.0;

/// A process with its children.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Process(pub(crate) u32);

impl Process {
    /// User and system time of all threads so far, in milliseconds.
    pub(crate) fn cpu_ms(self) -> anyhow::Result<f64> {
        let own = |process: Self| {
            let stat = process.read("stat")?;
            // The name of a program, in brackets, may have blanks.
            let rest = stat.rsplit_once(')').map_or(stat.as_str(), |(_, rest)| rest);
            let ticks: Vec<f64> = rest.split_whitespace().skip(11).take(2).filter_map(|t| t.parse().ok()).collect();
            Ok(ticks.iter().sum::<f64>() * 1e3 / TICKS_PER_SECOND)
        };
        self.sum(&own)
    }

    /// Memory that it has now, in MB.
    pub(crate) fn resident_mb(self) -> anyhow::Result<f64> {
        self.sum(&|process| process.memory_mb("VmRSS:"))
    }

    /// The most memory that it ever had, in MB.
    pub(crate) fn peak_mb(self) -> anyhow::Result<f64> {
        self.sum(&|process| process.memory_mb("VmHWM:"))
    }

    fn memory_mb(self, what: &str) -> anyhow::Result<f64> {
        let status = self.read("status")?;
        let line = status.lines().find_map(|line| line.strip_prefix(what)).unwrap_or("0 kB");
        let kib: f64 = line.trim().trim_end_matches(" kB").parse()?;
        Ok(kib * 1024.0 / 1e6)
    }

    fn sum(self, of: &dyn Fn(Self) -> anyhow::Result<f64>) -> anyhow::Result<f64> {
        let children = self.read(&format!("task/{}/children", self.0)).unwrap_or_default();
        let children = children.split_whitespace().filter_map(|id| id.parse().ok()).map(Self);
        let of_children: f64 = children.map(|child| child.sum(of)).sum::<anyhow::Result<f64>>()?;
        Ok(of(self)? + of_children)
    }

    fn read(self, file: &str) -> anyhow::Result<String> {
        fs::read_to_string(format!("/proc/{}/{file}", self.0)).with_context(|| format!("process {} is gone", self.0))
    }
}
