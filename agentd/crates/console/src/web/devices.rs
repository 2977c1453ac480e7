//! Who holds how much of which device's memory?
//!
//! The plan stands beside what the device reports, and each limit beside the word for who keeps it. What the forms send
//! is read in `partitions.rs`.

use super::confirmed;
use super::layout::{Section, bar, fact, mild_problem, page, pill};
use super::partitions::typed_bytes;
use super::units;
use agentd_domain::api::Agent;
use agentd_domain::engine::ModelUsage;
use agentd_domain::initctl::Health;
use agentd_domain::ledger::{
    AgentHold, Basis, DeviceView, Devices, Enforcement, ModelView, Partition, PartitionView,
};
use maud::{Markup, html};

pub fn list(devices: &Devices, agents: &[Agent], health: Health) -> Markup {
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
                    "A share of devices' memory, for the agents that are assigned to it. The word beside a name says who keeps "
                    "the limit: the device's hardware, the kernel, the engine, or nobody by force (advisory)."
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
                @for usage in devices.models.iter().filter_map(|one| one.usage.as_ref()) { (cache(usage)) }
            }
            @if !devices.devices.is_empty() {
                div.grid { (define(devices)) (assign(devices, agents)) (grant(devices, agents)) }
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
            @if let Some(agent) = &one.granted_to {
                p { "Granted to " (agent) " alone: no engine is put on it." }
            }
            (bar(one.total_bytes.saturating_sub(one.free_bytes), one.total_bytes))
            dl.facts {
                (fact("Of it", html! { (units::bytes(one.total_bytes)) }))
                (fact("Free in the plan", html! { (units::bytes(one.free_bytes)) }))
                (fact("Weights", html! { (units::bytes(planned.weights_bytes)) }))
                (fact("Keys and values", html! { (units::bytes(planned.kv_bytes)) }))
                (fact("Computing", html! { (units::bytes(computing)) }))
                (fact("Learned, by nobody asked for", html! { (units::bytes(planned.overhead_bytes)) }))
                @if one.programs_bytes > 0 {
                    (fact("Programs of agents", html! { (units::bytes(one.programs_bytes)) }))
                }
                (fact("Reserve", html! { (units::bytes(one.reserve_bytes)) }))
            }
            h3 { "What the device reports" }
            dl.facts {
                (fact("Free", html! { (units::bytes(one.reported_free_bytes)) }))
                (fact("Used by the engine", html! { (one.used_bytes.map_or_else(|| "unknown".to_owned(), units::bytes)) }))
                (fact("Beside the plan", html! { (beside(one.difference_bytes)) }))
                (fact("Unknown: used, and in no plan", html! {
                    (one.unknown_bytes().map_or_else(|| "unknown".to_owned(), units::bytes))
                }))
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
                ul.rows { @for agent in &one.agents { li { (holds(agent)) } } }
            }
            @if !one.builtin && !one.configured {
                div.actions {
                    details.confirm {
                        summary { "Change" }
                        (fields(Some(partition), &partition.devices.join(", ")))
                    }
                    (confirmed(
                        &format!("/devices/partitions/{}/remove", partition.id),
                        "Remove",
                        "Remove this partition? Its agents are in the default one then.",
                    ))
                }
            }
            @if one.configured { p.dim { "Its limits are changed in " code { "agentd.toml" } "." } }
        }
    }
}

/// One agent, and what it holds at this moment.
fn holds(one: &AgentHold) -> Markup {
    html! {
        @match &one.agent {
            Some(name) => a href={ "/agents/" (name) } { (name) },
            None => span { (one.agent_id) },
        }
        " " (one.cells) " cells, " (units::bytes(one.kv_bytes))
        div.dim {
            @if one.cells_shared > 0 { (one.cells_shared) " of them its part of shared ones · " }
            @if one.cells_promised > 0 { (one.cells_promised) " more promised · " }
            (one.running) " at work, " (one.waiting) " waiting"
            @if one.put_aside > 0 { " · " (one.put_aside) " gave way, " (units::bytes(one.aside_bytes)) " aside" }
        }
    }
}

