//! What does each token of a model say?
//!
//! The texts of all tokens, sorted, each with how much of it the one before says as well: whoever walks over them reads a
//! common beginning once. Made once for each model that is asked for a form.
//!
//! True: a token is here with the bytes that a client is shown. Control tokens show nothing, so they are not here: what a
//!       form was checked for is what is read.

use llama_cpp_2::model::LlamaModel;

#[derive(Debug, Default)]
pub(crate) struct Words {
    bytes: Vec<u8>,
    /// Where each word begins in `bytes`, and the end.
    starts: Vec<u32>,
    /// The token of each word.
    tokens: Vec<u32>,
    /// Bytes that a word has in common with the one before it.
    common: Vec<u16>,
    /// The word of each token.
    places: Vec<u32>,
    ends: Vec<u32>,
}

const NO_WORD: u32 = u32::MAX;

/// A word in its order.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Word<'words> {
    pub(crate) token: u32,
    pub(crate) bytes: &'words [u8],
    pub(crate) common: usize,
}

impl Words {
    pub(crate) fn of_model(model: &LlamaModel) -> Self {
        let vocabulary = model.vocab();
        let mut texts = Vec::with_capacity(vocabulary.n_tokens() as usize);
        let mut ends = Vec::new();
        for token in vocabulary.tokens() {
            if vocabulary.is_eog(token) {
                ends.push(token.0 as u32);
                texts.push(Vec::new());
            } else {
                texts.push(vocabulary.token_to_piece(token, false, None));
            }
        }
        Self::new(texts, ends)
    }

    /// The text of each token, empty for those that show nothing; the tokens that end an answer.
    pub(crate) fn new(texts: Vec<Vec<u8>>, ends: Vec<u32>) -> Self {
        let mut order: Vec<u32> =
            (0..texts.len() as u32).filter(|id| !texts[*id as usize].is_empty()).collect();
        order.sort_unstable_by(|a, b| texts[*a as usize].cmp(&texts[*b as usize]));
        let mut words = Self { places: vec![NO_WORD; texts.len()], ends, ..Self::default() };
        let mut before: &[u8] = &[];
        for token in order {
            let text = texts[token as usize].as_slice();
            let common = before.iter().zip(text).take_while(|(a, b)| a == b).count();
            words.places[token as usize] = words.tokens.len() as u32;
            words.common.push(common.min(usize::from(u16::MAX)) as u16);
            words.starts.push(words.bytes.len() as u32);
            words.tokens.push(token);
            words.bytes.extend_from_slice(text);
            before = text;
        }
        words.starts.push(words.bytes.len() as u32);
        words
    }

    /// Tokens of the model, those without a text included.
    pub(crate) fn tokens(&self) -> usize {
        self.places.len()
    }

    /// Tokens that end an answer.
    pub(crate) fn ends(&self) -> &[u32] {
        &self.ends
    }

    /// What a token shows, if anything.
    pub(crate) fn text(&self, token: u32) -> Option<&[u8]> {
        let place = *self.places.get(token as usize)?;
        (place != NO_WORD).then(|| self.bytes_at(place as usize))
    }

    pub(crate) fn in_order(&self) -> impl Iterator<Item = Word<'_>> {
        (0..self.tokens.len()).map(|place| Word {
            token: self.tokens[place],
            bytes: self.bytes_at(place),
            common: usize::from(self.common[place]),
        })
    }

    fn bytes_at(&self, place: usize) -> &[u8] {
        &self.bytes[self.starts[place] as usize..self.starts[place + 1] as usize]
    }
}
