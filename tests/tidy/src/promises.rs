//! What did the benchmarks measure, and does README say the same?
//!
//! Owns:   the form of a benchmark's result ([`Bench`]), which `tests/bench` writes as JSON; the section of README
//!         that is made from the results kept in `tests/results/bench/`.
//! Always: no number stands in README that is not in a committed file with its date, commit, machine and
//!         accelerator. [`check`] compares the section letter by letter; `scripts/bench readme` writes it.
//! Never:  measuring.

use crate::Repo;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

pub const FOLDER: &str = "tests/results/bench/";
const README: &str = "README.md";
const BEGIN: &str =
    "<!-- from tests/results/bench by `scripts/bench readme`; what is written here is lost -->";
const END: &str = "<!-- end of what is from tests/results/bench -->";

/// What one benchmark found out.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bench {
    /// Also the name of its file.
    pub name: String,
    /// The command that measures it again.
    pub command: String,
    /// `2026-11-21`, in UTC.
    pub date: String,
    /// `git describe` of what was measured.
    pub commit: String,
    /// `2 x Xeon ...`.
    pub machine: String,
    /// What ran the guest: `KVM`, or `TCG (emulated)`, whose times say nothing of hardware.
    pub accelerator: String,
    pub rows: Vec<Row>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Row {
    pub what: String,
    pub value: f64,
    pub unit: String,
    /// `1.2 to 3.4, 5 runs`; empty for what was measured once.
    pub spread: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub goal: Option<Goal>,
    /// In the file and on the terminal, but not in README.
    #[serde(default, skip_serializing_if = "is_false")]
    pub detail: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Goal {
    /// `128 MiB or less`.
    pub words: String,
    pub reached: bool,
}

impl Row {
    pub fn new(what: impl Into<String>, value: f64, unit: &str) -> Self {
        let (what, unit, spread) = (what.into(), unit.to_owned(), String::new());
        Self { what, value, unit, spread, goal: None, detail: false }
    }

    /// The median of some runs; an error when there was none.
    pub fn median(what: impl Into<String>, runs: &[f64], unit: &str) -> Result<Self> {
        let what = what.into();
        let mut sorted = runs.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (Some(least), Some(most)) = (sorted.first(), sorted.last()) else {
            anyhow::bail!("{what}: nothing was measured")
        };
        let spread = format!("{} to {}, {} runs", number(*least), number(*most), runs.len());
        let (low, high) = (sorted[(sorted.len() - 1) / 2], sorted[sorted.len() / 2]);
        Ok(Self { spread, ..Self::new(what, f64::midpoint(low, high), unit) })
    }

    #[must_use]
    pub fn at_most(mut self, most: f64) -> Self {
        let words = format!("{most} {} or less", self.unit);
        self.goal = Some(Goal { words, reached: self.value <= most });
        self
    }

    #[must_use]
    pub fn at_least(mut self, least: f64) -> Self {
        let words = format!("{least} {} or more", self.unit);
        self.goal = Some(Goal { words, reached: self.value >= least });
        self
    }

    #[must_use]
    pub fn detail(mut self) -> Self {
        self.detail = true;
        self
    }

    fn measured(&self) -> String {
        format!("{} {}", number(self.value), self.unit)
    }

    fn verdict(&self) -> String {
        match &self.goal {
            Some(Goal { words, reached: true }) => format!("{words}: reached"),
            Some(Goal { words, reached: false }) => format!("{words}: **not reached**"),
            None => String::new(),
        }
    }
}

impl Bench {
    /// All rows, for the terminal.
    pub fn table(&self) -> String {
        let rows = self
            .rows
            .iter()
            .map(|row| vec![row.what.clone(), row.measured(), row.spread.clone(), row.verdict()]);
        format!("{}\n\n{}", self.origin(), table(&["what", "measured", "spread", "goal"], rows))
    }

    /// What has a goal, each in a line.
    pub fn promises(&self) -> impl Iterator<Item = String> + '_ {
        let rows = self.rows.iter().filter(|row| row.goal.is_some());
        rows.map(|row| format!("{}: {} ({})", row.what, row.measured(), row.verdict()))
    }

    /// Where its numbers come from.
    fn origin(&self) -> String {
        format!(
            "`{}`: {}, commit `{}`, {}, {}",
            self.command, self.date, self.commit, self.machine, self.accelerator
        )
    }
}

