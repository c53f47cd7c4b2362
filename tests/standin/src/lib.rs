//! A provider stand-in: an HTTP server that speaks OpenAI chat completions, Anthropic messages, Gemini content
//! (also as Vertex), Bedrock's Converse, watsonx, TGI and Replicate, the batch APIs of OpenAI, Anthropic, Gemini and
//! Mistral, and misbehaves on demand.
//!
//! What it does with a call stands in the call itself, in the last user message or in the model name (see [`script`]),
//! so that real daemons can be steered from outside. It keeps a [`bill`], so that a test can tell how often it was
//! asked what. Never here: anything of Genmill; it knows what a provider knows.

mod answer;
mod batch;
pub mod bill;
mod chat;
pub mod limit;
mod prediction;
pub mod script;
mod shape;
mod token;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::middleware::from_fn_with_state;
use axum::routing::{get, post};
use axum::serve::ListenerExt as _;
use batch::Gate;
pub use batch::Made;
use bill::{Bill, Books, Call, Received};
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, PoisonError};
use std::time::Instant;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

/// The one key that is refused; any other that is not empty is taken.
pub const BAD_KEY: &str = "bad-key";

/// The longest request body, in bytes.
const BODY_BYTES_MAX: usize = 128 * 1024 * 1024;

/// How a stand-in is set up.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where it listens; port 0 picks a free one.
    pub listen: SocketAddr,
    /// The models it lists. It answers for any, but for names that begin with `missing`.
    pub models: Vec<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            models: vec!["standin".to_owned(), "gpt-4o-mini".to_owned()],
        }
    }
}

/// A running stand-in. It takes no more connections once this is dropped.
#[derive(Debug)]
pub struct Standin {
    address: SocketAddr,
    books: Arc<Books>,
    provider: Arc<chat::Provider>,
    // Dropping the set ends the server.
    _serving: JoinSet<io::Result<()>>,
}

