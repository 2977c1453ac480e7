//! Why was this found?
//!
//! In:  a ranked record, its text, the question. Out: every signal with its weight and its share of the score, and the
//!      largest of them in words a person understands.
//! Always: the shares add up to the score.

use crate::corpus::Told;
use crate::rank::{Corpus, Question, Ranked, Signal, Signals, Weights};
use crate::text;
use agentd_domain::agent_api::{Explain, Share};
use std::collections::BTreeSet;

/// Reasons that are told in words.
const REASONS_MOST: usize = 3;
/// A share smaller than this is no reason.
const REASON_LEAST: f32 = 0.05;

pub(crate) fn explain(
    corpus: &Told<'_>,
    ranked: &Ranked,
    cosine: f32,
    record_text: &str,
    question: &Question,
) -> Explain {
    let own: BTreeSet<String> = text::terms(record_text).into_iter().collect();
    let matched: Vec<String> =
        question.terms.iter().filter(|term| own.contains(&term.text)).map(|term| term.text.clone()).collect();
    let speaker = question.terms.iter().find(|term| corpus.speaks(&term.text)).map(|term| term.word.as_str());
    let why = Weights::MEASURED
        .explain(&ranked.signals)
        .into_iter()
        .filter(|(_, share)| *share >= REASON_LEAST)
        .map(|(signal, _)| reason(signal, &matched, speaker))
        .fold(Vec::new(), |mut reasons: Vec<String>, reason| {
            if reasons.len() < REASONS_MOST && !reasons.contains(&reason) {
                reasons.push(reason);
            }
            reasons
        });
    Explain {
        words: ranked.signals.get(Signal::Words),
        meaning: cosine,
        matched,
        signals: shares(&ranked.signals),
        why,
    }
}

/// Of a question that asked for vectors alone: the cosine is the score.
pub(crate) fn nearest(cosine: f32) -> Explain {
    Explain {
        words: 0.0,
        meaning: cosine,
        matched: Vec::new(),
        signals: vec![Share {
            signal: Signal::Meaning.name().to_owned(),
            value: cosine,
            weight: 1.0,
            share: cosine,
        }],
        why: vec!["it means nearly the same".to_owned()],
    }
}

fn shares(signals: &Signals) -> Vec<Share> {
    Signal::ALL
        .into_iter()
        .map(|signal| {
            let (value, weight) = (signals.get(signal), Weights::MEASURED.of(signal));
            Share { signal: signal.name().to_owned(), value, weight, share: value * weight }
        })
        .collect()
}

fn reason(signal: Signal, matched: &[String], speaker: Option<&str>) -> String {
    match signal {
        Signal::Words if !matched.is_empty() => format!("it says {}", matched.join(", ")),
        Signal::Words | Signal::Coverage => {
            "it and what was said around it have the question's words".to_owned()
        }
        Signal::Before | Signal::TwoBefore => "what was said before it has the question's words".to_owned(),
        Signal::After | Signal::TwoAfter => "what was said after it has the question's words".to_owned(),
        Signal::Answer => "it answers what was asked before it in like words".to_owned(),
        Signal::Kin if matched.is_empty() => "it has words of like meaning".to_owned(),
        Signal::Kin => format!("it says {} or words of like meaning", matched.join(", ")),
        Signal::Meaning | Signal::MeaningAfter => "it means nearly the same".to_owned(),
        Signal::SessionWords | Signal::SessionMeaning => "its conversation is about this".to_owned(),
        Signal::Speaker => format!("{} says it", speaker.unwrap_or("who is named")),
        Signal::Asks => "it tells and does not ask".to_owned(),
        Signal::TellsTime => "it says when".to_owned(),
        Signal::Time => "it was told at the time in question".to_owned(),
        Signal::Useful => "it was of use before".to_owned(),
    }
}
