//! A card with a model on it, and three partitions: what is left, one that somebody uses, one of a card that is gone.

use super::{MIB, echo};
use agentd_domain::engine::{GpuReadings, ModelUsage};
use agentd_domain::fault::Report;
use agentd_domain::ledger::*;

pub(super) fn partition_view(partition: Partition) -> PartitionView {
    PartitionView {
        builtin: partition.id.is_default(),
        configured: false,
        enforcement: Enforcement::Engine,
        held: Held::default(),
        free_bytes: partition.bytes,
        agents: Vec::new(),
        problem: None,
        partition,
    }
}

fn partition(id: &str, device: &str, bytes: u64) -> Partition {
    Partition {
        id: id.parse().expect("a name"),
        devices: vec![device.to_owned()],
        bytes,
        priority: 50,
        weight: 100,
        sequences_most: 0,
        guaranteed: false,
    }
}

fn need() -> Need {
    Need {
        devices: vec![DeviceNeed {
            device: "CUDA0".to_owned(),
            weights_bytes: 4000 * MIB,
            kv_bytes: 512 * MIB,
            compute_bytes: 300 * MIB,
            ..DeviceNeed::default()
        }],
        basis: Basis::Header,
        kv_bytes_per_cell: 128 * 1024,
        cells: 4096,
        sequences: 8,
        assumed: Vec::new(),
    }
}

pub(super) fn devices() -> Devices {
    let planned = DeviceNeed { overhead_bytes: 489 * MIB, ..need().devices.remove(0) };
    let mut chat =
        partition_view(Partition { guaranteed: true, priority: 80, ..partition("chat", "CUDA0", 2 << 30) });
    chat.agents.push(AgentHold {
        cells: 4096,
        kv_bytes: 512 * MIB,
        cells_shared: 1024,
        running: 2,
        waiting: 3,
        put_aside: 1,
        aside_bytes: 64 * MIB,
        ..AgentHold::nothing(echo().agent_id, Some(echo().name))
    });
    chat.held.kv_bytes = 512 * MIB;
    let mut gone = partition_view(partition("vision", "CUDA7", 1 << 30));
    gone.problem = Some(Report::environment(
        "partition_not_in_force",
        "the partition vision is not in force",
        "there is no device CUDA7",
        "put the device back",
    ));
    Devices {
        devices: vec![DeviceView {
            name: "CUDA0".to_owned(),
            description: "NVIDIA Test 24G".to_owned(),
            kind: "gpu".to_owned(),
            total_bytes: 24 << 30,
            reserve_bytes: 1 << 30,
            free_bytes: (23 << 30) - planned.total_bytes(),
            planned,
            reported_free_bytes: 9626 * MIB,
            used_bytes: Some(5301 * MIB),
            difference_bytes: Some(489 * MIB as i64),
            programs_bytes: 0,
            granted_to: None,
            enforcement: Enforcement::Kernel,
            problem: None,
            gpu: Some(GpuReadings { utilisation_percent: Some(82), ..GpuReadings::default() }),
        }],
        partitions: vec![partition_view(partition("default", "CUDA0", 21 << 30)), chat, gone],
        models: vec![ModelView {
            model: "tiny".to_owned(),
            partition: PartitionId::default_partition(),
            need: need(),
            cells_held: 4096,
            evictable: false,
            usage: Some(ModelUsage {
                model: "tiny".to_owned(),
                running: 2,
                waiting: 3,
                cells_total: 4096,
                cells_private: 3000,
                cells_shared: 1096,
                computed_prompt_tokens: 7000,
                cached_prompt_tokens: 21_000,
                preemptions: 5,
                swapped_out: 4,
                swapped_in: 3,
                swap_memory_bytes: 96 * MIB,
                ..ModelUsage::default()
            }),
        }],
    }
}

pub(super) fn model_plan(model: &str) -> ModelPlan {
    let no = "the partition chat has 2.0 GiB for one model";
    ModelPlan {
        model: model.to_owned(),
        architecture: "llama".to_owned(),
        context_length: Some(131_072),
        need: need(),
        fits: vec![
            Fit {
                partition: PartitionId::default_partition(),
                bytes: 21 << 30,
                free_bytes: 16 << 30,
                refusal: None,
                context_tokens_most: 131_072,
            },
            Fit {
                partition: "chat".parse().expect("a name"),
                bytes: 2 << 30,
                free_bytes: 2 << 30,
                refusal: Some(Report::caller(
                    "model_too_large",
                    "it does not fit now",
                    no,
                    "take a smaller one",
                )),
                context_tokens_most: 0,
            },
        ],
    }
}
