//! The end of `nacre build`: layers become blobs, blobs an image, the image an output.

use crate::build_command::failure;
use crate::cache_options::CachePlace;
use crate::report::{CommandError, Exit};
use crate::request::{AnnotationPlace, BuildRequest, Compression, Destination, Output, OutputKind, Push};
use nacre_frontend::llb::Image;
use nacre_frontend::reference::Reference;
use nacre_solver::cache::INLINE_MEMBER;
use nacre_solver::cache::export::{StepResult, inline_document};
use nacre_solver::export::{self, Archive, Dest, ExportError, ExportImage, PlannedArchive};
use nacre_solver::image::{Annotations, Assembled, Descriptor, Media, Timestamp, assemble, assemble_index};
use nacre_solver::op::source::{ResolvedImage, SourceContext};
use nacre_solver::push::{PushBlob, PushError, PushImage, PushReport, push, push_ahead};
use nacre_solver::registry::{RemoteImage, Uploaded};
use nacre_solver::snapshot::{self, AlsoTo, Layer, LayerBlob, Snapshot, SnapshotError, Workspace};
use nacre_solver::solve::{Event, Phase, Solved, Span};
use nacre_solver::tree::blob::Codec;
use nacre_solver::tree::layer::TarOptions;
use nacre_solver::tree::{self, Entry, Kind, Node, Origin, Tree};
use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// One platform's result.
pub(crate) struct Built {
    image: Image,
    solved: Solved,
    /// What the first output that makes an image made of it.
    assembled: Option<Assembled>,
    /// What stands for all platforms: the index if there are several, else the manifest.
    root: Option<Descriptor>,
}

impl Built {
    /// A result that no output has been made of.
    pub(crate) fn new(image: Image, solved: Solved) -> Self {
        Self { image, solved, assembled: None, root: None }
    }

    /// The file system of the image.
    pub(crate) fn snapshot(&self) -> &Snapshot {
        &self.solved.snapshot
    }

    /// What the steps gave.
    pub(crate) fn steps(&self) -> &[StepResult] {
        &self.solved.steps
    }

    /// What the steps are called in the store's records.
    pub(crate) fn names(&self) -> &[[String; 2]] {
        &self.solved.names
    }
}

/// The exit code for a layer that could not be had.
pub(crate) fn snapshot_exit(error: &SnapshotError) -> Exit {
    match error {
        SnapshotError::Copy(_) | SnapshotError::Context(_) | SnapshotError::Changed { .. } => Exit::Dockerfile,
        SnapshotError::Source(_) => Exit::Source,
        _ => Exit::Store,
    }
}

pub(crate) fn snapshot_error(error: SnapshotError) -> CommandError {
    CommandError::new(snapshot_exit(&error), &error, None)
}

pub(crate) fn export_error(error: ExportError) -> CommandError {
    CommandError::new(Exit::Store, &error, None)
}

/// Who is told of bytes that go, and who may end it.
pub(crate) struct Live<'a> {
    pub(crate) events: &'a (dyn Fn(Event) + Sync),
    pub(crate) stop: &'a (dyn Fn() -> bool + Sync),
}

/// The exit code and text for a push that failed.
pub(crate) fn push_error(error: &PushError) -> CommandError {
    let (exit, help) = match error {
        PushError::Interrupted => return CommandError::Interrupted,
        PushError::Store(_) | PushError::BadDocument { .. } | PushError::Missing { .. } => (Exit::Store, None),
        PushError::Registry(error) => (Exit::Source, error.help()),
        PushError::Source(error) => (Exit::Source, error.help()),
    };
    CommandError::new(exit, error, help)
}

/// Writes all outputs.
pub(crate) fn export(
    request: &BuildRequest,
    workspace: &Workspace,
    built: &mut [Built],
    planned: Option<&PlannedArchive>,
    live: &Live<'_>,
) -> Result<(), CommandError> {
    let Live { events, stop } = live;
    for output in &request.outputs {
        if stop() {
            return Err(CommandError::Interrupted);
        }
        let what = describe(output);
        let started = Instant::now();
        events(Event::Exporting { what: what.clone() });
        let planned = planned.filter(|_| first_image(request).is_some_and(|first| std::ptr::eq(first, output)));
        write(request, workspace, built, (output, planned), live)?;
        events(Event::Exported { what, duration: started.elapsed() });
    }
    Ok(())
}

