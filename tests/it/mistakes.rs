//! Wrong input: clear message, documented exit code.

use crate::story::Build;

#[test]
fn a_missing_dockerfile() {
    Build::new().file("a", "x").fails_with(3, &["Dockerfile"]);
}

#[test]
fn an_unknown_instruction_shows_the_place_and_a_guess() {
    let build = Build::new().dockerfile("FROM scratch\n\nCOPPY a /\n").file("a", "x");
    build.fails_with(3, &["unknown instruction `COPPY`", " --> Dockerfile:3:1", "3 | COPPY a /", "^^^^^", "`COPY`"]);
}

#[test]
fn all_mistakes_of_a_file_at_once() {
    let build = Build::new().dockerfile("FROM scratch\nCOPPY a /\nCOPY\nUSER\n");
    let ended = build.fails_with(3, &["3 mistakes in Dockerfile", "COPPY"]);
    assert_eq!(ended.stderr.matches("error: ").count(), 3, "{}", ended.stderr);
}

#[test]
fn an_unknown_stage() {
    Build::new().dockerfile("FROM scratch AS base\n").flag("--target=bass").fails_with(3, &["bass"]);
}

#[test]
fn a_source_that_is_not_in_the_context() {
    let build = Build::new().dockerfile("FROM scratch\nCOPY missing.txt /\n");
    build.fails_with(3, &["missing.txt", " --> Dockerfile:2"]);
}

#[test]
fn a_failing_step_shows_code_line_stage_and_output() {
    let build = Build::new().dockerfile("FROM busybox AS tools\nRUN echo error: lost; echo found >&2; exit 42\n");
    let ended = build.fails_with(4, &["exit code 42", "stage tools", " --> Dockerfile:2:1"]);
    assert!(ended.stderr.contains("> found"), "{}", ended.stderr);
    assert_eq!(ended.stdout(), "");
}

#[test]
fn a_killed_step_names_the_signal() {
    let build = Build::new().dockerfile("FROM busybox\nRUN sh -c 'kill -9 $$'; exit $?\n");
    build.fails_with(4, &["137"]);
}

#[test]
fn an_unreachable_registry() {
    // Port 1 on loopback refuses at once.
    let build = Build::new().dockerfile("FROM 127.0.0.1:1/nothing:1\nRUN true\n");
    build.fails_with(5, &["127.0.0.1:1/nothing"]);
}

#[test]
fn an_output_that_cannot_be_written() {
    let build = Build::new().dockerfile("FROM scratch\nCOPY a /\n").file("a", "x");
    let build = build.flag("--output=type=oci,dest=/proc/nowhere/x.tar");
    build.fails_with(7, &["/proc/nowhere"]);
}

#[test]
fn a_store_that_cannot_be_made() {
    let build = Build::new().dockerfile("FROM scratch\nCOPY a /\n").file("a", "x");
    std::fs::write(build.store(), "a file").expect("a file of our own");
    build.fails_with(7, &["store"]);
}
