//! Who holds how much of which device's memory?
//!
//! The plan stands beside what the device reports, and each limit beside the word for who keeps it.

use super::layout::{Section, bar, fact, mild_problem, page, pill};
use super::units;
use agentd_domain::initctl::Health;
use agentd_domain::ledger::{Basis, DeviceView, Devices, Enforcement, ModelView, PartitionView};
use maud::{Markup, html};

pub fn list(devices: &Devices, health: Health) -> Markup {
    page(
        "Devices",
        Section::Devices,
        health,
        &html! {
            h1 { "Devices" }
            div #devices data-live {
                @if devices.devices.is_empty() {
                    p.dim { "The engine has not said yet which devices there are." }
                }
                @for one in &devices.devices { (device(one)) }
                h2 { "Partitions" }
                p.dim {
                    "A share of devices' memory, for the agents that are assigned to it. From a terminal: "
                    code { "agentctl gpu partition set NAME --device CPU --bytes 2G" } ", then "
                    code { "agentctl gpu assign AGENT NAME" }
                }
                @for one in &devices.partitions { (partition(one)) }
                h2 { "Models" }
                @if devices.models.is_empty() { p.dim { "None is loaded." } } @else {
                    div.scroll { table {
                        thead { tr {
                            th { "Name" } th { "Loaded for" } th { "Device" } th { "Weights" } th { "Keys and values" }
                            th { "Computing" } th { "Cells" }
                        } }
                        tbody { @for one in &devices.models { (model(one)) } }
                    } }
                }
            }
        },
    )
}

fn device(one: &DeviceView) -> Markup {
    let planned = &one.planned;
    let computing = planned.compute_bytes.saturating_add(planned.recurrent_bytes);
    html! {
        section.card {
            h2 { (one.name) " " (kept_by(one.enforcement)) }
            p.dim { (one.description) }
            @if let Some(problem) = &one.problem { (mild_problem(problem)) }
            (bar(one.total_bytes.saturating_sub(one.free_bytes), one.total_bytes))
            dl.facts {
                (fact("Of it", html! { (units::bytes(one.total_bytes)) }))
                (fact("Free in the plan", html! { (units::bytes(one.free_bytes)) }))
                (fact("Weights", html! { (units::bytes(planned.weights_bytes)) }))
                (fact("Keys and values", html! { (units::bytes(planned.kv_bytes)) }))
                (fact("Computing", html! { (units::bytes(computing)) }))
                (fact("Learned, by nobody asked for", html! { (units::bytes(planned.overhead_bytes)) }))
                (fact("Reserve", html! { (units::bytes(one.reserve_bytes)) }))
            }
            h3 { "What the device reports" }
            dl.facts {
                (fact("Free", html! { (units::bytes(one.reported_free_bytes)) }))
                (fact("Used by the engine", html! { (one.used_bytes.map_or_else(|| "unknown".to_owned(), units::bytes)) }))
                (fact("Beside the plan", html! { (beside(one.difference_bytes)) }))
                @if let Some(gpu) = &one.gpu {
                    @if let Some(percent) = gpu.utilisation_percent { (fact("At work", html! { (percent) " % busy" })) }
                    @if let Some(celsius) = gpu.temperature_celsius { (fact("Temperature", html! { (celsius) " °C" })) }
                    @if let Some(milliwatts) = gpu.power_milliwatts {
                        (fact("Power", html! { (milliwatts / 1000) " W" }))
                    }
                }
            }
        }
    }
}

fn beside(difference: Option<i64>) -> String {
    match difference {
        None => "unknown".to_owned(),
        Some(more) if more > 0 => format!("{} more", units::bytes(more.unsigned_abs())),
        Some(0) => "as planned".to_owned(),
        Some(less) => format!("{} less", units::bytes(less.unsigned_abs())),
    }
}

fn partition(one: &PartitionView) -> Markup {
    let partition = &one.partition;
    html! {
        section.card {
            h3 {
                (partition.id) " " (kept_by(one.enforcement))
                @if partition.guaranteed { " " (pill("good", "guaranteed")) }
                @if one.builtin { " " (pill("quiet", "what is left")) }
                @if one.configured { " " (pill("quiet", "agentd.toml")) }
            }
            p.dim {
                (partition.devices.join(", ")) ", priority " (partition.priority) ", weight " (partition.weight)
                @if partition.sequences_most > 0 { ", at most " (partition.sequences_most) " sequences" }
            }
            @if let Some(problem) = &one.problem { (mild_problem(problem)) }
            (bar(one.held.total_bytes(), partition.bytes))
            dl.facts {
                (fact("Of it", html! { (units::bytes(partition.bytes)) }))
                (fact("Free", html! { (units::bytes(one.free_bytes)) }))
                (fact("Share of weights", html! { (units::bytes(one.held.weights_bytes)) }))
                (fact("Keys and values", html! { (units::bytes(one.held.kv_bytes)) }))
                (fact("Share of computing", html! { (units::bytes(one.held.compute_bytes)) }))
            }
            @if !one.agents.is_empty() {
                ul {
                    @for agent in &one.agents {
                        li {
                            @match &agent.agent {
                                Some(name) => a href={ "/agents/" (name) } { (name) },
                                None => span { (agent.agent_id) },
                            }
                            " " span.dim { (agent.cells) " cells, " (units::bytes(agent.kv_bytes)) }
                        }
                    }
                }
            }
        }
    }
}

fn model(one: &ModelView) -> Markup {
    let estimate = one.need.basis == Basis::Header;
    html! {
        @for (index, part) in one.need.devices.iter().enumerate() {
            tr {
                td {
                    @if index == 0 {
                        strong { (one.model) }
                        @for text in &one.need.assumed { div.dim { (text) } }
                    }
                }
                td { @if index == 0 { (one.partition) } }
                td { (part.device) }
                td { (units::bytes(part.weights_bytes)) }
                td { (units::bytes(part.kv_bytes)) }
                td {
                    (units::bytes(part.compute_bytes.saturating_add(part.recurrent_bytes)))
                    @if estimate { div.dim { "Upper estimate" } }
                }
                td { @if index == 0 { (one.cells_held) " of " (one.need.cells) } }
            }
        }
    }
}

/// Who keeps a limit; an advisory one is never dressed as a hard one.
fn kept_by(enforcement: Enforcement) -> Markup {
    let class = match enforcement {
        Enforcement::Hardware | Enforcement::Kernel => "good",
        Enforcement::Engine => "calm",
        Enforcement::Advisory => "warn",
    };
    pill(class, enforcement.name())
}
