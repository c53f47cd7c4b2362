//! Sampling parameters from a client to a local model and back.

use super::*;
use genmill_client::{Error, Event, Position, Reason};

/// The texts of a watched job by sample, and the job.
async fn watched(mill: &Mill, id: &str, from: Position) -> (BTreeMap<u32, String>, v1::Job) {
    let mut texts = BTreeMap::new();
    let mut events = std::pin::pin!(mill.client.watch_from(id, from));
    while let Some(event) = events.next().await {
        match event.unwrap() {
            Event::Text(delta) => {
                let text: &mut String = texts.entry(delta.sample).or_default();
                *text += &delta.text;
            }
            Event::Restarted { .. } => texts.clear(),
            Event::Finished(job) => return (texts, *job),
        }
    }
    panic!("no end");
}

fn result(job: &v1::Job) -> &v1::Result {
    assert!(job.error.is_none(), "{:?}", job.error);
    job.result.as_ref().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn samples_are_watched_side_by_side_and_from_where_each_was_left() {
    let mill = Mill::up().await;
    let request = || Request::new(QWEN2).prompt("X moves first").temperature(1.0).seed(4).max_tokens(120).ignore_eos();
    let alone = mill.run(request()).await;
    let id = mill.client.submit(request().samples(3)).await.unwrap().job.id;
    let (texts, job) = watched(&mill, &id, Position::default()).await;
    let result = result(&job);
    let expected: Vec<&str> = std::iter::once(&result.text)
        .chain(result.more_samples.iter().map(|sample| &sample.text))
        .map(|text| &**text)
        .collect();
    assert_eq!(texts.values().collect::<Vec<_>>(), expected);
    assert_eq!((texts.len(), result.more_samples[1].sample, expected[0]), (3, 2, text(&alone)));
    assert!(expected[0] != expected[1] && expected[1] != expected[2]);
    let usage = |job: &v1::Job| result_usage(job);
    assert_eq!(usage(&job), (usage(&alone).0, 360));
    let cut = |text: &str| u64::try_from(text.floor_char_boundary(10)).unwrap();
    let from = Position { epoch: 1, offset: cut(expected[0]), more: vec![cut(expected[1])] };
    let (rest, _) = watched(&mill, &id, from.clone()).await;
    let whole = u64::try_from(expected[0].len()).unwrap();
    assert_eq!(rest[&0], expected[0][usize::try_from(from.offset).unwrap()..]);
    assert_eq!(rest[&1], expected[1][usize::try_from(from.more[0]).unwrap()..]);
    assert_eq!(rest[&2], expected[2]);
    let beyond = Position { epoch: 1, offset: 0, more: vec![0, whole * 9] };
    let mut refused = std::pin::pin!(mill.client.watch_from(&id, beyond));
    let last = loop {
        if let Err(error) = refused.next().await.unwrap() {
            break error;
        }
    };
    assert!(last.to_string().contains("beyond the text"), "{last}");
}

fn result_usage(job: &v1::Job) -> (u64, u64) {
    let usage = result(job).usage.unwrap();
    (usage.prompt_tokens, usage.completion_tokens)
}

/// While the text comes: a watcher that joins in the middle of a long job gets every sample from its place on.
#[tokio::test(flavor = "multi_thread")]
async fn a_watcher_that_comes_back_misses_nothing_of_any_sample() {
    let mill = Mill::up().await;
    let request = Request::new(QWEN2).prompt("X").temperature(1.0).seed(9).max_tokens(490).ignore_eos().samples(6);
    let id = mill.client.submit(request).await.unwrap().job.id;
    let mut seen: BTreeMap<u32, String> = BTreeMap::new();
    let mut position = Position::default();
    // A few pieces at a time, each time over a new stream.
    let job = 'watch: loop {
        let mut events = std::pin::pin!(mill.client.watch_from(&id, position.clone()));
        for _ in 0..4 {
            match events.next().await.unwrap().unwrap() {
                Event::Text(delta) => {
                    let text = seen.entry(delta.sample).or_default();
                    assert_eq!(delta.offset, u64::try_from(text.len()).unwrap());
                    *text += &delta.text;
                    let length = |sample: u32| seen.get(&sample).map_or(0, |text| u64::try_from(text.len()).unwrap());
                    position = Position { epoch: 1, offset: length(0), more: (1..6).map(length).collect() };
                }
                Event::Restarted { .. } => panic!("nobody was lost"),
                Event::Finished(job) => break 'watch job,
            }
        }
    };
    assert_eq!(seen[&0], result(&job).text);
    for sample in &result(&job).more_samples {
        assert_eq!(seen[&sample.sample], sample.text);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn log_probabilities_echo_and_ends_come_through() {
    let mill = Mill::up().await;
    let request = Request::new(GPT2).prompt("X moves first").temperature(0.0).max_tokens(6);
    let job = mill.run(request.clone().logprobs(2).prompt_logprobs(1).echo()).await;
    let scored = result(&job);
    let plain = mill.run(request.clone()).await;
    assert_eq!(scored.text, format!("X moves first{}", text(&plain)));
    assert_eq!(u64::try_from(scored.logprobs.len()).unwrap(), result_usage(&job).1);
    assert_eq!(u64::try_from(scored.prompt_logprobs.len()).unwrap(), result_usage(&job).0);
    let told: String = scored.prompt_logprobs.iter().map(|token| token.token.as_str()).collect();
    assert_eq!((told.as_str(), scored.prompt_logprobs[0].logprob), ("X moves first", None));
    for token in &scored.logprobs {
        assert_eq!((token.top[0].token_id, token.top[0].logprob), (token.token_id, token.logprob));
        assert!(token.top.len() == 2 && token.logprob.unwrap() < 0.0);
    }
    let first = scored.logprobs[0].token_id.unwrap();
    let stopped = mill.run(request.clone().stop_token(first)).await;
    assert_eq!((text(&stopped), result_usage(&stopped).1), ("", 1));
    let biased = mill.run(request.clone().logit_bias(first, -100.0).logprobs(0)).await;
    assert_ne!(result(&biased).logprobs[0].token_id, Some(first));
    let held = mill.run(request.stop_token(first).min_tokens(3)).await;
    assert!(result_usage(&held).1 > 3);
    assert_eq!(held.request.unwrap().min_tokens, Some(3));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_out_of_range_is_refused_at_submission() {
    let mill = Mill::up().await;
    let refused = async |request: Request, says: &str| {
        let error = mill.client.submit(request).await.unwrap_err();
        assert!(matches!(error, Error::Refused { reason: Reason::InvalidRequest, .. }), "{error:?}");
        assert!(error.to_string().contains(says), "{error}");
    };
    let request = || Request::new(QWEN2).prompt("X");
    refused(request().min_p(1.5), "min_p: must be 0 to 1").await;
    refused(request().repetition_penalty(0.0), "repetition_penalty: must be 0.01 to 10").await;
    refused(request().frequency_penalty(-3.0), "frequency_penalty: must be -2 to 2").await;
    refused(request().logit_bias(1, 200.0), "logit_bias: a bias must be -100 to 100").await;
    refused(request().samples(0), "n: must be 1 to 128").await;
    refused(request().logprobs(21), "logprobs: must be 0 to 20").await;
    refused(request().max_tokens(4).min_tokens(5), "min_tokens: must be at most max_tokens, which is 4").await;
    refused(Request::new(QWEN2).user("X").echo(), "echo: needs a prompt").await;
    // Only the model knows its vocabulary.
    let job = mill.run(request().stop_token(640)).await;
    assert!(job.error.unwrap().message.contains("names token 640; the model knows 640"));
}
