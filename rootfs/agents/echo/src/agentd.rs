//! What does echo ask of agentd?
//!
//! One function per request of the agent API. A refusal is told in agentd's own words.

use crate::http::{self, Body, Request, Response, Upload};
use serde::Deserialize;
use serde_json::{Value, json};
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

const WAIT_S: u64 = 25;
/// Longer than agentd itself waits for anything.
const PATIENCE: Duration = Duration::from_secs(60);
/// A slow machine reads a long prompt for minutes before the first word.
const MODEL_SILENCE: Duration = Duration::from_secs(600);

/// Below the models' usual values: a companion that remembers should rather repeat than invent.
pub const TEMPERATURE: f32 = 0.3;

#[derive(Debug)]
pub enum CallError {
    /// agentd is being restarted, or the connection broke.
    Connection(io::Error),
    Refused {
        status: u16,
        why: String,
    },
    /// The answer is not what the API says.
    Strange(String),
}

impl CallError {
    /// Whether the same request may succeed later.
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Connection(_) => true,
            Self::Refused { status, .. } => matches!(status, 429 | 500..=599),
            Self::Strange(_) => false,
        }
    }
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connection(error) => write!(f, "agentd was not reached: {error}"),
            Self::Refused { status, why } => write!(f, "{why} (status {status})"),
            Self::Strange(what) => write!(f, "agentd's answer was not understood: {what}"),
        }
    }
}

impl From<io::Error> for CallError {
    fn from(error: io::Error) -> Self {
        Self::Connection(error)
    }
}

#[derive(Debug, Clone, Deserialize)]
pub struct Message {
    pub id: String,
    pub text: String,
    pub sent_unix_ms: i64,
    #[serde(default)]
    pub history: Vec<Turn>,
}

#[derive(Debug, Clone, Deserialize)]
pub struct Turn {
    pub role: String,
    pub content: String,
}

#[derive(Debug, Clone, Deserialize)]
pub struct Hit {
    pub id: String,
    pub text: String,
    pub event_unix_ms: i64,
    pub score: f32,
}

pub struct Agentd {
    /// `127.0.0.1:7070`.
    authority: String,
}

impl Agentd {
    pub fn from_environment() -> Self {
        let url = std::env::var("AGENTD_URL").unwrap_or_default();
        let authority = url.strip_prefix("http://").map(|rest| rest.trim_end_matches('/').to_owned());
        Self { authority: authority.unwrap_or_else(|| "127.0.0.1:7070".to_owned()) }
    }

    /// Waits for a message; `None` when none came within agentd's time.
    pub fn next_message(&self) -> Result<Option<Message>, CallError> {
        let path = format!("/agent/v1/messages/next?wait_s={WAIT_S}");
        let response = self.ask("GET", &path, &[], None, PATIENCE)?;
        if response.status == 204 {
            return Ok(None);
        }
        read(response).map(Some)
    }

    /// Gives the record's id once it is on disk.
    pub fn remember(
        &self,
        tier: &str,
        role: &str,
        message: &Message,
        key: &str,
    ) -> Result<String, CallError> {
        let body = json!({
            "tier": tier, "role": role, "text": message.text, "event_unix_ms": message.sent_unix_ms,
            "source": { "kind": "user", "ref": format!("message {}", message.id) },
        });
        let answer: Value = self.retried(|| {
            read(self.ask(
                "POST",
                "/agent/v1/memory/remember",
                &[("idempotency-key", key)],
                Some(&body),
                PATIENCE,
            )?)
        })?;
        let id = answer["id"].as_str().ok_or_else(|| CallError::Strange("no id".to_owned()))?;
        Ok(id.to_owned())
    }

    pub fn recall(&self, query: &str) -> Result<Vec<Hit>, CallError> {
        #[derive(Deserialize)]
        struct Recalled {
            hits: Vec<Hit>,
        }
        // A question is short; of a long message its beginning says what it is about.
        let query: String = query.chars().take(1000).collect();
        let body = json!({ "query": query, "k": 6, "tiers": ["spirit"] });
        let recalled: Recalled = self
            .retried(|| read(self.ask("POST", "/agent/v1/memory/recall", &[], Some(&body), PATIENCE)?))?;
        Ok(recalled.hits)
    }

    pub fn default_model(&self) -> Result<String, CallError> {
        let answer: Value = read(self.ask("GET", "/agent/v1/self", &[], None, PATIENCE)?)?;
        Ok(answer["model"].as_str().unwrap_or_default().to_owned())
    }

    /// Streams the model's words into `say`. After a broken connection the same call takes up the same answer.
    pub fn generate(
        &self,
        messages: &[Value],
        max_tokens: u32,
        message_id: &str,
        say: &mut dyn FnMut(&str),
    ) -> Result<(), CallError> {
        let body = json!({
            "model": "default", "messages": messages, "max_tokens": max_tokens,
            "temperature": TEMPERATURE, "stream": true,
        });
        // Another prompt is another request, and needs another key.
        let mut hash = DefaultHasher::new();
        body.to_string().hash(&mut hash);
        let key = format!("answer-{message_id}-{:016x}", hash.finish());
        let mut said = Said::default();
        self.retried(|| {
            said.begin_again();
            let headers = [("idempotency-key", key.as_str())];
            let response = self.ask("POST", "/v1/chat/completions", &headers, Some(&body), MODEL_SILENCE)?;
            if response.status != 200 {
                return Err(refusal(response.status, &response.text()?));
            }
            stream(response, &mut |text| said.say(text, say))
        })
    }