/// README's section from these results, without its two marks.
pub fn section(benches: &[Bench]) -> String {
    if benches.is_empty() {
        return "No result is kept in `tests/results/bench/` yet, so no number stands here.\n".to_owned();
    }
    let promised = benches.iter().flat_map(|bench| {
        bench.rows.iter().filter(|row| row.goal.is_some()).map(move |row| {
            let by = format!("`{}`, {}", bench.command, bench.accelerator);
            vec![row.what.clone(), row.measured(), row.spread.clone(), row.verdict(), by]
        })
    });
    let mut text = table(&["promise", "measured", "spread", "goal", "measured by"], promised);
    for bench in benches {
        let others: Vec<_> = bench
            .rows
            .iter()
            .filter(|row| row.goal.is_none() && !row.detail)
            .map(|row| vec![row.what.clone(), row.measured(), row.spread.clone()])
            .collect();
        if !others.is_empty() {
            text += &format!("\nWithout a goal, by `{}`, {}:\n\n", bench.command, bench.accelerator);
            text += &table(&["what", "measured", "spread"], others.into_iter());
        }
    }
    text += "\nWhen, at which commit, on which machine:\n\n";
    for bench in benches {
        text += &format!("- {}\n", bench.origin());
    }
    if benches.iter().any(|bench| bench.accelerator != "KVM") {
        text += "\nWhat was measured under emulation (TCG) says nothing of the times on hardware.\n";
    }
    text
}

/// README with this section between its two marks.
pub fn with_section(readme: &str, section: &str) -> Result<String> {
    let (before, rest) = readme.split_once(BEGIN).with_context(|| format!("{README} has no line {BEGIN}"))?;
    let (_, after) = rest.split_once(END).with_context(|| format!("{README} has no line {END}"))?;
    Ok(format!("{before}{BEGIN}\n\n{section}\n{END}{after}"))
}

/// The kept results, by name.
pub fn kept(repo: &Repo) -> Result<Vec<Bench>> {
    let files = repo.with_extension("json").filter(|(file, _)| file.starts_with(FOLDER));
    files
        .map(|(file, text)| {
            let bench: Bench = serde_json::from_str(text).with_context(|| file.to_owned())?;
            let own = format!("{FOLDER}{}.json", bench.name);
            anyhow::ensure!(file == own, "{file}: it is the result that belongs into {own}");
            Ok(bench)
        })
        .collect()
}

/// Complaints about README's section.
pub fn check(repo: &Repo) -> Result<Vec<String>> {
    let readme = repo.files.get(README).with_context(|| format!("{README} is missing"))?;
    let right = with_section(readme, &section(&kept(repo)?))?;
    if *readme == right {
        return Ok(Vec::new());
    }
    let wrong = readme.lines().zip(right.lines()).find(|(is, should)| is != should);
    let (is, should) = wrong.unwrap_or(("its end", "another end"));
    Ok(vec![format!("{README}: `scripts/bench readme` would write\n    {should}\n  instead of\n    {is}")])
}

/// As many digits as one can take in at a glance.
fn number(value: f64) -> String {
    if value.abs() >= 100.0 { format!("{value:.0}") } else { format!("{value:.1}") }
}

