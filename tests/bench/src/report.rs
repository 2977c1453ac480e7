//! One result as JSON and as a table for people.

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// What a benchmark found out.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Bench {
    pub name: String,
    /// The command that measures it again.
    pub command: String,
    /// `git describe` of what was measured.
    pub commit: String,
    pub machine: String,
    pub rows: Vec<Row>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Row {
    pub what: String,
    pub value: f64,
    pub unit: String,
    /// `min 1.2, max 3.4, 5 runs`.
    pub spread: String,
    /// The goal in words, when there is one, and whether it is reached.
    pub goal: Option<(String, bool)>,
}

impl Row {
    pub fn new(what: impl Into<String>, value: f64, unit: &str) -> Self {
        Self { what: what.into(), value, unit: unit.to_owned(), spread: String::new(), goal: None }
    }

    /// The median of some runs.
    pub fn median(what: impl Into<String>, runs: &[f64], unit: &str) -> Self {
        let mut sorted = runs.to_vec();
        sorted.sort_by(f64::total_cmp);
        let value = sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN);
        let (least, most) = (sorted.first().copied(), sorted.last().copied());
        let spread = match (least, most) {
            (Some(least), Some(most)) => format!("{least:.0} to {most:.0}, {} runs", runs.len()),
            _ => String::new(),
        };
        Self { spread, ..Self::new(what, value, unit) }
    }

    pub fn at_most(mut self, goal: f64) -> Self {
        self.goal = Some((format!("{goal} {} or less", self.unit), self.value <= goal));
        self
    }

    pub fn at_least(mut self, goal: f64) -> Self {
        self.goal = Some((format!("{goal} {} or more", self.unit), self.value >= goal));
        self
    }
}

impl Bench {
    /// Prints the table and writes the JSON file below `target/bench`.
    pub fn publish(&self, checkout: &Path) -> Result<PathBuf> {
        println!("{}", self.table());
        let folder = checkout.join("target/bench");
        std::fs::create_dir_all(&folder)?;
        let file = folder.join(format!("{}.json", self.name));
        std::fs::write(&file, serde_json::to_string_pretty(self)?)
            .with_context(|| format!("cannot write {}", file.display()))?;
        Ok(file)
    }

    pub fn table(&self) -> String {
        let mut text = format!(
            "{} at {} on {}\n\n| what | measured | spread | goal |\n|---|---|---|---|\n",
            self.name, self.commit, self.machine
        );
        for row in &self.rows {
            let goal = match &row.goal {
                Some((words, true)) => format!("{words}: reached"),
                Some((words, false)) => format!("{words}: NOT reached"),
                None => String::new(),
            };
            let value =
                if row.value >= 100.0 { format!("{:.0}", row.value) } else { format!("{:.1}", row.value) };
            text.push_str(&format!("| {} | {value} {} | {} | {goal} |\n", row.what, row.unit, row.spread));
        }
        text
    }
}

/// `2 x Xeon ..., TCG`.
pub fn machine(accelerator: &str) -> String {
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .unwrap_or("")
        .trim_start_matches([' ', '\t', ':']);
    format!("{cpus} x {model}, {accelerator}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_tells_the_median_and_whether_the_goal_is_reached() {
        let row = Row::median("time", &[30.0, 10.0, 20.0], "ms").at_most(25.0);
        assert_eq!((row.value, row.spread.as_str()), (20.0, "10 to 30, 3 runs"));
        assert_eq!(row.goal, Some(("25 ms or less".to_owned(), true)));
        assert_eq!(Row::new("ratio", 4.0, "x").at_least(5.0).goal, Some(("5 x or more".to_owned(), false)));
    }
}
