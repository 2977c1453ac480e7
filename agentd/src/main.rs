#![forbid(unsafe_code)]
mod agents { pub mod plan; }
mod clock;
mod health;
mod places;
mod store;
fn main() {}
