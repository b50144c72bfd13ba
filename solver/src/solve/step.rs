//! The steps that make layers: key, look-up, work, record.
//!
//! A step's input may be known by its content alone, when another machine's cache says what a stage's result is without
//! having it. Whatever can be found out that way is; before a step does work, such inputs are made.

use super::lookup::{Wanted, add_parent};
use super::{Build, Event, Phase, Span, StepLog, Stream, VertexError};
use crate::context::FoundKeys;
use crate::export::ArchiveLayer;
use crate::key_patterns::KeyKind;
use crate::leak::{Leak, LeakStream};
use crate::op::file::{FileOp, Recipe, Value};
use crate::op::run::{self, RunError};
use crate::read_ahead::{self, Progress, Reading};
use crate::snapshot::{AlsoTo, Compression, Layer, Made, Snapshot, SnapshotError, UnclaimedBlob};
use crate::sys;
use crate::tree::{Entry, Kind, Node, Origin, Tree, index};
use crate::upper::LostAttribute;
use nacre_frontend::llb::{RunOp, Vertex, VertexId};
use std::convert::Infallible;
use std::panic::resume_unwind;
use std::sync::{Arc, PoisonError};
use std::time::{Instant, SystemTime};

fn is_whole(value: &Value) -> bool {
    match value {
        Value::Snapshot(snapshot) => snapshot.is_whole(),
        _ => true,
    }
}

/// Can the layers of all these inputs be had, as far as is known?
pub(super) fn are_whole(inputs: &[Option<Value>]) -> bool {
    inputs.iter().flatten().all(is_whole)
}

/// Is this what a step came to, rather than something that it lacked?
pub(super) fn is_verdict(error: &VertexError) -> bool {
    use RunError::{Exit, Interrupted, Signal, TimedOut};
    matches!(
        error,
        VertexError::Run(Exit { .. } | Signal { .. } | TimedOut { .. } | Interrupted)
            | VertexError::Leak(_)
            | VertexError::Before(_)
    )
}

/// Bytes of a tree's files.
fn file_bytes(tree: &Tree) -> u64 {
    let mut sum = 0;
    let mut cursor = tree.cursor();
    while let Some(node) = cursor.next() {
        sum += if let Kind::File { size, .. } = node.entry.kind { size } else { 0 };
    }
    sum
}

/// A layer that was compressed while its files were read for the first time.
struct Early {
    blob: UnclaimedBlob,
    /// The archive has it, too.
    place: Option<ArchiveLayer>,
    /// `None`: what the step selects is the layer.
    tree: Option<Tree>,
    ended: Instant,
}

