//! How numbers are written, decided once.
//!
//! Functions here return text for people, or read what people wrote. Quantities keep about three
//! significant digits, units stand after a space, and percentages follow the
//! style of the whole project: `75.3 %`. A number that is not finite is
//! written as `n/a`, `inf` or `-inf`, so that a broken run looks broken.

/// Bytes in binary units: `512 B`, `44.2 KiB`, `1.50 GiB`.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    scaled(n as f64, 1024.0, &UNITS).unwrap_or_else(|| format!("{n} B"))
}

/// Reads a number of bytes as people write it: `800MB` and the like are powers of 1000, `2GiB` and the like of 1024. The error
/// says what is expected.
pub fn parse_bytes(text: &str) -> Result<usize, String> {
    const EXPECTED: &str = "expected a number of bytes, such as 800000000, 800MB or 2GiB";
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor: f64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kb" => 1e3,
        "m" | "mb" => 1e6,
        "g" | "gb" => 1e9,
        "t" | "tb" => 1e12,
        "ki" | "kib" => 1024.0,
        "mi" | "mib" => 1024.0 * 1024.0,
        "gi" | "gib" => 1024.0 * 1024.0 * 1024.0,
        "ti" | "tib" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
        _ => return Err(EXPECTED.into()),
    };
    let bytes = number.parse::<f64>().map_err(|_| EXPECTED)? * factor;
    if (1.0..1e18).contains(&bytes) { Ok(bytes as usize) } else { Err(EXPECTED.into()) }
}

/// A count in decimal units: `950`, `12.3 K`, `1.20 M`.
pub fn count(n: u64) -> String {
    scaled(n as f64, 1000.0, &["K", "M", "G", "T", "P", "E"]).unwrap_or_else(|| n.to_string())
}

/// A count to the last digit, in groups of three: `16,384`.
pub fn exact(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Tokens per second: `87.0 tok/s`, `12.3 K tok/s`.
pub fn rate(per_second: f64) -> String {
    let number = if per_second < 1000.0 || !per_second.is_finite() {
        significant(per_second)
    } else {
        count(per_second.round() as u64)
    };
    format!("{number} tok/s")
}

/// A length of time: `0.8 s`, `42 s`, `1 m 23 s`, `2 h 05 m`, `3 d 04 h`.
pub fn duration(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "n/a".to_owned();
    }
    if seconds < 9.95 {
        return format!("{seconds:.1} s");
    }
    let whole = seconds.round() as u64;
    match whole {
        0..60 => format!("{whole} s"),
        60..3_600 => format!("{} m {:02} s", whole / 60, whole % 60),
        3_600..86_400 => format!("{} h {:02} m", whole / 3_600, whole % 3_600 / 60),
        _ => format!("{} d {:02} h", whole / 86_400, whole % 86_400 / 3_600),
    }
}

/// A fraction as a percentage: `0.753` is `75.3 %`.
///
/// A fraction that is almost but not exactly 0 or 1 gets a second decimal, lest
/// 99.97 % read as all of it.
pub fn percent(fraction: f64) -> String {
    if !fraction.is_finite() {
        return not_finite(fraction);
    }
    let edge = fraction.abs().min((1.0 - fraction).abs());
    if edge > 0.0 && edge < 0.001 { format!("{:.2} %", fraction * 100.0) } else { format!("{:.1} %", fraction * 100.0) }
}

/// A relative change with its sign: `0.041` is `+4.1 %`.
pub fn change(fraction: f64) -> String {
    if !fraction.is_finite() {
        return not_finite(fraction);
    }
    // Adding zero turns -0.0 into 0.0.
    let tenths = (fraction * 1000.0).round() / 10.0 + 0.0;
    if tenths == 0.0 { "0.0 %".to_owned() } else { format!("{tenths:+.1} %") }
}

/// A compression ratio the paper's way: `4.05x` keeps one part in 4.05.
pub fn ratio(ratio: f64) -> String {
    if ratio.is_finite() { format!("{ratio:.2}x") } else { not_finite(ratio) }
}

/// A compression ratio in at most three characters, for a map: `4.1`, `12`.
pub fn short_ratio(ratio: f64) -> String {
    match ratio {
        r if !r.is_finite() => "?".to_owned(),
        r if r < 9.95 => format!("{r:.1}"),
        r => format!("{:.0}", r.min(999.0)),
    }
}

/// A compression ratio with the fraction removed, the way kvpress and its
/// leaderboard write it: `4.05x (75.3 % removed)`.
pub fn ratio_and_removed(value: f64) -> String {
    let removed = removed(value);
    if !removed.is_finite() {
        ratio(value)
    } else if removed < 0.0 {
        format!("{} ({} added)", ratio(value), percent(-removed))
    } else {
        format!("{} ({} removed)", ratio(value), percent(removed))
    }
}

/// The fraction that a compression ratio removes: `1 - 1 / ratio`.
pub fn removed(ratio: f64) -> f64 {
    1.0 - 1.0 / ratio
}

/// A divergence in nats, with more digits the smaller it is: `1.25`, `0.0412`.
pub fn nats(value: f64) -> String {
    let size = value.abs();
    if !value.is_finite() {
        not_finite(value)
    } else if size >= 1.0 {
        format!("{value:.2}")
    } else if size >= 0.1 {
        format!("{value:.3}")
    } else if size >= 0.0001 || size == 0.0 {
        format!("{value:.4}")
    } else {
        format!("{value:.1e}")
    }
}

