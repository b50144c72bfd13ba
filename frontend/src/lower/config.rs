//! Instructions that change variables and the image configuration.

use super::{At, StageLowering, text};
use crate::check::{Rule, is_secret_name};
use crate::diagnostic::{Diagnostic, Problem};
use crate::image_config::Healthcheck;
use crate::instruction::{Command as CommandLine, HealthcheckInstruction, Text};
use crate::llb::{MkdirOp, Op};
use crate::lower_problem::LowerProblem;
use crate::source::Span;
use crate::stage::problem;
use crate::word::Variables;
use std::rc::Rc;

impl StageLowering<'_, '_> {
    pub(super) fn arg(&mut self, at: &At<'_>, pairs: &[(Text, Option<Text>)]) -> Result<(), Diagnostic> {
        let mut words = vec!["ARG".to_owned()];
        for (name, default) in pairs {
            self.secret_name(at, "ARG", &name.value, name.span);
            let value = match (self.shared.build_args.get(&name.value), default) {
                (Some(value), _) => Some(value.clone()),
                (None, Some(default)) => Some(self.expand(at, default)?),
                (None, None) => self.shared.plan.global_args.get(&name.value).map(str::to_owned),
            };
            words.push(match &value {
                Some(value) => format!("{}={value}", name.value),
                None => name.value.clone(),
            });
            if let Some(value) = &value
                && !matches!(name.value.as_str(), "BUILDKIT_SBOM_SCAN_CONTEXT" | "BUILDKIT_SBOM_SCAN_STAGE")
            {
                Rc::make_mut(&mut self.state.env).set(&name.value, value.clone());
            }
            if !self.state.declared.contains(&name.value) {
                Rc::make_mut(&mut self.state.declared).insert(name.value.clone());
            }
            if !at.trigger {
                self.graph.outline.arg(at.instruction, name, default.is_some(), value.as_deref());
            }
            self.state.build_args.push((name.value.clone(), value));
        }
        self.commit(words.join(" "), true);
        Ok(())
    }

    /// Expands pairs with the variables from before the instruction.
    pub(super) fn expand_pairs(
        &mut self,
        at: &At<'_>,
        pairs: &[(Text, Text)],
    ) -> Result<Vec<(String, String)>, Diagnostic> {
        pairs.iter().map(|(key, value)| Ok((self.expand(at, key)?, self.expand(at, value)?))).collect()
    }

    pub(super) fn env(&mut self, at: &At<'_>, pairs: &[(Text, Text)]) -> Result<(), Diagnostic> {
        let expanded = self.expand_pairs(at, pairs)?;
        let mut words = vec!["ENV".to_owned()];
        for ((key, value), (written, _)) in expanded.into_iter().zip(pairs) {
            self.secret_name(at, "ENV", &key, written.span);
            words.push(format!("{key}={value}"));
            self.state.set_image_env(&key, &value);
            Rc::make_mut(&mut self.state.env).set(&key, value);
        }
        self.commit(words.join(" "), true);
        Ok(())
    }

    pub(super) fn label(&mut self, at: &At<'_>, pairs: &[(Text, Text)]) -> Result<(), Diagnostic> {
        let mut words = vec!["LABEL".to_owned()];
        for (key, value) in self.expand_pairs(at, pairs)? {
            words.push(format!("{key}={value}"));
            self.state.image.config.labels.insert(key, value);
        }
        self.commit(words.join(" "), true);
        Ok(())
    }

    pub(super) fn secret_name(&mut self, at: &At<'_>, keyword: &str, name: &str, span: Span) {
        if is_secret_name(name) {
            let message = format!("{keyword} `{name}` looks like a secret, and would stay readable in the image");
            self.report(Rule::SecretsUsedInArgOrEnv, at.instruction, at.trigger, span, message);
        }
    }

    /// Reports that an instruction replaces an earlier one of its stage.
    pub(super) fn only_once(&mut self, at: &At<'_>, keyword: &'static str) {
        // A trigger's own places mean nothing here; it stands where FROM does.
        let here = match at.trigger {
            true => self.shared.plan.stages[self.index].from.span,
            false => at.instruction.keyword.span,
        };
        if let Some(earlier) = self.seen.insert(keyword, here) {
            let message = format!("another {keyword} of this stage replaces this one");
            self.report(Rule::MultipleInstructionsDisallowed, at.instruction, at.trigger, earlier, message);
        }
    }

