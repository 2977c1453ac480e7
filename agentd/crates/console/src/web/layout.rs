//! What do all pages share?

use super::assets::{ICON, SCRIPT, STYLE};
use super::units;
use agentd_domain::fault::Report;
use agentd_domain::initctl::Health;
use maud::{DOCTYPE, Markup, html};

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Section {
    Overview,
    Agents,
    Knowledge,
    Models,
    Devices,
    Audit,
}

/// A page for somebody who is signed in.
pub fn page(title: &str, section: Section, health: Health, main: &Markup) -> Markup {
    let sections = [
        (Section::Overview, "/", "Overview"),
        (Section::Agents, "/agents", "Agents"),
        (Section::Knowledge, "/knowledge", "Knowledge"),
        (Section::Models, "/models", "Models"),
        (Section::Devices, "/devices", "Devices"),
        (Section::Audit, "/audit", "Audit"),
    ];
    let header = html! {
        header.top {
            a.brand href="/" { img src=(ICON.url) alt="" width="22" height="22"; span { "agentd OS" } }
            nav aria-label="Main" {
                @for (own, path, name) in sections {
                    a href=(path) aria-current=[(own == section).then_some("page")] { (name) }
                }
            }
            div.aside {
                span #health data-live { (health_pill(health)) }
                form method="post" action="/sign-out" { button.ghost type="submit" { "Sign out" } }
            }
        }
    };
    document(
        title,
        html! {
            (header)
            p #offline .banner hidden role="status" { "The appliance does not answer. Trying again." }
            main { (main) }
        },
    )
}

/// A page with nothing around it: claim, sign in, errors.
pub fn bare_page(title: &str, main: &Markup) -> Markup {
    document(
        title,
        html! {
            main.bare {
                div.brand { img src=(ICON.url) alt="" width="28" height="28"; span { "agentd OS" } }
                (main)
            }
        },
    )
}

pub fn error_page(report: &Report) -> Markup {
    bare_page(
        "Something went wrong",
        &html! {
            h1 { "That did not work" }
            (problem(report))
            p { a href="/" { "Back to the overview" } }
        },
    )
}

/// What, why, and how to fix it.
pub fn problem(report: &Report) -> Markup {
    graded_problem(report, "problem")
}

/// A problem with which the machine goes on working.
pub fn mild_problem(report: &Report) -> Markup {
    graded_problem(report, "problem warn")
}

fn graded_problem(report: &Report, class: &str) -> Markup {
    html! {
        div class=(class) role="alert" {
            p.what { (prose(&report.what)) }
            p.why { (prose(&report.why)) "." }
            p.fix { span.label { "What to do " } (prose(&report.fix)) "." }
            p.code { (report.code) }
        }
    }
}

pub fn health_pill(health: Health) -> Markup {
    let (class, word) = match health {
        Health::Green => ("good", "Healthy"),
        Health::Yellow => ("warn", "Degraded"),
        Health::Red => ("bad", "Needs attention"),
    };
    pill(class, word)
}

/// A word with a colour; the word says it all, for those who do not see the colour.
pub fn pill(class: &str, word: &str) -> Markup {
    html! { span class={ "pill " (class) } { (word) } }
}

/// How full something is. An image with a text, since the numbers stand beside it.
pub fn bar(part: u64, whole: u64) -> Markup {
    let percent = units::percent(part, whole);
    let class = match percent {
        0..=79 => "bar",
        80..=94 => "bar warn",
        _ => "bar bad",
    };
    html! {
        svg class=(class) role="img" aria-label={ (percent) " percent" } {
            rect.back width="100%" height="100%" rx="3" {}
            rect.fill width={ (percent) "%" } height="100%" rx="3" {}
        }
    }
}

pub fn fact(name: &str, value: Markup) -> Markup {
    html! { div.fact { dt { (name) } dd { (value) } } }
}

/// Reports are written to stand inside a sentence, with code between backticks; here they begin one.
fn prose(text: &str) -> Markup {
    let text = sentence(text);
    html! {
        @for (index, piece) in text.split('`').enumerate() {
            @if index % 2 == 1 { code { (piece) } } @else { (piece) }
        }
    }
}

fn sentence(text: &str) -> String {
    let text = text.trim_end_matches('.');
    let mut characters = text.chars();
    match characters.next() {
        Some(first) => first.to_uppercase().chain(characters).collect(),
        None => String::new(),
    }
}

fn document(title: &str, body: Markup) -> Markup {
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                title { (title) " · agentd OS" }
                link rel="icon" type="image/svg+xml" href=(ICON.url);
                link rel="stylesheet" href=(STYLE.url);
                script src=(SCRIPT.url) defer {}
            }
            body { (body) }
        }
    }
}
