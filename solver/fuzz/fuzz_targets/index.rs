//! A layer index; magic, version and trailer are put around the bytes, so that what lies behind them is reached.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nacre_solver::tree::index::{content_key, decode, encode};
use nacre_solver::tree::{Kind, Node};

fuzz_target!(|data: &[u8]| {
    let _ = decode(data);
    let mut bytes = b"nacreidx\x01".to_vec();
    bytes.extend_from_slice(data);
    let trailer = blake3::hash(&bytes);
    bytes.extend_from_slice(trailer.as_bytes());
    let Ok(tree) = decode(&bytes) else { return };
    let known = |node: &Node| !matches!(node.entry.kind, Kind::File { digest: None, .. });
    let complete = tree.iter().all(|node| known(&node));
    if complete {
        let again = encode(&tree);
        assert_eq!(decode(&again).expect("what was read can be stored").len(), tree.len());
        content_key(&tree);
    }
});
