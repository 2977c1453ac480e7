//! How is the machine?

use super::layout::{Section, bar, fact, mild_problem, page, pill, problem};
use super::units;
use agentd_domain::api::{Agent, ApplianceStatus, EngineState};
use agentd_domain::engine::{GpuReadings, LoadedModel, ModelKind};
use agentd_domain::initctl::{Clock, Health};
use maud::{Markup, html};

pub fn overview(status: &ApplianceStatus, agents: &[Agent]) -> Markup {
    page(
        "Overview",
        Section::Overview,
        status.health,
        &html! {
            h1 { "Overview" }
            div #problems data-live {
                @for report in &status.problems {
                    @if status.health == Health::Red { (problem(report)) } @else { (mild_problem(report)) }
                }
            }
            div.grid {
                (machine(status))
                (engine(&status.engine))
                (agents_card(agents))
                (devices(status))
                (boot(&status.milestones))
                (power())
            }
        },
    )
}

fn machine(status: &ApplianceStatus) -> Markup {
    let memory_used = status.memory_total_bytes.saturating_sub(status.memory_available_bytes);
    let data_used = status.data_total_bytes.saturating_sub(status.data_available_bytes);
    html! {
        section.card #machine data-live {
            h2 { "Appliance" }
            dl.facts {
                (fact("Version", html! { (status.version) @if !status.variant.is_empty() { " " (pill("calm", &status.variant)) } }))
                (fact("Slot", html! { (slot(&status.slot)) }))
                (fact("Up for", html! { (units::span_ms(status.uptime_ms)) }))
                (fact("Clock", html! { (units::moment(status.now_unix_ms)) " UTC " (clock(status.clock)) }))
                (fact("Addresses", html! {
                    @if status.addresses.is_empty() { span.dim { "none: the network is down" } }
                    @for address in &status.addresses { code { (address) } " " }
                }))
            }
            (gauge("Memory in use", memory_used, status.memory_total_bytes))
            @if status.agentd_rss_bytes > 0 {
                p.dim { (units::bytes(status.agentd_rss_bytes)) " of it for agentd, which serves this page" }
            }
            (gauge("Data partition in use", data_used, status.data_total_bytes))
        }
    }
}

fn gauge(name: &str, used: u64, total: u64) -> Markup {
    html! {
        div.gauge {
            div { span { (name) } span.numbers {
                @if total == 0 { "not there" } @else { (units::bytes(used)) " of " (units::bytes(total)) }
            } }
            (bar(used, total))
        }
    }
}

fn engine(state: &EngineState) -> Markup {
    html! {
        section.card #engine data-live {
            h2 { "Engine " (match state {
                EngineState::Ready { loading: true, .. } => pill("calm", "Loading"),
                EngineState::Ready { .. } => pill("good", "Ready"),
                EngineState::Starting => pill("calm", "Starting"),
                EngineState::Down { .. } => pill("bad", "Down"),
            }) }
            @match state {
                EngineState::Ready { backend, backends, models, rss_bytes, private_bytes, uptime_ms, loading } => {
                    dl.facts {
                        (fact("Back end", html! { code { (backend_name(backend)) } }))
                        // One that has no driver here is a normal state, and the owner of a card wants to know.
                        @for other in backends.iter().filter(|other| other.file != *backend) {
                            (fact("", html! { (other.line()) }))
                        }
                        (fact("Memory", html! {
                            (units::bytes(*rss_bytes))
                            @if *private_bytes > 0 {
                                ", " (units::bytes(*private_bytes)) " of it allocated, the rest pages of files"
                            }
                        }))
                        (fact("Running for", html! { (units::span_ms(*uptime_ms)) }))
                    }
                    @if *loading {
                        p.dim { "A model is being loaded." }
                    } @else if models.is_empty() {
                        p.dim { "No model is loaded." }
                    }
                    @for model in models { (loaded(model)) }
                }
                EngineState::Starting => p.dim { "Models are being loaded." },
                EngineState::Down { report } => (problem(report)),
            }
        }
    }
}

fn loaded(model: &LoadedModel) -> Markup {
    html! {
        div.row {
            div { strong { (model.model) } " " (kind(model.kind)) }
            div.dim {
                (model.architecture) " · " (units::count(model.parameters)) " parameters · "
                (units::bytes(model.file_bytes)) " · " (model.context_tokens) " tokens"
                @if model.kind == ModelKind::Embedding { " · " (model.dimension) " dimensions" }
            }
        }
    }
}

