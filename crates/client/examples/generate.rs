//! Asks one model one question, and prints its answer as it comes.
//!
//! `cargo run -p genmill-client --example generate -- vllm_tictactoe-qwen2 "Best move (1-9):" [SERVER]`

use anyhow::Context as _;
use futures_util::TryStreamExt as _;
use genmill_client::{Client, Event, Request};
use std::io::Write as _;

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let model = arguments.next().context("name a model, such as vllm_tictactoe-qwen2")?;
    let prompt = arguments.next().context("give a prompt")?;
    let server = arguments.next().unwrap_or_else(|| "http://127.0.0.1:50051".to_owned());

    let client = Client::connect(&server).await?;
    if !client.is_available(&model).await? {
        anyhow::bail!("{model}: {}", client.model(&model).await?.unavailable_reason);
    }
    let submitted = client.submit(Request::new(model).prompt(prompt).max_tokens(50)).await?;

    let mut out = std::io::stdout().lock();
    let mut events = std::pin::pin!(client.watch(&submitted.job.id));
    while let Some(event) = events.try_next().await? {
        match event {
            Event::Text(delta) => write!(out, "{}", delta.text)?,
            Event::Restarted { epoch } => writeln!(out, "\n[attempt {epoch}: from the beginning]")?,
            Event::Finished(job) => writeln!(out, "\n[{} {:?}]", job.id, job.state())?,
        }
        out.flush()?;
    }
    Ok(())
}
