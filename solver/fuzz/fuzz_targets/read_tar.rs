//! A layer's tar. What was read is an index, and written again it is read as the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nacre_solver::tree::index::{content_key, decode, encode};
use nacre_solver::tree::layer::{Limits, NoSink, read_tar};
use nacre_solver::tree::{Kind, Tree};

/// Makes the check sums of headers right, which random changes never are.
fn with_check_sums(data: &[u8]) -> Vec<u8> {
    let mut data = data.to_vec();
    for block in data.chunks_exact_mut(512).filter(|block| block[257..].starts_with(b"ustar")) {
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
        block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    }
    data
}

fuzz_target!(|data: &[u8]| {
    let data = with_check_sums(data);
    let limits = Limits { entries: 10_000, file_bytes: 1 << 24, metadata_bytes: 1 << 24, ..Limits::default() };
    let Ok(tree) = read_tar(&mut &data[..], &mut NoSink, &limits) else { return };
    for node in tree.iter() {
        if let Kind::File { digest, .. } = node.entry.kind {
            assert!(digest.is_some(), "a file without digest");
        }
    }
    let bytes = encode(&tree);
    let again = decode(&bytes).expect("what was read can be stored");
    assert!(again == tree, "the index tells all");
    assert_eq!(content_key(&again), content_key(&tree));
    let flat = Tree::default().apply(&tree);
    assert!(flat.iter().all(|node| node.entry.kind != Kind::Whiteout), "nothing left to hide");
    assert!(flat.apply(&tree).len() <= flat.len() + tree.len());
    for node in tree.iter().take(50) {
        flat.resolve(&node.entry.path, true);
    }
});
