//! What is said to who does not get it?
//!
//! A refusal is typed, names the numbers it was decided with, and says what would fit. It is made at once; nothing waits
//! here.
//! Source of the codes: OpenAI's `context_length_exceeded` (for a context), and the status that fits each.

use agentd_domain::fault::Report;
use agentd_domain::human;
use agentd_domain::ledger::{Held, PartitionId};

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// It would not fit were everything else gone.
    ModelTooLarge {
        model: String,
        partition: PartitionId,
        needs_bytes: u64,
        budget_bytes: u64,
        /// On which device, when it is the device and not the partition that is too small.
        device: Option<String>,
        /// Tokens that would fit; 0 when not even the weights do.
        context_tokens_most: u64,
    },
    /// It would fit if others ended.
    BudgetExceeded {
        partition: PartitionId,
        short_bytes: u64,
        device: Option<String>,
        /// Who holds the partition, by class.
        held: Held,
        /// Kept free for partitions with a guarantee.
        guaranteed_bytes: u64,
    },
    ContextExceedsBudget {
        partition: PartitionId,
        needs_cells: u64,
        has_cells: u64,
        /// Of what was asked for, the prompt: what is left is for the answer.
        prompt_cells: u64,
    },
    QueueFull {
        waiting: u64,
        most: u64,
    },
    DeviceUnhealthy {
        device: String,
        why: String,
    },
    UnknownModel {
        model: String,
    },
    UnknownPartition {
        partition: PartitionId,
    },
}

impl Refusal {
    pub fn report(&self, what: &str) -> Report {
        let bytes = human::bytes;
        match self {
            Self::ModelTooLarge {
                model,
                partition,
                needs_bytes,
                budget_bytes,
                device,
                context_tokens_most,
            } => {
                let place = device.as_ref().map_or_else(
                    || format!("the partition {partition}"),
                    |device| format!("the device {device}"),
                );
                let fix = match context_tokens_most {
                    0 => format!(
                        "take a smaller model or a smaller quantisation, or give more bytes: `agentctl gpu partition set {partition} --bytes ...`"
                    ),
                    most => format!(
                        "a context of {most} tokens fits: load it with that, take a smaller quantisation, or give more bytes: `agentctl gpu partition set {partition} --bytes ...`"
                    ),
                };
                let why = format!(
                    "{model} needs {}, {place} has {} for one model",
                    bytes(*needs_bytes),
                    bytes(*budget_bytes)
                );
                Report::caller("model_too_large", what, why, fix)
            }
            Self::BudgetExceeded { partition, short_bytes, device, held, guaranteed_bytes } => {
                let place = device.as_ref().map_or_else(
                    || format!("the partition {partition}"),
                    |device| format!("the device {device}"),
                );
                let mut why = format!(
                    "{} are missing on {place}; held are {} of weights, {} of keys and values, {} for computing",
                    bytes(*short_bytes),
                    bytes(held.weights_bytes),
                    bytes(held.kv_bytes),
                    bytes(held.compute_bytes)
                );
                if *guaranteed_bytes > 0 {
                    why.push_str(&format!(", and {} are kept for others", bytes(*guaranteed_bytes)));
                }
                let fix = "try again when others have ended, or unload a model; `agentctl gpu ls` shows who holds what";
                Report::environment("vram_budget_exceeded", what, why, fix)
            }
            Self::ContextExceedsBudget { partition, needs_cells, has_cells, prompt_cells } => {
                let why = format!(
                    "it needs {needs_cells} tokens of context, its share in the partition {partition} is {has_cells}"
                );
                let fix = match has_cells.saturating_sub(*prompt_cells) {
                    0 => "shorten the prompt, or give the partition more bytes".to_owned(),
                    left => format!("ask for at most {left} tokens of answer, or shorten the prompt"),
                };
                Report::caller("context_exceeds_budget", what, why, fix)
            }
            Self::QueueFull { waiting, most } => Report::environment(
                "queue_full",
                what,
                format!("{waiting} requests wait already, {most} may"),
                "send it again in a moment",
            ),
            Self::DeviceUnhealthy { device, why } => Report::environment(
                "device_unhealthy",
                what,
                format!("{device}: {why}"),
                "see its state with `agentctl gpu ls`; a device that is lost comes back with a restart of the appliance",
            ),
            Self::UnknownModel { model } => Report::caller(
                "not_found",
                what,
                format!("the model {model} is not loaded"),
                "`agentctl model ls` shows the models",
            ),
            Self::UnknownPartition { partition } => Report::caller(
                "not_found",
                what,
                format!("there is no partition `{partition}`"),
                format!(
                    "`agentctl gpu partition ls` shows the partitions; define it: `agentctl gpu partition set {partition} --bytes ...`"
                ),
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_refusal_says_what_would_do() {
        let partition = PartitionId::default_partition();
        let held = Held { weights_bytes: 1 << 30, ..Held::default() };
        let device = || Some("CUDA0".to_owned());
        let all = [
            (
                Refusal::ModelTooLarge {
                    model: "m".to_owned(),
                    partition: partition.clone(),
                    needs_bytes: 2 << 30,
                    budget_bytes: 1 << 30,
                    device: None,
                    context_tokens_most: 2048,
                },
                "model_too_large",
                422,
                "2048 tokens fits",
            ),
            (
                Refusal::BudgetExceeded {
                    partition: partition.clone(),
                    short_bytes: 5 << 20,
                    device: device(),
                    held,
                    guaranteed_bytes: 1 << 20,
                },
                "vram_budget_exceeded",
                429,
                "agentctl gpu ls",
            ),
            (
                Refusal::ContextExceedsBudget {
                    partition,
                    needs_cells: 5000,
                    has_cells: 4096,
                    prompt_cells: 4000,
                },
                "context_exceeds_budget",
                413,
                "at most 96 tokens",
            ),
            (Refusal::QueueFull { waiting: 256, most: 256 }, "queue_full", 429, "again"),
            (
                Refusal::DeviceUnhealthy { device: "CUDA0".to_owned(), why: "XID 79".to_owned() },
                "device_unhealthy",
                503,
                "gpu ls",
            ),
        ];
        for (refusal, code, status, fix) in all {
            let report = refusal.report("the model was not loaded");
            assert_eq!((report.code.as_str(), report.http_status()), (code, status));
            assert!(report.fix.contains(fix), "{}", report.fix);
        }
    }
}
