//! A conversation as the appliance would hold it, and its questions as an agent would ask them.

use super::fit::Example;
use super::locomo::{Category, Conversation};
use super::metric::{PLACES, Recall};
use super::told::Told;
use super::vectors::{DIMENSION, Vectors};
use agentd_memory::rank::{
    Corpus, Nearness, Plain, Question, Signal, Weights, as_told, candidates, judge, listed, rank, window,
};
use agentd_memory::text;
use anyhow::{Context, Result};
use std::collections::{HashMap, HashSet};

/// Questions are asked so long after the last turn.
pub const LATER_MS: i64 = 24 * 60 * 60 * 1000;

pub struct Bed {
    pub name: String,
    pub corpus: Plain,
    /// Ids of the turns, by slot.
    ids: Vec<String>,
    pub asked: Vec<Asked>,
    /// The same conversation in a store.
    pub told: Told,
    /// Of each record: alone, and with the two before it.
    alone: Vec<Vec<f32>>,
    windows: Vec<Vec<f32>>,
    pub tokens: Tokens,
}

/// What the embedder read.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tokens {
    pub records: u64,
    pub alone: u64,
    pub windows: u64,
    pub words: u64,
    pub distinct_words: u64,
    pub questions: u64,
    pub asked: u64,
    pub told: u64,
    pub new_words: u64,
}

impl Tokens {
    pub fn with(self, other: &Self) -> Self {
        Self {
            records: self.records + other.records,
            alone: self.alone + other.alone,
            windows: self.windows + other.windows,
            words: self.words + other.words,
            distinct_words: self.distinct_words + other.distinct_words,
            questions: self.questions + other.questions,
            asked: self.asked + other.asked,
            told: self.told + other.told,
            new_words: self.new_words + other.new_words,
        }
    }
}

pub struct Asked {
    pub text: String,
    pub question: Question,
    pub category: Category,
    pub evidence: Vec<String>,
    alone: Vec<f32>,
    /// The question's vector and that of what would be told, summed, of length 1.
    both: Vec<f32>,
}

/// All that the embedder must read for these conversations.
pub fn texts(conversation: &Conversation) -> Vec<String> {
    let records: Vec<String> = conversation.turns.iter().map(super::locomo::Turn::record_text).collect();
    let corpus = bare(conversation, &records);
    let mut texts: Vec<String> = windows(conversation, &records);
    texts.extend(words(&records).into_iter().map(|(_, word)| word));
    for question in &conversation.questions {
        texts.push(question.text.clone());
        texts.push(as_told(&question.text, |term| corpus.speaks(term)));
        texts.extend(Question::read(&question.text, 0).terms.into_iter().map(|term| term.word));
    }
    texts.extend(records);
    texts
}

/// Without vectors.
fn bare(conversation: &Conversation, records: &[String]) -> Plain {
    let mut corpus = Plain::default();
    for (turn, record) in conversation.turns.iter().zip(records) {
        corpus.push(record, u64::from(turn.session), turn.unix_ms);
    }
    corpus
}

fn windows(conversation: &Conversation, records: &[String]) -> Vec<String> {
    let mut before: HashMap<u32, Vec<&str>> = HashMap::new();
    let turns = conversation.turns.iter().zip(records);
    turns
        .map(|(turn, record)| {
            let before = before.entry(turn.session).or_default();
            let text = window(before, record);
            before.push(record);
            text
        })
        .collect()
}

/// Distinct terms in the order they are met, each with the word that it was met as.
fn words(records: &[String]) -> Vec<(String, String)> {
    let mut seen = HashSet::new();
    let all = records.iter().flat_map(|record| text::content_words(record));
    all.filter_map(|word| Some((text::terms(&word).into_iter().next()?, word)))
        .filter(|(term, _)| seen.insert(term.clone()))
        .collect()
}

impl Bed {
    pub fn new(conversation: &Conversation, vectors: &Vectors) -> Result<Self> {
        let records: Vec<String> = conversation.turns.iter().map(super::locomo::Turn::record_text).collect();
        let window_texts = windows(conversation, &records);
        let mut corpus = bare(conversation, &records);
        let mut tokens = Tokens { records: records.len() as u64, ..Tokens::default() };
        for (term, word) in words(&records) {
            corpus.add_word(&term, vectors.of(&word)?);
            tokens.words += u64::from(vectors.tokens(&word)?);
            tokens.distinct_words += 1;
        }
        let now = conversation.turns.last().context("no turns")?.unix_ms + LATER_MS;
        let mut asked = Vec::new();
        for question in &conversation.questions {
            let told = as_told(&question.text, |term| corpus.speaks(term));
            let read = Question::read(&question.text, now);
            for term in
                read.terms.iter().filter(|term| !corpus.knows(&term.text)).cloned().collect::<Vec<_>>()
            {
                corpus.add_asked(&term.text, vectors.of(&term.word)?);
                tokens.new_words += u64::from(vectors.tokens(&term.word)?);
            }
            tokens.questions += 1;
            tokens.asked += u64::from(vectors.tokens(&question.text)?);
            tokens.told += u64::from(vectors.tokens(&told)?);
            let alone = vectors.of(&question.text)?.to_vec();
            asked.push(Asked {
                text: question.text.clone(),
                question: read,
                category: question.category,
                evidence: question.evidence.clone(),
                both: sum_of(&alone, vectors.of(&told)?),
                alone,
            });
        }
        let of = |texts: &[String], tokens: &mut u64| -> Result<Vec<Vec<f32>>> {
            let each = texts.iter().map(|text| {
                *tokens += u64::from(vectors.tokens(text)?);
                Ok(vectors.of(text)?.to_vec())
            });
            each.collect()
        };
        let alone = of(&records, &mut tokens.alone)?;
        let windows = of(&window_texts, &mut tokens.windows)?;
        let ids = conversation.turns.iter().map(|turn| turn.id.clone()).collect();
        let told = Told::new(conversation, vectors)?;
        let name = conversation.name.clone();
        Ok(Self { name, corpus, ids, asked, told, alone, windows, tokens })
    }

