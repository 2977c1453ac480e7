//! What do the real programs do on this machine's kernel?
//!
//! The tests are in `tests/`, one folder per program; here is what they share, also with `tests/bench`.
//! `scripts/test host` builds the programs as the image has them and tells the tests where they are.
#![forbid(unsafe_code)]

pub mod line;
pub mod scene;