fn describe(output: &Output) -> String {
    let dest = match output.dest() {
        Some(Destination::Path(path)) => path.display().to_string(),
        Some(Destination::Stdout) => "standard output".to_owned(),
        None => "the store".to_owned(),
    };
    match &output.kind {
        OutputKind::Store if output.names.is_empty() => "to the store, without a name".to_owned(),
        OutputKind::Store if output.push.is_some() => {
            format!("to the store and registries as {}", output.names.join(", "))
        }
        OutputKind::Store => format!("to the store as {}", output.names.join(", ")),
        OutputKind::Registry => format!("to registries as {}", output.names.join(", ")),
        OutputKind::Oci { .. } => format!("OCI image to {dest}"),
        OutputKind::Docker { .. } => format!("docker archive to {dest}"),
        OutputKind::Local { dest, .. } => format!("files to {}", dest.display()),
        OutputKind::Tar { .. } => format!("tar to {dest}"),
        OutputKind::CacheOnly => "nothing: only the cache is kept".to_owned(),
    }
}

/// The first output that is an image.
fn first_image(request: &BuildRequest) -> Option<&Output> {
    let is_image = |output: &&Output| {
        matches!(
            output.kind,
            OutputKind::Store | OutputKind::Registry | OutputKind::Oci { .. } | OutputKind::Docker { .. }
        )
    };
    request.outputs.iter().find(is_image)
}

/// How the first output that is an image compresses its layers.
pub(crate) fn compression(request: &BuildRequest) -> Option<snapshot::Compression> {
    first_image(request).map(|output| compression_of(request, output))
}

/// The first output that is an image, when it is an archive, which layers may go into before the image is there.
pub(crate) fn planned_archive(request: &BuildRequest) -> Option<PlannedArchive> {
    first_image(request).and_then(archive_dest).map(PlannedArchive::new)
}

/// Where an image's archive goes, if the output is one.
fn archive_dest(output: &Output) -> Option<Dest> {
    match &output.kind {
        OutputKind::Oci { dest, tar: true } | OutputKind::Docker { dest, tar: true } => Some(destination(dest)),
        _ => None,
    }
}

/// No file time is later than this.
fn clamp_mtime(request: &BuildRequest, output: &Output) -> Option<i64> {
    request.source_date_epoch.filter(|_| output.rewrite_timestamp)
}

fn compression_of(request: &BuildRequest, output: &Output) -> snapshot::Compression {
    let (codec, level) = codec(output.compression);
    snapshot::Compression { codec, level, clamp_mtime: clamp_mtime(request, output), force: output.force_compression }
}

fn write(
    request: &BuildRequest,
    workspace: &Workspace,
    built: &mut [Built],
    (output, planned): (&Output, Option<&PlannedArchive>),
    live: &Live<'_>,
) -> Result<(), CommandError> {
    let clamp_mtime = clamp_mtime(request, output);
    if output.rewrite_timestamp && clamp_mtime.is_none() {
        let help = Some("set SOURCE_DATE_EPOCH".to_owned());
        return Err(failure(Exit::Usage, "rewrite-timestamp needs to know the time to write", help));
    }
    match &output.kind {
        OutputKind::CacheOnly => Ok(()),
        OutputKind::Tar { .. } | OutputKind::Local { .. } => write_files(workspace, built, output, clamp_mtime),
        OutputKind::Store | OutputKind::Registry | OutputKind::Oci { .. } | OutputKind::Docker { .. } => {
            write_image(request, workspace, built, (output, planned), live)
        }
    }
}