/// A new partition, or one that is there.
fn fields(old: Option<&Partition>, devices: &str) -> Markup {
    let id = old.map_or("new", |one| one.id.as_str());
    let number = |name: &str, label: &str, most: u32, value: u32| {
        html! {
            label for={ (id) "-" (name) } { (label) }
            input id={ (id) "-" (name) } name=(name) type="number" min="0" max=(most) value=(value);
        }
    };
    html! {
        form.stack method="post" action="/devices/partitions" {
            @match old {
                Some(one) => { input type="hidden" name="name" value=(one.id); }
                None => {
                    label for="new-name" { "Name" }
                    input #new-name name="name" required pattern="[a-z0-9][a-z0-9\\-]{0,39}" placeholder="chat";
                }
            }
            label for={ (id) "-devices" } { "Devices" }
            input id={ (id) "-devices" } name="devices" required value=(devices);
            label for={ (id) "-bytes" } { "Bytes, such as 512M or 2G" }
            input id={ (id) "-bytes" } name="bytes" required value=[old.map(|one| typed_bytes(one.bytes))];
            (number("priority", "Priority: who has more goes first", 100, old.map_or(50, |one| one.priority.into())))
            (number("weight", "Weight: share of time among equals", 1000, old.map_or(100, |one| one.weight)))
            (number("sequences_most", "Most sequences at once, 0 for no limit", 256, old.map_or(0, |one| one.sequences_most)))
            label.check {
                input type="checkbox" name="guaranteed" checked[old.is_some_and(|one| one.guaranteed)];
                " Guaranteed: kept free also while it is not used"
            }
            button.primary type="submit" { @if old.is_some() { "Change" } @else { "Define" } }
        }
    }
}

fn define(devices: &Devices) -> Markup {
    // A graphics card where there is one, else host memory.
    let usual = devices.devices.iter().find(|one| one.kind != "cpu").or(devices.devices.first());
    html! {
        section.card {
            h2 { "Define a partition" }
            (fields(None, usual.map_or("", |one| one.name.as_str())))
        }
    }
}

fn assign(devices: &Devices, agents: &[Agent]) -> Markup {
    let is_in = |agent: &Agent| {
        devices.partitions.iter().find(|one| one.agents.iter().any(|hold| hold.agent_id == agent.agent_id))
    };
    html! {
        section.card {
            h2 { "Put an agent into a partition" }
            @if agents.is_empty() { p.dim { "No agent is installed." } } @else {
                form.stack method="post" action="/devices/assign" {
                    label for="assign-agent" { "Agent" }
                    select #assign-agent name="agent" {
                        @for agent in agents {
                            option value=(agent.name) {
                                (agent.name)
                                @if let Some(now) = is_in(agent) { " (now in " (now.partition.id) ")" }
                            }
                        }
                    }
                    label for="assign-partition" { "Partition" }
                    select #assign-partition name="partition" {
                        @for one in &devices.partitions { option value=(one.partition.id) { (one.partition.id) } }
                    }
                    button.primary type="submit" { "Put it there" }
                }
            }
        }
    }
}

/// A whole accelerator for a program of an agent's own. Without one there is nothing to give.
fn grant(devices: &Devices, agents: &[Agent]) -> Markup {
    let whole: Vec<&DeviceView> = devices.devices.iter().filter(|one| one.kind != "cpu").collect();
    html! {
        @if !whole.is_empty() && !agents.is_empty() {
            section.card {
                h2 { "Give a device to one agent" }
                p.dim {
                    "For an agent whose own program drives it (" code { "[gpu] memory = \"whole\"" }
                    "). The engine leaves the device, and nobody else gets any of it."
                }
                form.stack method="post" action="/devices/grant" {
                    label for="grant-agent" { "Agent" }
                    select #grant-agent name="agent" {
                        @for agent in agents { option value=(agent.name) { (agent.name) } }
                    }
                    label for="grant-device" { "Device" }
                    select #grant-device name="device" {
                        option value="" { "none: take it back" }
                        @for one in whole { option value=(one.name) { (one.name) } }
                    }
                    button.primary type="submit" { "Give it" }
                }
            }
        }
    }
}

/// How one chat model's cache is used, and what sharing has saved.
fn cache(one: &ModelUsage) -> Markup {
    let used = one.cells_private.saturating_add(one.cells_shared);
    let prompts = one.computed_prompt_tokens.saturating_add(one.cached_prompt_tokens);
    html! {
        section.card {
            h3 { "Cache of " (one.model) }
            (bar(used.into(), one.cells_total.into()))
            dl.facts {
                (fact("Requests", html! { (one.running) " at work, " (one.waiting) " waiting" }))
                (fact("Cells of one request", html! { (one.cells_private) }))
                (fact("Cells shared by several", html! { (one.cells_shared) }))
                (fact("Of these kept for later, by nobody at work", html! { (one.cells_cached) }))
                (fact("Free cells", html! { (one.cells_free) " of " (one.cells_total) }))
                (fact("Prompt tokens computed", html! { (one.computed_prompt_tokens) }))
                (fact("Prompt tokens from the cache", html! {
                    (one.cached_prompt_tokens)
                    @if prompts > 0 { " (" (units::percent(one.cached_prompt_tokens, prompts)) " %)" }
                }))
                (fact("Requests that gave way", html! { (one.preemptions) }))
                (fact("Swapped out and in", html! { (one.swapped_out) " and " (one.swapped_in) " times" }))
                (fact("Aside now", html! {
                    (units::bytes(one.swap_memory_bytes)) " in memory, " (units::bytes(one.swap_disk_bytes)) " on disk"
                }))
                @if one.recomputed_tokens > 0 {
                    (fact("Tokens computed a second time", html! { (one.recomputed_tokens) }))
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