/// A perplexity or a loss: `3.84`, `152.3`, `1.22e6`.
pub fn plain(value: f64) -> String {
    let size = value.abs();
    if !value.is_finite() {
        not_finite(value)
    } else if size < 100.0 {
        format!("{value:.2}")
    } else if size < 100_000.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.2e}")
    }
}

/// Scales `n` down by powers of `base`, or gives nothing if it needs no unit.
fn scaled(n: f64, base: f64, units: &[&str]) -> Option<String> {
    if n < base {
        return None;
    }
    let mut value = n;
    for (i, unit) in units.iter().enumerate() {
        value /= base;
        // Compare the rounded value: 999,999 is 1.00 M, not 1000 K.
        if value.round() < base || i + 1 == units.len() {
            return Some(format!("{} {unit}", significant(value)));
        }
    }
    None
}

/// Three significant digits, without an exponent.
fn significant(value: f64) -> String {
    if !value.is_finite() {
        not_finite(value)
    } else if value < 9.995 {
        format!("{value:.2}")
    } else if value < 99.95 {
        format!("{value:.1}")
    } else {
        format!("{value:.0}")
    }
}

fn not_finite(value: f64) -> String {
    if value.is_nan() { "n/a".to_owned() } else { format!("{value}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_in_the_units_that_people_write() {
        let cases = [("1", 1), ("800MB", 800_000_000), ("1.5 GB", 1_500_000_000), ("2GiB", 2 << 30), ("4Mi", 4 << 20)];
        for (text, wanted) in cases {
            assert_eq!(parse_bytes(text), Ok(wanted), "{text}");
        }
        for wrong in ["", "GB", "-1", "1..2", "5 apples", "0", "1e30", "nan", "99999999TB"] {
            assert!(parse_bytes(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn bytes_use_binary_units_and_three_digits() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1024), "1.00 KiB");
        assert_eq!(bytes(45_261), "44.2 KiB");
        assert_eq!(bytes(160 * 1024), "160 KiB");
        assert_eq!(bytes(1024 * 1024 - 1), "1.00 MiB");
        assert_eq!(bytes(u64::MAX), "16.0 EiB");
    }

    #[test]
    fn counts_never_round_up_to_a_thousand_of_a_unit() {
        assert_eq!(count(999), "999");
        assert_eq!(count(12_345), "12.3 K");
        assert_eq!(count(999_499), "999 K");
        assert_eq!(count(999_999), "1.00 M");
        assert_eq!(exact(7), "7");
        assert_eq!(exact(16_384), "16,384");
        assert_eq!(exact(1_234_567), "1,234,567");
    }

    #[test]
    fn durations_carry_over() {
        assert_eq!(duration(0.84), "0.8 s");
        assert_eq!(duration(9.96), "10 s");
        assert_eq!(duration(59.7), "1 m 00 s");
        assert_eq!(duration(83.0), "1 m 23 s");
        assert_eq!(duration(7_500.0), "2 h 05 m");
        assert_eq!(duration(273_600.0), "3 d 04 h");
        assert_eq!(duration(f64::NAN), "n/a");
    }

    #[test]
    fn percentages_do_not_hide_the_last_bit() {
        assert_eq!(percent(0.753), "75.3 %");
        assert_eq!(percent(1.0), "100.0 %");
        assert_eq!(percent(0.9997), "99.97 %");
        assert_eq!(percent(0.0002), "0.02 %");
        assert_eq!(percent(0.0), "0.0 %");
        assert_eq!(change(0.041), "+4.1 %");
        assert_eq!(change(-0.0123), "-1.2 %");
        assert_eq!(change(-0.0001), "0.0 %");
    }

    #[test]
    fn ratios_carry_what_was_removed_or_added() {
        assert_eq!(ratio_and_removed(4.05), "4.05x (75.3 % removed)");
        assert_eq!(ratio_and_removed(1.0), "1.00x (0.0 % removed)");
        assert_eq!(ratio_and_removed(0.8), "0.80x (25.0 % added)");
        assert_eq!(ratio_and_removed(f64::NAN), "n/a");
        assert_eq!(short_ratio(4.05), "4.0");
        assert_eq!(short_ratio(9.96), "10");
        assert_eq!(short_ratio(1e6), "999");
        assert_eq!(short_ratio(f64::NAN), "?");
    }

    #[test]
    fn small_and_broken_numbers_stay_visible() {
        assert_eq!(nats(1.254), "1.25");
        assert_eq!(nats(0.0412), "0.0412");
        assert_eq!(nats(0.0), "0.0000");
        assert_eq!(nats(3.2e-7), "3.2e-7");
        assert_eq!(plain(152.34), "152.3");
        assert_eq!(plain(1_216_000.0), "1.22e6");
        assert_eq!(plain(f64::INFINITY), "inf");
        assert_eq!(rate(87.04), "87.0 tok/s");
        assert_eq!(rate(12_345.0), "12.3 K tok/s");
        assert_eq!(rate(f64::INFINITY), "inf tok/s");
    }
}