impl Standin {
    /// Starts one.
    ///
    /// # Errors
    /// When the address cannot be bound.
    pub async fn start(options: Options) -> io::Result<Self> {
        let listener = TcpListener::bind(options.listen).await?;
        let address = listener.local_addr()?;
        let books = Arc::new(Books::default());
        let provider = Arc::new(chat::Provider {
            limits: Arc::default(),
            books: Arc::clone(&books),
            models: options.models,
            predictions: prediction::Predictions::default(),
            generations: Arc::default(),
            batches: Arc::default(),
        });
        let app = router(Arc::clone(&provider));
        let mut serving = JoinSet::new();
        // A small piece of an answer must not wait until the one before it is acknowledged: that takes 40 ms.
        let listener = listener.tap_io(|connection| drop(connection.set_nodelay(true)));
        serving.spawn(async move { axum::serve(listener, app).await });
        Ok(Self { address, books, provider, _serving: serving })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The base URL that an OpenAI client takes.
    #[must_use]
    pub fn base_url(&self) -> String {
        format!("http://{}/v1", self.address)
    }

    /// The root of its addresses, as Anthropic's client takes it; Gemini's is `/v1beta` below it.
    #[must_use]
    pub fn origin(&self) -> String {
        format!("http://{}", self.address)
    }

    /// What it was asked, and what it billed for it.
    #[must_use]
    pub fn bill(&self) -> Bill {
        self.books.bill()
    }

    /// When it was started, from which the times of [`Standin::calls`] count.
    #[must_use]
    pub fn opened(&self) -> Instant {
        self.books.opened()
    }

    /// Every call with what it was billed, oldest first.
    #[must_use]
    pub fn calls(&self) -> Vec<Call> {
        self.books.calls()
    }

    /// How often records of calls were asked for (`GET /v1/generation`).
    #[must_use]
    pub fn records_asked(&self) -> u32 {
        let generations = self.provider.generations.lock().unwrap_or_else(PoisonError::into_inner);
        generations.values().map(|(_, asked)| asked).sum()
    }

    /// How often predictions were looked at again.
    #[must_use]
    pub fn predictions_looked_at(&self) -> u64 {
        self.provider.predictions.looks()
    }

    /// Which predictions were to be cancelled, by their places among all that were made.
    #[must_use]
    pub fn predictions_cancelled(&self) -> Vec<usize> {
        self.provider.predictions.cancelled()
    }

    /// The batches that were made, oldest first. An item is on the bill, as a call, when its batch has ended.
    #[must_use]
    pub fn batches(&self) -> Vec<Made> {
        self.provider.batches.made()
    }

    /// The names of the files that are kept: those of items, and of results that there are.
    #[must_use]
    pub fn files(&self) -> Vec<String> {
        self.provider.batches.files()
    }

    /// Holds up the next call that makes a batch before it is read, until [`Standin::release_creation`].
    pub fn hold_creation(&self) {
        self.provider.batches.gate.send_replace(Gate::Armed);
    }

    /// Whether a call is held up.
    #[must_use]
    pub fn holds_creation(&self) -> bool {
        *self.provider.batches.gate.borrow() == Gate::Holds
    }

    /// Lets a call go on that was held up.
    pub fn release_creation(&self) {
        self.provider.batches.gate.send_replace(Gate::Open);
    }

    /// Ends every batch that still runs.
    pub fn end_batches(&self) {
        self.provider.batches.end(&self.provider);
    }

    /// The calls received, oldest first; the newest ten thousand.
    #[must_use]
    pub fn requests(&self) -> Vec<Received> {
        self.books.requests()
    }
}

fn router(provider: Arc<chat::Provider>) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(chat::complete))
        .route("/v1/messages", post(chat::messages))
        .route("/v1beta/models/{call}", post(batch::gemini))
        .route("/v1beta/batches", get(batch::gemini_list))
        .route("/v1beta/batches/{call}", get(batch::gemini_look).post(batch::gemini_cancel))
        .route("/v1/messages/batches", get(batch::anthropic_list).post(batch::anthropic))
        .route("/v1/messages/batches/{id}", get(batch::anthropic_look))
        .route("/v1/messages/batches/{id}/cancel", post(batch::anthropic_cancel))
        .route("/v1/messages/batches/{id}/results", get(batch::anthropic_results))
        .route("/v1/files", post(batch::upload))
        .route("/v1/files/{id}", get(batch::file).delete(batch::delete))
        .route("/v1/files/{id}/content", get(batch::content))
        .route("/v1/batches", get(batch::openai_list).post(batch::openai))
        .route("/v1/batches/{id}", get(batch::openai_look))
        .route("/v1/batches/{id}/cancel", post(batch::openai_cancel))
        .route("/v1/batch/jobs", get(batch::mistral_list).post(batch::mistral))
        .route("/v1/batch/jobs/{id}", get(batch::mistral_look))
        .route("/v1/batch/jobs/{id}/cancel", post(batch::mistral_cancel))
        .route("/batches", get(batch::made))
        .route("/v1beta/models", get(chat::models))
        .route("/v1/projects/{project}/locations/{location}/publishers/{publisher}/models/{call}", post(chat::vertex))
        .route("/ml/v1/text/{method}", post(chat::watsonx))
        .route("/generate", post(chat::generate))
        .route("/generate_stream", post(chat::generate))
        .route("/model/{model}/{method}", post(chat::converse))
        .route("/v1/models/{owner}/{name}/predictions", post(prediction::predict))
        .route("/v1/predictions/{id}", get(prediction::look))
        .route("/v1/predictions/{id}/cancel", post(prediction::cancel))
        .route("/v1/generation", get(chat::generation))
        .route("/v1/key", get(chat::key))
        .route("/v1/credits", get(chat::credits))
        .route("/token", post(token::give))
        .route("/computeMetadata/v1/instance/service-accounts/default/token", get(token::of_machine))
        .route("/identity/token", post(token::give))
        .route("/v1/models", get(chat::models))
        .route("/bill", get(chat::bill))
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .layer(from_fn_with_state(Arc::clone(&provider), batch::pass))
        .with_state(provider)
}
