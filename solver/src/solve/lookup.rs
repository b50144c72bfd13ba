//! Looking results up, here and in other machines' caches; saying why there was none; keeping them.

use super::{Build, Event};
use crate::cache::export::StepResult;
use crate::cache::import::{Hit, layer_alone};
use crate::op::file::Recipe;
use crate::op::source::{Cached, ImageLayer, Origin};
use crate::plan::cache_key::{Key, Parts};
use crate::plan::explain::{self, Reason};
use crate::snapshot::{Layer, Made, Snapshot};
use crate::store::StoreError;
use crate::store::record::{Part, RECORD_VERSION, Record};
use crate::tree::{LayerId, Tree};
use nacre_frontend::llb::{Definition, Op, Source, Vertex, VertexId};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// The part of a key that stands for the file system that a step changes.
const PARENT: &str = "content below";

/// The step's name in the key is the same whatever it stands on: a predecessor that is written in another way and
/// gives the same content changes nothing.
pub(super) fn add_parent(parts: &mut Parts, parent: &Snapshot) {
    parts.add(PARENT, parent.content().hex());
}

/// Identities of a step: by its text and by its place. Without a project they are the same on every machine.
pub(super) fn steps(definition: &Definition, id: VertexId, project: &str) -> [String; 2] {
    let vertex = &definition.vertices[id.0];
    let same_stage = definition.vertices[..id.0].iter().filter(|other| other.stage == vertex.stage).count().to_string();
    let step = |kind: &str, what: &str| {
        let mut parts = Parts::default();
        parts.add("project", project);
        parts.add("platform", vertex.platform.to_string());
        parts.add("stage", &vertex.stage);
        parts.add(kind, what);
        parts.key().hex()
    };
    [step("text", &vertex.text), step("position", &same_stage)]
}

/// A step whose result is looked for.
pub(super) struct Wanted<'a> {
    pub(super) id: VertexId,
    pub(super) vertex: &'a Vertex,
    pub(super) parent: &'a Snapshot,
    /// A result of which only the content is known does not count.
    pub(super) whole: bool,
    /// Key made of whole inputs.
    pub(super) inputs_key: Option<Key>,
}

