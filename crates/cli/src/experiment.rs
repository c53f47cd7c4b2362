//! `genmill experiment`: the same prompts over many models, as one table.

mod file;
mod plan;
mod progress;
mod report;
mod results;
mod score;

use crate::exit::{Ending, WrongUsage};
use crate::output;
use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use genmill_client::{Acknowledgement, Client, Outcome, Reason, Until, v1};
use plan::Plan;
use progress::Progress;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Run the same prompts over many models
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    Run(RunArgs),
}

/// Run an experiment: submit models x prompts, follow them, print a table and write all results
#[derive(Debug, clap::Args)]
#[command(after_help = FILE_HELP)]
struct RunArgs {
    /// The experiment, in YAML or JSON
    file: PathBuf,
    /// Where all results go, one line of JSON each [default: results/NAME-RUN.jsonl]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// The run's id: the same id and file go on with the same jobs [default: a new one]
    #[arg(long, value_name = "ID", value_parser = parse_run_id)]
    run: Option<String>,
    /// Print the table as one line of JSON per model
    #[arg(long)]
    json: bool,
}

const FILE_HELP: &str = r#"The file:
  name: sums                       # 1 to 64 characters of [A-Za-z0-9._-]
  models: [vllm_a, litellm_gpt-4]
  request:                         # optional, for every job: max_tokens, temperature, top_p, top_k,
    max_tokens: 5                  # seed, stop, timeout_ms, priority, tenant, labels
    temperature: 0
  prompts:                         # or prompts_file: a JSONL or YAML file of such entries
    - id: two                      # optional
      prompt: "2 + 2 ="            # or messages: [{role: user, content: ...}]
      expect: ["4", "four"]        # optional: answers that count as correct, compared without space around
      choices: ["3", "4", "5"]     # optional: all answers there are, for a baseline of random choice

The table, per model: jobs, ok, failed, correct (share of the prompts that have `expect`), p50 latency (from the start of
a job's last attempt to its end), tokens/s (generated tokens over the time from the model's first start to its last end),
cost (unknown when that of one of its jobs is, or one was refused).

Results are written to FILE.partial, and take FILE's place at the end; when not every job has a result and FILE is there
already, it stays.

Exit codes: 0 all jobs succeeded, 1 some did not, 2 wrong usage (also in the file), 3 server not reachable."#;

fn parse_run_id(id: &str) -> Result<String, String> {
    genmill_core::names::Experiment::parse(id).map(String::from).map_err(|error| error.to_string())
}

pub(crate) async fn run(args: Args, server: &str) -> anyhow::Result<Ending> {
    let Command::Run(args) = args.command;
    let experiment = file::read(&args.file).map_err(WrongUsage)?;
    let run = match &args.run {
        Some(run) => run.clone(),
        None => plan::run_id(genmill_daemon::clock::now_unix_ms(), genmill_daemon::random::random_u64()?),
    };
    let client = Client::connect(server).await?;
    check_models(&client, &experiment.models).await?;
    let plan = Arc::new(Plan::new(experiment, run));
    let out = args.out.clone().unwrap_or_else(|| plan.default_out());
    let results = results::Results::create(&out)?;
    output::note(&plan.describe());
    let mut conduct = Conduct { progress: Progress::new(plan.jobs()), score: score::Score::new(&plan), results };
    let ended = tokio::select! {
        ended = conduct.run(&client, &plan) => ended.map(|()| Ended::Complete),
        signal = genmill_daemon::shutdown::signal() => signal.map(|_| Ended::Interrupted).map_err(anyhow::Error::from),
    };
    conduct.progress.clear();
    match ended {
        Ok(Ended::Complete) => conduct.finish(&plan, args.json),
        Err(error) if error.is::<FileChanged>() => {
            conduct.results.discard();
            Err(error)
        }
        ended => {
            let left = conduct.leave(&plan, &args);
            ended.and(left).map(|()| Ending::JobFailed)
        }
    }
}

/// The run's id stands for other jobs than those of the file.
#[derive(Debug, thiserror::Error)]
#[error("the experiment file changed since run {run}: use another --run")]
struct FileChanged {
    run: String,
}

enum Ended {
    Complete,
    Interrupted,
}

/// Every model must be available before anything is submitted.
async fn check_models(client: &Client, models: &[String]) -> anyhow::Result<()> {
    let mut missing = Vec::new();
    for name in models {
        let model = client.model(name).await?;
        if !model.available {
            missing.push(format!("  {name}: {}", model.unavailable_reason));
        }
    }
    anyhow::ensure!(
        missing.is_empty(),
        "nothing was submitted, because not all models are available:\n{}",
        missing.join("\n")
    );
    Ok(())
}

