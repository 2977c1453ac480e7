//! How does a reply reach the person whole, although agentd may be restarted while it is given?
//!
//! Every part is kept until the end. When the connection breaks, the parts go again over a new one; agentd joins
//! nothing, it takes the reply that comes to its end.

use crate::agentd::{Agentd, CallError, Pause, refusal};
use crate::http::Upload;
use serde_json::json;

/// With its pauses about half a minute: longer than agentd needs to start again.
const ATTEMPTS: usize = 12;

pub struct Reply<'a> {
    agentd: &'a Agentd,
    message_id: &'a str,
    /// One line of JSON each.
    parts: Vec<String>,
    connection: Option<Upload>,
    has_text: bool,
}

impl<'a> Reply<'a> {
    pub fn to(agentd: &'a Agentd, message_id: &'a str) -> Self {
        Self { agentd, message_id, parts: Vec::new(), connection: None, has_text: false }
    }

    /// Something beside the words.
    pub fn note(&mut self, text: &str) {
        self.part(&json!({ "type": "note", "text": text }));
    }

    pub fn text(&mut self, text: &str) {
        self.has_text = true;
        self.part(&json!({ "type": "text", "text": text }));
    }

    pub fn has_text(&self) -> bool {
        self.has_text
    }

    /// Ends the reply. Ok when agentd has it on disk.
    pub fn done(mut self) -> Result<(), CallError> {
        self.part(&json!({ "type": "done" }));
        let mut pause = Pause::default();
        let mut last = None;
        for _ in 0..ATTEMPTS {
            let answer = match self.connection.take() {
                Some(connection) => connection.end(),
                None => self.send_all().and_then(Upload::end),
            };
            let answer = answer.and_then(|response| Ok((response.status, response.text()?)));
            match answer {
                Ok((204, _)) => return Ok(()),
                Ok((status, text)) => {
                    let error = refusal(status, &text);
                    if !error.may_pass() {
                        return Err(error);
                    }
                    last = Some(error);
                }
                Err(error) => last = Some(error.into()),
            }
            pause.wait();
        }
        Err(last.unwrap_or_else(|| CallError::Strange("the reply was not tried".to_owned())))
    }

    /// Sends a part now if that is possible; otherwise it goes with the others at the end.
    fn part(&mut self, part: &serde_json::Value) {
        self.parts.push(format!("{part}\n"));
        let sent = match self.connection.take() {
            Some(mut connection) => {
                let line = &self.parts[self.parts.len() - 1];
                connection.piece(line.as_bytes()).map(|()| connection)
            }
            None => self.send_all(),
        };
        self.connection = sent.ok();
    }

    fn send_all(&self) -> std::io::Result<Upload> {
        let mut connection = self.agentd.begin_reply(self.message_id)?;
        for part in &self.parts {
            connection.piece(part.as_bytes())?;
        }
        Ok(connection)
    }
}