impl Build<'_> {
    /// Held by whoever looks for, or makes, the result of a key.
    pub(super) fn turn(&self, key: &Key) -> Arc<Mutex<()>> {
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        turns.entry(key.hex()).or_default().clone()
    }

    /// What a difference in the parent's content is called.
    fn parent_name(&self, id: VertexId) -> String {
        let input = self.definition.vertices[id.0].inputs.first().copied().flatten();
        match input.map(|input| &self.definition.vertices[input.0]) {
            None => "content of scratch".to_owned(),
            Some(Vertex { op: Op::Source(Source::Image(_)), text, .. }) => {
                format!("content of image {}", text.trim_start_matches("FROM "))
            }
            Some(before) => format!("content of {}", before.text),
        }
    }

    fn warn(&self, message: String) {
        self.tell(Event::Warning { message });
    }

    /// The snapshot that the store's record or another machine's stands for, if its layer can be had.
    pub(super) fn look_up(
        &self,
        wanted: &Wanted<'_>,
        key: &Key,
        parts: &Parts,
        recipe: Option<&Recipe>,
        files: Option<&Tree>,
    ) -> Result<Snapshot, Reason> {
        if wanted.vertex.ignore_cache {
            return Err(Reason::CacheOff);
        }
        let reason = match self.look_up_here(key, recipe) {
            Ok((layer, record, content)) => {
                self.tell(Event::Cached { id: wanted.id.0 });
                self.note(wanted, key, parts, files, (&layer, content.0, record.created, record.duration_ms));
                return Ok(wanted.parent.with(layer, &content.0, Some(record.created)));
            }
            Err(reason) => reason,
        };
        let context = &self.workspace.sources;
        let found = self.workspace.imports.find(key, context, &|message| self.warn(message));
        let Some(hit) = found else { return Err(reason) };
        let image = hit.layer.clone();
        self.take(wanted, hit, files).ok_or_else(|| match image.filter(|image| image.lost().is_some()) {
            Some(image) => Reason::Lost {
                cache: image.name.clone(),
                digest: image.layers.first().map(|layer| layer.descriptor.digest.clone()).unwrap_or_default(),
            },
            None => reason,
        })
    }

    fn look_up_here(&self, key: &Key, recipe: Option<&Recipe>) -> Result<(Layer, Record, Key), Reason> {
        let record = self.workspace.store.get_record(&key.hex()).ok().flatten().ok_or(Reason::FirstBuild)?;
        let content = Key::from_hex(&record.content_key);
        let (Some(id), Some(content)) = (record.layer.clone(), content) else { return Err(Reason::FirstBuild) };
        if self.workspace.is_whole(&id, recipe.is_some()) {
            return Ok((self.workspace.layer(id, Made::Step(recipe.cloned()), None), record, content));
        }
        let blob = record.blob.as_ref();
        let blob =
            blob.filter(|blob| self.workspace.store.has_blob(&blob.descriptor.digest, Some(blob.descriptor.size)));
        let layer = blob.and_then(|blob| {
            let layer = ImageLayer { descriptor: blob.descriptor.clone(), diff_id: blob.diff_id.clone() };
            let digest = blob.descriptor.digest.clone();
            let image = layer_alone("the store".to_owned(), &digest, layer, Origin::Store, Cached::default());
            self.workspace.layer_alone(&Arc::new(image)).filter(Layer::is_there)
        });
        layer.map(|layer| (layer, record, content)).ok_or(Reason::ResultGone)
    }

    /// The snapshot that another machine's record stands for, found without the content of what the step reads.
    pub(super) fn look_up_by_inputs(&self, wanted: &Wanted<'_>) -> Option<Snapshot> {
        let key = wanted.inputs_key.filter(|_| !wanted.vertex.ignore_cache)?;
        let context = &self.workspace.sources;
        let hit = self.workspace.imports.find_by_inputs(&key, context, &|message| self.warn(message))?;
        self.take(wanted, hit, None)
    }

    fn take(&self, wanted: &Wanted<'_>, hit: Hit, files: Option<&Tree>) -> Option<Snapshot> {
        let content = Key::from_hex(&hit.entry.content_key)?;
        let key = Key::from_hex(&hit.entry.key)?;
        let layer = match &hit.layer {
            Some(image) => Some(self.workspace.layer_alone(image)?).filter(Layer::is_there),
            None => None,
        };
        let layer = match layer {
            Some(layer) => layer,
            None if wanted.whole => return None,
            None => self.workspace.layer_elsewhere(&content.0),
        };
        let parts = hit.entry.parts.iter().map(|part| (part.name.clone(), part.value.clone())).collect();
        let (created, duration) = (hit.entry.created, hit.entry.duration_ms);
        self.tell(Event::Cached { id: wanted.id.0 });
        let listed = if files.is_none() { hit.files() } else { None };
        let files = files.or(listed.as_ref());
        self.note(wanted, &key, &Parts(parts), files, (&layer, content.0, created, duration));
        if let Some(result) = self.results.lock().unwrap_or_else(PoisonError::into_inner).get_mut(&wanted.id.0) {
            result.hit = Some(hit);
        }
        Some(wanted.parent.with(layer, &content.0, Some(created)))
    }

    /// Remembers a result for caches that are to be written.
    pub(super) fn note(
        &self,
        wanted: &Wanted<'_>,
        key: &Key,
        parts: &Parts,
        files: Option<&Tree>,
        (layer, content, created, duration_ms): (&Layer, [u8; 32], i64, u64),
    ) {
        if !self.request.collect {
            return;
        }
        let result = StepResult {
            key: *key,
            inputs_key: wanted.inputs_key,
            steps: steps(self.definition, wanted.id, ""),
            parts: as_parts(parts),
            content,
            created,
            duration_ms,
            layer: layer.clone(),
            files: files.map(crate::cache::bare),
            hit: None,
        };
        self.results.lock().unwrap_or_else(PoisonError::into_inner).insert(wanted.id.0, result);
    }

    /// Says why a step runs: what differs from its last record, here or elsewhere. Gives what it made then, if its files
    /// differ.
    pub(super) fn explain(
        &self,
        id: VertexId,
        reason: Reason,
        parts: &Parts,
        selection: Option<&Tree>,
    ) -> Option<Arc<Tree>> {
        let mut before = None;
        let reason = match reason {
            Reason::FirstBuild => self.last(id, parts).map_or(Reason::FirstBuild, |(old, layer)| {
                before.clone_from(&layer);
                let old: Vec<(String, String)> = old.into_iter().map(|part| (part.name, part.value)).collect();
                let mut differences = parts.differences(&old);
                differences.retain(|difference| difference.part != "arguments" || differences_only(&old, parts));
                for difference in differences.iter_mut().filter(|difference| difference.part == PARENT) {
                    difference.part = self.parent_name(id);
                }
                let files = differences.iter().any(|difference| difference.part == "files");
                differences.retain(|difference| difference.part != "files");
                match (files, selection) {
                    (true, Some(new)) => {
                        let mut names = layer.map(|old| explain::changed_files(&old, new)).unwrap_or_default();
                        if names.is_empty() {
                            names.push("selected files changed".to_owned());
                        }
                        Reason::Files(names)
                    }
                    _ => Reason::Changed(differences),
                }
            }),
            other => other,
        };
        self.tell(Event::Explained { id: id.0, reason: reason.to_string() });
        before
    }

    /// Is there any record of a step, here or elsewhere?
    pub(super) fn has_run(&self, id: VertexId) -> bool {
        let here = steps(self.definition, id, &self.request.project);
        let there = steps(self.definition, id, "");
        let context = &self.workspace.sources;
        here.iter().any(|step| self.workspace.store.last_record_of_step(step).is_ok_and(|record| record.is_some()))
            || there.iter().any(|step| self.workspace.imports.has_step(step, context, &|message| self.warn(message)))
    }

    /// The parts of the last record of a step, and the files that it selected then.
    fn last(&self, id: VertexId, parts: &Parts) -> Option<(Vec<Part>, Option<Arc<Tree>>)> {
        let store = &self.workspace.store;
        // What stood in this place before is only of use when it was a step of this kind.
        let op = parts.0.iter().find(|(name, _)| name == "op").map(|(_, value)| value);
        let alike = |parts: &[Part]| parts.iter().find(|part| part.name == "op").map(|part| &part.value) == op;
        let names = steps(self.definition, id, &self.request.project);
        let here = names
            .iter()
            .find_map(|step| store.last_record_of_step(step).ok().flatten().filter(|record| alike(&record.parts)));
        if let Some(record) = here {
            // Read for the comparison alone, and only when there is one to make.
            let files = |parts: &[Part]| parts.iter().find(|part| part.name == "files").map(|part| part.value.clone());
            let selects = parts.0.iter().find(|(name, _)| name == "files").map(|(_, value)| value.clone());
            let layer = record.layer.as_ref().filter(|_| selects.is_some() && selects != files(&record.parts));
            let layer = layer.and_then(|layer| store.read_layer(layer).ok()).map(Arc::new);
            return Some((record.parts, layer));
        }
        let names = steps(self.definition, id, "");
        let there = names.iter().find_map(|step| self.workspace.imports.last_of_step(step));
        let hit = there.filter(|hit| alike(&hit.entry.parts))?;
        Some((hit.entry.parts.clone(), hit.files().map(Arc::new)))
    }

    /// Keeps what a step gave.
    pub(super) fn keep(
        &self,
        wanted: &Wanted<'_>,
        key: &Key,
        parts: &Parts,
        files: Option<&Tree>,
        (layer, content, started): (&Layer, &[u8; 32], Instant),
    ) -> Result<(), StoreError> {
        let duration_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
        let id: &LayerId = layer.id();
        let record = Record {
            version: RECORD_VERSION,
            key: key.hex(),
            steps: steps(self.definition, wanted.id, &self.request.project).to_vec(),
            parts: as_parts(parts),
            layer: Some(id.clone()),
            content_key: Key(*content).hex(),
            created: self.now.0,
            duration_ms,
            blob: None,
            extra: BTreeMap::new(),
        };
        self.note(wanted, key, parts, files, (layer, *content, self.now.0, duration_ms));
        self.workspace.store.put_record(&record)
    }
}

fn as_parts(parts: &Parts) -> Vec<Part> {
    parts.0.iter().map(|(name, value)| Part { name: name.clone(), value: value.clone() }).collect()
}

/// `arguments` repeats `command` word by word: it is told only when it is all that differs.
fn differences_only(old: &[(String, String)], parts: &Parts) -> bool {
    let command = |parts: &[(String, String)]| parts.iter().find(|(name, _)| name == "command").cloned();
    command(old) == command(&parts.0)
}
