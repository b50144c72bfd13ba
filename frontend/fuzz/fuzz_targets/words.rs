//! Expansion of a word with every kind of lexer. The first byte chooses the lexer; NUL separates the text from values.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nacre_frontend::word::Lexer;

fuzz_target!(|data: &[u8]| {
    let Some((&choice, rest)) = data.split_first() else { return };
    let text = String::from_utf8_lossy(rest);
    let mut parts = text.split('\0');
    let text = parts.next().unwrap_or_default();
    let names = ["A", "B", "E", "long_name"];
    let vars: Vec<(String, String)> =
        names.iter().zip(parts).map(|(name, value)| (name.to_string(), value.to_owned())).collect();
    let bit = |at: u8| choice >> at & 1 == 1;
    let lexer = Lexer {
        escape: if bit(0) { '`' } else { '\\' },
        raw_quotes: bit(1),
        raw_escapes: bit(2),
        skip_process_quotes: bit(3),
        skip_unset_env: bit(4),
    };
    let word = lexer.word(text, vars.as_slice());
    let words = lexer.words(text, vars.as_slice());
    assert_eq!(word.as_ref().err(), words.as_ref().err(), "one way fails, the other does not");
    if let (Ok(word), Ok(words)) = (word, words) {
        assert!(words.iter().all(|word| !word.is_empty()), "an empty word");
        assert!(word.matched.is_disjoint(&word.unmatched), "set and not set");
        // An escape that is kept stands twice between double quotes.
        if !text.contains('$') && !lexer.raw_escapes {
            assert!(word.value.len() <= text.len(), "grew without a variable");
        }
    }
    nacre_frontend::line::HeredocMarker::parse(text);
    let _ = nacre_frontend::mode::parse(text).map(|mode| mode.apply(0o644, bit(5)));
    let _ = nacre_frontend::reference::Reference::parse(text);
    let _ = nacre_frontend::units::parse_duration(text);
    let _ = nacre_frontend::units::parse_size(text);
    let _ = nacre_frontend::units::parse_signal(text);
    let _ = nacre_frontend::lower::GitUrl::parse(text);
});