    /// Arguments of CMD and ENTRYPOINT; the shell form gets the shell.
    pub(super) fn command_line(&mut self, at: &At<'_>, keyword: &'static str, line: &CommandLine) -> Vec<String> {
        self.only_once(at, keyword);
        if line.exec_form {
            return line.args.clone();
        }
        let no_shell = self.state.image.config.shell.as_ref().is_none_or(Vec::is_empty);
        if no_shell && !self.state.base_unknown {
            let message = format!("{keyword} in shell form does not pass signals on; use the JSON form, or set SHELL");
            self.report(Rule::JSONArgsRecommended, at.instruction, at.trigger, line.span, message);
        }
        self.with_shell(line.args.join(" "))
    }

    pub(super) fn with_shell(&self, line: String) -> Vec<String> {
        let shell = self.state.image.config.shell.clone().filter(|shell| !shell.is_empty());
        let mut args = shell.unwrap_or_else(|| match self.state.image.os.as_str() {
            "windows" => ["cmd", "/S", "/C"].map(str::to_owned).to_vec(),
            _ => ["/bin/sh", "-c"].map(str::to_owned).to_vec(),
        });
        args.push(line);
        args
    }

    pub(super) fn workdir(&mut self, at: &At<'_>, path: &Text) -> Result<(), Diagnostic> {
        let written = self.expand(at, path)?;
        if !self.state.workdir_set && !written.starts_with('/') {
            let message = format!("WORKDIR `{written}` is relative to whatever the base image sets");
            self.report(Rule::WorkdirRelativePath, at.instruction, at.trigger, path.span, message);
        }
        self.state.workdir_set = true;
        let current = &self.state.image.config.working_dir;
        // An absolute path goes into the image as written, a relative one is joined and cleaned.
        let absolute = match written.as_str() {
            "" if current.starts_with('/') => current.clone(),
            path if path.starts_with('/') => path.to_owned(),
            path => text::absolute(current, path),
        };
        self.state.image.config.working_dir.clone_from(&absolute);
        let has_layer = absolute != "/";
        if has_layer {
            let env = Rc::clone(&self.state.env);
            let name = self.words(at.instruction, at.trigger, &self.shared.lexer, &env, "");
            let op = MkdirOp { path: text::absolute("/", &absolute), user: self.state.image.config.user.clone() };
            let inputs = vec![self.state.top];
            self.add(Op::Mkdir(op), inputs, name);
        }
        self.commit(format!("WORKDIR {absolute}"), !has_layer);
        Ok(())
    }

    pub(super) fn volume(&mut self, at: &At<'_>, paths: &[Text]) -> Result<(), Diagnostic> {
        let mut expanded = Vec::new();
        for path in paths {
            let value = self.expand(at, path)?;
            if value.is_empty() {
                return Err(Diagnostic::at(path.span, Problem::EmptyVolume));
            }
            expanded.push(value);
        }
        self.commit(format!("VOLUME [{}]", expanded.join(" ")), true);
        let empty = || serde_json::Value::Object(serde_json::Map::new());
        self.state.image.config.volumes.extend(expanded.into_iter().map(|path| (path, empty())));
        Ok(())
    }

    pub(super) fn healthcheck(&mut self, at: &At<'_>, check: &HealthcheckInstruction) {
        self.only_once(at, "HEALTHCHECK");
        let check = match check {
            HealthcheckInstruction::None => Healthcheck { test: vec!["NONE".to_owned()], ..Healthcheck::default() },
            HealthcheckInstruction::Cmd { command, interval, timeout, start_period, start_interval, retries } => {
                let kind = if command.exec_form { "CMD" } else { "CMD-SHELL" };
                Healthcheck {
                    test: std::iter::once(kind.to_owned()).chain(command.args.iter().cloned()).collect(),
                    interval: *interval,
                    timeout: *timeout,
                    start_period: *start_period,
                    start_interval: *start_interval,
                    retries: *retries,
                }
            }
        };
        self.commit(
            format!(
                "HEALTHCHECK {{Test:[{}] Interval:{} Timeout:{} StartPeriod:{} StartInterval:{} Retries:{}}}",
                check.test.join(" "),
                text::go_duration(check.interval),
                text::go_duration(check.timeout),
                text::go_duration(check.start_period),
                text::go_duration(check.start_interval),
                check.retries
            ),
            true,
        );
        self.state.image.config.healthcheck = Some(check);
    }