    /// Cosines of the question and what would be told with every record's window.
    pub fn cosines(&self, asked: &Asked) -> Vec<f32> {
        self.windows.iter().map(|vector| dot(vector, &asked.both)).collect()
    }

    /// Of how many questions the store's first ten are not those of the ranking alone, which has whole vectors and no
    /// file.
    pub fn differing(&self, vectors: &Vectors) -> Result<usize> {
        let mut differing = 0;
        for asked in &self.asked {
            let alone =
                self.ranked(asked, &Weights::MEASURED).into_iter().map(|slot| self.ids[slot].as_str());
            let (found, places) = (self.told.ask(&asked.text, vectors)?, PLACES[1]);
            let alone: Vec<&str> = alone.take(places).collect();
            differing += usize::from(alone != found[..places.min(found.len())]);
        }
        Ok(differing)
    }

    /// The ranking when every turn has proved as useful as can be, and those that answer the question never: what
    /// usefulness can spoil at worst.
    pub fn misled(&self, weights: &Weights) -> Recall {
        self.recall_by(|asked| {
            let cosines = self.cosines(asked);
            let Ok(mut pool) = candidates(&self.corpus, &asked.question, Nearness::new(&cosines));
            for (slot, signals) in &mut pool {
                let is_evidence = asked.evidence.contains(&self.ids[*slot]);
                signals.0[Signal::Useful as usize] = f32::from(u8::from(!is_evidence));
            }
            let listed = listed(&self.corpus, judge(pool, weights), PLACES[PLACES.len() - 1]);
            listed.into_iter().map(|one| one.slot).collect()
        })
    }

    /// The appliance's ranking.
    pub fn recall(&self, weights: &Weights) -> Recall {
        self.recall_by(|asked| self.ranked(asked, weights))
    }

    fn ranked(&self, asked: &Asked, weights: &Weights) -> Vec<usize> {
        let cosines = self.cosines(asked);
        let most = PLACES[PLACES.len() - 1];
        let Ok(ranked) = rank(&self.corpus, &asked.question, Nearness::new(&cosines), weights, most);
        ranked.into_iter().map(|one| one.slot).collect()
    }

    /// Cosine of the question with each turn alone, as a vector database does it.
    pub fn plain_cosine(&self) -> Recall {
        self.recall_by(|asked| best(self.alone.iter().map(|vector| dot(vector, &asked.alone)).collect()))
    }

    /// BM25 over single turns, k1 1.2 and b 0.75.
    pub fn plain_words(&self) -> Recall {
        self.recall_by(|asked| {
            let records = self.corpus.slots();
            let mut scores = vec![0.0f32; records];
            for term in &asked.question.terms {
                let mut postings = Vec::new();
                let Ok(()) =
                    self.corpus.postings(&term.text, &mut |slot, count| postings.push((slot, count as f32)));
                let found = postings.len() as f32;
                let idf = (1.0 + (records as f32 - found + 0.5) / (found + 0.5)).ln();
                for (slot, count) in postings {
                    let length = self.corpus.facts(slot).words as f32 / self.corpus.mean_words();
                    scores[slot] += idf * count * 2.2 / (count + 1.2 * (0.25 + 0.75 * length));
                }
            }
            best(scores)
        })
    }

    /// Of every question that names a turn.
    pub fn examples(&self) -> Vec<Example> {
        let example = |asked: &Asked| {
            let cosines = self.cosines(asked);
            let Ok(pool) = candidates(&self.corpus, &asked.question, Nearness::new(&cosines));
            let pool: Vec<_> = pool
                .into_iter()
                .map(|(slot, signals)| (asked.evidence.contains(&self.ids[slot]), signals))
                .collect();
            Example::new(&pool, asked.evidence.len())
        };
        self.asked.iter().filter_map(example).collect()
    }

    fn recall_by(&self, order: impl Fn(&Asked) -> Vec<usize>) -> Recall {
        let mut recall = Recall::default();
        for asked in &self.asked {
            let found: Vec<&str> = order(asked).into_iter().map(|slot| self.ids[slot].as_str()).collect();
            recall.add(asked.category, &asked.evidence, &found);
        }
        recall
    }
}

fn best(scores: Vec<f32>) -> Vec<usize> {
    let mut slots: Vec<usize> = (0..scores.len()).collect();
    slots.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]).then(b.cmp(a)));
    slots.truncate(PLACES[PLACES.len() - 1]);
    slots
}

fn sum_of(a: &[f32], b: &[f32]) -> Vec<f32> {
    let sum: Vec<f32> = a.iter().zip(b).map(|(a, b)| a + b).collect();
    let length = dot(&sum, &sum).sqrt().max(f32::MIN_POSITIVE);
    sum.into_iter().map(|value| value / length).collect()
}

pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    debug_assert!(a.len() == DIMENSION && b.len() == DIMENSION);
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
