//! Whose fault is it, and what should a person do?
//!
//! Every error that reaches a person is a [`Report`]: what happened, why, and how to fix it. The fix is a
//! command or a setting, never "check the logs".

use serde::{Deserialize, Serialize};

/// Who can mend it. HTTP status, exit code, retry and log level follow from this.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    /// The request was wrong; the same request will fail again. HTTP 4xx, exit code 2.
    Caller,
    /// Something outside is missing or broken; the same request may work later. HTTP 503, exit code 3.
    Environment,
    /// We broke an invariant of our own. HTTP 500, exit code 70 (EX_SOFTWARE of sysexits.h).
    Bug,
}

/// An error as a person sees it, on the console, in `agentctl` and on the boot screen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{what}: {why}. {fix}")]
pub struct Report {
    /// A stable name for programs, in snake_case: `claim_code_wrong`, `model_file_truncated`.
    pub code: String,
    pub fault: Fault,
    /// What did not happen: "the agent was not started".
    pub what: String,
    /// Why: "the manifest names an unknown key `agent.nmae`".
    pub why: String,
    /// What to do: "write `agent.name`; `agentctl plan agent.toml` checks the file".
    pub fix: String,
}

impl Report {
    pub fn caller(
        code: &str,
        what: impl Into<String>,
        why: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        Self::new(Fault::Caller, code, what, why, fix)
    }

    pub fn environment(
        code: &str,
        what: impl Into<String>,
        why: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        Self::new(Fault::Environment, code, what, why, fix)
    }

    pub fn bug(code: &str, what: impl Into<String>, why: impl Into<String>, fix: impl Into<String>) -> Self {
        Self::new(Fault::Bug, code, what, why, fix)
    }

    fn new(
        fault: Fault,
        code: &str,
        what: impl Into<String>,
        why: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        Self { code: code.to_owned(), fault, what: what.into(), why: why.into(), fix: fix.into() }
    }

    /// The HTTP status that belongs to this error. Codes with a status of their own are listed here.
    pub fn http_status(&self) -> u16 {
        match (self.fault, self.code.as_str()) {
            (_, "not_found") => 404,
            (_, "unauthorized") => 401,
            (_, "forbidden") => 403,
            (_, "token_expired" | "token_foreign" | "token_revoked" | "token_stolen") => 403,
            (_, "conflict") => 409,
            (_, "too_large" | "context_exceeds_budget" | "memory_full" | "blocks_full") => 413,
            (_, "model_too_large") => 422,
            (_, "too_many_requests" | "queue_full" | "vram_budget_exceeded") => 429,
            (_, "timeout") => 504,
            (Fault::Caller, _) => 400,
            (Fault::Environment, _) => 503,
            (Fault::Bug, _) => 500,
        }
    }

    /// The exit code of a command that ends with this error.
    pub fn exit_code(&self) -> u8 {
        match self.fault {
            Fault::Caller => 2,
            Fault::Environment => 3,
            Fault::Bug => 70,
        }
    }
}
