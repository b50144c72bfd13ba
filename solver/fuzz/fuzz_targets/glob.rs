//! A pattern, a NUL, and a name; against a matcher that tries everything.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nacre_solver::tree::glob::{Glob, has_meta};

/// Tries every length for every star; only patterns of stars, question marks and plain ASCII.
fn naive(pattern: &[u8], name: &[u8]) -> bool {
    match pattern.split_first() {
        None => name.is_empty(),
        Some((b'*', rest)) => {
            let reach = name.iter().position(|&byte| byte == b'/').unwrap_or(name.len());
            (0..=reach).any(|skip| naive(rest, &name[skip..]))
        }
        Some((b'?', rest)) => name.split_first().is_some_and(|(&first, name)| first != b'/' && naive(rest, name)),
        Some((plain, rest)) => name.split_first().is_some_and(|(first, name)| first == plain && naive(rest, name)),
    }
}

fuzz_target!(|data: &[u8]| {
    let split = data.iter().position(|&byte| byte == 0).unwrap_or(data.len());
    let (pattern, name) = (&data[..split], data.get(split + 1..).unwrap_or_default());
    let meta = has_meta(pattern);
    let Ok(glob) = Glob::new(pattern) else { return };
    let found = glob.matches(name);
    if !meta && !pattern.contains(&b'\\') {
        assert_eq!(found, pattern == name, "plain text matches itself");
    }
    let simple = pattern.iter().all(|byte| byte.is_ascii() && !matches!(byte, b'[' | b'\\'));
    let stars = pattern.iter().filter(|&&byte| byte == b'*').count();
    if simple && name.is_ascii() && stars <= 4 && name.len() <= 24 {
        assert_eq!(found, naive(pattern, name), "{} on {}", pattern.escape_ascii(), name.escape_ascii());
    }
});