fn how_to_resume(plan: &Plan, file: &Path, out: Option<&Path>) -> String {
    let (file, run, name) = (file.display(), &plan.run, &plan.experiment.name);
    let out = out.map(|out| format!(" --out {}", out.display())).unwrap_or_default();
    format!(
        "what is submitted goes on at the server; to go on here: genmill experiment run {file} --run {run}{out}\n\
         to stop it there: genmill cancel --experiment {name}"
    )
}

/// One run on its way.
struct Conduct {
    progress: Progress,
    score: score::Score,
    results: results::Results,
}

impl Conduct {
    /// Submits everything and follows it to the end.
    async fn run(&mut self, client: &Client, plan: &Arc<Plan>) -> anyhow::Result<()> {
        let cursor = self.submit(client, plan).await?;
        // From here on the server tells when nothing is left.
        let mut finished = std::pin::pin!(client.watch_jobs(plan.filter(), cursor, Until::Idle));
        while !self.score.is_complete() {
            let Some(next) = finished.try_next().await? else { break };
            self.note_job(plan, next.job)?;
        }
        Ok(())
    }

    /// Submits everything, and follows what finishes meanwhile. Returns where to go on following.
    async fn submit(&mut self, client: &Client, plan: &Arc<Plan>) -> anyhow::Result<String> {
        let requests = Arc::clone(plan);
        let requests = stream::iter((0..plan.jobs()).map(move |index| requests.request(index)));
        let mut acknowledgements = std::pin::pin!(client.submit_all(requests));
        let mut finished = std::pin::pin!(client.watch_jobs(plan.filter(), String::new(), Until::Dropped));
        let mut cursor = String::new();
        loop {
            tokio::select! {
                next = acknowledgements.next() => match next {
                    Some(acknowledgement) => self.note_acknowledgement(plan, acknowledgement?)?,
                    None => return Ok(cursor),
                },
                Some(next) = finished.next() => {
                    let next = next?;
                    cursor = next.cursor;
                    self.note_job(plan, next.job)?;
                }
            }
        }
    }

    fn note_acknowledgement(&mut self, plan: &Plan, acknowledgement: Acknowledgement) -> anyhow::Result<()> {
        self.progress.submitted();
        let Outcome::Refused(refusal) = acknowledgement.outcome else { return Ok(()) };
        if refusal.reason == Some(Reason::RequestIdReused) {
            // Also when a job of that id was seen: it is another one.
            anyhow::bail!(FileChanged { run: plan.run.clone() });
        }
        let Some(index) = self.score.note_refused(&acknowledgement.request_id) else { return Ok(()) };
        self.progress.finished();
        self.progress.tell(&format!("{}: refused: {refusal}", plan.label(index)));
        self.results.refused(plan, index, &refusal.message)
    }

    fn note_job(&mut self, plan: &Plan, job: v1::Job) -> anyhow::Result<()> {
        let request_id = job.request.as_ref().map_or("", |request| request.request_id.as_str());
        // Jobs of other runs of the experiment pass by here too.
        let Some((index, correct)) = self.score.note_job(plan, request_id, &job) else { return Ok(()) };
        self.progress.finished();
        if let Some(error) = &job.error {
            self.progress.tell(&format!("{}: {}", plan.label(index), error.message));
        }
        self.results.job(plan, index, correct, &job)
    }

    /// Ends before everything is done.
    fn leave(self, plan: &Plan, args: &RunArgs) -> anyhow::Result<()> {
        let results = self.results.set_aside()?;
        output::note(&format!("stopped: {} of {} jobs are done", self.score.finished(), plan.jobs()));
        output::note(&format!("their results: {}", results.display()));
        output::note(&how_to_resume(plan, &args.file, args.out.as_deref()));
        Ok(())
    }

    fn finish(mut self, plan: &Plan, json: bool) -> anyhow::Result<Ending> {
        let lost = self.score.note_lost();
        if lost > 0 {
            output::note(&format!("{lost} jobs finished earlier, and the server no longer keeps their results"));
        }
        // Before anything is printed: a reader that is gone must not cost results.
        let (told, results) = if self.score.has_every_job() {
            ("all results", self.results.keep()?)
        } else {
            ("results, not of every job", self.results.keep_unless_there()?)
        };
        let rows = report::rows(plan, &self.score);
        let table = if json { report::json(&rows)? } else { report::table(&rows) };
        output::line(&table)?;
        output::note(&format!("{told}: {}", results.display()));
        Ok(if self.score.all_succeeded() { Ending::Done } else { Ending::JobFailed })
    }
}
