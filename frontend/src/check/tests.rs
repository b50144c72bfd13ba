//! Every rule: where it fires and where it does not.

use super::*;
use crate::image_config::ImageConfig;
use crate::llb::Platform;
use crate::lower::{BaseConfigs, BaseImage, Lowered, Options, lower};
use crate::parser;
use crate::source::SourceFile;

fn host() -> Platform {
    Platform { os: "linux".to_owned(), architecture: "amd64".to_owned(), variant: String::new() }
}

/// All findings. Bases are images for amd64 with PATH; `other` is one for arm64.
fn findings(text: &str, options: &Options) -> (SourceFile, Vec<Warning>) {
    let file = parser::parse(SourceFile::new("Dockerfile", text)).unwrap_or_else(|failure| panic!("{failure:?}"));
    let mut bases = BaseConfigs::new();
    loop {
        let (lowered, warnings) = lower(&file, options, &bases).unwrap_or_else(|found| panic!("{text}\n{found:?}"));
        let Lowered::NeedsBases(missing) = lowered else { return (file.source, warnings) };
        for (request, _) in missing {
            let other = format!("{:?}", request.source).contains("other");
            let config = ImageConfig {
                os: "linux".to_owned(),
                architecture: if other { "arm64" } else { "amd64" }.to_owned(),
                ..ImageConfig::default()
            };
            bases.insert(request, BaseImage { config, digest: None });
        }
    }
}

fn options() -> Options {
    Options {
        all_stages: true,
        build_args: [("IMAGE".to_owned(), Some("given".to_owned()))].into(),
        ignored: Some(IgnoreRules::new(|path| path == "secret.txt" || path.starts_with("tmp/"))),
        ..Options::new(host())
    }
}

/// The findings of one rule, each as its line and the text that it marks.
fn marks(rule: Rule, text: &str) -> Vec<(u32, String)> {
    let text = match rule.experimental() {
        true => format!("# check=experimental={}\n{text}", rule.name()),
        false => text.to_owned(),
    };
    let (source, warnings) = findings(&text, &options());
    let first = u32::from(rule.experimental());
    let warnings = warnings.iter().filter(|one| one.rule == rule);
    let mark = |one: &Warning| (source.line(one.span.start) - first, text[one.span.start..one.span.end].to_owned());
    warnings.map(mark).collect()
}

