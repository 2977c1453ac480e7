//! In which letters may a secret stand in a host's answer?
//!
//! In:     a secret, and the template of the field that carries it.
//! Out:    [`Forms`]: for each place of each form, the bytes that may stand there, as rows of bits that
//!         [`super::search`] shifts along a text.
//! Always: a form is the secret as it is (in capitals and small letters alike), in hexadecimal digits, and in base64,
//!         standard or for URLs, wherever its first byte falls among groups of three. Where a letter of base64 holds
//!         some bits of the secret and some of a neighbour, all letters with these bits may stand there, so a form is
//!         found with its edges. `Authorization: Basic` carries a user and a password in base64: then both together
//!         and the password alone are secrets too.
//! Never:  an escape: [`super::escape`] reads those, whatever the form beneath them is.
//! Source: RFC 4648, 4, 5 and 8; RFC 7617, 2.

use super::{SECRET_LEAST_BYTES, Secret};
use agentd_domain::net::rule::SecretUse;
use base64::Engine;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};

const STANDARD: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
/// The last two letters for URLs; the others are the same.
const FOR_URLS: [u8; 2] = *b"-_";
const WORD_BITS: usize = 64;

/// One bit for each place of all forms, one form after another.
pub(super) type Places = Box<[u64]>;

/// All forms of what one answer must not hold.
pub(crate) struct Forms {
    /// By byte: the places where it may stand; nothing for the many bytes that stand nowhere.
    at: Vec<Option<Places>>,
    pub(super) first: Places,
    pub(super) last: Places,
    /// Where a line may end behind the letter: base64 is wrapped (RFC 2045, 6.8).
    pub(super) wrapped: Places,
}

impl Forms {
    pub(crate) fn of(secret: &Secret, into: &SecretUse) -> Self {
        let mut hidden = vec![secret.0.clone()];
        hidden.extend(basic(secret, into));
        let mut forms = Vec::new();
        for bytes in &hidden {
            forms.push((plain(bytes), false));
            forms.push((hexadecimal(bytes), false));
            forms.extend((0..3).map(|before| (in_base64(bytes, before), true)));
        }
        Self::laid_out(&forms)
    }

    /// A set of places without any.
    pub(super) fn none(&self) -> Places {
        vec![0; self.first.len()].into()
    }

    pub(super) fn may_stand(&self, byte: u8) -> Option<&[u64]> {
        self.at.get(usize::from(byte))?.as_deref()
    }

    fn laid_out(forms: &[(Form, bool)]) -> Self {
        let places: usize = forms.iter().map(|(form, _)| form.len()).sum();
        let none = || -> Places { vec![0; places.div_ceil(WORD_BITS)].into() };
        let mut all = Self { at: vec![None; 256], first: none(), last: none(), wrapped: none() };
        let mut place = 0;
        for (form, wraps) in forms {
            set(&mut all.first, place);
            for letters in form {
                for byte in letters {
                    if let Some(row) = all.at.get_mut(usize::from(*byte)) {
                        set(row.get_or_insert_with(none), place);
                    }
                }
                if *wraps {
                    set(&mut all.wrapped, place);
                }
                place += 1;
            }
            set(&mut all.last, place - 1);
        }
        all
    }
}

/// For each place the bytes that may stand there.
type Form = Vec<Vec<u8>>;

fn set(places: &mut Places, place: usize) {
    if let Some(word) = places.get_mut(place / WORD_BITS) {
        *word |= 1 << (place % WORD_BITS);
    }
}

/// Hosts change the case of what they put into the name of a field, for one.
fn plain(bytes: &[u8]) -> Form {
    bytes.iter().map(|byte| either_case(*byte)).collect()
}

fn hexadecimal(bytes: &[u8]) -> Form {
    hex::encode(bytes).bytes().map(either_case).collect()
}

fn either_case(byte: u8) -> Vec<u8> {
    let mut both = vec![byte.to_ascii_lowercase(), byte.to_ascii_uppercase()];
    both.dedup();
    both
}

/// As it is encoded when so many bytes stand before it, and any number behind it.
fn in_base64(bytes: &[u8], before: usize) -> Form {
    let own = 8 * before..8 * (before + bytes.len());
    let bit = |at: usize| {
        let byte = bytes.get((at - own.start) / 8).copied().unwrap_or_default();
        byte >> (7 - at % 8) & 1 == 1
    };
    let letters = own.start / 6..own.end.div_ceil(6);
    letters
        .map(|letter| {
            // The most significant of its six bits is the first.
            let fits = |value: usize| {
                (0..6).all(|offset| {
                    let at = 6 * letter + offset;
                    !own.contains(&at) || (value >> (5 - offset) & 1 == 1) == bit(at)
                })
            };
            let mut may_stand = Vec::new();
            for (value, standard) in STANDARD.iter().enumerate().filter(|(value, _)| fits(*value)) {
                may_stand.push(*standard);
                may_stand.extend(value.checked_sub(62).and_then(|index| FOR_URLS.get(index)));
            }
            may_stand
        })
        .collect()
}

/// What stands in the base64 of `Authorization: Basic`, where the secret is that.
fn basic(secret: &Secret, into: &SecretUse) -> Vec<Vec<u8>> {
    const LENIENT: GeneralPurposeConfig = GeneralPurposeConfig::new()
        .with_decode_allow_trailing_bits(true)
        .with_decode_padding_mode(DecodePaddingMode::Indifferent);
    let scheme = into.template.get(.."basic ".len()).unwrap_or_default();
    if !scheme.eq_ignore_ascii_case("basic ") {
        return Vec::new();
    }
    let Ok(pair) = GeneralPurpose::new(&alphabet::STANDARD, LENIENT).decode(&secret.0) else {
        return Vec::new();
    };
    let colon = pair.iter().position(|byte| *byte == b':');
    let password = colon.and_then(|at| pair.get(at + 1..)).unwrap_or_default().to_vec();
    // What is shorter stands in answers by chance.
    [pair, password].into_iter().filter(|bytes| bytes.len() >= SECRET_LEAST_BYTES).collect()
}
