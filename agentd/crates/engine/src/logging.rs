//! Where do this process's words go?
//!
//! JSON lines on standard error, which the launcher hands to the log. llama.cpp talks a lot: its words appear
//! from `warn` up, and wholly with `AGENTD_LOG=debug`. Its first error since the last question is kept, because
//! llama.cpp answers a failed load with a null pointer and says why only there; what follows is consequences.

use std::fmt::Write as _;
use std::sync::{Mutex, PoisonError};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer};

/// What llama-cpp-2 calls the events it makes of llama.cpp's lines.
const LLAMA: &str = "llama-cpp-2";

static FIRST_ERROR: Mutex<Option<String>> = Mutex::new(None);

pub(crate) fn start() {
    let filter = EnvFilter::try_from_env("AGENTD_LOG")
        .unwrap_or_else(|_| EnvFilter::new("info,llama-cpp-2=warn,llama_cpp_2=warn"));
    let lines = tracing_subscriber::fmt::layer()
        .json()
        .flatten_event(true)
        .with_writer(std::io::stderr)
        .with_filter(filter);
    tracing_subscriber::registry().with(lines).with(KeepFirstError).init();
    llama_cpp_2::send_logs_to_tracing(llama_cpp_2::LogOptions::default());
}

/// What llama.cpp complained of first since this was asked last.
pub(crate) fn take_error() -> Option<String> {
    FIRST_ERROR.lock().unwrap_or_else(PoisonError::into_inner).take()
}

/// Runs this with llama.cpp's words going nowhere, and returns its first error. For what is expected to fail.
pub(crate) fn quietly<T>(run: impl FnOnce() -> T) -> Option<String> {
    take_error();
    tracing::subscriber::with_default(tracing_subscriber::registry().with(KeepFirstError), run);
    take_error()
}

struct KeepFirstError;

impl<S: Subscriber> Layer<S> for KeepFirstError {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        if event.metadata().target() == LLAMA && *event.metadata().level() == Level::ERROR {
            let mut message = Message(String::new());
            event.record(&mut message);
            FIRST_ERROR.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(message.0);
        }
    }
}

struct Message(String);

impl Visit for Message {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        if field.name() == "message" {
            self.0.clear();
            // Writing to a String does not fail.
            let _ = write!(self.0, "{value:?}");
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            value.trim().clone_into(&mut self.0);
        }
    }
}