/// Every rule has a row here; each row's file is quiet when the rule is skipped.
const FIRES: &[(Rule, &str, &[(u32, &str)])] = &[
    (Rule::StageNameCasing, "FROM scratch AS Base\n", &[(1, "Base")]),
    (Rule::StageNameCasing, "FROM scratch AS a\nFROM scratch AS bB\n", &[(2, "bB")]),
    (Rule::FromAsCasing, "FROM scratch as b\n", &[(1, "as")]),
    (Rule::FromAsCasing, "FROM scratch As b\n", &[(1, "As")]),
    (Rule::FromAsCasing, "from scratch AS b\n", &[(1, "AS")]),
    (Rule::FromAsCasing, "FROM scratch \\\n  as b\n", &[(2, "as")]),
    (Rule::NoEmptyContinuation, "FROM a\nRUN a \\\n\n  b\n", &[(3, "")]),
    (Rule::NoEmptyContinuation, "FROM a\nRUN a \\\n  # why\n \n\n  b\nRUN c\n", &[(4, "")]),
    (Rule::NoEmptyContinuation, "FROM a\nRUN a \\\n\n <<E\n\nE\n", &[(3, "")]),
    (Rule::ConsistentInstructionCasing, "FROM a\nrun b\nRUN c\n", &[(2, "run")]),
    (Rule::ConsistentInstructionCasing, "from a\nrun b\nRun c\n", &[(3, "Run")]),
    (Rule::ConsistentInstructionCasing, "FROM a\nrun b\n", &[(2, "run")]),
    (Rule::DuplicateStageName, "FROM a AS b\nFROM a AS c\nFROM a AS b\n", &[(3, "b")]),
    (Rule::DuplicateStageName, "FROM a AS b\nFROM a AS B\n", &[(2, "B")]),
    (Rule::ReservedStageName, "FROM a AS scratch\nFROM a AS context\n", &[(1, "scratch"), (2, "context")]),
    (Rule::JSONArgsRecommended, "FROM a\nCMD echo x\n", &[(2, "echo x")]),
    (Rule::JSONArgsRecommended, "FROM a\nENTRYPOINT run it\n", &[(2, "run it")]),
    (Rule::MaintainerDeprecated, "FROM a\nMAINTAINER me\n", &[(2, "MAINTAINER")]),
    (Rule::UndefinedArgInFrom, "ARG TAG=1\nFROM a:x$TAGS\n", &[(2, "$TAGS")]),
    (Rule::UndefinedArgInFrom, "FROM --platform=linux/amd64$X a\n", &[(1, "$X")]),
    (Rule::WorkdirRelativePath, "FROM a\nWORKDIR app\n", &[(2, "app")]),
    (Rule::WorkdirRelativePath, "FROM a\nARG P=q\nWORKDIR ${P}\n", &[(3, "${P}")]),
    (Rule::UndefinedVar, "FROM a\nCOPY $X /\n", &[(2, "$X")]),
    (Rule::UndefinedVar, "FROM a\nENV A=b\nLABEL x=\"1 ${AB:-} $AB\" y=2\n", &[(3, "${AB")]),
    (Rule::UndefinedVar, "ARG G=1\nFROM a\nWORKDIR /$G\n", &[(3, "$G")]),
    (Rule::UndefinedVar, "FROM a\nRUN --mount=type=cache,target=/x$X true\n", &[(2, "$X")]),
    (Rule::MultipleInstructionsDisallowed, "FROM a\nCMD [\"x\"]\nCMD [\"y\"]\n", &[(2, "CMD")]),
    (Rule::MultipleInstructionsDisallowed, "FROM a\nENTRYPOINT [\"x\"]\nENTRYPOINT [\"y\"]\n", &[(2, "ENTRYPOINT")]),
    (
        Rule::MultipleInstructionsDisallowed,
        "FROM a\nHEALTHCHECK NONE\nHEALTHCHECK NONE\nHEALTHCHECK CMD x\n",
        &[(2, "HEALTHCHECK"), (3, "HEALTHCHECK")],
    ),
    (Rule::LegacyKeyValueFormat, "FROM a\nENV A b c\nLABEL x y\n", &[(2, "A b c"), (3, "x y")]),
    (Rule::RedundantTargetPlatform, "FROM --platform=${TARGETPLATFORM} a\n", &[(1, "${TARGETPLATFORM}")]),
    (Rule::SecretsUsedInArgOrEnv, "FROM a\nARG API_KEY\nENV A=b PASSWORD=c\n", &[(2, "API_KEY"), (3, "PASSWORD")]),
    (Rule::InvalidDefaultArgInFrom, "ARG IMAGE\nFROM $IMAGE-x\n", &[(2, "$IMAGE-x")]),
    (Rule::FromPlatformFlagConstDisallowed, "FROM --platform=linux/arm64 a\n", &[(1, "linux/arm64")]),
    (Rule::FromPlatformFlagConstDisallowed, "FROM --platform=linux/arm64 a AS amd64\n", &[(1, "linux/arm64")]),
    (Rule::CopyIgnoredFile, "FROM a\nCOPY a ./secret.txt /\nADD /tmp/x /\n", &[(2, "./secret.txt"), (3, "/tmp/x")]),
    (Rule::InvalidDefinitionDescription, "# other words\nFROM a AS b\n", &[(1 + 1, "FROM a AS b")]),
    (Rule::InvalidDefinitionDescription, "FROM a AS b\n# other words\nARG X=1\n", &[(3, "ARG X=1")]),
    (Rule::ExposeProtoCasing, "FROM a\nEXPOSE 80/tcp 81/UDP\n", &[(2, "81/UDP")]),
    (Rule::ExposeInvalidFormat, "FROM a\nEXPOSE 80 127.0.0.1:80:80 81:81\n", &[(2, "127.0.0.1:80:80"), (2, "81:81")]),
    (Rule::InvalidBaseImagePlatform, "FROM other\n", &[(1, "FROM other")]),
];

#[test]
fn every_rule_fires() {
    let mut seen = BTreeSet::new();
    for (rule, text, expected) in FIRES {
        seen.insert(*rule);
        let expected: Vec<(u32, String)> = expected.iter().map(|(line, mark)| (*line, (*mark).to_owned())).collect();
        assert_eq!(marks(*rule, text), expected, "{rule:?}\n{text}");
        let skipped = format!("# check=skip={};experimental=all\n{text}", rule.name());
        let (_, warnings) = findings(&skipped, &options());
        assert!(warnings.iter().all(|one| one.rule != *rule), "{skipped}");
    }
    assert_eq!(seen.len(), 22);
    assert_eq!(seen.len(), Rule::ALL.len());
}