fn agents_card(agents: &[Agent]) -> Markup {
    html! {
        section.card #agents-card data-live {
            h2 { "Agents " span.dim { (agents.len()) } }
            @if agents.is_empty() { p.dim { "None yet: " code { "agentctl agent install DIR" } } }
            @for agent in agents {
                div.row.split {
                    div {
                        a href={ "/agents/" (agent.name) } { strong { (agent.name) } }
                        div.dim { (agent.description) }
                    }
                    div { (super::agents::state_pill(agent.state)) (super::health::brief(agent)) }
                }
            }
        }
    }
}

fn devices(status: &ApplianceStatus) -> Markup {
    let devices = &status.devices;
    // Those that no back end here can use, and what is wrong with any.
    let used: Vec<_> = devices.iter().filter_map(|device| device.gpu.as_ref()?.uuid.as_ref()).collect();
    let others = status.gpus.iter().filter(|gpu| gpu.uuid.as_ref().is_none_or(|uuid| !used.contains(&uuid)));
    html! {
        section.card #devices data-live {
            h2 { "Devices" }
            @if devices.is_empty() { p.dim { "The engine has not named any." } }
            @for device in devices {
                div.row {
                    div { strong { (device.name) } " " span.dim { (device.description) } }
                    (gauge("Memory in use", device.memory_total_bytes.saturating_sub(device.memory_free_bytes), device.memory_total_bytes))
                    @if let Some(gpu) = &device.gpu { (readings(gpu)) }
                }
            }
            @for gpu in others {
                div.row {
                    div {
                        strong { (gpu.name.as_deref().unwrap_or("GPU")) } " "
                        span.dim { (gpu.pci_address.as_deref().unwrap_or("")) " no model runs on it: there is no back end for it" }
                    }
                    (readings(gpu))
                }
            }
            @for region in &status.regions {
                div.row {
                    div { strong { (region.name) } " " span.dim { "as the kernel counts it" } }
                    (gauge("Memory in use", region.engines_bytes + region.agents_bytes, region.capacity_bytes))
                }
            }
        }
    }
}

fn readings(gpu: &GpuReadings) -> Markup {
    html! {
        div.dim { (gpu.facts().join(" · ")) }
        @if let Some(sentence) = gpu.health.sentence() { div { (sentence) } }
    }
}

/// When each stage of the last boot was reached, counted from the start of the kernel.
fn boot(milestones: &[(String, u64)]) -> Markup {
    let longest = milestones.iter().map(|(_, ms)| *ms).max().unwrap_or(0);
    html! {
        section.card {
            h2 { "Last boot" }
            p.dim { "When each stage was reached, counted from the start of the kernel." }
            @if milestones.is_empty() { p.dim { "Nothing was recorded." } }
            ol.timeline {
                @for (name, ms) in milestones {
                    li {
                        span { (name.replace('_', " ")) }
                        svg.track role="img" aria-label={ (units::span_ms(*ms)) " after the kernel began" } {
                            rect.back width="100%" height="100%" rx="2" {}
                            rect.fill width={ (units::percent(*ms, longest)) "%" } height="100%" rx="2" {}
                        }
                        span.numbers { (units::span_ms(*ms)) }
                    }
                }
            }
        }
    }
}

fn power() -> Markup {
    html! {
        section.card {
            h2 { "Power" }
            p.dim { "Agents are stopped first, and start again with the machine." }
            div.actions {
                (super::confirmed("/reboot", "Restart", "Restart the appliance?"))
                (super::confirmed("/poweroff", "Shut down", "Shut down the appliance? It must be switched on by hand."))
            }
        }
    }
}

fn slot(slot: &str) -> &str {
    match slot {
        "direct" => "direct (no boot loader)",
        other => other,
    }
}

fn clock(clock: Clock) -> Markup {
    match clock {
        Clock::Unconfirmed => pill("warn", "not confirmed"),
        Clock::Sntp => pill("calm", "from the network"),
        Clock::Owner => pill("calm", "set by you"),
    }
}

pub fn kind(kind: ModelKind) -> Markup {
    match kind {
        ModelKind::Chat => pill("calm", "chat"),
        ModelKind::Embedding => pill("calm", "embedding"),
    }
}

/// `libggml-cpu-icelake.so` is `cpu-icelake` to a person.
fn backend_name(file: &str) -> &str {
    file.strip_prefix("libggml-").and_then(|rest| rest.strip_suffix(".so")).unwrap_or(file)
}
