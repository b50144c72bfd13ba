//! Vertices of sources and steps, and what they are called.

use super::{BaseConfigs, BaseRequest, StageLowering, text, without_credentials};
use crate::diagnostic::Diagnostic;
use crate::instruction::Instruction;
use crate::llb::{ImageSource, Op, Platform, Source, Vertex, VertexId};
use crate::lower::environment::Environment;
use crate::lower_problem::LowerProblem;
use crate::source::Span;
use crate::stage::{External, SourceRef, from_context, problem};
use crate::word::Lexer;

impl StageLowering<'_, '_> {
    /// The vertex of FROM's image.
    pub(super) fn image_vertex(&mut self, source: &ImageSource, platform: &Platform, name: &str) -> VertexId {
        let source = pinned(source, platform, self.shared.bases);
        let stage = &self.shared.plan.stages[self.index];
        let text = match &source {
            ImageSource::Reference(reference) => format!("FROM {reference}"),
            ImageSource::OciLayout { .. } => format!("FROM {name}"),
        };
        let step_name = self.step_name(&text, false, &Environment::default());
        let (lines, label) = (Some(stage.from.lines), stage.label(self.index));
        let platform = platform.clone();
        self.graph.source(Source::Image(source), |op| Vertex {
            op,
            inputs: Vec::new(),
            name: step_name,
            stage: label,
            text,
            lines,
            platform,
            ignore_cache: false,
        })
    }

    /// The vertex of a context: no stage owns it.
    pub(super) fn files_vertex(&mut self, source: &Source, context: &str) -> VertexId {
        let name = match source {
            Source::Local { .. } if context == "context" => "[internal] load build context".to_owned(),
            Source::Local { .. } => format!("[context {context}] load from client"),
            Source::Http { url, .. } => format!("[context {context}] {}", without_credentials(url)),
            Source::Git { remote, .. } => format!("[context {context}] {}", without_credentials(remote)),
            Source::Image(_) => format!("[context {context}]"),
        };
        let platform = self.shared.plan.target_platform.clone();
        self.graph.source(source.clone(), |op| Vertex {
            op,
            inputs: Vec::new(),
            text: name.clone(),
            name,
            stage: String::new(),
            lines: None,
            platform,
            ignore_cache: false,
        })
    }

    /// The main context, or what the caller put in its place.
    pub(super) fn main_context(&mut self) -> Result<Option<VertexId>, LowerProblem> {
        let external = match self.shared.options.contexts.get("context") {
            None => {
                let source = Source::Local { name: "context".to_owned() };
                External::Files { source, context: "context".to_owned() }
            }
            Some(context) => from_context("context", context, &self.shared.plan.target_platform)?,
        };
        Ok(self.external_vertex(&external))
    }

    /// An image or context that is read but not built on.
    pub(super) fn external_vertex(&mut self, external: &External) -> Option<VertexId> {
        match external {
            External::Scratch => None,
            External::Files { source, context } => Some(self.files_vertex(source, context)),
            External::Image { source, platform, name } => {
                let pinned = pinned(source, platform, self.shared.bases);
                let text = match &pinned {
                    ImageSource::Reference(reference) => format!("FROM {reference}"),
                    ImageSource::OciLayout { .. } => format!("[context {name}] OCI load from client"),
                };
                let platform = platform.clone();
                let lines = Some(self.lines);
                Some(self.graph.source(Source::Image(pinned), |op| Vertex {
                    op,
                    inputs: Vec::new(),
                    name: text.clone(),
                    stage: String::new(),
                    text,
                    lines,
                    platform,
                    ignore_cache: false,
                }))
            }
        }
    }

    /// File system that `--from` names. The outer `None` of the result does not exist; the inner is the empty one.
    pub(super) fn source_vertex(&mut self, source: &SourceRef, span: Span) -> Result<Option<VertexId>, Diagnostic> {
        match source {
            SourceRef::External(external) => Ok(self.external_vertex(external)),
            SourceRef::Stage(index) => match &self.states[*index] {
                Some(state) => Ok(state.top),
                None => {
                    let stages = &self.shared.plan.stages;
                    let (from, stage) = (stages[*index].label(*index), stages[self.index].label(self.index));
                    Err(problem(span, LowerProblem::NotYetDefined { from, stage }))
                }
            },
        }
    }

    /// Adds a vertex on top of the stage.
    pub(super) fn add(&mut self, op: Op, inputs: Vec<Option<VertexId>>, name: (String, String)) {
        let stage = &self.shared.plan.stages[self.index];
        let (name, text) = name;
        let vertex = Vertex {
            op,
            inputs,
            name,
            stage: stage.label(self.index),
            text,
            lines: Some(self.lines),
            platform: self.state.platform.clone(),
            ignore_cache: self.ignore_cache,
        };
        self.state.top = Some(self.graph.push(vertex));
    }

    /// `[stage 2/5] ` and the words; counts the step.
    pub(super) fn step_name(&mut self, words: &str, trigger: bool, env: &Environment) -> String {
        self.step += 1;
        let mut name = String::from("[");
        if self.shared.options.multi_platform {
            name.push_str(&self.state.platform.to_string());
            name.push_str(&text::cross_target(&self.state.platform, env));
            name.push(' ');
        }
        if !self.label.is_empty() {
            name.push_str(&self.label);
            name.push(' ');
        }
        let width = self.steps.to_string().len();
        name.push_str(&format!("{:width$}/{}] ", self.step, self.steps));
        if trigger {
            name.push_str("ONBUILD ");
        }
        name + words
    }

    /// Step name and text of an instruction, for people and logs: expanded, keyword in upper case, on one line, without
    /// the passwords of addresses.
    pub(super) fn words(
        &mut self,
        instruction: &Instruction,
        trigger: bool,
        lexer: &Lexer,
        env: &Environment,
        suffix: &str,
    ) -> (String, String) {
        let written = format!("{}{suffix}", instruction.original);
        let expanded = lexer.word(&written, env).map(|expanded| expanded.value);
        let fits = |value: &String| self.shared.spend(value.len().saturating_sub(written.len())).is_ok();
        let expanded = expanded.ok().filter(fits).unwrap_or(written);
        let (keyword, rest) = expanded.split_once(' ').unwrap_or((&expanded, ""));
        let text = format!("{} {rest}", keyword.to_uppercase()).replace(['\n', '\r'], " ");
        let text = text::without_passwords(text.trim_end());
        (self.step_name(&text, trigger, env), text)
    }
}

/// The image by digest, where that is known.
fn pinned(source: &ImageSource, platform: &Platform, bases: &BaseConfigs) -> ImageSource {
    let request = BaseRequest { source: source.clone(), platform: platform.clone() };
    let digest = bases.get(&request).and_then(|base| base.digest.clone());
    digest.map_or_else(|| source.clone(), |digest| with_digest(source, digest))
}

/// An image source that means exactly this digest; one that has a digest already stays as it is. Graphs name base images
/// so once their digest is known.
pub fn with_digest(source: &ImageSource, digest: String) -> ImageSource {
    match source {
        ImageSource::Reference(reference) if !reference.contains('@') => {
            ImageSource::Reference(format!("{reference}@{digest}"))
        }
        ImageSource::OciLayout { path, tag, digest: None } => {
            ImageSource::OciLayout { path: path.clone(), tag: tag.clone(), digest: Some(digest) }
        }
        _ => source.clone(),
    }
}
