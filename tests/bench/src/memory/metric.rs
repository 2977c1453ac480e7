//! How much of what answers a question is among the first turns found?
//!
//! As `task_eval/evaluation.py` of LoCoMo counts: for each question the share of its evidence that is among the first
//! k turns, a question without evidence counts 1, and the mean over the questions. Evidence that names no turn is
//! never found.

use super::locomo::Category;
use std::collections::BTreeMap;

pub const PLACES: [usize; 4] = [5, 10, 25, 50];

/// Sums over questions, by category.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Recall {
    sums: BTreeMap<Category, (u32, [f64; PLACES.len()])>,
}

impl Recall {
    /// One question: its evidence, and what was found, best first.
    pub fn add(&mut self, category: Category, evidence: &[String], found: &[&str]) {
        let (questions, sums) = self.sums.entry(category).or_default();
        *questions += 1;
        for (sum, places) in sums.iter_mut().zip(PLACES) {
            let first = &found[..places.min(found.len())];
            let there = evidence.iter().filter(|turn| first.contains(&turn.as_str())).count();
            *sum += if evidence.is_empty() { 1.0 } else { there as f64 / evidence.len() as f64 };
        }
    }

    pub fn merge(&mut self, other: &Self) {
        for (category, (more, values)) in &other.sums {
            let (questions, sums) = self.sums.entry(*category).or_default();
            *questions += more;
            sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
        }
    }

    /// In hundredths, at each of [`PLACES`].
    pub fn overall(&self) -> [f64; PLACES.len()] {
        self.mean(|_| true)
    }

    pub fn of(&self, category: Category) -> [f64; PLACES.len()] {
        self.mean(|other| other == category)
    }

    pub fn questions(&self, category: Category) -> u32 {
        self.sums.get(&category).map_or(0, |(questions, _)| *questions)
    }

    /// One number for choosing between two ways: the mean over [`PLACES`].
    pub fn mean_overall(&self) -> f64 {
        self.overall().iter().sum::<f64>() / PLACES.len() as f64
    }

    fn mean(&self, counts: impl Fn(Category) -> bool) -> [f64; PLACES.len()] {
        let mut total = [0.0; PLACES.len()];
        let mut questions = 0;
        for (_, (count, sums)) in self.sums.iter().filter(|(category, _)| counts(**category)) {
            questions += count;
            total.iter_mut().zip(sums).for_each(|(total, sum)| *total += sum);
        }
        total.map(|total| 100.0 * total / f64::from(questions.max(1)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recall_is_counted_as_in_the_paper() {
        let mut recall = Recall::default();
        let evidence = |turns: &[&str]| turns.iter().map(|turn| (*turn).to_owned()).collect::<Vec<_>>();
        let found: Vec<String> = (0..60).map(|at| format!("D1:{at}")).collect();
        let found: Vec<&str> = found.iter().map(String::as_str).collect();
        recall.add(Category::MultiHop, &evidence(&["D1:0", "D1:7", "D1:30", "D9:9; D8:1"]), &found);
        assert_eq!(recall.overall(), [25.0, 50.0, 50.0, 75.0]);
        recall.add(Category::SingleHop, &[], &found);
        assert_eq!(recall.of(Category::SingleHop), [100.0; 4]);
        assert_eq!(recall.overall()[0], 62.5);
        assert_eq!(recall.of(Category::Temporal), [0.0; 4]);
        let mut both = recall.clone();
        both.merge(&recall);
        assert_eq!((both.overall(), both.questions(Category::MultiHop)), (recall.overall(), 2));
        recall.add(Category::MultiHop, &evidence(&["D1:0"]), &[]);
        assert_eq!(recall.of(Category::MultiHop)[0], 12.5);
    }
}
