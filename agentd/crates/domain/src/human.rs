//! How are numbers written for people?
//!
//! The console and `agentctl` write them the same way.

/// `1.5 GiB`, with as many digits as one can take in at a glance.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = count as f64;
    let mut unit = 0;
    // 1023.5 would be written as 1024 of the smaller unit.
    while value >= 1023.5 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = usize::from(unit > 0 && value < 9.95);
    format!("{value:.digits$} {}", UNITS[unit])
}

/// Bytes as people write them: a whole number, and perhaps `K`, `M`, `G` or `T` for powers of 1024.
///
/// # Errors
/// A sentence that shows the text and how to write one.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let bad = || format!("`{}` is no number of bytes: write one such as 512M or 2G", text.escape_debug());
    let power = match text.chars().next_back() {
        Some('K' | 'k') => 1,
        Some('M' | 'm') => 2,
        Some('G' | 'g') => 3,
        Some('T' | 't') => 4,
        _ => 0,
    };
    let digits = if power == 0 { text } else { text.get(..text.len() - 1).unwrap_or_default() };
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(bad());
    }
    let number: u64 = digits.parse().map_err(|_| bad())?;
    number.checked_mul(1 << (10 * power)).ok_or_else(bad)
}

/// `3 d 4 h`, `12 min 5 s`, `840 ms`: the two largest units.
pub fn span_ms(ms: u64) -> String {
    let seconds = ms / 1000;
    let (d, h, min, s) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    match (d, h, min) {
        (0, 0, 0) if ms < 1000 => format!("{ms} ms"),
        (0, 0, 0) if ms < 10_000 => format!("{}.{} s", s, ms % 1000 / 100),
        (0, 0, 0) => format!("{s} s"),
        (0, 0, _) => format!("{min} min {s} s"),
        (0, _, _) => format!("{h} h {min} min"),
        _ => format!("{d} d {h} h"),
    }
}

/// `1.2 M`, for counts of parameters.
pub fn count(n: u64) -> String {
    match n {
        0..1_000 => n.to_string(),
        1_000..1_000_000 => format!("{:.0} K", n as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} M", n as f64 / 1e6),
        _ => format!("{:.1} B", n as f64 / 1e9),
    }
}

/// 0 to 100; 0 when there is nothing to be a share of.
pub fn percent(part: u64, whole: u64) -> u8 {
    let share = u128::from(part.min(whole)) * 100;
    share.checked_div(u128::from(whole)).and_then(|p| u8::try_from(p).ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_people_write_them() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1024), "1.0 KiB");
        assert_eq!(bytes((1 << 20) - 1), "1.0 MiB");
        assert_eq!(bytes(412 << 20), "412 MiB");
        assert_eq!(bytes(3 << 29), "1.5 GiB");
        assert_eq!(span_ms(840), "840 ms");
        assert_eq!(span_ms(1_840), "1.8 s");
        assert_eq!(span_ms(59_999), "59 s");
        assert_eq!(span_ms(725_000), "12 min 5 s");
        assert_eq!(span_ms(90_000_000), "1 d 1 h");
        assert_eq!(count(22_713_216), "22.7 M");
        assert_eq!(percent(1, 0), 0);
        assert_eq!(percent(3, 2), 100);
        assert_eq!(percent(u64::MAX, u64::MAX), 100);
    }

    #[test]
    fn bytes_as_people_type_them() {
        assert_eq!(parse_bytes("2G"), Ok(2 << 30));
        assert_eq!(parse_bytes("512m"), Ok(512 << 20));
        assert_eq!(parse_bytes("4096"), Ok(4096));
        for wrong in ["", "G", "2GB", "-1", "1.5G", "2 G", "+2G", "99999999T", "é", "2é"] {
            assert!(parse_bytes(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn no_value_is_too_large_to_write() {
        for n in [0, 1, 999, 1_000, 1_023, 1_024, 59_999, 60_000, 1 << 40, u64::MAX - 1, u64::MAX] {
            for text in [bytes(n), span_ms(n), count(n)] {
                assert!(!text.is_empty() && text.len() < 40, "{text}");
            }
        }
    }
}
