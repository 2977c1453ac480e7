//! Memories of any number, the same in every run: texts, sessions, vectors, words and questions.
//!
//! Shaped after what is measured on real ones: a vocabulary by Zipf's law, conversations of twenty turns between two of a
//! hundred people, sentence vectors in clusters that lie in clusters, words of like meaning in groups of eight.

use agentd_domain::agent_api::{Remember, Tier};
use agentd_memory::NewRecord;
use std::collections::HashMap;

pub const DIMENSION: usize = 384;
const VOCABULARY: usize = 20_000;
/// The commonest words carry no content; they are stop words in a real text.
const STOP_WORDS: usize = 30;
const WORDS_OF_A_RECORD: usize = 22;
const WORDS_OF_A_QUESTION: usize = 5;
const TURNS_OF_A_SESSION: usize = 20;
const PEOPLE: usize = 100;
/// Topics, and what is said within one.
const TOPICS: usize = 200;
const THEMES_OF_A_TOPIC: usize = 20;
const TOLD_MS: i64 = 1_700_000_000_000;
const TURN_MS: i64 = 60_000;

pub struct Synthetic {
    words: Vec<String>,
    /// By word its place among them.
    places: HashMap<String, usize>,
    /// Sums of 1/rank, so that a word is found by halving.
    ranks: Vec<f64>,
    topics: Vec<Vec<f32>>,
}

impl Default for Synthetic {
    fn default() -> Self {
        let mut sum = 0.0;
        let ranks = (STOP_WORDS..VOCABULARY).map(|rank| {
            sum += 1.0 / (rank + 1) as f64;
            sum
        });
        let ranks = ranks.collect();
        let topics = (0..TOPICS).map(|at| Random::seeded(1, at).direction()).collect();
        let words: Vec<String> = (0..VOCABULARY - STOP_WORDS).map(word).collect();
        let places = words.iter().cloned().zip(0..).collect();
        Self { words, places, ranks, topics }
    }
}

impl Synthetic {
    pub fn record(&self, number: usize) -> NewRecord {
        let session = number / TURNS_OF_A_SESSION;
        let speaker = (session + number % 2 * (1 + session % 7)) % PEOPLE;
        let mut random = Random::seeded(2, number);
        let text = format!(
            "{}: {}",
            capital(&word(VOCABULARY + speaker)),
            self.draw(&mut random, WORDS_OF_A_RECORD)
        );
        let event = TOLD_MS + number as i64 * TURN_MS;
        let request =
            Remember { tier: Tier::Spirit, text, role: None, source: None, event_unix_ms: Some(event) };
        let mut new = NewRecord::new(request, event);
        new.detail.session = Some(format!("conversation {session}"));
        new
    }

    pub fn vector(&self, number: usize) -> Vec<f32> {
        // A session keeps to its topic, mostly.
        let theme = Random::seeded(3, number / TURNS_OF_A_SESSION).below(TOPICS * THEMES_OF_A_TOPIC);
        let mut random = Random::seeded(4, number);
        let theme = if random.below(4) == 0 { random.below(TOPICS * THEMES_OF_A_TOPIC) } else { theme };
        self.near(theme, &mut random)
    }

    /// A question about what some record is about.
    pub fn question(&self, number: usize) -> (String, Vec<f32>) {
        let mut random = Random::seeded(5, number);
        let about = self.draw(&mut random, WORDS_OF_A_QUESTION);
        let speaker = capital(&word(VOCABULARY + random.below(PEOPLE)));
        let theme = random.below(TOPICS * THEMES_OF_A_TOPIC);
        (format!("What did {speaker} say about {about}?"), self.near(theme, &mut random))
    }

    /// Eight words after each other are kin.
    pub fn word_vector(&self, text: &str) -> Vec<f32> {
        let at = self.places.get(text).copied().unwrap_or(VOCABULARY + text.len());
        let centre = Random::seeded(6, at / 8).direction();
        mixed(&centre, &Random::seeded(7, at).direction(), 0.7)
    }

    fn near(&self, theme: usize, random: &mut Random) -> Vec<f32> {
        let topic = &self.topics[theme % TOPICS];
        let theme = mixed(topic, &Random::seeded(8, theme).direction(), 0.8);
        mixed(&theme, &random.direction(), 0.7)
    }

    fn draw(&self, random: &mut Random, words: usize) -> String {
        let most = self.ranks.last().copied().unwrap_or(1.0);
        let drawn = (0..words).map(|_| {
            let at = (f64::from(random.unit()) + 0.5) * most;
            let rank = self.ranks.partition_point(|sum| *sum < at);
            self.words.get(rank).map_or("end", String::as_str)
        });
        drawn.collect::<Vec<_>>().join(" ")
    }
}

/// One direction and a share of another, of length 1.
fn mixed(one: &[f32], other: &[f32], share: f32) -> Vec<f32> {
    let sum: Vec<f32> = one.iter().zip(other).map(|(a, b)| a + share * b).collect();
    let length = sum.iter().map(|v| v * v).sum::<f32>().sqrt();
    sum.into_iter().map(|v| v / length).collect()
}

fn word(number: usize) -> String {
    const SYLLABLES: [&str; 16] = [
        "ba", "dok", "ki", "lor", "mu", "nak", "po", "rim", "zak", "tan", "vo", "wim", "zor", "gu", "hol",
        "fi",
    ];
    let mut word = String::new();
    let mut left = number + 16;
    while left > 0 {
        word.push_str(SYLLABLES[left % 16]);
        left /= 16;
    }
    word
}

fn capital(word: &str) -> String {
    let mut letters = word.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}

/// xorshift64.
struct Random(u64);

impl Random {
    fn seeded(stream: u64, number: usize) -> Self {
        // splitmix64: seeds beside each other begin far apart.
        let mut mixed = (stream << 48 ^ number as u64).wrapping_add(0x9E37_79B9_7F4A_7C15);
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        Self((mixed ^ (mixed >> 31)) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, most: usize) -> usize {
        ((self.next() >> 16) % most as u64) as usize
    }

    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    }

    fn direction(&mut self) -> Vec<f32> {
        let values: Vec<f32> = (0..DIMENSION).map(|_| self.unit()).collect();
        mixed(&values, &values, 0.0)
    }
}
