//! Which time does a question name?
//!
//! Months, days, years, seasons, and times counted from now ("yesterday", "three weeks ago"), in English. Several are
//! taken together: "between May and July 2023" is the three months. A month without a year is the latest that has
//! begun. All in UTC: a day more or less does not matter here.

/// Half open, in milliseconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    pub from_unix_ms: i64,
    pub to_unix_ms: i64,
}

const DAY_MS: i64 = 24 * 60 * 60 * 1000;
/// A day that is named is often a day off: time zones, "the weekend of".
const DAY_SLACK_DAYS: i64 = 3;
/// People tell what happened soon after: within so many days it counts in full ..
const SOON_DAYS: i64 = 2;
/// .. and until then less and less.
const LATER_DAYS: i64 = 21;
const LATER: f32 = 0.6;

const MONTHS: [&str; 12] = [
    "january",
    "february",
    "march",
    "april",
    "may",
    "june",
    "july",
    "august",
    "september",
    "october",
    "november",
    "december",
];
const SHORT_MONTHS: [&str; 12] =
    ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"];

/// Before a month, and seldom before what else "may" and "march" are.
const BEFORE_MONTHS: [&str; 12] =
    ["in", "of", "during", "since", "between", "from", "until", "till", "by", "early", "late", "last"];

impl Span {
    /// 1 inside, less for what was told some days later, 0 elsewhere.
    pub fn holds(&self, unix_ms: i64) -> f32 {
        let late_ms = unix_ms.saturating_sub(self.to_unix_ms);
        if unix_ms < self.from_unix_ms || late_ms >= LATER_DAYS * DAY_MS {
            0.0
        } else if late_ms < SOON_DAYS * DAY_MS {
            1.0
        } else {
            LATER * (1.0 - late_ms as f32 / (LATER_DAYS * DAY_MS) as f32)
        }
    }

    fn days(from: i64, to: i64) -> Self {
        Self { from_unix_ms: from.saturating_mul(DAY_MS), to_unix_ms: to.saturating_mul(DAY_MS) }
    }

    fn with(self, other: Self) -> Self {
        Self {
            from_unix_ms: self.from_unix_ms.min(other.from_unix_ms),
            to_unix_ms: self.to_unix_ms.max(other.to_unix_ms),
        }
    }
}

/// What the text names, if it names a time.
pub(super) fn span(text: &str, now_unix_ms: i64) -> Option<Span> {
    let lower = text.to_lowercase();
    let words: Vec<&str> =
        lower.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).collect();
    let today = now_unix_ms.div_euclid(DAY_MS);
    // One year serves all months of the question.
    let year = words.iter().find_map(|word| year(word));
    let named = (0..words.len()).filter_map(|at| {
        month(&words, at, year, today)
            .or_else(|| season(&words, at, year, today))
            .or_else(|| relative(&words, at, today))
    });
    named
        .reduce(Span::with)
        .or_else(|| year.map(|year| Span::days(first_day(year, 1), first_day(year + 1, 1))))
}

fn year(word: &str) -> Option<i64> {
    let is_year = word.len() == 4 && word.bytes().all(|b| b.is_ascii_digit());
    word.parse().ok().filter(|year| is_year && (1900..2100).contains(year))
}

fn month(words: &[&str], at: usize, year: Option<i64>, today: i64) -> Option<Span> {
    let word = *words.get(at)?;
    let month = MONTHS.iter().position(|month| *month == word);
    let day_after = words.get(at + 1).and_then(|word| day(word));
    let day_before = at.checked_sub(1).and_then(|at| words.get(at)).and_then(|word| day(word));
    let of_day = at.checked_sub(2).filter(|_| words.get(at - 1) == Some(&"of"));
    let day = day_after.or(day_before).or(of_day.and_then(|at| words.get(at)).and_then(|word| day(word)));
    // Names that are words too, and short ones, count only beside a day or year, or after "in": "may", "mar".
    let is_word = ["may", "march"].contains(&word);
    let month = match month {
        Some(month) if !is_word => month,
        _ => {
            let short = month.or_else(|| SHORT_MONTHS.iter().position(|month| *month == word))?;
            let previous = at.checked_sub(1).and_then(|at| words.get(at));
            let after_word = previous.is_some_and(|word| BEFORE_MONTHS.contains(word));
            let with_year = words.get(at + 1).is_some_and(|word| self::year(word).is_some());
            if !(day.is_some() || with_year || is_word && after_word) {
                return None;
            }
            short
        }
    };
    let month = month as i64 + 1;
    let year = year.unwrap_or_else(|| latest_year(month, today));
    Some(match day {
        Some(day) => {
            let day = first_day(year, month) + day - 1;
            Span::days(day - DAY_SLACK_DAYS, day + 1 + DAY_SLACK_DAYS)
        }
        None => Span::days(first_day(year, month), first_day(year, month + 1)),
    })
}

fn season(words: &[&str], at: usize, year: Option<i64>, today: i64) -> Option<Span> {
    let first_month = match *words.get(at)? {
        "spring" => 3,
        "summer" => 6,
        "fall" | "autumn" => 9,
        "winter" => 12,
        _ => return None,
    };
    // "fall" and "spring" are other things too.
    let previous = at.checked_sub(1).and_then(|at| words.get(at));
    let named = previous.is_some_and(|word| ["in", "of", "during", "last", "this", "the"].contains(word))
        || words.get(at + 1).is_some_and(|word| self::year(word).is_some());
    let year = year.unwrap_or_else(|| latest_year(first_month, today));
    named.then(|| Span::days(first_day(year, first_month), first_day(year, first_month + 3)))
}

