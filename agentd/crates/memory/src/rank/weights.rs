//! What are the signals, and how much does each count?
//!
//! Found, not chosen: `scripts/bench memory --fit` maximises, for the questions of three of LoCoMo's conversations
//! (conv-26, conv-30, conv-41), the probability of each evidence turn among the 200 other turns that look best to
//! words and meaning together (a softmax over them, with an L2 penalty of 0.005). One weight for each signal and
//! nothing else is fitted. Usefulness is the exception: nobody has used LoCoMo's turns before, so it cannot be measured
//! there. It gets what can do no harm: with every turn but the evidence as useful as can be, recall at 10 falls by less
//! than half a point, so it decides between what is nearly equal and nothing else. `scripts/bench memory` says what they bring on conversations that they were not fitted to,
//! and what is lost when a signal is left out.

/// A closed list with a name for people; its order is that of [`Signals`].
macro_rules! signals {
    ($($(#[$doc:meta])* $variant:ident, $name:literal, $weight:literal;)+) => {
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Signal { $($(#[$doc])* $variant,)+ }

        impl Signal {
            pub const ALL: [Self; SIGNALS] = [$(Self::$variant,)+];

            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)+ }
            }
        }

        impl Weights {
            /// Those that were measured.
            pub const MEASURED: Self = Self([$($weight,)+]);
        }
    };
}

/// How many there are.
pub const SIGNALS: usize = 17;

signals! {
    /// BM25 of the record's own words, as a share of what the question asks.
    Words, "words", 0.57;
    /// The same of the record before it in its session.
    Before, "before", -0.12;
    After, "after", -0.35;
    TwoBefore, "two_before", 0.17;
    TwoAfter, "two_after", -0.18;
    /// The words of the record before, if that one asks something: this one probably answers.
    Answer, "answer", 2.63;
    /// The question's words, or ones of like meaning.
    Kin, "kin", 3.18;
    /// How much of the question is said in the record and two on each side.
    Coverage, "coverage", 3.78;
    /// Words of the session's best records.
    SessionWords, "session_words", 0.60;
    /// The vector of the record and the two before it, beside the question's.
    Meaning, "meaning", 1.40;
    /// The same of the record after it, whose vector has this one in its middle.
    MeaningAfter, "meaning_after", 1.25;
    SessionMeaning, "session_meaning", 1.81;
    /// It is said by the one speaker whom the question names.
    Speaker, "speaker", 1.13;
    /// It asks; who asks tells little.
    Asks, "asks", -0.92;
    /// The question asks when, and the record has words of time.
    TellsTime, "tells_time", 1.71;
    /// It was told when the question's date says, or soon after.
    Time, "time", 2.48;
    /// It was given to somebody before ([`Corpus::usefulness`](super::Corpus::usefulness)).
    Useful, "useful", 0.03;
}

/// One number for each signal; 0 where it says nothing.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Signals(pub [f32; SIGNALS]);

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Weights(pub [f32; SIGNALS]);

impl Signals {
    pub fn get(&self, signal: Signal) -> f32 {
        self.0[signal as usize]
    }

    pub(crate) fn set(&mut self, signal: Signal, value: f32) {
        self.0[signal as usize] = value;
    }
}

impl Weights {
    pub fn of(&self, signal: Signal) -> f32 {
        self.0[signal as usize]
    }

    pub fn sum(&self, signals: &Signals) -> f32 {
        self.0.iter().zip(&signals.0).map(|(weight, value)| weight * value).sum()
    }

    /// What each signal added to the score, the largest first; those that added nothing are left out.
    pub fn explain(&self, signals: &Signals) -> Vec<(Signal, f32)> {
        let mut parts: Vec<(Signal, f32)> =
            Signal::ALL.into_iter().map(|signal| (signal, self.of(signal) * signals.get(signal))).collect();
        parts.retain(|(_, part)| *part != 0.0);
        parts.sort_by(|a, b| b.1.abs().total_cmp(&a.1.abs()));
        parts
    }
}
