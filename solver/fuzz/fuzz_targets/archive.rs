//! An archive for ADD: its kind, and what comes out of it. No name from it may reach the disk.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nacre_solver::tree::Kind;
use nacre_solver::tree::archive::{detect, unpack};
use nacre_solver::tree::layer::Limits;

fuzz_target!(|data: &[u8]| {
    detect(data);
    let dir = tempfile::Builder::new().prefix("fuzz").tempdir_in("/dev/shm").expect("memory");
    let archive = dir.path().join("archive");
    let staging = dir.path().join("staging");
    std::fs::write(&archive, data).expect("written");
    std::fs::create_dir(&staging).expect("made");
    let limits = Limits { entries: 100, file_bytes: 1 << 22, metadata_bytes: 1 << 22, ..Limits::default() };
    let Ok(Some(tree)) = unpack(&archive, &staging, &limits) else { return };
    for node in tree.iter() {
        let path = &node.entry.path;
        assert!(!path.is_empty() && !path.contains(&0));
        assert!(path.split(|&byte| byte == b'/').all(|part| !matches!(part, b"" | b"." | b"..")));
        assert!(node.entry.kind != Kind::Whiteout);
    }
    for file in std::fs::read_dir(&staging).expect("listed") {
        let name = file.expect("listed").file_name();
        assert!(name.to_string_lossy().bytes().all(|byte| byte.is_ascii_digit()), "{name:?}");
    }
    assert_eq!(std::fs::read_dir(dir.path()).expect("listed").count(), 2, "something beside");
});