fn table(head: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let line = |cells: Vec<String>| {
        let cells: Vec<_> = cells.iter().map(|cell| cell.replace('|', "\\|")).collect();
        format!("| {} |\n", cells.join(" | "))
    };
    let mut text = line(head.iter().map(|&name| name.to_owned()).collect());
    text += &format!("|{}\n", "---|".repeat(head.len()));
    text.extend(rows.map(line));
    text
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde gives a reference")]
fn is_false(value: &bool) -> bool {
    !value
}

#[cfg(test)]
mod tests {
    use super::*;

    fn boot() -> Bench {
        Bench {
            name: "boot".into(),
            command: "scripts/bench boot".into(),
            date: "2026-11-21".into(),
            commit: "0123456789ab".into(),
            machine: "2 x Fast | Loud".into(),
            accelerator: "TCG (emulated)".into(),
            rows: vec![
                Row::median("Debian over us", &[4.0, 6.5, 5.5], "x").unwrap().at_least(5.0),
                Row::new("page", 1234.5, "ms"),
                Row::new("a step", 3.0, "ms").detail(),
            ],
        }
    }

    #[test]
    fn a_row_tells_the_median_and_whether_the_goal_is_reached() {
        let row = Row::median("time", &[30.0, 10.0, 20.0], "ms").unwrap().at_most(25.0);
        assert_eq!((row.value, row.spread.as_str()), (20.0, "10.0 to 30.0, 3 runs"));
        assert_eq!(row.verdict(), "25 ms or less: reached");
        assert_eq!(Row::median("time", &[10.0, 20.0], "ms").unwrap().value, 15.0);
        assert_eq!(Row::new("ratio", 4.0, "x").at_least(5.0).verdict(), "5 x or more: **not reached**");
        assert!(Row::median("time", &[], "ms").is_err(), "nothing measured is no number");
    }

    #[test]
    fn promises_first_then_the_rest_then_where_it_comes_from() {
        let expected = "\
| promise | measured | spread | goal | measured by |
|---|---|---|---|---|
| Debian over us | 5.5 x | 4.0 to 6.5, 3 runs | 5 x or more: reached | `scripts/bench boot`, TCG (emulated) |

Without a goal, by `scripts/bench boot`, TCG (emulated):

| what | measured | spread |
|---|---|---|
| page | 1234 ms |  |

When, at which commit, on which machine:

- `scripts/bench boot`: 2026-11-21, commit `0123456789ab`, 2 x Fast | Loud, TCG (emulated)

What was measured under emulation (TCG) says nothing of the times on hardware.
";
        assert_eq!(section(&[boot()]), expected);
        assert_eq!(boot().promises().collect::<Vec<_>>(), ["Debian over us: 5.5 x (5 x or more: reached)"]);
        assert!(boot().table().contains("| a step | 3.0 ms |"), "the terminal shows all");
    }

    #[test]
    fn a_cell_cannot_break_its_table() {
        let text = table(&["a"], [vec!["x|y".to_owned()]].into_iter());
        assert_eq!(text, "| a |\n|---|\n| x\\|y |\n");
    }

    #[test]
    fn a_kept_result_is_read_as_it_was_written() {
        let text = serde_json::to_string_pretty(&boot()).unwrap();
        let again: Bench = serde_json::from_str(&text).unwrap();
        assert_eq!(again.rows, boot().rows);
        assert_eq!(section(&[again]), section(&[boot()]));
    }

    #[test]
    fn readme_says_what_was_kept_and_nothing_else() {
        let empty = with_section(&format!("# Top\n{BEGIN}\n{END}\nend\n"), &section(&[])).unwrap();
        assert_eq!(check(&Repo::of(&[(README, &empty)])).unwrap(), [""; 0]);
        assert!(empty.starts_with("# Top\n") && empty.ends_with("\nend\n"));

        let json = serde_json::to_string(&boot()).unwrap();
        let file = format!("{FOLDER}boot.json");
        assert_eq!(
            check(&Repo::of(&[(README, &empty), (&file, &json)])).unwrap().len(),
            1,
            "not written yet"
        );
        let full = with_section(&empty, &section(&[boot()])).unwrap();
        assert_eq!(check(&Repo::of(&[(README, &full), (&file, &json)])).unwrap(), [""; 0]);
        assert_eq!(check(&Repo::of(&[(README, &full)])).unwrap().len(), 1, "a number without a file");
        let better = full.replace("5.5 x", "9.5 x");
        assert_eq!(check(&Repo::of(&[(README, &better), (&file, &json)])).unwrap().len(), 1);
    }

    #[test]
    fn what_cannot_be_read_is_an_error() {
        let json = serde_json::to_string(&boot()).unwrap();
        let other = format!("{FOLDER}size.json");
        for (file, text) in [(&other, json.as_str()), (&other, "{}")] {
            assert!(kept(&Repo::of(&[(file, text)])).is_err(), "{text}");
        }
        assert!(check(&Repo::of(&[(README, "no marks\n")])).is_err());
    }
}
