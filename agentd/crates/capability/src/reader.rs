//! How is a section of the manifest read so that every mistake is found in one pass?
//!
//! A [`Section`] takes known keys out of its table; a value of the wrong shape becomes a problem and reads as
//! absent, and what is left at the end is unknown. So one call tells an author everything.

use agentd_domain::fault::Report;
use std::fmt::Display;
use toml::{Table, Value};

/// All that is wrong, in the order in which it was found.
#[derive(Default)]
pub(crate) struct Problems(pub Vec<Report>);

impl Problems {
    pub fn wrong(&mut self, key: &str, why: impl Display, fix: impl Into<String>) {
        self.0.push(Report::caller(
            "manifest_invalid",
            "the manifest was not accepted",
            format!("`{key}`: {why}"),
            fix,
        ));
    }

    fn unknown(&mut self, key: &str, known: &[&str]) {
        self.0.push(Report::caller(
            "manifest_unknown_key",
            "the manifest was not accepted",
            format!("`{key}` is not a key that this version knows"),
            format!("remove it, or write one of: {}", known.join(", ")),
        ));
    }
}

/// One table of the manifest and the keys that were asked of it so far.
pub(crate) struct Section {
    /// `limits.` for `[limits]`; empty for the top.
    prefix: String,
    table: Table,
    known: Vec<&'static str>,
}

impl Section {
    pub fn top(table: Table) -> Self {
        Self { prefix: String::new(), table, known: Vec::new() }
    }

    pub fn key(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    fn take(&mut self, name: &'static str) -> Option<Value> {
        self.known.push(name);
        self.table.remove(name)
    }

    /// An absent section reads as an empty one.
    pub fn section(&mut self, name: &'static str, problems: &mut Problems) -> Self {
        let table = match self.take(name) {
            None => Table::new(),
            Some(Value::Table(table)) => table,
            Some(other) => {
                let fix = format!("write a section `[{}]`", self.key(name));
                problems.wrong(&self.key(name), format!("it is {}", shape(&other)), fix);
                Table::new()
            }
        };
        Self { prefix: format!("{}{name}.", self.prefix), table, known: Vec::new() }
    }

    /// The entries of `[[name]]`, each with its place in its keys: `net.allow[0].host`.
    pub fn entries(&mut self, name: &'static str, problems: &mut Problems) -> Vec<Self> {
        let entries = match self.take(name) {
            None => return Vec::new(),
            Some(Value::Array(entries)) => entries,
            Some(other) => {
                let fix = format!("write a section `[[{}]]` for each", self.key(name));
                problems.wrong(&self.key(name), format!("it is {}", shape(&other)), fix);
                return Vec::new();
            }
        };
        let mut sections = Vec::new();
        for (index, entry) in entries.into_iter().enumerate() {
            let key = format!("{}[{index}]", self.key(name));
            match entry {
                Value::Table(table) => {
                    sections.push(Self { prefix: format!("{key}."), table, known: Vec::new() });
                }
                other => problems.wrong(&key, format!("it is {}", shape(&other)), "write a section for each"),
            }
        }
        sections
    }

    pub fn whole_numbers(&mut self, name: &'static str, problems: &mut Problems) -> Option<Vec<u64>> {
        let value = self.take(name)?;
        let numbers = value.as_array().and_then(|items| {
            items.iter().map(|item| item.as_integer().and_then(|n| u64::try_from(n).ok())).collect()
        });
        if numbers.is_none() {
            let why = format!("it is {}", shape(&value));
            problems.wrong(&self.key(name), why, "write a list of whole numbers, such as `[443]`");
        }
        numbers
    }

    pub fn text(&mut self, name: &'static str, problems: &mut Problems) -> Option<String> {
        match self.take(name)? {
            Value::String(text) => Some(text),
            other => {
                problems.wrong(
                    &self.key(name),
                    format!("it is {}", shape(&other)),
                    "write a text in quotation marks",
                );
                None
            }
        }
    }

    pub fn flag(&mut self, name: &'static str, problems: &mut Problems) -> Option<bool> {
        match self.take(name)? {
            Value::Boolean(flag) => Some(flag),
            other => {
                problems.wrong(
                    &self.key(name),
                    format!("it is {}", shape(&other)),
                    "write `true` or `false`",
                );
                None
            }
        }
    }

    pub fn texts(&mut self, name: &'static str, problems: &mut Problems) -> Option<Vec<String>> {
        let value = self.take(name)?;
        let texts = value
            .as_array()
            .and_then(|items| items.iter().map(|item| item.as_str().map(str::to_owned)).collect());
        if texts.is_none() {
            let fix = "write a list of texts, such as `[\"/agent/run\", \"--fast\"]`";
            problems.wrong(&self.key(name), format!("it is {}", shape(&value)), fix);
        }
        texts
    }

    pub fn whole_number(&mut self, name: &'static str, problems: &mut Problems) -> Option<u64> {
        let value = self.take(name)?;
        let number = value.as_integer().and_then(|number| u64::try_from(number).ok());
        if number.is_none() {
            problems.wrong(
                &self.key(name),
                format!("it is {}", shape(&value)),
                "write a whole number that is not negative",
            );
        }
        number
    }

    /// What nobody asked for is unknown.
    pub fn finish(self, problems: &mut Problems) {
        let known: Vec<String> = self.known.iter().map(|name| self.key(name)).collect();
        let known: Vec<&str> = known.iter().map(String::as_str).collect();
        for name in self.table.keys() {
            problems.unknown(&self.key(name), &known);
        }
    }
}

fn shape(value: &Value) -> String {
    match value {
        Value::String(_) => "a text".to_owned(),
        Value::Integer(number) => format!("the number {number}"),
        Value::Float(number) => format!("the number {number}"),
        Value::Boolean(flag) => format!("`{flag}`"),
        Value::Datetime(_) => "a date".to_owned(),
        Value::Array(_) => "a list of another kind".to_owned(),
        Value::Table(_) => "a section".to_owned(),
    }
}
