//! A server stream that is opened again where it broke. Shared by all watches.

use crate::patience::Patience;
use crate::{Client, Error};
use futures_util::stream::{Stream, unfold};
use std::future::Future;
use tokio::time::{Instant, sleep};
use tonic::{Response, Status, Streaming};

/// What differs between watches.
pub(crate) trait Follow: Send {
    /// What the server sends.
    type Response: Send;
    /// What the caller gets.
    type Item;

    /// Opens the stream at the place that was reached.
    fn open(&self, client: &Client)
    -> impl Future<Output = Result<Response<Streaming<Self::Response>>, Status>> + Send;

    /// Notes the place that is reached with `response`, and what of it the caller is to see.
    fn accept(&mut self, response: Self::Response) -> Result<Option<Self::Item>, Error>;

    /// True when nothing more can come.
    fn is_over(&self) -> bool;

    /// True when the server may end the stream in good order now.
    fn may_end(&self) -> bool;
}

struct State<F: Follow> {
    client: Client,
    follow: F,
    stream: Option<Streaming<F::Response>>,
    patience: Patience,
    failed: bool,
}

/// Follows until it is over, or the server has been away for longer than the client's patience. An error is the last
/// item.
pub(crate) fn follow<F>(client: &Client, follow: F) -> impl Stream<Item = Result<F::Item, Error>> + Send + use<F>
where
    F: Follow + 'static,
    F::Item: Send,
{
    let patience = Patience::new(client.patience());
    let state = State { client: client.clone(), follow, stream: None, patience, failed: false };
    unfold(state, |mut state| async move {
        if state.failed {
            return None;
        }
        let item = state.next().await.transpose()?;
        state.failed = item.is_err();
        Some((item, state))
    })
}

impl<F: Follow> State<F> {
    async fn next(&mut self) -> Result<Option<F::Item>, Error> {
        while !self.follow.is_over() {
            match self.receive().await {
                Ok(Some(response)) => {
                    self.patience.reset();
                    if let Some(item) = self.follow.accept(response)? {
                        return Ok(Some(item));
                    }
                }
                Ok(None) if self.follow.may_end() => return Ok(None),
                Ok(None) => self.wait(Status::unavailable("the stream ended early")).await?,
                Err(status) => self.wait(status).await?,
            }
        }
        Ok(None)
    }

    async fn receive(&mut self) -> Result<Option<F::Response>, Status> {
        match &mut self.stream {
            Some(stream) => stream.message().await,
            None => {
                let stream = self.follow.open(&self.client).await?.into_inner();
                self.stream.insert(stream).message().await
            }
        }
    }

    /// Waits before the stream is opened again, if that can help.
    async fn wait(&mut self, status: Status) -> Result<(), Error> {
        self.stream = None;
        let error = self.client.error(status);
        if !error.is_passing() {
            return Err(error);
        }
        let delay = self.patience.after_failure(Instant::now()).ok_or(error)?;
        sleep(delay).await;
        Ok(())
    }
}
