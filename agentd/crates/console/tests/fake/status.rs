//! How the fake machine is: what the overview and `agentctl status` show.

use super::{MIB, NOW_UNIX_MS, chat_model, embedder, loaded};
use agentd_domain::api::{ApplianceStatus, EngineState};
use agentd_domain::engine::Device;
use agentd_domain::fault::Report;
use agentd_domain::initctl::{Clock, Health};

pub fn status() -> ApplianceStatus {
    let cpu = Device {
        name: "CPU".into(),
        description: "AMD EPYC-Milan Processor".into(),
        kind: "cpu".into(),
        memory_total_bytes: 978 * MIB,
        memory_free_bytes: 702 * MIB,
        gpu: None,
    };
    let milestones = [
        ("kernel", 0),
        ("init", 1_912),
        ("network", 2_480),
        ("agentd_ready", 2_655),
        ("first_page", 2_740),
        ("first_agent", 3_390),
    ];
    ApplianceStatus {
        version: "0.1.0~214".into(),
        variant: "base".into(),
        slot: "a".into(),
        uptime_ms: 8_045_700,
        health: Health::Yellow,
        problems: vec![Report::environment(
            "clock_unconfirmed",
            "the time may be wrong",
            "no time server answered since the start",
            "connect a network, or set the time on the local console",
        )],
        memory_total_bytes: 978 * MIB,
        memory_available_bytes: 702 * MIB,
        agentd_rss_bytes: 31 * MIB,
        data_total_bytes: 7_400 * MIB,
        data_available_bytes: 6_950 * MIB,
        devices: vec![cpu],
        gpus: Vec::new(),
        regions: Vec::new(),
        clock: Clock::Unconfirmed,
        now_unix_ms: NOW_UNIX_MS,
        addresses: vec!["10.0.2.15/24".into(), "fec0::5054:ff:fe12:3456/64".into()],
        engine: EngineState::Ready {
            backend: "libggml-cpu-haswell.so".into(),
            backends: Vec::new(),
            models: vec![loaded(&embedder(), 22_713_216, 384), loaded(&chat_model(), 1_213_440, 64)],
            rss_bytes: 118 * MIB,
            private_bytes: 71 * MIB,
            uptime_ms: 3_700_000,
            loading: false,
        },
        milestones: milestones.map(|(name, ms)| (name.to_owned(), ms)).to_vec(),
    }
}
