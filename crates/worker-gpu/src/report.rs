//! What engines have measured, for people and for Prometheus.
//!
//! Never here: measuring.

use genmill_engine::measure::Totals;
use std::fmt::Write as _;

/// What is told of a model and its engines, one after the other.
#[derive(Clone, Debug)]
pub(crate) struct Figures {
    /// Its name.
    pub(crate) model: String,
    /// What they have done.
    pub(crate) totals: Totals,
    /// How many sequences one could run at once.
    pub(crate) places: usize,
    /// Whether it is loaded now.
    pub(crate) held: bool,
    /// Bytes that could be read in a second; `None` until it was measured.
    pub(crate) bytes_per_s_most: Option<f64>,
}

impl Figures {
    /// How full steps were, 0 to 1.
    fn occupancy(&self) -> f64 {
        self.totals.sequences_per_step() / self.places.max(1) as f64
    }

    /// The part of the memory's speed that steps reached.
    fn bandwidth(&self) -> Option<f64> {
        self.bytes_per_s_most.map(|most| self.totals.bytes_per_s() / most)
    }

    /// All in a line.
    pub(crate) fn line(&self) -> String {
        let Self { model, totals, .. } = self;
        let bandwidth = self.bandwidth().map(|part| format!(", {:.0} % of the memory bandwidth", part * 100.0));
        format!(
            "{model}: {} steps in {:.1} s, prefill {} tokens at {:.0}/s, decode {} tokens at {:.0}/s, {:.1} sequences a \
             step ({:.0} % of {}), {:.0} % of prompt tokens cached, {:.1} GB/s{}",
            totals.steps,
            totals.busy().as_secs_f64(),
            totals.prefill_tokens,
            totals.prefill_tokens_per_s(),
            totals.decode_tokens,
            totals.decode_tokens_per_s(),
            totals.sequences_per_step(),
            self.occupancy() * 100.0,
            self.places,
            totals.prefix_hits() * 100.0,
            totals.bytes_per_s() / 1e9,
            bandwidth.unwrap_or_default(),
        )
    }
}

/// A name, a type, what it says, and a value for each model.
type Row = (&'static str, &'static str, &'static str, fn(&Figures) -> Option<f64>);

/// Every metric.
const ROWS: &[Row] = &[
    ("steps_total", "counter", "Steps computed.", |of| Some(of.totals.steps as f64)),
    ("prefill_tokens_total", "counter", "Prompt tokens computed.", |of| Some(of.totals.prefill_tokens as f64)),
    ("decode_tokens_total", "counter", "Generated tokens computed.", |of| Some(of.totals.decode_tokens as f64)),
    ("prefill_seconds_total", "counter", "Time of steps, the part of prompt tokens.", |of| {
        Some(of.totals.prefill_time.as_secs_f64())
    }),
    ("decode_seconds_total", "counter", "Time of steps, the part of generated tokens.", |of| {
        Some(of.totals.decode_time.as_secs_f64())
    }),
    ("step_sequences_total", "counter", "Sequences of all steps.", |of| Some(of.totals.sequences as f64)),
    ("step_bytes_total", "counter", "Bytes that the steps had to read and write.", |of| {
        Some(of.totals.work.bytes as f64)
    }),
    ("step_operations_total", "counter", "Multiplications and additions that the steps had to make.", |of| {
        Some(of.totals.work.operations as f64)
    }),
    ("prompt_tokens_total", "counter", "Prompt tokens admitted.", |of| Some(of.totals.prompt_tokens as f64)),
    ("cached_prompt_tokens_total", "counter", "Prompt tokens found computed.", |of| {
        Some(of.totals.cached_prompt_tokens as f64)
    }),
    ("sequences_max", "gauge", "Sequences that can run at once.", |of| Some(of.places as f64)),
    ("resident", "gauge", "1 while the model is loaded.", |of| Some(f64::from(u8::from(of.held)))),
    ("memory_bytes_per_second", "gauge", "How fast memory can be read.", |of| of.bytes_per_s_most),
];

/// All of them in the text format of Prometheus.
pub(crate) fn metrics(engines: &[Figures]) -> String {
    let mut text = String::new();
    for (name, kind, help, value) in ROWS {
        // Writing to a string cannot fail.
        writeln!(text, "# HELP genmill_engine_{name} {help}\n# TYPE genmill_engine_{name} {kind}").unwrap_or_default();
        for of in engines {
            if let Some(value) = value(of) {
                writeln!(text, "genmill_engine_{name}{{model=\"{}\"}} {value}", escaped(&of.model)).unwrap_or_default();
            }
        }
    }
    text
}

/// A label's value as the format wants it.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use genmill_engine::measure::{Measured, Work};
    use std::time::Duration;

    fn figures(model: &str) -> Figures {
        let mut totals = Totals { prompt_tokens: 40, cached_prompt_tokens: 10, ..Totals::default() };
        let work = Work { bytes: 5_000_000_000, operations: 7 };
        let time = Duration::from_secs(2);
        totals.add(&Measured { prefill_tokens: 30, decode_tokens: 10, sequences: 8, work, time });
        Figures { model: model.to_owned(), totals, places: 32, held: true, bytes_per_s_most: Some(10e9) }
    }

    #[test]
    fn the_line_tells_what_was_reached() {
        assert_eq!(
            figures("vllm_a").line(),
            "vllm_a: 1 steps in 2.0 s, prefill 30 tokens at 20/s, decode 10 tokens at 20/s, 8.0 sequences a step (25 % of \
             32), 25 % of prompt tokens cached, 2.5 GB/s, 25 % of the memory bandwidth"
        );
    }

    #[test]
    fn each_metric_has_a_line_for_each_engine() {
        let text = metrics(&[figures("vllm_a"), Figures { bytes_per_s_most: None, ..figures("hf_\"b\"") }]);
        assert!(text.contains("# TYPE genmill_engine_prefill_tokens_total counter\n"), "{text}");
        assert!(text.contains("genmill_engine_prefill_tokens_total{model=\"vllm_a\"} 30\n"), "{text}");
        assert!(text.contains("genmill_engine_prefill_tokens_total{model=\"hf_\\\"b\\\"\"} 30\n"), "{text}");
        assert_eq!(text.matches("genmill_engine_memory_bytes_per_second{").count(), 1);
    }
}