fn relative(words: &[&str], at: usize, today: i64) -> Option<Span> {
    let days = |unit: &str| match unit {
        "day" | "days" => Some(1),
        "week" | "weeks" => Some(7),
        "month" | "months" => Some(30),
        "year" | "years" => Some(365),
        _ => None,
    };
    match *words.get(at)? {
        "today" => Some(Span::days(today, today + 1)),
        "yesterday" => Some(Span::days(today - 1, today)),
        "ago" => {
            let unit = days(words.get(at.checked_sub(1)?)?)?;
            let count = number(words.get(at.checked_sub(2)?)?)?;
            // "Two months ago" is not to the day: half a unit to each side, a day at least.
            let slack = (unit / 2).max(1);
            let day = today - count * unit;
            Some(Span::days(day - slack, day + slack + 1))
        }
        "last" => {
            let unit = days(words.get(at + 1)?)?;
            // "Last week" is the seven days before, or those of the calendar's last week: twice as many.
            (unit > 1).then(|| Span::days(today - 2 * unit, today))
        }
        "this" => {
            let unit = days(words.get(at + 1)?)?;
            (unit > 1).then(|| Span::days(today - unit, today + 1))
        }
        _ => None,
    }
}

fn number(word: &str) -> Option<i64> {
    const NAMES: [&str; 10] = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"];
    match word {
        "a" | "an" => Some(1),
        "few" => Some(3),
        _ => {
            let named = NAMES.iter().position(|name| *name == word).map(|at| at as i64 + 1);
            named.or_else(|| word.parse().ok().filter(|number| (1..1000).contains(number)))
        }
    }
}

/// `7`, `7th`.
fn day(word: &str) -> Option<i64> {
    let digits = word.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let ending = &word[digits.len()..];
    let day: i64 = digits.parse().ok()?;
    ((1..=31).contains(&day) && ["", "st", "nd", "rd", "th"].contains(&ending)).then_some(day)
}

/// The latest year in which this month has begun.
fn latest_year(month: i64, today: i64) -> i64 {
    let mut year = 1970 + today.div_euclid(365) + 1;
    while first_day(year, month) > today {
        year -= 1;
    }
    year
}

/// Days since 1970 of a month's first; months beyond December belong to the next year. Howard Hinnant's
/// `days_from_civil`, <https://howardhinnant.github.io/date_algorithms.html>.
fn first_day(year: i64, month: i64) -> i64 {
    let (year, month) = (year + (month - 1).div_euclid(12), (month - 1).rem_euclid(12) + 1);
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * (month + if month > 2 { -3 } else { 9 }) + 2) / 5;
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// 2023-10-22.
    const NOW: i64 = 19_652 * DAY_MS;

    fn days(text: &str) -> Option<(i64, i64)> {
        span(text, NOW).map(|span| (span.from_unix_ms / DAY_MS, span.to_unix_ms / DAY_MS))
    }

    #[test]
    fn civil_days_are_counted_right() {
        assert_eq!(first_day(1970, 1), 0);
        assert_eq!(first_day(2000, 3), 11_017);
        assert_eq!(first_day(2023, 13), first_day(2024, 1));
        assert_eq!(first_day(2023, 10) + 21, NOW / DAY_MS);
    }

    #[test]
    fn dates_in_questions_are_understood() {
        let month = |year, month| Some((first_day(year, month), first_day(year, month + 1)));
        let day = |first: i64, day: i64| Some((first + day - 4, first + day + 3));
        assert_eq!(days("What did Ana do in June 2023?"), month(2023, 6));
        assert_eq!(days("What did Ana do in June?"), month(2023, 6));
        assert_eq!(days("What did Ana do in December?"), month(2022, 12), "the next has not begun");
        assert_eq!(days("what happened on 7 May 2022?"), day(first_day(2022, 5), 7));
        assert_eq!(days("what happened on the 7th of May, 2022?"), day(first_day(2022, 5), 7));
        assert_eq!(days("what happened on Sep 3rd?"), day(first_day(2023, 9), 3));
        assert_eq!(days("between May and July 2023"), Some((first_day(2023, 5), first_day(2023, 8))));
        assert_eq!(days("in the summer of 2022"), Some((first_day(2022, 6), first_day(2022, 9))));
        assert_eq!(days("Where was he in 2021?"), Some((first_day(2021, 1), first_day(2022, 1))));
        assert_eq!(days("what was said yesterday"), Some((19_651, 19_652)));
        assert_eq!(days("what was said two weeks ago"), Some((19_652 - 17, 19_652 - 10)));
    }

    #[test]
    fn what_names_no_time_has_no_span() {
        for text in
            ["May I ask?", "Did he march on?", "Which seeds fall?", "the sun", "room 2", "", "ago", "last"]
        {
            assert_eq!(days(text), None, "{text}");
        }
    }

    #[test]
    fn what_was_told_soon_after_counts_too() {
        let span = Span::days(10, 12);
        let at = |day: i64| span.holds(day * DAY_MS);
        assert_eq!([at(9), at(10), at(11), at(13), at(40)], [0.0, 1.0, 1.0, 1.0, 0.0]);
        assert!(at(15) < LATER && at(15) > at(20) && at(20) > 0.0);
    }

    proptest! {
        #[test]
        fn any_text_at_any_time_has_a_span_in_order(
            text in "((in|last|ago|may|june|summer|[0-9]{1,4}|two|weeks|.{0,4})[ ,]){0,8}", now in any::<i64>()
        ) {
            if let Some(span) = span(&text, now) {
                prop_assert!(span.from_unix_ms <= span.to_unix_ms);
                prop_assert!((0.0..=1.0).contains(&span.holds(now)));
            }
        }
    }
}
