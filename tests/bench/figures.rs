//! What was measured: told line by line as it comes, and written as JSON at the end.

use serde_json::json;
use std::io::Write as _;
use std::path::Path;

/// What a figure is to reach.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Goal {
    /// It is told for comparison.
    Nothing,
    /// At least this.
    AtLeast(f64),
    /// At most this.
    AtMost(f64),
}

/// Everything measured so far.
#[derive(Debug, Default)]
pub(crate) struct Figures {
    rows: Vec<serde_json::Value>,
    heading: String,
}

impl Figures {
    /// Begins a group of figures.
    pub(crate) fn heading(&mut self, heading: &str) -> anyhow::Result<()> {
        heading.clone_into(&mut self.heading);
        Ok(writeln!(std::io::stdout(), "\n{heading}")?)
    }

    /// Adds a figure.
    pub(crate) fn add(&mut self, name: &str, value: f64, unit: &str, goal: Goal) -> anyhow::Result<()> {
        let digits = match value {
            ..10.0 => 2,
            ..100.0 => 1,
            _ => 0,
        };
        let (told, reached, bound) = match goal {
            Goal::Nothing => (String::new(), None, None),
            Goal::AtLeast(bound) => (format!("(goal: at least {bound})"), Some(value >= bound), Some(bound)),
            Goal::AtMost(bound) => (format!("(goal: at most {bound})"), Some(value <= bound), Some(bound)),
        };
        let missed = if reached == Some(false) { " MISSED" } else { "" };
        writeln!(std::io::stdout(), "  {name:<42} {value:>10.digits$} {unit:<12} {told}{missed}")?;
        let group = &self.heading;
        self.rows.push(
            json!({ "group": group, "name": name, "value": value, "unit": unit, "goal": bound, "reached": reached }),
        );
        Ok(())
    }

    /// Writes all of them.
    pub(crate) fn write(&self, file: &Path) -> anyhow::Result<()> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let all = json!({ "cores": cores, "figures": self.rows });
        std::fs::write(file, format!("{all:#}\n"))?;
        Ok(writeln!(std::io::stdout(), "\nwritten to {}", file.display())?)
    }
}

/// The value below which `percent` of `values` lie.
pub(crate) fn percentile(values: &mut [f64], percent: usize) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    let index = (values.len() * percent).div_ceil(100).saturating_sub(1);
    values.get(index).copied().unwrap_or(f64::NAN)
}
