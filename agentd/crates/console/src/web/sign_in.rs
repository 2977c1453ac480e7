//! The two pages a stranger sees: becoming the owner, and signing in.

use super::layout::{bare_page, problem};
use crate::auth::password::SHORTEST_CHARACTERS;
use agentd_domain::fault::Report;
use maud::{Markup, html};

/// `code` is what was typed before, so that a mistake elsewhere does not cost it.
pub fn claim(failed: Option<&Report>, code: &str) -> Markup {
    bare_page(
        "Claim this appliance",
        &html! {
            h1 { "Claim this appliance" }
            p { "It has no owner yet. The claim code is on its screen and on its serial line; it changes every 15 minutes." }
            @if let Some(report) = failed { (problem(report)) }
            form.stack method="post" action="/claim" {
                label for="code" { "Claim code" }
                input #code .code name="code" required autofocus autocomplete="one-time-code" autocapitalize="characters"
                    spellcheck="false" placeholder="XXXX-XXXX-XXXX" maxlength="24" value=(code);
                label for="password" { "Your new password" }
                input #password type="password" name="password" required minlength=(SHORTEST_CHARACTERS)
                    autocomplete="new-password" aria-describedby="rule";
                p #rule .hint { (SHORTEST_CHARACTERS) " characters or more. Several words are fine." }
                label for="again" { "Once more" }
                input #again type="password" name="again" required autocomplete="new-password";
                button.primary type="submit" { "Become the owner" }
            }
        },
    )
}

pub fn sign_in(failed: Option<&Report>) -> Markup {
    bare_page(
        "Sign in",
        &html! {
            h1 { "Sign in" }
            @if let Some(report) = failed { (problem(report)) }
            form.stack method="post" action="/sign-in" {
                label for="password" { "Password" }
                input #password type="password" name="password" required autofocus autocomplete="current-password";
                button.primary type="submit" { "Sign in" }
            }
        },
    )
}
