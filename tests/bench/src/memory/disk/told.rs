//! What is told: the same texts and vectors in every run.

use agentd_domain::agent_api::{Remember, Tier};
use agentd_memory::{EmbedderDigest, Embedding, NewRecord};

pub const EMBEDDER: EmbedderDigest = [5; 32];
/// all-MiniLM-L6-v2's.
pub const DIMENSION: usize = 384;
const TEXT_BYTES: usize = 400;
/// Different words of all records together; English letters of one person have about as many.
const VOCABULARY: u64 = 20_000;
const CENTRES: usize = 64;
const TOLD_MS: i64 = 1_790_000_000_000;

/// A source of records.
pub struct Told {
    words: Vec<String>,
    /// Sums of 1/rank, so that a word is found by halving.
    ranks: Vec<f64>,
    centres: Vec<Vec<f32>>,
}

impl Told {
    pub fn new() -> Self {
        let words = (0..VOCABULARY).map(word).collect();
        let mut sum = 0.0;
        let ranks = (1..=VOCABULARY)
            .map(|rank| {
                sum += 1.0 / rank as f64;
                sum
            })
            .collect();
        let mut random = Random::seeded(1);
        let centres = (0..CENTRES).map(|_| (0..DIMENSION).map(|_| random.unit()).collect()).collect();
        Self { words, ranks, centres }
    }

    pub fn text(&self, number: usize) -> String {
        let mut random = Random::seeded(number as u64 + 2);
        let most = self.ranks.last().copied().unwrap_or(1.0);
        let mut text = String::with_capacity(TEXT_BYTES + 16);
        text.push_str(&number.to_string());
        while text.len() < TEXT_BYTES {
            let drawn = f64::from(random.unit() + 0.5) * most;
            let rank = self.ranks.partition_point(|sum| *sum < drawn);
            text.push(' ');
            text.push_str(self.words.get(rank).map_or("word", String::as_str));
        }
        text.truncate(TEXT_BYTES);
        text
    }

    pub fn record(&self, number: usize) -> NewRecord {
        let text = self.text(number);
        let request = Remember { tier: Tier::Spirit, text, role: None, source: None, event_unix_ms: None };
        NewRecord::new(request, TOLD_MS + number as i64)
    }

    /// Clustered, as sentences are: a centre and a third as much of noise, of length 1.
    pub fn vector(&self, number: usize) -> Vec<f32> {
        let mut random = Random::seeded(number as u64 ^ 0x5555_0000);
        let centre = &self.centres[number % CENTRES];
        let vector: Vec<f32> = centre.iter().map(|c| c + random.unit() * 0.7).collect();
        let length = vector.iter().map(|v| v * v).sum::<f32>().sqrt();
        vector.into_iter().map(|v| v / length).collect()
    }

    pub fn embedding(&self, number: usize) -> Embedding {
        Embedding { embedder: EMBEDDER, vector: self.vector(number) }
    }
}

/// Pronounceable, of three to ten letters, different for each number.
fn word(number: u64) -> String {
    const SYLLABLES: [&str; 16] = [
        "ba", "den", "ki", "lor", "mu", "nas", "po", "ri", "sel", "tan", "vo", "wim", "zer", "gu", "hol",
        "fi",
    ];
    let mut word = String::new();
    let mut left = number + 16;
    while left > 0 {
        word.push_str(SYLLABLES[(left % 16) as usize]);
        left /= 16;
    }
    word
}

/// xorshift64.
struct Random(u64);

impl Random {
    fn seeded(seed: u64) -> Self {
        // One step of splitmix64: seeds beside each other begin far apart.
        let mixed = (seed.wrapping_add(0x9E37_79B9_7F4A_7C15)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        Self((mixed ^ (mixed >> 31)) | 1)
    }

    fn unit(&mut self) -> f32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    }
}
