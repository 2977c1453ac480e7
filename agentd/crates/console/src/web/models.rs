//! Which models are there?

use super::layout::{Section, page, pill, problem};
use super::overview::kind;
use super::units;
use agentd_domain::api::Model;
use agentd_domain::engine::ModelKind;
use agentd_domain::initctl::Health;
use maud::{Markup, html};

pub fn list(models: &[Model], health: Health) -> Markup {
    page(
        "Models",
        Section::Models,
        health,
        &html! {
            h1 { "Models" }
            div #models data-live {
                @if models.is_empty() { p.dim { "There is none." } } @else {
                    div.scroll { table {
                        thead { tr { th { "Name" } th { "Kind" } th { "State" } th { "Size" } th { "From" } th {} } }
                        tbody { @for model in models { (row(model)) } }
                    } }
                }
            }
            p.dim {
                "A model is loaded when a request names it, and gives way to others when nobody uses it. A pinned one is \
                 always loaded."
            }
            section.card {
                h2 { "Add a model" }
                p.dim {
                    "A file in GGUF format. It is checked before it is used. From a terminal: "
                    code { "agentctl model add FILE.gguf" }
                }
                form #upload .stack .narrow hidden {
                    input #file type="file" accept=".gguf" required aria-label="Model file";
                    button.primary type="submit" { "Upload" }
                    progress #upload-progress max="100" value="0" hidden {}
                    p #upload-state role="status" {}
                }
                noscript { p { "Uploading from this page needs JavaScript." } }
            }
        },
    )
}

fn row(model: &Model) -> Markup {
    html! {
        tr {
            td {
                strong { (model.name) } @if model.default { " " (pill("calm", "default")) }
                div.dim { (model.file) }
                @if let Some(report) = &model.problem { (problem(report)) }
            }
            td { (kind(model.kind)) div.dim { (model.architecture) } }
            td {
                @match (model.loaded, model.loading) {
                    (true, _) => (pill("good", "Loaded")),
                    (false, true) => (pill("calm", "Loading")),
                    (false, false) => (pill("quiet", "Not loaded")),
                }
                @if model.pinned { " " (pill("calm", "pinned")) }
                div.dim { (used(model)) }
            }
            td {
                (units::bytes(model.bytes))
                @if let Some(held) = model.held_bytes { div.dim { (units::bytes(held)) " of memory" } }
            }
            td { (origin(&model.origin)) }
            td {
                @if model.kind == ModelKind::Chat && model.problem.is_none() { (pin(model)) }
                @if model.origin == "data" {
                    (super::confirmed(&format!("/models/{}/remove", model.name), "Remove", "Remove this model's file?"))
                }
            }
        }
    }
}

/// Who uses it, and when somebody did last.
fn used(model: &Model) -> String {
    match (model.uses, model.idle_ms, model.last_used_unix_ms) {
        (0, Some(idle_ms), Some(_)) => format!("last used {} ago", units::span_ms(idle_ms)),
        (0, Some(idle_ms), None) => format!("idle for {}", units::span_ms(idle_ms)),
        (0, None, Some(last)) => format!("last used {}", units::moment(last)),
        (0, None, None) => String::new(),
        (1, ..) => "1 request".to_owned(),
        (uses, ..) => format!("{uses} requests"),
    }
}

fn pin(model: &Model) -> Markup {
    let (action, word) = if model.pinned { ("unpin", "Unpin") } else { ("pin", "Pin") };
    html! {
        form method="post" action=(format!("/models/{}/{action}", model.name)) {
            button type="submit" { (word) }
        }
    }
}

fn origin(origin: &str) -> &str {
    match origin {
        "image" => "the image",
        "data" => "you",
        "medium" => "a medium",
        other => other,
    }
}
