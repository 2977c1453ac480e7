//! How are moments written for people? Numbers are in [`agentd_domain::human`].

pub use agentd_domain::human::{bytes, count, percent, span_ms};

/// `2026-11-20 12:04:03`, in UTC.
pub fn moment(unix_ms: i64) -> String {
    format_moment(unix_ms, "%Y-%m-%d %H:%M:%S")
}

/// `12:04:03`, in UTC.
pub fn clock_time(unix_ms: i64) -> String {
    format_moment(unix_ms, "%H:%M:%S")
}

fn format_moment(unix_ms: i64, format: &str) -> String {
    match jiff::Timestamp::from_millisecond(unix_ms) {
        Ok(moment) => moment.strftime(format).to_string(),
        // Beyond the year 9999: the clock is wrong, and the number says so better than a blank.
        Err(_) => format!("{unix_ms} ms"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn in_utc() {
        assert_eq!(moment(0), "1970-01-01 00:00:00");
        assert_eq!(moment(4_070_908_800_000), "2099-01-01 00:00:00");
        assert_eq!(clock_time(1_795_176_243_000), "12:04:03");
    }

    proptest! {
        #[test]
        fn no_clock_breaks_a_page(t in any::<i64>()) {
            for text in [moment(t), clock_time(t)] {
                prop_assert!(!text.is_empty() && text.len() < 40, "{text}");
            }
        }
    }
}
