//! What do the real programs do on this machine's kernel?
//!
//! The tests are in `tests/`, one folder per program; this crate has nothing else. `scripts/test host` builds the
//! programs as the image has them and tells the tests where they are.
#![forbid(unsafe_code)]
