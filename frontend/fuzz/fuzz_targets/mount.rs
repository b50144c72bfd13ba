//! `--mount=`: with and without expansion.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nacre_frontend::flag::{check_mount, parse_mount, parse_mount_with};
use nacre_frontend::word::Lexer;

fuzz_target!(|data: &[u8]| {
    let text = String::from_utf8_lossy(data);
    let checked = check_mount(&text);
    if let Ok(mount) = parse_mount(&text) {
        assert!(checked.is_ok(), "read although refused");
        assert!(mount.target != Some(String::new()), "an empty target is none");
    }
    let vars = [("A".to_owned(), "x,y=\"z".to_owned())];
    let lexer = Lexer::new('\\');
    let mount = parse_mount_with(&text, |value| lexer.word(value, vars.as_slice()).map(|word| word.value));
    if let Err(error) = mount {
        assert!(!error.to_string().is_empty());
        error.help();
    }
});