    pub fn begin_reply(&self, message_id: &str) -> io::Result<Upload> {
        Upload::begin(&self.authority, &format!("/agent/v1/messages/{message_id}/reply"), PATIENCE)
    }

    fn ask(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: Option<&Value>,
        patience: Duration,
    ) -> Result<Response, CallError> {
        let bytes = body.map(Value::to_string);
        let body = bytes.as_ref().map_or(Body::None, |text| Body::Whole(text.as_bytes()));
        Ok(http::send(&self.authority, &Request { method, path, headers, body, patience })?)
    }

    /// A few attempts for a request that may be repeated.
    fn retried<T>(&self, mut attempt: impl FnMut() -> Result<T, CallError>) -> Result<T, CallError> {
        let mut pause = Pause::default();
        for _ in 0..4 {
            match attempt() {
                Err(error) if error.may_pass() => pause.wait(),
                other => return other,
            }
        }
        attempt()
    }
}

/// What was said of a streamed answer, so that a repetition says only what is new.
#[derive(Default)]
struct Said {
    whole: String,
    seen: usize,
}

impl Said {
    fn begin_again(&mut self) {
        self.seen = 0;
    }

    fn say(&mut self, text: &str, say: &mut dyn FnMut(&str)) {
        let known = &self.whole[self.seen..];
        if known.starts_with(text) {
            self.seen += text.len();
            return;
        }
        let new = match text.strip_prefix(known) {
            Some(new) => new.to_owned(),
            // Another answer than before: what was said cannot be taken back.
            None => format!("\n\n{text}"),
        };
        say(&new);
        self.whole.push_str(&new);
        self.seen = self.whole.len();
    }
}

fn stream(response: Response, say: &mut dyn FnMut(&str)) -> Result<(), CallError> {
    for line in response.lines() {
        let line = line?;
        let Some(data) = line.strip_prefix("data: ") else { continue };
        if data == "[DONE]" {
            return Ok(());
        }
        let chunk: Value =
            serde_json::from_str(data).map_err(|error| CallError::Strange(error.to_string()))?;
        if let Some(why) = chunk["error"]["message"].as_str() {
            return Err(CallError::Refused { status: 503, why: why.to_owned() });
        }
        if let Some(text) = chunk["choices"][0]["delta"]["content"].as_str().filter(|text| !text.is_empty()) {
            say(text);
        }
    }
    Err(CallError::Connection(io::ErrorKind::UnexpectedEof.into()))
}

fn read<T: serde::de::DeserializeOwned>(response: Response) -> Result<T, CallError> {
    let status = response.status;
    let text = response.text()?;
    if status != 200 {
        return Err(refusal(status, &text));
    }
    serde_json::from_str(&text).map_err(|error| CallError::Strange(error.to_string()))
}

/// What agentd says of a refusal: a report's `what` and `why`, or an OpenAI error's `message`.
pub fn refusal(status: u16, text: &str) -> CallError {
    let value: Value = serde_json::from_str(text).unwrap_or_default();
    let why = match (value["what"].as_str(), value["why"].as_str(), value["error"]["message"].as_str()) {
        (Some(what), Some(why), _) => format!("{what}: {why}"),
        (_, _, Some(message)) => message.to_owned(),
        _ => "refused".to_owned(),
    };
    CallError::Refused { status, why }
}

/// Waits longer each time, up to five seconds.
#[derive(Default)]
pub struct Pause {
    times: u32,
}

impl Pause {
    pub fn wait(&mut self) {
        let ms = (100u64 << self.times.min(6)).min(5000);
        self.times += 1;
        std::thread::sleep(Duration::from_millis(ms));
    }

    pub fn reset(&mut self) {
        self.times = 0;
    }
}

pub fn unix_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(attempts: &[&[&str]]) -> String {
        let mut said = Said::default();
        let mut heard = String::new();
        for attempt in attempts {
            said.begin_again();
            for text in *attempt {
                said.say(text, &mut |text| heard.push_str(text));
            }
        }
        heard
    }

    #[test]
    fn a_repeated_answer_is_told_once() {
        assert_eq!(told(&[&["he", "llo"]]), "hello");
        assert_eq!(told(&[&["he", "ll"], &["he", "ll", "o"]]), "hello");
        assert_eq!(told(&[&["he", "ll"], &["hel", "lo"]]), "hello");
        assert_eq!(told(&[&["hello"], &["h", "ello", " you"]]), "hello you");
        assert_eq!(told(&[&["hello"], &["bye"]]), "hello\n\nbye");
    }

    #[test]
    fn refusals_are_told_in_agentds_words() {
        let text = |error: CallError| error.to_string();
        let report = r#"{"code":"forbidden","fault":"caller","what":"w","why":"y","fix":"f"}"#;
        assert_eq!(text(refusal(403, report)), "w: y (status 403)");
        assert_eq!(text(refusal(503, r#"{"error":{"message":"m"}}"#)), "m (status 503)");
        assert_eq!(text(refusal(500, "<html>")), "refused (status 500)");
    }

    #[test]
    fn what_may_pass_is_retried() {
        assert!(CallError::Connection(io::ErrorKind::ConnectionReset.into()).may_pass());
        assert!(refusal(503, "").may_pass() && refusal(429, "").may_pass());
        assert!(!refusal(400, "").may_pass() && !refusal(403, "").may_pass());
    }
}
