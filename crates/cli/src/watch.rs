//! `genmill watch`: a job's text as it is generated.

use crate::exit::Ending;
use crate::{output, show};
use futures_util::TryStreamExt as _;
use genmill_client::{Client, Event, Position, v1};
use genmill_core::ids::JobId;

/// Follow a job: print its text as it comes, also after its end
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The job's id
    #[arg(value_parser = JobId::parse)]
    id: JobId,
    /// Leave out so many bytes of the text
    #[arg(long, value_name = "BYTES", default_value_t = 0)]
    from_offset: u64,
    /// Print nothing but the final job, as one line of JSON
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(args: Args, server: &str) -> anyhow::Result<Ending> {
    let client = Client::connect(server).await?;
    let id = args.id.to_string();
    if args.json {
        let job = wait(&client, &id).await?;
        output::job_json(&job)?;
        return Ok(show::ending(job));
    }
    let from = Position { offset: args.from_offset, ..Position::default() };
    Ok(show::ending(print_text(&client, &id, from).await?))
}

/// Waits for a job's end.
pub(crate) async fn wait(client: &Client, id: &str) -> anyhow::Result<v1::Job> {
    let mut events = std::pin::pin!(client.watch(id));
    while let Some(event) = events.try_next().await? {
        if let Event::Finished(job) = event {
            return Ok(*job);
        }
    }
    anyhow::bail!("the watch of job {id} ended without the job")
}

/// Prints a job's text as it comes, a line feed at its end, and returns the job.
pub(crate) async fn print_text(client: &Client, id: &str, from: Position) -> anyhow::Result<v1::Job> {
    let mut printed = from.offset;
    let mut events = std::pin::pin!(client.watch_from(id, from));
    while let Some(event) = events.try_next().await? {
        match event {
            // Texts that come side by side cannot be read: what follows the first is printed when it is whole.
            Event::Text(delta) if delta.sample > 0 => {}
            Event::Text(delta) => {
                output::part(&delta.text)?;
                printed = delta.offset + u64::try_from(delta.text.len())?;
            }
            Event::Restarted { epoch } => {
                if printed > 0 {
                    output::part("\n")?;
                    output::note(&format!("(attempt {epoch}: the text above is void)"));
                }
                printed = 0;
            }
            Event::Finished(job) => {
                output::line(rest(&job, printed))?;
                for sample in job.result.iter().flat_map(|result| &result.more_samples) {
                    output::line(&sample.text)?;
                }
                return Ok(*job);
            }
        }
    }
    anyhow::bail!("the watch of job {id} ended without the job")
}

/// What the result holds beyond `printed` bytes: a provider that does not stream gives its text only at the end.
fn rest(job: &v1::Job, printed: u64) -> &str {
    let text = job.result.as_ref().map_or("", |result| result.text.as_str());
    usize::try_from(printed).ok().and_then(|printed| text.get(printed..)).unwrap_or("")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_streamed_is_printed_at_the_end() {
        let result = v1::Result { text: "añb".to_owned(), ..v1::Result::default() };
        let job = v1::Job { result: Some(result), ..v1::Job::default() };
        assert_eq!(rest(&job, 0), "añb");
        assert_eq!(rest(&job, 3), "b");
        assert_eq!(rest(&job, 2), "");
        assert_eq!(rest(&job, 9), "");
        assert_eq!(rest(&v1::Job::default(), 0), "");
    }
}
