//! An ignore file, a NUL, and a path: parsed, compiled, and asked in both ways.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nacre_solver::tree::ignore::{Matcher, parse};

fuzz_target!(|data: &[u8]| {
    let split = data.iter().position(|&byte| byte == 0).unwrap_or(data.len());
    let patterns = parse(&data[..split]);
    assert!(patterns.iter().all(|pattern| !pattern.contains('\n')), "a pattern over two lines");
    let Ok(matcher) = Matcher::new(&patterns) else { return };
    let path: Vec<u8> = data[split..].iter().map(|&byte| if byte == 0 { b'/' } else { byte }).collect();
    let parts: Vec<&[u8]> =
        path.split(|&byte| byte == b'/').filter(|part| !matches!(*part, b"" | b"." | b"..")).take(20).collect();
    let mut verdict = matcher.root();
    let mut pruned = false;
    for depth in 1..=parts.len() {
        let path = parts[..depth].join(&b'/');
        verdict = matcher.verdict(&verdict, &path);
        assert!(!pruned || verdict.excluded(), "included below a directory that may be skipped");
        pruned |= verdict.excluded() && matcher.can_prune(&path);
        let alone = matcher.excluded(&path);
        // With no `!` there is no order to get wrong: both ways must agree.
        if patterns.iter().all(|pattern| !pattern.starts_with('!')) {
            assert_eq!(alone, verdict.excluded(), "{patterns:?} on {}", path.escape_ascii());
        }
    }
});
