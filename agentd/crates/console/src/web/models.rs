//! Which models are there?

use super::layout::{Section, page, pill, problem};
use super::overview::kind;
use super::units;
use agentd_domain::api::Model;
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
            td { @if model.loaded { (pill("good", "Loaded")) } @else { (pill("quiet", "Not loaded")) } }
            td { (units::bytes(model.bytes)) }
            td { (origin(&model.origin)) }
            td { @if model.origin == "data" {
                (super::confirmed(&format!("/models/{}/remove", model.name), "Remove", "Remove this model's file?"))
            } }
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