#[test]
fn every_rule_knows_when_to_be_quiet() {
    let quiet: &[(Rule, &str)] = &[
        (Rule::StageNameCasing, "FROM scratch AS base_1.x\nFROM scratch\n"),
        (Rule::FromAsCasing, "FROM scratch AS b\nFROM b AS c\n"),
        (Rule::FromAsCasing, "from scratch as b\n"),
        (Rule::FromAsCasing, "From scratch as b\nFrom as\n"),
        (Rule::NoEmptyContinuation, "FROM a\nRUN a \\\n  # why\n  b\n\nRUN <<E\n\nE\n"),
        (Rule::NoEmptyContinuation, "FROM a\nONBUILD RUN <<E\n\nE\nCOPY <<E /x\n\n\nE\n"),
        (Rule::ConsistentInstructionCasing, "arg A=1\nFROM a\nRUN b\n"),
        (Rule::ConsistentInstructionCasing, "from a\nrun b\n"),
        (Rule::DuplicateStageName, "FROM a AS b\nFROM a AS c\nFROM a\nFROM a\n"),
        (Rule::ReservedStageName, "FROM scratch AS contexts\n"),
        (Rule::JSONArgsRecommended, "FROM a\nCMD [\"echo\"]\nENTRYPOINT []\nRUN x\nHEALTHCHECK CMD x\n"),
        (Rule::JSONArgsRecommended, "FROM a\nSHELL [\"sh\", \"-c\"]\nCMD x\n"),
        (Rule::MaintainerDeprecated, "FROM a\nLABEL maintainer=me\n"),
        (Rule::UndefinedArgInFrom, "ARG TAG\nFROM --platform=$BUILDPLATFORM a:${TAG:-1}\n"),
        (Rule::WorkdirRelativePath, "FROM a\nWORKDIR /x\nWORKDIR y\n"),
        (Rule::WorkdirRelativePath, "FROM a AS b\nWORKDIR /x\nFROM b\nWORKDIR y\n"),
        (Rule::UndefinedVar, "FROM a\nARG A\nENV B=$PATH\nLABEL x=$A y=$B z='$C' w=\\$D\nRUN echo $E\nCMD $F\n"),
        (Rule::UndefinedVar, "ARG G=1\nFROM a\nARG G\nWORKDIR /$G\n"),
        (Rule::MultipleInstructionsDisallowed, "FROM a AS b\nCMD [\"x\"]\nFROM b\nCMD [\"y\"]\nRUN x\nRUN y\n"),
        (Rule::LegacyKeyValueFormat, "FROM a\nENV A=b C=d\nLABEL \"x y\"=z\n"),
        (Rule::RedundantTargetPlatform, "FROM --platform=$BUILDPLATFORM a\nFROM --platform=linux/$TARGETARCH a\n"),
        (Rule::SecretsUsedInArgOrEnv, "FROM a\nARG PUBLIC_KEY TOKEN_FILE AUTHOR KEYBOARD\nENV MONKEY=1\n"),
        (Rule::InvalidDefaultArgInFrom, "ARG TAG\nFROM busybox:latest$TAG\n"),
        (Rule::FromPlatformFlagConstDisallowed, "FROM --platform=linux/arm64 a AS build-arm64\nFROM a\n"),
        (Rule::CopyIgnoredFile, "FROM a AS b\nCOPY . /\nCOPY --from=a secret.txt /\nCOPY <<secret.txt /\nsecret.txt\n"),
        (Rule::CopyIgnoredFile, "FROM a\nRUN --mount=type=bind,source=secret.txt,target=/s true\n"),
        (Rule::InvalidDefinitionDescription, "# b builds\nFROM a AS b\n# words\n\nARG X=1\n# Y is it\nARG X Y\n"),
        (Rule::InvalidDefinitionDescription, "# no name, no description\nFROM a\n"),
        (Rule::ExposeProtoCasing, "FROM a\nEXPOSE 80 81/udp 82-90/sctp\n"),
        (Rule::ExposeInvalidFormat, "FROM a\nEXPOSE 80 82-90/tcp\n"),
        (Rule::InvalidBaseImagePlatform, "FROM a\nFROM --platform=linux/arm64 other AS x\n"),
    ];
    let mut seen = BTreeSet::new();
    for (rule, text) in quiet {
        seen.insert(*rule);
        assert_eq!(marks(*rule, text), [], "{rule:?}\n{text}");
    }
    assert_eq!(seen.len(), Rule::ALL.len());
}

