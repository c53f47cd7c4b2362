//! `genmill get`: one job as it is now.

use crate::exit::Ending;
use crate::{output, show};
use genmill_client::{Client, v1};
use genmill_core::ids::JobId;

/// Show a job
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The job's id
    #[arg(value_parser = JobId::parse)]
    id: JobId,
    /// Print the job as one line of JSON
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(args: Args, server: &str) -> anyhow::Result<Ending> {
    let job = Client::connect(server).await?.get(&args.id.to_string()).await?;
    if args.json {
        output::job_json(&job)?;
    } else {
        output::line(&describe(&job))?;
    }
    Ok(Ending::Done)
}

fn describe(job: &v1::Job) -> String {
    let mut lines = Vec::new();
    let mut row = |name: &str, value: String| {
        if !value.is_empty() {
            lines.push(format!("{name:<13} {value}"));
        }
    };
    let request = job.request.clone().unwrap_or_default();
    row("id", job.id.clone());
    row("state", show::state(job.state()));
    row("model", request.model);
    row("experiment", request.experiment);
    row("tenant", request.tenant);
    row("labels", labels(&request.labels));
    row("attempts", attempts(job));
    row("created", show::time(job.created_at.as_ref()));
    row("started", show::time(job.started_at.as_ref()));
    row("finished", show::time(job.finished_at.as_ref()));
    row("not before", job.not_before.as_ref().map(|at| show::time(Some(at))).unwrap_or_default());
    row("redriven from", job.redriven_from.clone());
    row("redriven as", job.redriven_as.clone());
    row("worker", job.worker.clone());
    row("cost", show::cost_of(job));
    row("error", job.error.as_ref().map(|error| error.message.clone()).unwrap_or_default());
    if let Some(result) = &job.result {
        describe_result(result, row);
        lines.push(format!("\n{}", result.text));
        lines.extend(
            result.more_samples.iter().map(|sample| format!("\n-- sample {} --\n{}", sample.sample, sample.text)),
        );
    }
    lines.join("\n")
}

fn describe_result(result: &v1::Result, mut row: impl FnMut(&str, String)) {
    let reason = result.finish_reason().as_str_name().trim_start_matches("FINISH_REASON_").to_lowercase();
    row("finish", reason);
    let calls: Vec<String> =
        result.tool_calls.iter().map(|call| format!("{}({}) as {}", call.name, call.arguments, call.id)).collect();
    row("tool calls", calls.join(", "));
    row("left out", result.left_out_parameters.join(", "));
    row("answered by", if result.cached { "an earlier job (cached)".to_owned() } else { result.answered_by.clone() });
    if let Some(usage) = &result.usage {
        row("tokens", format!("{} prompt + {} generated", usage.prompt_tokens, usage.completion_tokens));
    }
    if result.determinism() != v1::Determinism::Unspecified {
        row("determinism", result.determinism().as_str_name().trim_start_matches("DETERMINISM_").to_lowercase());
    }
    row("fingerprint", result.fingerprint.clone());
    if let Some(latency) = &result.latency {
        let first = latency.first_token_ms.map(|ms| format!(", first text {}", show::milliseconds(ms)));
        let queued = show::milliseconds(latency.queued_ms);
        let total = show::milliseconds(latency.total_ms);
        row("latency", format!("queued {queued}{}, total {total}", first.unwrap_or_default()));
    }
}

fn labels(labels: &std::collections::HashMap<String, String>) -> String {
    let mut pairs: Vec<String> = labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    pairs.sort();
    pairs.join(" ")
}

fn attempts(job: &v1::Job) -> String {
    let of = |count: u32, name: &str| if count > 0 { format!(", {count} {name}") } else { String::new() };
    format!("{}{}{}", job.attempts, of(job.failures, "failed"), of(job.losses, "lost"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_is_described_line_by_line() {
        let result = v1::Result {
            text: "four".to_owned(),
            finish_reason: v1::FinishReason::Stop.into(),
            usage: Some(v1::Usage { prompt_tokens: 3, completion_tokens: 1, ..v1::Usage::default() }),
            determinism: v1::Determinism::Bitwise.into(),
            fingerprint: "ab/float32/cpu/fma/1".to_owned(),
            latency: Some(v1::Latency { queued_ms: 1, first_token_ms: Some(2), total_ms: 1_500 }),
            ..v1::Result::default()
        };
        let job = v1::Job {
            id: "j".to_owned(),
            state: v1::JobState::Succeeded.into(),
            attempts: 2,
            losses: 1,
            result: Some(result),
            ..v1::Job::default()
        };
        let text = describe(&job);
        assert!(text.contains("state         succeeded\n"), "{text}");
        assert!(text.contains("attempts      2, 1 lost\n"), "{text}");
        assert!(text.contains("tokens        3 prompt + 1 generated\n"), "{text}");
        assert!(text.contains("determinism   bitwise\nfingerprint   ab/float32/cpu/fma/1\n"), "{text}");
        assert!(text.contains("latency       queued 1 ms, first text 2 ms, total 1.5 s\n"), "{text}");
        assert!(text.ends_with("\n\nfour"), "{text}");
    }
}