/// The files of all platforms. With `split` each platform has a directory, `linux_arm64`, as BuildKit names it.
fn files(workspace: &Workspace, built: &[Built], split: bool) -> Result<Arc<Tree>, CommandError> {
    let (mut nodes, mut groups) = (Vec::new(), 0);
    let mut owners: BTreeMap<Vec<u8>, &Built> = BTreeMap::new();
    for one in built {
        let tree = workspace.flatten(one.snapshot()).map_err(snapshot_error)?;
        if built.len() == 1 && !split {
            return Ok(tree);
        }
        let platform = one.image.platform.to_string();
        let directory = if split { platform.replace('/', "_").into_bytes() } else { Vec::new() };
        if split {
            nodes.push(Node { entry: Entry::dir(directory.clone(), 0o755), origin: Origin::None });
        }
        // Files of two platforms are never one inode.
        let before = groups;
        for mut node in tree.iter().filter(|node| !split || !node.entry.path.is_empty()) {
            node.entry.path = tree::join(&directory, &node.entry.path);
            if let Kind::File { link_group, .. } = &mut node.entry.kind
                && *link_group > 0
            {
                *link_group += before;
                groups = groups.max(*link_group);
            }
            if !split
                && !node.entry.is_dir()
                && let Some(other) = owners.insert(node.entry.path.clone(), one)
            {
                let path = String::from_utf8_lossy(&node.entry.path).into_owned();
                let message = format!("{} and {platform} both have `/{path}`", other.image.platform);
                let help = "leave out platform-split=false, so that each platform gets a directory".to_owned();
                return Err(failure(Exit::Usage, &message, Some(help)));
            }
            nodes.push(node);
        }
    }
    Ok(Arc::new(Tree::from_nodes(nodes)))
}

/// The root file system's files, not an image.
fn write_files(
    workspace: &Workspace,
    built: &[Built],
    output: &Output,
    clamp_mtime: Option<i64>,
) -> Result<(), CommandError> {
    let split = match &output.kind {
        OutputKind::Tar { platform_split, .. } | OutputKind::Local { platform_split, .. } => *platform_split,
        _ => None,
    };
    let tree = files(workspace, built, split.unwrap_or(built.len() > 1))?;
    workspace.prepare(&tree).map_err(snapshot_error)?;
    let open = |node: &Node| workspace.open(node);
    let read = |node: &Node| workspace.open(node).map(|reader| reader as Box<dyn Read>);
    let image = ExportImage { images: &[], index: None, names: &[] };
    let dest;
    let target = match &output.kind {
        OutputKind::Tar { dest: to, .. } => {
            dest = destination(to);
            export::Output::Tar { dest: &dest, tree: &tree, open: &open, options: TarOptions { clamp_mtime } }
        }
        OutputKind::Local { dest: to, .. } => {
            export::Output::Local { dest: to, tree: &tree, read: &read, options: workspace.sources.write }
        }
        _ => return Ok(()),
    };
    export::export(&image, &workspace.store, &target, &mut io::stdout().lock()).map_err(export_error)
}

fn destination(dest: &Destination) -> Dest {
    match dest {
        Destination::Stdout => Dest::Stdout,
        Destination::Path(path) => Dest::Path(path.clone()),
    }
}

/// The codec and its level.
pub(crate) fn codec(compression: Compression) -> (Codec, Option<u32>) {
    match compression {
        Compression::Uncompressed => (Codec::None, None),
        Compression::Gzip(level) => (Codec::Gzip, level),
        Compression::Zstd(level) => (Codec::Zstd, level),
    }
}

