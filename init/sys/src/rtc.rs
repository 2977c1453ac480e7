//! The clock on the board, which goes on without power.
//!
//! Source: rtc(4), linux/rtc.h. It keeps UTC.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

/// `_IOW('p', 0x0a, struct rtc_time)`
const RTC_SET_TIME: libc::Ioctl = 0x4024_700a;

/// `struct rtc_time`
#[repr(C)]
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct RtcTime {
    sec: libc::c_int,
    min: libc::c_int,
    hour: libc::c_int,
    mday: libc::c_int,
    /// From 0.
    mon: libc::c_int,
    /// Since 1900.
    year: libc::c_int,
    wday: libc::c_int,
    yday: libc::c_int,
    isdst: libc::c_int,
}

/// Sets the board's clock.
pub fn set(device: &Path, unix_s: u64) -> io::Result<()> {
    let time = civil(unix_s).ok_or(io::ErrorKind::InvalidInput)?;
    let file = OpenOptions::new().write(true).open(device)?;
    // SAFETY: RTC_SET_TIME reads one rtc_time through the pointer. `RtcTime` has that struct's layout (repr(C),
    // nine ints), is initialised, and lives during the call; `file` keeps the descriptor open.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), RTC_SET_TIME, &raw const time) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Year, month and day from a count of days, by the rules of the Gregorian calendar
/// (Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms", civil_from_days).
fn civil(unix_s: u64) -> Option<RtcTime> {
    let (days, in_day) = (i64::try_from(unix_s / 86_400).ok()?, unix_s % 86_400);
    // Days since 1 March of year 0; eras of 400 years have equal lengths.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = (month_from_march + 2) % 12;
    let year = era * 400 + year_of_era + i64::from(month < 2);
    let int = |value: i64| libc::c_int::try_from(value).ok();
    let part = |value: u64| libc::c_int::try_from(value).ok();
    Some(RtcTime {
        sec: part(in_day % 60)?,
        min: part(in_day / 60 % 60)?,
        hour: part(in_day / 3600)?,
        mday: int(day)?,
        mon: int(month)?,
        year: int(year - 1900)?,
        // The kernel works these out itself.
        ..RtcTime::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(unix_s: u64) -> [libc::c_int; 6] {
        let time = civil(unix_s).unwrap();
        [time.year + 1900, time.mon + 1, time.mday, time.hour, time.min, time.sec]
    }

    #[test]
    fn known_instants_have_their_dates() {
        // `date -u -d @<n>`
        assert_eq!(told(0), [1970, 1, 1, 0, 0, 0]);
        assert_eq!(told(951_782_399), [2000, 2, 28, 23, 59, 59]);
        assert_eq!(told(951_782_400), [2000, 2, 29, 0, 0, 0]);
        assert_eq!(told(1_709_251_199), [2024, 2, 29, 23, 59, 59]);
        assert_eq!(told(1_767_225_599), [2025, 12, 31, 23, 59, 59]);
        assert_eq!(told(4_107_542_400), [2100, 3, 1, 0, 0, 0]);
    }
}