    pub(super) fn expose(&mut self, at: &At<'_>, words: &[Text]) -> Result<(), Diagnostic> {
        // Sorted as written, before expansion; the history shows it.
        let mut words: Vec<&Text> = words.iter().collect();
        words.sort_by(|a, b| a.value.cmp(&b.value));
        let mut ports = Vec::new();
        for word in words {
            let env = Rc::clone(&self.state.env);
            let expanded = self.shared.lexer.words(&word.value, &*env);
            let expanded = expanded.map_err(|error| Diagnostic::at(word.span, error.into()))?;
            let length: usize = expanded.iter().map(String::len).sum();
            let spent = self.shared.spend(length.saturating_sub(word.value.len()));
            spent.map_err(|error| Diagnostic::at(word.span, error.into()))?;
            let unset = self.shared.lexer.word(&word.value, &*env).map(|word| word.unmatched).unwrap_or_default();
            for name in unset {
                self.undefined(at, &name, word.span);
            }
            for port in expanded {
                ports.extend(parse_port(&port).map_err(|error| problem(word.span, error))?);
                let (address, protocol) = port.split_once('/').unwrap_or((&port, ""));
                if protocol != protocol.to_lowercase() {
                    let message = format!("protocol `{protocol}` should be lower case");
                    self.report(Rule::ExposeProtoCasing, at.instruction, at.trigger, word.span, message);
                }
                if address.contains(':') {
                    let message = format!("`{port}` names more than a port of the container; the rest is ignored");
                    self.report(Rule::ExposeInvalidFormat, at.instruction, at.trigger, word.span, message);
                }
            }
        }
        self.commit(format!("EXPOSE [{}]", ports.join(" ")), true);
        let empty = || serde_json::Value::Object(serde_json::Map::new());
        self.state.image.config.exposed_ports.extend(ports.into_iter().map(|port| (port, empty())));
        Ok(())
    }
}

/// Reads a word of EXPOSE: `[[address:]host:]port[-port][/protocol]`. Only ports of the container are returned.
pub(super) fn parse_port(word: &str) -> Result<Vec<String>, LowerProblem> {
    let mut parts = word.rsplitn(3, ':');
    let (container, host, address) =
        (parts.next().unwrap_or_default(), parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let (container, protocol) = container.split_once('/').unwrap_or((container, ""));
    if container.is_empty() {
        return Err(LowerProblem::NoPort(word.to_owned()));
    }
    let protocol = match protocol.to_lowercase() {
        protocol if protocol.is_empty() => "tcp".to_owned(),
        protocol if matches!(protocol.as_str(), "tcp" | "udp" | "sctp") => protocol,
        protocol => return Err(LowerProblem::BadPortProtocol { protocol, port: word.to_owned() }),
    };
    let bare = address.strip_prefix('[').and_then(|address| address.strip_suffix(']')).unwrap_or(address);
    if !bare.is_empty() && bare.parse::<std::net::IpAddr>().is_err() {
        return Err(LowerProblem::BadPortAddress(address.to_owned()));
    }
    let range = |text: &str| -> Option<(u16, u16)> {
        let port = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse::<u16>().ok())?;
        let (first, last) = match text.split_once('-') {
            Some((first, last)) => (port(first)?, port(last)?),
            None => (port(text)?, port(text)?),
        };
        (first <= last).then_some((first, last))
    };
    let bad = |text: &str| LowerProblem::BadPort(text.to_owned());
    let (first, last) = range(container).ok_or_else(|| bad(container))?;
    if !host.is_empty() {
        let (host_first, host_last) = range(host).ok_or_else(|| bad(host))?;
        if first != last && last - first != host_last - host_first {
            let (container, host) = (container.to_owned(), host.to_owned());
            return Err(LowerProblem::PortRanges { container, host });
        }
    }
    Ok((first..=last).map(|port| format!("{port}/{protocol}")).collect())
}
