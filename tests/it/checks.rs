//! Build checks, outline and targets; and what a failed step tells beyond its error.

use crate::story::Build;
use serde_json::Value;

const WARNED: &str = "\
# app is what runs
FROM scratch AS App
COPY secret.txt /
# VERSION to show
ARG VERSION=1
CMD run
";

fn warned() -> Build {
    Build::new().dockerfile(WARNED).file(".dockerignore", "secret*\n").file("secret.txt", "x")
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

#[test]
fn a_check_shows_rule_place_and_caret() {
    let ended = warned().flag("--check").fails_with(3, &["the checks found 3 warnings"]);
    let text = ended.stdout();
    assert!(text.starts_with("Check complete, 3 warnings found.\n"), "{text}");
    for words in [
        "(StageNameCasing)\n --> Dockerfile:2:17\n  |\n2 | FROM scratch AS App\n  |                 ^^^\n",
        "(CopyIgnoredFile)\n --> Dockerfile:3:6\n",
        "(JSONArgsRecommended)\n --> Dockerfile:6:5\n",
        "https://docs.docker.com/go/dockerfile/rule/json-args-recommended/",
    ] {
        assert!(text.contains(words), "{words}\n{text}");
    }
}

#[test]
fn a_check_without_findings_ends_with_0() {
    let build = Build::new().dockerfile("FROM scratch\nCOPY a /\n").flag("--call=check");
    assert_eq!(build.runs().stdout(), "Check complete, no warnings found.\n");
    let build = Build::new().dockerfile("# check=skip=all;error=true\nFROM scratch AS A\n").flag("--check");
    build.runs();
}

#[test]
fn a_check_as_json_has_the_members_of_docker() {
    let ended = warned().flag("--call=check,format=json").ends();
    assert_eq!(ended.code, Some(3));
    let answer = json(&ended.stdout());
    let first = &answer["warnings"][0];
    assert_eq!(first["ruleName"], "StageNameCasing");
    for name in ["description", "url", "detail"] {
        assert!(first[name].is_string(), "{first}");
    }
    assert_eq!(first["location"]["ranges"][0]["start"], json(r#"{"line": 2, "character": 16}"#));
    assert_eq!(answer["sources"][0]["fileName"], "Dockerfile");
    assert!(answer["sources"][0]["data"].as_str().is_some_and(|data| data.starts_with("IyBhcHAg")));

    let build = Build::new().dockerfile("FROM scratch\nRUM x\n").flag("--call=check,format=json");
    let answer = json(&build.fails_with(3, &["unknown instruction `RUM`"]).stdout());
    assert_eq!(answer["buildError"]["message"], "unknown instruction `RUM`");
    assert_eq!(answer["buildError"]["location"]["ranges"][0]["start"]["line"], 2);
}

#[test]
fn a_check_as_sarif_names_its_rules() {
    let log = json(&warned().flag("--call=check,format=sarif").ends().stdout());
    assert_eq!((log["version"].as_str(), log["runs"].as_array().map(Vec::len)), (Some("2.1.0"), Some(1)));
    let run = &log["runs"][0];
    let rules = run["tool"]["driver"]["rules"].as_array().expect("rules");
    assert_eq!(rules.len(), 22);
    let results = run["results"].as_array().expect("results");
    assert_eq!(results.len(), 3);
    for result in results {
        let index = usize::try_from(result["ruleIndex"].as_u64().expect("an index")).expect("a small one");
        assert_eq!(rules[index]["id"], result["ruleId"]);
        let region = &result["locations"][0]["physicalLocation"]["region"];
        assert!(region["startLine"].as_u64() >= Some(1) && region["startColumn"].as_u64() >= Some(1), "{region}");
    }
}

/// Port 1 on loopback refuses at once; nothing is said of what that image might set.
#[test]
fn a_check_goes_on_without_a_base() {
    let build = Build::new().dockerfile("FROM 127.0.0.1:1/gone:1\nWORKDIR $APP\nENV A b\n").flag("--check");
    let ended = build.fails_with(3, &["the checks found 2 warnings"]);
    assert!(ended.stderr.contains("warning: a base image is not looked at"), "{}", ended.stderr);
    assert!(ended.stdout().contains("(LegacyKeyValueFormat)"), "{}", ended.stdout());
    assert!(!ended.stdout().contains("UndefinedVar"), "{}", ended.stdout());
}

#[test]
fn checks_ask_the_base() {
    let build =
        Build::new().dockerfile("FROM --platform=linux/s390x busybox AS a\nENV P=$PATH Q=$NOPE\n").flag("--check");
    let text = build.fails_with(3, &[]).stdout();
    assert!(text.contains("variable `$NOPE`") && !text.contains("variable `$PATH`"), "{text}");
    assert!(text.contains("(InvalidBaseImagePlatform)"), "{text}");
}

#[test]
fn findings_become_errors_on_request() {
    let build = Build::new().dockerfile("# check=error=true\nFROM scratch AS A\nCOPY a /\n").file("a", "x");
    build.fails_with(3, &["(StageNameCasing)", "check=skip=StageNameCasing"]);
    let build = Build::new().dockerfile("FROM scratch AS A\nCOPY a /\n").file("a", "x");
    build.flag("--build-arg=BUILDKIT_DOCKERFILE_CHECK=error=true").fails_with(3, &["(StageNameCasing)"]);
}

#[test]
fn a_build_shows_its_findings_behind_the_steps() {
    let text = Build::new().dockerfile("FROM scratch AS A\nCOPY a /\nCMD x\n").file("a", "x").runs().stderr;
    let finding = text.find("warning: stage name `A` should be lower case (StageNameCasing)\n --> Dockerfile:1:17");
    assert!(finding > text.find("DONE") && finding.is_some(), "{text}");
    assert!(text.contains("\n2 warnings found\n"), "{text}");
}

#[test]
fn outline_and_targets() {
    let text = warned().flag("--call=outline").runs().stdout();
    let expected = "\
TARGET:        app
DESCRIPTION:   is what runs

BUILD ARG   VALUE   DESCRIPTION
VERSION     1       to show
";
    assert_eq!(text, expected);
    let outline = json(&warned().flag("--call=outline,format=json").flag("--build-arg=VERSION=2").runs().stdout());
    assert_eq!((&outline["name"], &outline["args"][0]["value"]), (&Value::from("app"), &Value::from("2")));

    let text = warned().flag("--call=targets").runs().stdout();
    assert_eq!(text, "TARGET          BASE      DESCRIPTION\napp (default)   scratch   is what runs\n");
    let targets = json(&warned().flag("--call=targets,format=json").runs().stdout());
    assert_eq!(
        (&targets["targets"][0]["name"], &targets["targets"][0]["default"]),
        (&Value::from("app"), &Value::from(true))
    );
    warned().flag("--call=targets,format=sarif").fails_with(2, &["no SARIF"]);
}

#[test]
fn a_missing_source_is_explained() {
    let build = Build::new().file("src/app.py", "x").file("secret.txt", "x").file(".dockerignore", "secret*\n");
    let caret = "\n  |        ^^^^^^\n";
    let check = |line: &str, words: &[&str]| {
        build.write("Dockerfile", &format!("FROM scratch\nCOPY {line}\n"));
        build.fails_with(3, words);
    };
    check(". app.py /", &["/app.py: not found", " --> Dockerfile:2:8", caret, "did you mean `src/app.py`?"]);
    check("src/apy.py /", &["did you mean `src/app.py`?"]);
    check("secret.txt /", &["`secret.txt` is there, but .dockerignore excludes it"]);
    check("../etc/passwd /", &["/etc/passwd: not found", "paths are those below the build context"]);
}

#[test]
fn the_ignore_file_is_shown() {
    let build = Build::new().dockerfile("FROM scratch\nCOPY . /\n").file(".dockerignore", "a\n# b\n !\n");
    build.fails_with(3, &["illegal exclusion pattern", " --> .dockerignore:3:2", "put a pattern behind `!`"]);
}

#[test]
fn a_step_that_lacks_something_says_what_to_give() {
    let build = Build::new().dockerfile("FROM busybox\nRUN --mount=type=secret,id=tok,required true\n");
    build.fails_with(4, &["secret `tok`", " --> Dockerfile:2:13", "`--secret id=tok,src=FILE`"]);
    let build = Build::new().dockerfile("FROM busybox\nUSER apache\nRUN true\n");
    build.fails_with(4, &["apache", " --> Dockerfile:2:6", "make user `apache` in an earlier step"]);
    let build = Build::new().dockerfile("FROM busybox AS tools\nFROM busybox\nCOPY --from=tools /nope /\n");
    build.fails_with(3, &["/nope: not found", " --> Dockerfile:3:19"]);
    let build = Build::new().dockerfile("FROM busybox\nWORKDIR /etc/passwd/x\n");
    build.fails_with(3, &[" --> Dockerfile:2:9", "is a file in the image"]);
}

#[test]
fn an_unknown_target_lists_the_stages() {
    let build = Build::new().dockerfile("FROM scratch AS base\nFROM base AS test\n");
    build.flag("--target=release").fails_with(3, &["the stages are `base`, `test`"]);
}

#[test]
fn an_image_that_looks_like_a_stage() {
    let build = Build::new().dockerfile("FROM busybox AS build\nRUN true\nFROM 127.0.0.1:1/x:1 AS a\n");
    build.fails_with(5, &["cannot use base image `127.0.0.1:1/x:1`", " --> Dockerfile:3:6"]);
}
