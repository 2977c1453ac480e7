//! What do LoCoMo's conversations say, and what is asked about them?
//!
//! In:  `locomo10.json` of snap-research/LoCoMo, or a file of the same form with fewer conversations. Its licence is
//!      CC BY-NC 4.0: it is read where it lies, and nothing of it is kept but hashes of texts and vectors of them.
//! Out: turns in their order with session and time, questions with the turns that answer them.
//! Source: Maharana et al., "Evaluating Very Long-Term Conversational Memory of LLM Agents", ACL 2024.

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde_json::{Map, Value};
use std::fs;
use std::path::Path;

/// One conversation of two people over months.
pub struct Conversation {
    /// `conv-26`.
    pub name: String,
    pub turns: Vec<Turn>,
    pub questions: Vec<Question>,
}

/// What one of them said; the unit that is retrieved.
pub struct Turn {
    /// `D1:3`: session and place in it.
    pub id: String,
    pub speaker: String,
    pub text: String,
    /// What a photo shows that was sent along.
    pub caption: Option<String>,
    pub session: u32,
    pub unix_ms: i64,
}

pub struct Question {
    pub text: String,
    pub category: Category,
    /// Ids of turns as the file has them; some name no turn, which no retriever can find.
    pub evidence: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Category {
    MultiHop,
    Temporal,
    OpenDomain,
    SingleHop,
    Adversarial,
}

impl Category {
    pub const ALL: [Self; 5] =
        [Self::MultiHop, Self::Temporal, Self::OpenDomain, Self::SingleHop, Self::Adversarial];

    /// The file's numbers; the paper's table names them in another order.
    fn from_number(number: u8) -> Option<Self> {
        Self::ALL.get(usize::from(number).checked_sub(1)?).copied()
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::MultiHop => "multi-hop",
            Self::Temporal => "temporal",
            Self::OpenDomain => "open-domain",
            Self::SingleHop => "single-hop",
            Self::Adversarial => "adversarial",
        }
    }
}

impl Turn {
    /// As an agent would store it: who, what, and what the photo showed.
    pub fn record_text(&self) -> String {
        match &self.caption {
            Some(caption) => format!("{}: {} [shares a photo: {caption}]", self.speaker, self.text),
            None => format!("{}: {}", self.speaker, self.text),
        }
    }
}

#[derive(Deserialize)]
struct FileConversation {
    sample_id: String,
    conversation: Map<String, Value>,
    qa: Vec<FileQuestion>,
}

#[derive(Deserialize)]
struct FileQuestion {
    question: String,
    category: u8,
    evidence: Vec<String>,
}

#[derive(Deserialize)]
struct FileTurn {
    speaker: String,
    dia_id: String,
    text: String,
    blip_caption: Option<String>,
}

pub fn read(file: &Path) -> Result<Vec<Conversation>> {
    let text = fs::read_to_string(file)
        .with_context(|| format!("{}: LoCoMo's `data/locomo10.json` is wanted", file.display()))?;
    let raw: Vec<FileConversation> = serde_json::from_str(&text).context("this is not LoCoMo's form")?;
    raw.into_iter().map(conversation).collect()
}

fn conversation(raw: FileConversation) -> Result<Conversation> {
    let mut turns = Vec::new();
    for session in 1.. {
        let Some(said) = raw.conversation.get(&format!("session_{session}")) else {
            // Some sessions have a date and no turns; no file has more than 35 of them.
            if session > 100 {
                break;
            }
            continue;
        };
        let when = raw.conversation.get(&format!("session_{session}_date_time")).and_then(Value::as_str);
        let unix_ms = when.and_then(unix_ms).with_context(|| format!("session {session}: time {when:?}"))?;
        let said: Vec<FileTurn> = serde_json::from_value(said.clone())?;
        turns.extend(said.into_iter().enumerate().map(|(place, turn)| Turn {
            id: turn.dia_id,
            speaker: turn.speaker,
            text: turn.text,
            caption: turn.blip_caption,
            session,
            // Only the session's time is told; turns follow each other by a minute.
            unix_ms: unix_ms + place as i64 * 60_000,
        }));
    }
    ensure!(!turns.is_empty(), "{}: nobody says anything", raw.sample_id);
    let question = |raw: FileQuestion| -> Result<Question> {
        let category = Category::from_number(raw.category).context("an unknown category")?;
        Ok(Question { text: raw.question, category, evidence: raw.evidence })
    };
    let questions = raw.qa.into_iter().map(question).collect::<Result<_>>()?;
    Ok(Conversation { name: raw.sample_id, turns, questions })
}

/// `1:56 pm on 8 May, 2023`, taken as UTC.
fn unix_ms(text: &str) -> Option<i64> {
    let (time, date) = text.split_once(" on ")?;
    let (clock, half) = time.trim().split_once(' ')?;
    let (hour, minute) = clock.split_once(':')?;
    let hour: i8 = hour.parse().ok()?;
    let hour = hour % 12 + if half.eq_ignore_ascii_case("pm") { 12 } else { 0 };
    let mut words = date.split([' ', ',']).filter(|word| !word.is_empty());
    let day: i8 = words.next()?.parse().ok()?;
    let name = words.next()?.to_lowercase();
    let month = MONTHS.iter().position(|month| *month == name)? + 1;
    let year: i16 = words.next()?.parse().ok()?;
    let civil = jiff::civil::date(year, i8::try_from(month).ok()?, day).at(hour, minute.parse().ok()?, 0, 0);
    Some(civil.to_zoned(jiff::tz::TimeZone::UTC).ok()?.timestamp().as_millisecond())
}

const MONTHS: [&str; 12] = [
    "january",
    "february",
    "march",
    "april",
    "may",
    "june",
    "july",
    "august",
    "september",
    "october",
    "november",
    "december",
];

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn times_of_sessions_are_understood() {
        let ms = |text| unix_ms(text).map(|ms| jiff::Timestamp::from_millisecond(ms).unwrap().to_string());
        assert_eq!(ms("1:56 pm on 8 May, 2023").as_deref(), Some("2023-05-08T13:56:00Z"));
        assert_eq!(ms("12:09 am on 13 September, 2023").as_deref(), Some("2023-09-13T00:09:00Z"));
        assert_eq!(ms("12:30 pm on 1 January, 2024").as_deref(), Some("2024-01-01T12:30:00Z"));
        assert_eq!(ms("yesterday"), None);
    }

    #[test]
    fn sessions_without_turns_are_skipped() {
        let raw: FileConversation = serde_json::from_value(json!({
            "sample_id": "conv-1",
            "conversation": {
                "speaker_a": "Ann", "speaker_b": "Bob",
                "session_1_date_time": "1:00 pm on 8 May, 2023",
                "session_3_date_time": "2:00 pm on 9 May, 2023",
                "session_3": [
                    {"speaker": "Ann", "dia_id": "D3:1", "text": "Look!", "blip_caption": "a photo of a cat"},
                    {"speaker": "Bob", "dia_id": "D3:2", "text": "Nice."}
                ]
            },
            "qa": [{"question": "Whose cat?", "answer": "Ann's", "evidence": ["D3:1"], "category": 4}]
        }))
        .unwrap();
        let found = conversation(raw).unwrap();
        assert_eq!(found.turns.len(), 2);
        assert_eq!(found.turns[0].record_text(), "Ann: Look! [shares a photo: a photo of a cat]");
        assert_eq!(found.turns[1].unix_ms - found.turns[0].unix_ms, 60_000);
        assert_eq!((found.turns[1].session, found.questions[0].category), (3, Category::SingleHop));
    }
}