#[test]
fn names_are_those_that_directives_use() {
    let names: Vec<&str> = Rule::ALL.iter().map(|rule| rule.name()).collect();
    let expected = "StageNameCasing FromAsCasing NoEmptyContinuation ConsistentInstructionCasing DuplicateStageName \
                    ReservedStageName JSONArgsRecommended MaintainerDeprecated UndefinedArgInFrom WorkdirRelativePath \
                    UndefinedVar MultipleInstructionsDisallowed LegacyKeyValueFormat RedundantTargetPlatform \
                    SecretsUsedInArgOrEnv InvalidDefaultArgInFrom FromPlatformFlagConstDisallowed CopyIgnoredFile \
                    InvalidDefinitionDescription ExposeProtoCasing ExposeInvalidFormat InvalidBaseImagePlatform";
    assert_eq!(names, expected.split_whitespace().collect::<Vec<_>>());
    for rule in Rule::ALL {
        assert_eq!(Rule::named(rule.name()), Some(*rule));
    }
}

#[test]
fn unreachable_stages_are_checked_only_on_request() {
    let text = "FROM a AS b\nCMD x\nFROM a\nCMD [\"y\"]\n";
    assert_eq!(findings(text, &options()).1.len(), 1);
    assert_eq!(findings(text, &Options::new(host())).1, []);
}

#[test]
fn the_build_arg_takes_the_place_of_the_directive() {
    let text = "# check=skip=all\nFROM a\nCMD x\n";
    assert_eq!(findings(text, &options()).1, []);
    let arg = |value: &str| {
        let args = [("BUILDKIT_DOCKERFILE_CHECK".to_owned(), Some(value.to_owned()))].into();
        Options { build_args: args, ..options() }
    };
    assert_eq!(findings(text, &arg("skip=StageNameCasing")).1.len(), 1);
    let file = parser::parse(SourceFile::new("Dockerfile", "FROM scratch\nCMD x\n")).expect("parses");
    let failed = lower(&file, &arg("error=true"), &BaseConfigs::new()).expect_err("a finding is an error");
    assert_eq!(failed.len(), 1);
    assert!(lower(&file, &arg("error=true;skip=all"), &BaseConfigs::new()).is_ok());
}

/// A base nobody could ask: what may come from it is not called undefined.
#[test]
fn unknown_bases_are_trusted() {
    let file =
        parser::parse(SourceFile::new("Dockerfile", "FROM a\nWORKDIR $HOME\nCMD x\nEXPOSE 1:1\n")).expect("parses");
    let options = Options { unknown_bases: true, ..options() };
    let (lowered, warnings) = lower(&file, &options, &BaseConfigs::new()).expect("lowers");
    assert!(matches!(lowered, Lowered::Graph(_)));
    let rules: Vec<Rule> = warnings.iter().map(|one| one.rule).collect();
    assert_eq!(rules, [Rule::WorkdirRelativePath, Rule::ExposeInvalidFormat]);
}

#[test]
fn secret_names() {
    fn check(name: &str, expected: bool) {
        assert_eq!(is_secret_name(name), expected, "{name}");
    }
    check("API_KEY", true);
    check("apikey", true);
    check("GITHUB_TOKEN", true);
    check("secret_MESSAGE", true);
    check("PUBLIC_KEY", false);
    check("TOKEN_FILE", false);
    check("KEYBOARD", false);
    check("monkey", false);
}

#[test]
fn selections() {
    fn check(text: &str, rule: Rule, expected: bool) {
        assert_eq!(Selection::parse(text).reports(rule), expected, "{text} {rule:?}");
    }
    check("", Rule::UndefinedVar, true);
    check("skip=UndefinedVar", Rule::UndefinedVar, false);
    check("skip=StageNameCasing, undefinedvar;error=true", Rule::UndefinedVar, false);
    check("skip=all", Rule::StageNameCasing, false);
    check("", Rule::InvalidDefinitionDescription, false);
    check("experimental=all", Rule::InvalidDefinitionDescription, true);
    check("experimental=InvalidDefinitionDescription;skip=all", Rule::InvalidDefinitionDescription, false);
    assert!(Selection::parse("skip=all;error=true").is_error());
}
