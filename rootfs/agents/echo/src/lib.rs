//! echo: the bundled agent, a companion that remembers.
//!
//! In:    messages of people, one at a time, from agentd's API on 127.0.0.1:7070.
//! Out:   a reply in parts: what was remembered, what came to mind, then the model's words.
//! Always: what a person tells is on disk before the reply says so; every word is kept as it was said. With a model
//!         whose words are noise, or with none, the memory still answers.
//! Never:  an instruction taken from memory: what is recalled goes to the model as data, with its date.
//! Threads: one. Everything blocks, with a limit on every wait.
//! It is written against HTTP alone, as any agent in any language would be.
#![forbid(unsafe_code)]

pub mod agentd;
pub mod http;
pub mod mind;
mod reply;

use agentd::{Agentd, CallError, Message};
use mind::{Kind, Prompt};
use reply::Reply;
use std::time::Duration;

/// The model that comes with the image speaks noise: a little of it shows that the path works.
const TINY: &str = "tiny";
const TINY_WORDS: u32 = 32;
const MODEL_WORDS: u32 = 700;
/// For a model that is still being loaded.
const MODEL_PATIENCE: Duration = Duration::from_secs(90);

/// Answers messages until agentd ends the run.
pub fn run() {
    let agentd = Agentd::from_environment();
    println!("echo is awake");
    let mut pause = agentd::Pause::default();
    loop {
        match agentd.next_message() {
            Ok(Some(message)) => {
                pause.reset();
                let id = message.id.clone();
                match answer(&agentd, &message) {
                    Ok(()) => println!("message {id} is answered"),
                    Err(error) => println!("message {id} is not answered: {error}"),
                }
            }
            Ok(None) => pause.reset(),
            Err(error) => {
                println!("no message was got: {error}");
                pause.wait();
            }
        }
    }
}

fn answer(agentd: &Agentd, message: &Message) -> Result<(), CallError> {
    let mut reply = Reply::to(agentd, &message.id);
    let kind = mind::kind(&message.text);
    let own = match remember(agentd, message, kind) {
        Ok(id) => {
            if kind == Kind::Told {
                reply.note(&format!("remembered: {id}"));
            }
            Some(id)
        }
        Err(error) => {
            reply.note(&format!("not remembered: {error}"));
            None
        }
    };
    let recalled = match agentd.recall(&message.text) {
        Ok(hits) => mind::worth_saying(hits, own.as_deref()),
        Err(error) => {
            reply.note(&format!("nothing came to mind: {error}"));
            Vec::new()
        }
    };
    for hit in &recalled {
        reply.note(&format!("recalled: {}", hit.text));
    }
    speak(agentd, message, &recalled, &mut reply);
    reply.done()
}

/// What is told is a fact for good; what is asked is only what happened.
fn remember(agentd: &Agentd, message: &Message, kind: Kind) -> Result<String, CallError> {
    let (tier, role) = match kind {
        Kind::Told => ("spirit", "fact"),
        Kind::Asked => ("working", "event"),
    };
    // The message's own id as the key: a message that is given out again is remembered once.
    agentd.remember(tier, role, message, &format!("message-{}", message.id))
}

fn speak(agentd: &Agentd, message: &Message, recalled: &[agentd::Hit], reply: &mut Reply<'_>) {
    let model = agentd.default_model().unwrap_or_default();
    let max_tokens = if model == TINY { TINY_WORDS } else { MODEL_WORDS };
    let now_unix_ms = agentd::unix_ms();
    let mut prompt = Prompt { message, recalled, history: true, now_unix_ms };
    let mut pause = agentd::Pause::default();
    let began = std::time::Instant::now();
    loop {
        match agentd.generate(&prompt.messages(), max_tokens, &message.id, &mut |text| reply.text(text)) {
            Ok(()) => return,
            // A small model has room for little: try once with the message alone.
            Err(CallError::Refused { status: 400, .. }) if prompt.history => prompt.history = false,
            Err(error) if error.may_pass() && began.elapsed() < MODEL_PATIENCE => pause.wait(),
            Err(error) => {
                reply.note(&format!("the model did not answer: {error}"));
                if !reply.has_text() {
                    reply.text(&mind::words_without_model(mind::kind(&message.text), recalled));
                }
                return;
            }
        }
    }
}
