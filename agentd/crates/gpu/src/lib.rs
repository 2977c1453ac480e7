//! Who gets how much of a device's memory?
//!
//! | module | question |
//! |---|---|
//! | [`plan`] | what does a GGUF file need, device by device, before it is loaded? |
//! | [`place`] | which of its layers go to which device? |
//! | [`partition`] | may a partition be defined so? |
//! | [`ledger`] | who holds what, and does one more thing fit? |
//! | [`admission`] | what is said to who does not get it? |
//! | [`evict`] | which model goes to make room? |
//!
//! Pure: no clock, no file, no socket, no thread. agentd keeps one [`ledger::Ledger`], feeds it what the engine says,
//! and asks it before a load. The words are `agentd_domain::ledger`'s.
//!
//! What is counted how: weights once for each device they lie on, however many agents use them; keys and values in
//! cells, given out in blocks of 256; room for computing as an upper estimate until the engine says what it is; what the
//! device's runtime takes besides is learned.
#![forbid(unsafe_code)]

pub mod admission;
pub mod evict;
pub mod ledger;
pub mod partition;
pub mod place;
pub mod plan;
