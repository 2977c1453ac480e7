#![forbid(unsafe_code)]
mod agents { pub mod plan; }
mod clock;
mod engine;
mod health;
mod inbox;
mod initlink;
mod logs;
mod places;
mod store;
fn main() {}