fn write_image(
    request: &BuildRequest,
    workspace: &Workspace,
    built: &mut [Built],
    (output, planned): (&Output, Option<&PlannedArchive>),
    live: &Live<'_>,
) -> Result<(), CommandError> {
    let compression = compression_of(request, output);
    let media = if output.docker_media_types { Media::Docker } else { Media::Oci };
    let names = canonical_names(&output.names)?;
    let place = |place: AnnotationPlace| -> BTreeMap<String, String> {
        let annotations = request.annotations.iter().chain(&output.annotations);
        annotations.filter(|note| note.place == place).map(|note| (note.name.clone(), note.value.clone())).collect()
    };
    let annotations = Annotations {
        manifest: place(AnnotationPlace::Manifest),
        manifest_descriptor: place(AnnotationPlace::ManifestDescriptor),
    };
    let targets = output.push.map(|how| targets(&names, how)).transpose()?.unwrap_or_default();
    let mut ahead = BTreeMap::new();
    let mut images = Vec::new();
    let archive = match (archive_dest(output).filter(|_| built.len() == 1), planned) {
        (None, _) => None,
        (Some(_), Some(planned)) => planned.take().map_err(export_error)?,
        (Some(dest), None) => Archive::begin(&dest).map_err(export_error)?,
    };
    for one in built.iter() {
        let made = one.snapshot().layers();
        let later = output.kind == OutputKind::Registry;
        let layers = match targets.first() {
            None => layer_blobs(workspace, &made, compression, later, archive.as_ref(), live.events, &|_, _| ()),
            // What is compressed goes out while the rest still is.
            Some(target) => std::thread::scope(|scope| {
                let (sender, blobs) = mpsc::channel();
                let sending =
                    scope.spawn(|| push_ahead(blobs, target, &workspace.sources, &shown(live.events), live.stop));
                let tell = |layer: &Layer, blob: &LayerBlob| drop(sender.send(push_blob(layer, &blob.descriptor)));
                let layers = layer_blobs(workspace, &made, compression, later, None, live.events, &tell);
                drop(sender);
                ahead.extend(sending.join().unwrap_or_default());
                layers
            }),
        };
        let layers = layers.map_err(snapshot_error)?;
        let layers: Vec<(Descriptor, String)> =
            layers.into_iter().map(|layer| (layer.descriptor, layer.diff_id)).collect();
        let (mut config, created) = dated(one, request.source_date_epoch);
        if request.cache_to.iter().any(|target| target.place == CachePlace::Inline) {
            let diff_ids: Vec<String> = layers.iter().map(|(_, diff_id)| diff_id.clone()).collect();
            let records = inline_document(one.steps(), &made, &diff_ids, request.source_date_epoch);
            let records = serde_json::to_value(records).unwrap_or_default();
            config.other.insert(INLINE_MEMBER.to_owned(), records);
        }
        images.push(assemble(config, &layers, Some(created.into()), media, &annotations));
    }
    let index = (images.len() > 1).then(|| assemble_index(&images, media, &place(AnnotationPlace::Index)));
    let image = ExportImage { images: &images, index: index.as_ref(), names: &names };
    let dest;
    let target = match &output.kind {
        OutputKind::Oci { dest: to, tar } => {
            dest = destination(to);
            export::Output::Oci { dest: &dest, tar: *tar }
        }
        OutputKind::Docker { dest: to, tar: true } => {
            dest = destination(to);
            export::Output::Docker { dest: &dest }
        }
        OutputKind::Docker { tar: false, .. } => {
            return Err(failure(Exit::Usage, "type=docker writes archives only", Some("use type=oci".to_owned())));
        }
        _ => export::Output::Store,
    };
    if let Some(archive) = archive {
        let docker = matches!(output.kind, OutputKind::Docker { .. });
        archive.finish(&image, &workspace.store, docker).map_err(export_error)?;
    } else if output.kind == OutputKind::Registry {
        // Only documents: the base's layers may never be needed here.
        let nameless = ExportImage { names: &[], ..image };
        export::put_in_store(&nameless, &workspace.store).map_err(export_error)?;
    } else {
        export::export(&image, &workspace.store, &target, &mut io::stdout().lock()).map_err(export_error)?;
    }
    if let Some(how) = output.push {
        push_image(workspace, built, &images, index.as_ref(), (&targets, how), ahead, live)?;
    }
    let root = index.as_ref().map_or_else(|| images[0].manifest_descriptor.clone(), |(_, root)| root.clone());
    for (one, assembled) in built.iter_mut().zip(images) {
        one.assembled.get_or_insert(assembled);
        one.root.get_or_insert_with(|| root.clone());
    }
    Ok(())
}

