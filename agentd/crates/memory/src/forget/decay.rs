//! How present is a record now?
//!
//! effective = strength x 2^(-age / half-life) x trust, where age counts from the last use. It is compared as its
//! logarithm: after years all of them would be 0, and a clock that jumped by a century would make all equal.
//! Being recalled strengthens: by a tenth of what is missing, by more after a longer gap (spacing effect).
//!
//! Always: a time before the last use counts as now, so that a clock that was set back fades nothing.

use crate::life::Life;
use crate::record::Role;

const DAY_MS: f64 = 24.0 * 60.0 * 60.0 * 1000.0;

/// What a record begins with.
pub(crate) const FIRST_STRENGTH: f32 = 0.5;
/// What a use brings of what is missing, right after the last use ..
const USE_GAIN: f32 = 0.1;
/// .. and at most, after a gap of a half-life and more.
const SPACED_GAIN: f32 = 0.3;

/// Days until half of it is gone; infinite for what does not fade.
pub(crate) fn half_life_days(role: Role) -> f32 {
    match role {
        Role::Event => 14.0,
        Role::Insight => 30.0,
        Role::Fact | Role::Preference | Role::Procedure => 120.0,
        Role::Identity => f32::INFINITY,
    }
}

fn age_days(life: &Life, now_unix_ms: i64) -> f64 {
    (now_unix_ms.saturating_sub(life.last_used_unix_ms).max(0)) as f64 / DAY_MS
}

/// The logarithm (base 2) of how present it is: 0 at most. The smallest goes first.
pub(crate) fn effective_log2(life: &Life, now_unix_ms: i64) -> f64 {
    let faded = match life.half_life_days {
        days if days.is_infinite() => 0.0,
        days => age_days(life, now_unix_ms) / f64::from(days.max(f32::MIN_POSITIVE)),
    };
    let part = |share: f64| share.clamp(1e-9, 1.0).log2();
    part(f64::from(life.strength)) - faded + part(f64::from(life.trust) / 100.0)
}

/// How present it is, 0 to 1.
pub(crate) fn effective(life: &Life, now_unix_ms: i64) -> f32 {
    effective_log2(life, now_unix_ms).exp2() as f32
}

/// What using it has brought of what was missing when it was told: 0 to 1.
pub(crate) fn gain(life: &Life) -> f32 {
    ((life.strength - FIRST_STRENGTH) / (1.0 - FIRST_STRENGTH)).clamp(0.0, 1.0)
}

/// The same, faded since the last use.
pub(crate) fn usefulness(gain: f32, half_life_days: f32, last_used_unix_ms: i64, now_unix_ms: i64) -> f32 {
    if half_life_days.is_infinite() {
        return gain;
    }
    let age_days = now_unix_ms.saturating_sub(last_used_unix_ms).max(0) as f64 / DAY_MS;
    gain * (-age_days / f64::from(half_life_days.max(f32::MIN_POSITIVE))).exp2() as f32
}

/// What one use makes of it.
pub(crate) fn used(life: &Life, now_unix_ms: i64) -> Life {
    let gap = match life.half_life_days {
        days if days.is_infinite() => 0.0,
        days => (age_days(life, now_unix_ms) / f64::from(days.max(f32::MIN_POSITIVE))).min(1.0) as f32,
    };
    let gain = USE_GAIN + (SPACED_GAIN - USE_GAIN) * gap;
    let strength = life.strength.clamp(0.0, 1.0);
    Life {
        strength: (strength + gain * (1.0 - strength)).min(1.0),
        uses: life.uses.saturating_add(1),
        last_used_unix_ms: life.last_used_unix_ms.max(now_unix_ms),
        ..*life
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::life::tests::{any_life, blank_life};
    use proptest::prelude::*;

    const DAY: i64 = DAY_MS as i64;

    proptest! {
        #[test]
        fn time_only_fades_and_use_only_strengthens(life in any_life(), a in 0i64..1 << 45, b in 0i64..1 << 45) {
            let life = Life { last_used_unix_ms: 0, ..life };
            let (earlier, later) = (a.min(b), a.max(b));
            prop_assert!(effective_log2(&life, later) <= effective_log2(&life, earlier));
            prop_assert!((0.0..=1.0).contains(&effective(&life, later)));
            let after = used(&life, later);
            prop_assert!(after.strength >= life.strength && after.strength <= 1.0);
            prop_assert!(effective_log2(&after, later) >= effective_log2(&life, later));
            prop_assert_eq!(after.last_used_unix_ms, later);
        }

        #[test]
        fn a_clock_at_either_end_of_time_breaks_nothing(life in any_life(), now in any::<i64>()) {
            prop_assert!(!effective_log2(&life, now).is_nan());
            prop_assert!(!effective(&life, now).is_nan());
            let after = used(&life, now);
            prop_assert!(after.last_used_unix_ms >= life.last_used_unix_ms);
        }

        #[test]
        fn longer_gaps_strengthen_more(gap in 0i64..200, more in 0i64..200) {
            let life = Life { last_used_unix_ms: 0, strength: 0.5, half_life_days: 14.0, ..blank_life() };
            prop_assert!(
                used(&life, (gap + more) * DAY).strength >= used(&life, gap * DAY).strength
            );
        }
    }

    #[test]
    fn half_after_a_half_life_and_identity_stays() {
        let life = Life {
            strength: 1.0,
            trust: 100,
            half_life_days: half_life_days(Role::Event),
            last_used_unix_ms: 0,
            ..blank_life()
        };
        assert!((effective(&life, 14 * DAY) - 0.5).abs() < 1e-6);
        assert!((effective(&life, 28 * DAY) - 0.25).abs() < 1e-6);
        assert_eq!(effective(&life, -DAY), 1.0, "the clock was set back");
        let identity = Life { half_life_days: half_life_days(Role::Identity), ..life };
        assert_eq!(effective(&identity, 100 * 365 * DAY), 1.0);
        let distrusted = Life { trust: 20, ..life };
        assert!((effective(&distrusted, 0) - 0.2).abs() < 1e-6);
    }
}