impl Build<'_> {
    /// Tells of time that ends now.
    fn span(&self, id: VertexId, phase: Phase, layer: Option<&Layer>, started: Instant, bytes: u64) {
        let (id, layer, duration) = (Some(id.0), layer.map(|layer| layer.id().clone()), started.elapsed());
        self.tell(Event::Span(Span { id, layer, phase, started, duration, bytes }));
    }

    /// Makes a vertex's layers, and those below, if they are known by their content alone.
    pub(super) fn realize(&self, id: VertexId) -> Result<(), VertexError> {
        let _turn = self.realizing[id.0].lock().unwrap_or_else(PoisonError::into_inner);
        if self.known(id).as_ref().is_none_or(is_whole) {
            return Ok(());
        }
        self.realize_inputs(&self.definition.vertices[id.0])?;
        let value = self.attempt(id, true).map_err(|error| VertexError::Before(Box::new(error)))?;
        self.set(id, value);
        Ok(())
    }

    pub(super) fn realize_inputs(&self, vertex: &Vertex) -> Result<Vec<Option<Value>>, VertexError> {
        vertex.inputs.iter().flatten().try_for_each(|input| self.realize(*input))?;
        Ok(self.inputs(vertex))
    }

    /// Can the files of all these inputs be looked at without fetching anything?
    fn is_indexed(&self, inputs: &[Option<Value>]) -> bool {
        inputs.iter().flatten().all(|value| match value {
            Value::Snapshot(snapshot) => self.workspace.is_indexed(snapshot),
            _ => true,
        })
    }

    /// Reads the files of a COPY and compresses its layer at once, where a result cannot be expected to be known: on the first
    /// build of the step, when its files have not been read before, and only for layers of the image that is written. To look
    /// the step up first would take reading them twice. `None` when that is not so, or did not work: then the usual way tells
    /// what is the matter. `begun` says whether the step has been told of.
    fn read_early(
        &self,
        wanted: &Wanted<'_>,
        recipe: &Recipe,
        selection: Option<&mut Tree>,
        begun: &mut bool,
    ) -> Result<Option<Early>, VertexError> {
        /// Below, reading twice takes no time.
        const MIN_BYTES: u64 = 1 << 20;
        let (Some(selection), Some(compression)) = (selection, self.request.compression) else { return Ok(None) };
        let is_wanted = self.exported[wanted.id.0] && wanted.parent.is_whole() && self.request.host.leaks.is_none();
        if !is_wanted || !wanted.vertex.ignore_cache && self.has_run(wanted.id) {
            return Ok(None);
        }
        match recipe.unread(selection)? {
            Some((unread, all)) if unread >= MIN_BYTES && unread > all / 2 => {}
            _ => return Ok(None),
        }
        // One at a time: each takes all processors, and the memory for what they do.
        let _turn = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
        self.tell(Event::Started { id: wanted.id.0 });
        *begun = true;
        let (clock, started) = (SystemTime::now(), Instant::now());
        let mut own = None;
        let tree: &mut Tree = match !self.request.collect && recipe.selects_layer(self.workspace)? {
            true => selection,
            false => own.insert(recipe.undigested(self.workspace)?),
        };
        let (keys, progress) = (FoundKeys::default(), Progress::default());
        let open = |node: &Node| {
            progress.opens(node);
            match recipe.open_unread(node, &keys) {
                Some(opened) => opened.map(|reader| self.workspace.stoppable(reader)),
                None => self.workspace.open(node),
            }
        };
        let mut place = self.place(wanted.parent, compression);
        let also = place.as_mut().map(|place| place as &mut dyn AlsoTo);
        let blob = std::thread::scope(|scope| {
            let (tree, progress) = (&*tree, &progress);
            let (threads, blocks_read) = (self.workspace.threads, sys::blocks_read_by_thread);
            let follow =
                move || read_ahead::ahead(tree, progress, threads, blocks_read, |node| recipe.open_ahead(node));
            // Without a thread for it, reading takes longer where files are not in memory.
            if let Ok(follower) = std::thread::Builder::new().name("ahead".into()).spawn_scoped(scope, follow) {
                progress.followed_by(follower.thread());
            }
            let _reading = Reading(progress);
            self.workspace.early_blob(tree, &open, compression, also)
        });
        if self.cancel.is_cancelled() {
            return Err(RunError::Interrupted.into());
        }
        let Some(mut blob) = blob else { return Ok(None) };
        if !recipe.learn(tree, blob.take_digests(), keys, clock)? {
            return Ok(None);
        }
        self.span(wanted.id, Phase::Compress, None, started, blob.size_bytes());
        Ok(Some(Early { blob, place, tree: own, ended: Instant::now() }))
    }

    /// Where the next layer above `parent` goes in the archive that is to be written. The layers below have to be in it first.
    fn place(&self, parent: &Snapshot, compression: Compression) -> Option<ArchiveLayer> {
        let archive = self.request.archive.as_ref()?.get()?;
        let below = parent.layers();
        for (at, layer) in below.iter().enumerate() {
            if let Some(place) = archive.layer(at) {
                place.end(&self.workspace.blob_here(layer, compression)?.descriptor, &self.workspace.store);
            }
        }
        archive.layer(below.len())
    }

    pub(super) fn file(
        &self,
        id: VertexId,
        vertex: &Vertex,
        op: &FileOp,
        mut inputs: Vec<Option<Value>>,
        whole: bool,
    ) -> Result<Snapshot, VertexError> {
        let started = Instant::now();
        loop {
            let parent = self.rootfs(&inputs)?;
            let recipe = Recipe { op: op.clone(), parent: parent.clone(), inputs: inputs.clone(), now: self.now };
            let inputs_key = recipe.parts_of_inputs().map(|mut parts| {
                parts.add("platform", vertex.platform.to_string());
                add_parent(&mut parts, &parent);
                parts.key()
            });
            let wanted = Wanted { id, vertex, parent: &parent, whole, inputs_key };
            let read = inputs.get(1..).unwrap_or_default();
            if let Some(snapshot) = self.known_by_inputs(&wanted, read) {
                return Ok(self.found(id, snapshot, started));
            }
            if !are_whole(read) {
                inputs = self.realize_inputs(vertex)?;
                continue;
            }
            let mut selection = recipe.select(self.workspace)?;
            let mut begun = false;
            let early = self.read_early(&wanted, &recipe, selection.as_mut(), &mut begun)?;
            let mut parts = recipe.parts(selection.as_mut())?;
            parts.add("platform", vertex.platform.to_string());
            add_parent(&mut parts, &parent);
            let key = parts.key();
            let reason = match self.look_up(&wanted, &key, &parts, Some(&recipe), selection.as_ref()) {
                Ok(snapshot) => return Ok(self.found(id, snapshot, started)),
                Err(reason) => reason,
            };
            if !parent.is_whole() {
                inputs = self.realize_inputs(vertex)?;
                continue;
            }
            if !begun {
                self.tell(Event::Started { id: id.0 });
            }
            let before = self.explain(id, reason, &parts, selection.as_ref());
            // Times are to be kept after all: another build has made the step meanwhile.
            let mut early = early.filter(|_| before.is_none());
            if let Some(selection) = selection.as_ref().filter(|_| self.request.host.key_warnings) {
                self.warn_of_keys(vertex, recipe.keys_in(selection));
            }
            // As large as the layer itself, and only of use to caches that are to be written.
            let (selection, selected) = match self.request.collect {
                true => (selection, None),
                false => (None, selection),
            };
            let looked_up = early.as_ref().map_or(started, |early| early.ended);
            self.span(id, Phase::LookUp, None, looked_up, 0);
            let working = Instant::now();
            let mut tree = match (early.as_mut().and_then(|early| early.tree.take()), selected) {
                (None, Some(selected)) if recipe.selects_layer(self.workspace)? => selected,
                (made, _) => made.map_or_else(|| recipe.carry_out(self.workspace), Ok)?,
            };
            if let Some(before) = before {
                self.keep_times(&mut tree, &before);
            }
            self.check_for_secrets(&tree)?;
            self.span(id, Phase::Run, None, working, 0);
            let (storing, bytes) = (Instant::now(), file_bytes(&tree));
            // The blob is brought to disk meanwhile.
            let (blob, place) = early.map(|early| (early.blob, early.place)).unzip();
            let (content, layer_id, blob) = std::thread::scope(|scope| {
                let blob = blob.map(|blob| scope.spawn(|| self.workspace.keep_blob(blob, &tree)));
                let (content, id) = (index::content_key(&tree), self.workspace.store.put_layer(tree.clone()));
                (content, id, blob.map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic))))
            });
            let layer = self.workspace.layer(layer_id?, Made::Step(Some(recipe)), Some(Arc::new(tree)));
            if let Some(blob) = blob.transpose()? {
                let blob = self.workspace.adopt_blob(&layer, blob)?;
                if let Some(place) = place.flatten() {
                    place.end(&blob.descriptor, &self.workspace.store);
                }
            }
            self.keep(&wanted, &key, &parts, selection.as_ref(), (&layer, &content, started))?;
            self.span(id, Phase::Hash, Some(&layer), storing, bytes);
            self.tell(Event::Finished { id: id.0, duration: started.elapsed() });
            return Ok(parent.with(layer, &content, Some(self.now.0)));
        }
    }

    /// Directories that the step made when it ran before, and makes again, keep their times. They stand in front of what they
    /// hold: the beginning of the blob, up to the first change, stays what it was and need not be made again.
    fn keep_times(&self, tree: &mut Tree, before: &Tree) {
        let keep = |(): &mut (), entry: &mut Entry, _: &mut Origin| {
            if matches!(entry.kind, Kind::Dir { .. }) && entry.mtime == self.now {
                let old = before.get(&entry.path).map(|old| old.entry);
                let same = |old: &Entry| Entry { mtime: self.now, ..old.clone() } == *entry;
                if let Some(old) = old.filter(same) {
                    entry.mtime = old.mtime;
                }
            }
            Ok::<(), Infallible>(())
        };
        let Ok(_) = tree.update(|_| (), keep, |()| ());
    }

    /// Says which files of the context look as if they held keys.
    fn warn_of_keys(&self, vertex: &Vertex, found: Vec<(String, KeyKind)>) {
        const AT_MOST: usize = 10;
        for (path, key) in found.iter().take(AT_MOST) {
            let message = format!(
                "{}: `{path}` looks as if it held {}, which everybody who has the image could read: leave it out by \
                 .dockerignore, or use it with RUN --mount=type=secret (--no-secret-warnings turns this off)",
                vertex.name,
                key.name()
            );
            self.tell(Event::Warning { message });
        }
        if let Some(more @ 1..) = found.len().checked_sub(AT_MOST) {
            self.tell(Event::Warning { message: format!("{}: {more} more files look like that", vertex.name) });
        }
    }

    /// Says which attributes a step has set in vain.
    fn warn_of_attributes(&self, vertex: &Vertex, lost: &[LostAttribute]) {
        let Some(first) = lost.first() else { return };
        let (path, name) = (String::from_utf8_lossy(&first.path), String::from_utf8_lossy(&first.name));
        let what = match &*name {
            "system.posix_acl_access" | "system.posix_acl_default" => "access control list",
            name => &format!("attribute {name}"),
        };
        let more = match lost.len() - 1 {
            0 => String::new(),
            1 => ", nor the one of another file".to_owned(),
            more => format!(", nor those of {more} more files"),
        };
        let message = format!(
            "{}: the {what} of `/{path}` does not become part of the image{more}: of extended attributes, layers \
             hold file capabilities only, as BuildKit's",
            vertex.name
        );
        self.tell(Event::Warning { message });
    }

    /// A result that the inputs' own keys lead to, without the files of `read`.
    fn known_by_inputs(&self, wanted: &Wanted<'_>, read: &[Option<Value>]) -> Option<Snapshot> {
        if self.is_indexed(read) { None } else { self.look_up_by_inputs(wanted) }
    }

    /// Notes how long it took to find `snapshot`.
    fn found(&self, id: VertexId, snapshot: Snapshot, started: Instant) -> Snapshot {
        self.span(id, Phase::LookUp, snapshot.top(), started, 0);
        snapshot
    }

    /// Looks for secrets in the names, links, attributes and files of a new layer.
    fn check_for_secrets(&self, tree: &Tree) -> Result<(), VertexError> {
        let Some(leaks) = &self.request.host.leaks else { return Ok(()) };
        self.workspace.prepare(tree)?;
        for node in tree.iter() {
            let entry = &node.entry;
            let path = || format!("/{}", String::from_utf8_lossy(&entry.path));
            leaks.check(&entry.path, || "the name of a file".to_owned())?;
            if let Kind::Symlink { target } = &entry.kind {
                leaks.check(target, path)?;
            }
            entry.xattrs.values().try_for_each(|value| leaks.check(value, path))?;
            if entry.is_file() {
                let read = |source| SnapshotError::Read { path: path(), source };
                let mut file = self.workspace.open(&node).map_err(read)?;
                leaks.check_reader(&mut file, path).map_err(read)??;
            }
        }
        Ok(())
    }

    pub(super) fn run(
        &self,
        id: VertexId,
        vertex: &Vertex,
        op: &RunOp,
        mut inputs: Vec<Option<Value>>,
        whole: bool,
        log: &mut StepLog,
    ) -> Result<Snapshot, VertexError> {
        let started = Instant::now();
        loop {
            let parent = self.rootfs(&inputs)?;
            if let Some(first) = inputs.first_mut() {
                *first = Some(Value::Snapshot(parent.clone()));
            }
            let inputs_key = run::parts_of_inputs(vertex, op, &inputs).map(|mut parts| {
                add_parent(&mut parts, &parent);
                parts.key()
            });
            let wanted = Wanted { id, vertex, parent: &parent, whole, inputs_key };
            let read = inputs.get(1..).unwrap_or_default();
            if let Some(snapshot) = self.known_by_inputs(&wanted, read) {
                return Ok(self.found(id, snapshot, started));
            }
            if !are_whole(read) {
                inputs = self.realize_inputs(vertex)?;
                continue;
            }
            let mut parts = run::parts(self.workspace, vertex, op, &inputs)?;
            add_parent(&mut parts, &parent);
            let key = parts.key();
            // Of equal steps in two stages one runs, and the other takes its result.
            let turn = self.turn(&key);
            let _turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
            let reason = match self.look_up(&wanted, &key, &parts, None, None) {
                Ok(snapshot) => return Ok(self.found(id, snapshot, started)),
                Err(reason) => reason,
            };
            if !parent.is_whole() {
                inputs = self.realize_inputs(vertex)?;
                continue;
            }
            if self.cancel.is_cancelled() {
                return Err(RunError::Interrupted.into());
            }
            run::ensure_platform(self.workspace, &vertex.platform, &self.request.host, self.cancel)?;
            self.tell(Event::Started { id: id.0 });
            self.explain(id, reason, &parts, None);
            log.path = Some(self.workspace.store.part("logs").join(key.hex()));
            let leaks = self.request.host.leaks.as_deref();
            // Each stream by itself: pieces of the two come in any order.
            let mut streams = leaks.map(|leaks| [LeakStream::new(leaks), LeakStream::new(leaks)]);
            let mut leaked = None;
            self.span(id, Phase::LookUp, None, started, 0);
            let running = Instant::now();
            let mut output = |stream: Stream, data: &[u8]| {
                if let (Some(streams), None) = (&mut streams, &leaked) {
                    leaked = streams[usize::from(stream == Stream::Stderr)].push(data);
                }
                log.write(data);
                self.tell(Event::Log { id: id.0, stream, data: data.to_vec() });
            };
            let ran = run::execute(self.workspace, op, &inputs, &self.request.host, self.cancel, &mut output);
            if let Some((secret, form)) = leaked {
                log.forget();
                return Err(Leak { secret, place: "what the step printed".to_owned(), form }.into());
            }
            let ran = ran?;
            self.warn_of_attributes(vertex, &ran.lost);
            self.check_for_secrets(&ran.changes)?;
            let (phase, duration) = (Phase::Run, ran.ended - running);
            self.tell(Event::Span(Span { id: Some(id.0), layer: None, phase, started: running, duration, bytes: 0 }));
            let (hashing, bytes) = (ran.ended, file_bytes(&ran.changes));
            let content = index::content_key(&ran.changes);
            let snapshot_key = parent.content().stacked(&content);
            // The same content as an earlier run on the same content: that layer stays, so that the image's bytes do too.
            let earlier = self.workspace.store.layer_by_content(&snapshot_key.0);
            let layer = match earlier.filter(|id| self.workspace.is_whole(id, false)) {
                Some(id) => self.workspace.layer(id, Made::Step(None), None),
                None => {
                    let id = self.workspace.store.put_layer(ran.changes)?;
                    self.workspace.store.adopt_upper(&ran.upper, &id)?;
                    self.workspace.store.set_layer_by_content(&snapshot_key.0, &id)?;
                    self.workspace.layer(id, Made::Step(None), None)
                }
            };
            self.keep(&wanted, &key, &parts, None, (&layer, &content, started))?;
            self.span(id, Phase::Hash, Some(&layer), hashing, bytes);
            self.tell(Event::Finished { id: id.0, duration: started.elapsed() });
            return Ok(parent.with(layer, &content, Some(self.now.0)));
        }
    }
}