/// Pushes what was assembled. Base layers know where they come from, so that they can be mounted.
fn push_image(
    workspace: &Workspace,
    built: &[Built],
    images: &[Assembled],
    index: Option<&(Vec<u8>, Descriptor)>,
    (targets, how): (&[RemoteImage], Push),
    ahead: BTreeMap<(String, String, String), Uploaded>,
    live: &Live<'_>,
) -> Result<(), CommandError> {
    let mut image = PushImage { ahead, ..PushImage::default() };
    for (one, assembled) in built.iter().zip(images) {
        for (layer, descriptor) in one.snapshot().layers().iter().zip(&assembled.layers) {
            image.add_blob(push_blob(layer, descriptor));
        }
        image.add_blob(PushBlob { descriptor: assembled.config_descriptor.clone(), base: None });
        let manifest =
            Descriptor { annotations: BTreeMap::new(), platform: None, ..assembled.manifest_descriptor.clone() };
        image.manifests.push((manifest, assembled.manifest_bytes.clone()));
    }
    image.manifests.extend(index.map(|(bytes, descriptor)| (descriptor.clone(), bytes.clone())));
    let targets: Vec<RemoteImage> = match (how, image.root()) {
        (Push::ByDigest, Some(root)) => {
            let by_digest =
                |target: &RemoteImage| RemoteImage { tag: None, digest: Some(root.digest.clone()), ..target.clone() };
            targets.iter().map(by_digest).collect()
        }
        _ => targets.to_vec(),
    };
    send(&image, &targets, &workspace.sources, live.events, live.stop).map(drop)
}

/// Where an image of these names goes.
fn targets(names: &[String], how: Push) -> Result<Vec<RemoteImage>, CommandError> {
    let target = |name: &String| {
        let target = RemoteImage::parse(name)
            .ok_or_else(|| failure(Exit::Usage, &format!("`{name}` is no name in a registry"), None))?;
        Ok(if how == Push::ByDigest { RemoteImage { tag: None, ..target } } else { target })
    };
    names.iter().map(target).collect()
}

/// A layer to push. Base layers know where they come from, so that they can be mounted.
pub(crate) fn push_blob(layer: &Layer, descriptor: &Descriptor) -> PushBlob {
    let base = layer.image().map(|(base, at)| (base.clone(), at));
    let same = |(base, at): &(std::sync::Arc<ResolvedImage>, usize)| {
        base.layers.get(*at).is_some_and(|layer| layer.descriptor.digest == descriptor.digest)
    };
    PushBlob { descriptor: descriptor.clone(), base: base.filter(same) }
}

/// Shows blobs on their way out.
pub(crate) fn shown(events: &(dyn Fn(Event) + Sync)) -> impl Fn(&str, u64, u64) + Sync {
    move |digest: &str, done_bytes: u64, total: u64| {
        let short: String = digest.trim_start_matches("sha256:").chars().take(12).collect();
        events(Event::Transfer { id: None, what: format!("pushing {short}"), done_bytes, total_bytes: Some(total) });
    }
}

/// Pushes, and shows the layers that are under way.
pub(crate) fn send(
    image: &PushImage,
    targets: &[RemoteImage],
    sources: &SourceContext,
    events: &(dyn Fn(Event) + Sync),
    stop: &(dyn Fn() -> bool + Sync),
) -> Result<PushReport, CommandError> {
    push(image, targets, sources, &shown(events), stop).map_err(|error| push_error(&error))
}

fn canonical_names(names: &[String]) -> Result<Vec<String>, CommandError> {
    let canonical = |name: &String| {
        Reference::parse(name)
            .map(|reference| reference.to_string())
            .map_err(|error| failure(Exit::Usage, &format!("image name `{name}`: {error}"), None))
    };
    names.iter().map(canonical).collect()
}

