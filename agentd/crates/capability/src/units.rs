//! How are sizes, rates and shares written in a manifest?
//!
//! `192M` is 192 × 2^20 bytes, as cgroup v2 files read it; `20M/s` is a rate; `50%` is a share of one CPU.
//! Numbers are decimal and whole: no sign, no fraction, no space.

/// Bytes from `4096`, `64K`, `192M`, `1G` or `2T`.
pub(crate) fn size_bytes(text: &str) -> Option<u64> {
    let (digits, factor) = match text.as_bytes().last()? {
        b'K' => (&text[..text.len() - 1], 1_u64 << 10),
        b'M' => (&text[..text.len() - 1], 1 << 20),
        b'G' => (&text[..text.len() - 1], 1 << 30),
        b'T' => (&text[..text.len() - 1], 1 << 40),
        _ => (text, 1),
    };
    whole(digits)?.checked_mul(factor)
}

/// Bytes per second from `20M/s`.
pub(crate) fn rate_bytes_per_second(text: &str) -> Option<u64> {
    size_bytes(text.strip_suffix("/s")?)
}

/// Percent of one CPU from `50%`.
pub(crate) fn percent(text: &str) -> Option<u64> {
    whole(text.strip_suffix('%')?)
}

/// `parse` alone would take a leading `+`.
fn whole(digits: &str) -> Option<u64> {
    let decimal = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    decimal.then(|| digits.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_powers_of_two() {
        assert_eq!(size_bytes("4096"), Some(4096));
        assert_eq!(size_bytes("192M"), Some(192 << 20));
        assert_eq!(size_bytes("1T"), Some(1 << 40));
        for bad in ["", "M", "-1M", "+1M", "1.5G", "1 M", "1MB", "1m", "99999999999T", "０M"] {
            assert_eq!(size_bytes(bad), None, "{bad}");
        }
    }

    #[test]
    fn rates_and_shares_need_their_sign() {
        assert_eq!(rate_bytes_per_second("20M/s"), Some(20 << 20));
        assert_eq!(rate_bytes_per_second("20M"), None);
        assert_eq!(percent("50%"), Some(50));
        assert_eq!(percent("50"), None);
    }
}
