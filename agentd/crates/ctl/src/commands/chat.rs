//! Talking with an agent.
//!
//! A message has a random key. When the connection breaks before the reply is whole, the same message is sent
//! again under the same key, which delivers it once; what was printed already is not printed twice.

use super::Session;
use crate::client::{self, CONNECTION_LOST, Client};
use crate::{ask, show};
use agentd_domain::agent_api::ReplyPart;
use agentd_domain::api::{AgentKey, ChatRequest};
use agentd_domain::fault::Report;
use std::io::{self, BufRead, Write};
use std::time::Duration;

/// agentd is back within seconds after a crash.
const PAUSES: [Duration; 4] =
    [Duration::from_millis(500), Duration::from_secs(1), Duration::from_secs(2), Duration::from_secs(4)];

pub async fn run(session: &Session, agent: &AgentKey, text: Option<String>) -> Result<(), Report> {
    let client = session.client()?;
    if let Some(text) = text {
        return say(session, &client, agent, text).await;
    }
    let prompt = ask::have_terminal();
    loop {
        if prompt {
            let mut screen = io::stderr();
            let _ = write!(screen, "> ").and_then(|()| screen.flush());
        }
        let mut line = String::new();
        let read = io::stdin().lock().read_line(&mut line).map_err(|e| {
            Report::caller(
                "input_unreadable",
                "no message was sent",
                e.to_string(),
                "give the message as an argument",
            )
        })?;
        if read == 0 {
            return Ok(());
        }
        if !line.trim().is_empty() {
            say(session, &client, agent, line.trim().to_owned()).await?;
        }
    }
}

async fn say(session: &Session, client: &Client, agent: &AgentKey, text: String) -> Result<(), Report> {
    let message = ChatRequest { text, idempotency_key: Some(random_key()?) };
    let path = format!("/api/v1/agents/{agent}/chat");
    let mut reply = Reply::new(session.json);
    let mut pauses = PAUSES.iter();
    loop {
        reply.rewind();
        let result = match client.post_json(&path, &message).await {
            Ok(answer) => client::lines(answer, |part, raw| reply.take(part, raw)).await,
            Err(report) => Err(report),
        };
        let broken = match result {
            Ok(()) if reply.ended => return Ok(()),
            Ok(()) => client::connection_lost("the reply ended before it was whole"),
            Err(report) if report.code == CONNECTION_LOST || report.code == "appliance_unreachable" => report,
            Err(report) => return Err(report),
        };
        match pauses.next() {
            Some(&pause) => tokio::time::sleep(pause).await,
            None => return Err(broken),
        }
    }
}

/// A reply on its way to the terminal, maybe in several attempts.
struct Reply {
    json: bool,
    ended: bool,
    /// How many characters of text and how many notes were printed.
    printed: Position,
    /// How far this attempt has come.
    at: Position,
    open_line: bool,
}

#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
struct Position {
    characters: usize,
    notes: usize,
}

impl Reply {
    fn new(json: bool) -> Self {
        Self { json, ended: false, printed: Position::default(), at: Position::default(), open_line: false }
    }

    fn rewind(&mut self) {
        self.at = Position::default();
    }

    fn take(&mut self, part: ReplyPart, raw: &str) -> Result<(), Report> {
        if let Some(text) = self.next(&part) {
            show::out(&if self.json { format!("{raw}\n") } else { text });
        }
        match part {
            ReplyPart::Failed { report } => Err(report),
            _ => Ok(()),
        }
    }

    /// What to print of this part, when it is new.
    fn next(&mut self, part: &ReplyPart) -> Option<String> {
        match part {
            ReplyPart::Text { text } => {
                let skip = self.printed.characters.saturating_sub(self.at.characters);
                self.at.characters += text.chars().count();
                let new: String = text.chars().skip(skip).collect();
                if new.is_empty() {
                    return None;
                }
                self.printed.characters = self.at.characters;
                self.open_line = !new.ends_with('\n');
                Some(show::harmless(&new))
            }
            ReplyPart::Note { text } => {
                self.at.notes += 1;
                if self.at.notes <= self.printed.notes {
                    return None;
                }
                self.printed.notes = self.at.notes;
                let end = self.end_line();
                Some(format!("{end}\u{b7} {}\n", show::harmless(text)))
            }
            ReplyPart::Done | ReplyPart::Failed { .. } => {
                self.ended = true;
                Some(self.end_line().to_owned())
            }
        }
    }

    fn end_line(&mut self) -> &'static str {
        if std::mem::take(&mut self.open_line) { "\n" } else { "" }
    }
}

fn random_key() -> Result<String, Report> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|e| {
        Report::environment("no_randomness", "no message was sent", e.to_string(), "try again")
    })?;
    Ok(hex::encode(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn text(text: &str) -> ReplyPart {
        ReplyPart::Text { text: text.to_owned() }
    }

    proptest! {
        /// However often the connection breaks, and however the text is cut into pieces, it is printed once.
        #[test]
        fn a_reply_in_several_attempts_is_printed_once(whole in "[a-zäö ]{1,60}", cuts in proptest::collection::vec((1usize..9, 0usize..60), 1..6)) {
            let mut reply = Reply::new(false);
            let mut printed = String::new();
            let characters: Vec<char> = whole.chars().collect();
            let attempts = cuts.iter().copied().chain([(7, characters.len())]);
            for (piece, broken_after) in attempts {
                reply.rewind();
                for part in characters[..broken_after.min(characters.len())].chunks(piece) {
                    let part: String = part.iter().collect();
                    printed.extend(reply.next(&text(&part)));
                }
            }
            printed.extend(reply.next(&ReplyPart::Done));
            prop_assert_eq!(printed, format!("{whole}\n"));
        }
    }

    #[test]
    fn notes_stand_on_lines_of_their_own_and_once() {
        let mut reply = Reply::new(false);
        let note = ReplyPart::Note { text: "stored".to_owned() };
        assert_eq!(reply.next(&text("a")).as_deref(), Some("a"));
        assert_eq!(reply.next(&note).as_deref(), Some("\n\u{b7} stored\n"));
        reply.rewind();
        assert_eq!(reply.next(&text("a")), None);
        assert_eq!(reply.next(&note), None);
        assert_eq!(reply.next(&text("b\n")).as_deref(), Some("b\n"));
        assert_eq!(reply.next(&ReplyPart::Done).as_deref(), Some(""));
        assert!(reply.ended);
    }
}