/// The layers as blobs, several made at once; `made` is told of each. With `later`, base layers are only named. Layers
/// go into `archive` as they are made.
pub(crate) fn layer_blobs(
    workspace: &Workspace,
    layers: &[Layer],
    compression: snapshot::Compression,
    later: bool,
    archive: Option<&Arc<Archive>>,
    events: &(dyn Fn(Event) + Sync),
    made: &(dyn Fn(&Layer, &LayerBlob) + Sync),
) -> Result<Vec<LayerBlob>, SnapshotError> {
    let next = AtomicUsize::new(0);
    let results = Mutex::new(BTreeMap::new());
    std::thread::scope(|scope| {
        for _ in 0..layers.len().min(workspace.threads) {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let Some(layer) = layers.get(at) else { return };
                    // A layer that a registry gave may be in the one where it is to go.
                    let known = if later { workspace.original_blob(layer, compression) } else { None };
                    let started = Instant::now();
                    let mut place = archive.and_then(|archive| archive.layer(at));
                    let also = place.as_mut().map(|place| place as &mut dyn AlsoTo);
                    let result = known.map_or_else(|| workspace.blob(layer, compression, also), Ok);
                    if let Ok(blob) = &result {
                        made(layer, blob);
                        if let Some(place) = place {
                            place.end(&blob.descriptor, &workspace.store);
                        }
                    }
                    let bytes = result.as_ref().map_or(0, |blob| blob.descriptor.size);
                    let (layer, duration) = (Some(layer.id().clone()), started.elapsed());
                    events(Event::Span(Span { id: None, layer, phase: Phase::Compress, started, duration, bytes }));
                    results.lock().unwrap_or_else(PoisonError::into_inner).insert(at, result);
                }
            });
        }
    });
    let results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    results.into_values().collect()
}

/// The configuration with dates in its history: a layer has the date of the run that made it, so that a build from the
/// cache gives the same bytes; what makes no layer has the date of the layer before. With SOURCE_DATE_EPOCH no date is
/// later than that.
fn dated(built: &Built, epoch: Option<i64>) -> (nacre_frontend::image_config::ImageConfig, i64) {
    let mut config = built.image.config.clone();
    let created = built.snapshot().created();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs() as i64);
    // What stands before the first new layer gets that one's date.
    let mut latest = created.iter().flatten().next().copied().unwrap_or(now);
    let mut layers = created.iter();
    for entry in &mut config.history {
        if !entry.empty_layer
            && let Some(Some(created)) = layers.next()
        {
            latest = latest.max(*created);
        }
        if entry.created.is_none() {
            entry.created = Some(Timestamp::from(epoch.unwrap_or(latest)).to_string());
        }
    }
    (config, epoch.unwrap_or(latest))
}

/// Says what was built: digest on standard output with `-q`, `--iidfile`, `--metadata-file`.
pub(crate) fn report(request: &BuildRequest, built: &[Built]) -> Result<(), CommandError> {
    let root = built.first().and_then(|one| one.root.as_ref());
    if let (Some(path), Some(root)) = (&request.iid_file, root) {
        write_file(path, root.digest.as_bytes())?;
    }
    if let Some(path) = &request.metadata_file {
        let mut metadata = serde_json::Map::new();
        if let (Some(root), Some(assembled)) = (root, built.first().and_then(|one| one.assembled.as_ref())) {
            metadata.insert("containerimage.config.digest".into(), assembled.config_descriptor.digest.clone().into());
            metadata.insert("containerimage.descriptor".into(), serde_json::to_value(root).unwrap_or_default());
            metadata.insert("containerimage.digest".into(), root.digest.clone().into());
        }
        let names: Vec<String> = request.outputs.iter().flat_map(|output| output.names.clone()).collect();
        if !names.is_empty() {
            metadata.insert("image.name".into(), canonical_names(&names)?.join(",").into());
        }
        let text = serde_json::to_string_pretty(&metadata).unwrap_or_default();
        write_file(path, format!("{text}\n").as_bytes())?;
    }
    let printed = request.outputs.iter().any(|output| matches!(output.dest(), Some(Destination::Stdout)));
    match root {
        // Behind an archive it would be a part of it.
        Some(root) if request.quiet && printed => {
            crate::print_error(&format!("{}\n", root.digest));
            Ok(())
        }
        Some(root) if request.quiet => crate::print_result(&format!("{}\n", root.digest)),
        _ => Ok(()),
    }
}

/// Writes beside and renames, so that nobody reads half of it.
fn write_file(path: &Path, bytes: &[u8]) -> Result<(), CommandError> {
    let error = |error: io::Error| failure(Exit::Store, &format!("cannot write {}: {error}", path.display()), None);
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(directory).map_err(error)?;
    file.write_all(bytes).map_err(error)?;
    file.persist(path).map_err(|failed| error(failed.error))?;
    Ok(())
}
