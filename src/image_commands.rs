//! `nacre pull`, `push`, `tag`, `rmi`, `inspect` and `save`: images of the store by their names.

use crate::build_command::{enter_to_unpack, failure};
use crate::cli::{InspectArgs, ListFormat, PullArgs, PushArgs, RmiArgs, SaveArgs, TagArgs};
use crate::export_command::send;
use crate::interrupt::end_on_signals;
use crate::report::{CommandError, Exit, with_causes};
use crate::request::Environment;
use nacre_frontend::llb::ImageSource;
use nacre_frontend::platform;
use nacre_frontend::reference::Reference;
use nacre_solver::export::{self, Dest, ExportImage};
use nacre_solver::image::{Assembled, Descriptor, Manifest};
use nacre_solver::materialize::{Ownership, WriteOptions};
use nacre_solver::op::source::{
    Form, Progress, PullPolicy, ResolvedImage, SourceContext, SourceError, ensure_blob, ensure_layers, resolve_image,
};
use nacre_solver::push::PushImage;
use nacre_solver::registry::{Client, ClientOptions, RemoteImage};
use nacre_solver::sandbox::foreign;
use nacre_solver::solve::Event;
use nacre_solver::store::refs::RememberedReference;
use nacre_solver::store::{Store, StoreError};
use nacre_solver::tree::layer::Limits;
use serde_json::{Value, json};
use std::collections::HashSet;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

/// Layers that are fetched at once.
const PARALLEL_LAYERS: usize = 4;

pub(crate) fn store_error(error: StoreError) -> CommandError {
    CommandError::new(Exit::Store, &error, None)
}

pub(crate) fn source_error(error: &SourceError) -> CommandError {
    CommandError::new(Exit::Source, error, error.help())
}

pub(crate) fn reference(name: &str) -> Result<Reference, CommandError> {
    Reference::parse(name).map_err(|error| failure(Exit::Usage, &format!("image name `{name}`: {error}"), error.help()))
}

pub(crate) fn open(env: &Environment, flag: Option<&Path>) -> Result<Arc<Store>, CommandError> {
    Store::open(&env.store(flag)?).map(Arc::new).map_err(store_error)
}

pub(crate) fn listen(env: &Environment) -> Result<(), CommandError> {
    end_on_signals(env.color).map_err(|error| CommandError::new(Exit::Host, &error, None))
}

pub(crate) fn sources(store: &Arc<Store>, options: ClientOptions) -> SourceContext {
    SourceContext {
        store: store.clone(),
        client: Client::new(options),
        pull: PullPolicy::Always,
        offline: false,
        limits: Limits::default(),
        write: WriteOptions { ownership: Ownership::SingleId },
        progress: None,
        warn: None,
    }
}

/// Of the store in this directory, in a process for which owners on disk are these.
pub(crate) fn sources_at(
    store: &Path,
    options: ClientOptions,
    ownership: Ownership,
) -> Result<SourceContext, CommandError> {
    let store = Store::open(store).map_err(store_error)?;
    let store = if ownership == Ownership::SingleId { store.with_single_id() } else { store };
    Ok(SourceContext { write: WriteOptions { ownership }, ..sources(&Arc::new(store), options) })
}

/// Unpacks an image, so that the first step on it need not. That can be done later, too, if it fails here: so it may take no more
/// than half of what the disk has left, and a thousand times its compressed size.
pub(crate) fn unpack(image: &ResolvedImage, sources: &SourceContext) -> Result<(), SourceError> {
    /// Below, any ratio does no harm.
    const LITTLE_BYTES: u64 = 1 << 30;
    if !foreign::is_native(&image.platform) {
        // It is rarely run here, and more often sent on.
        return Ok(());
    }
    let default = Limits::default();
    let room = sources.store.free_bytes().unwrap_or(default.file_bytes) / 2;
    let compressed = image.layers.iter().fold(0, |sum: u64, layer| sum.saturating_add(layer.descriptor.size));
    let most = room.min(compressed.saturating_mul(1000).max(LITTLE_BYTES));
    let file_bytes = default.file_bytes.min(most / image.layers.len().max(1) as u64);
    let limits = Limits { file_bytes, ..default };
    ensure_layers(image, Form::Tree, &SourceContext { limits, ..sources.clone() }).map(drop)
}

pub(crate) fn warn_not_unpacked(error: &SourceError) {
    crate::print_error(&format!("warning: not unpacked: {}\n", with_causes(error)));
}

/// An image by a name or digest of the store.
fn find(store: &Store, image: &str) -> Result<(String, Descriptor), CommandError> {
    let unknown = || {
        let help = Some("`nacre images` lists what there is".to_owned());
        failure(Exit::Usage, &format!("no image `{image}` in the store"), help)
    };
    let digits = image.strip_prefix("sha256:").unwrap_or(image);
    if digits.len() >= 6 && digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        let prefix = format!("sha256:{digits}");
        let tags = store.tags().map_err(store_error)?;
        let mut found: Vec<_> = tags.into_iter().filter(|(_, root)| root.digest.starts_with(&prefix)).collect();
        found.dedup_by(|a, b| a.1.digest == b.1.digest);
        match found.len() {
            0 => {}
            1 => return found.pop().ok_or_else(unknown),
            _ => return Err(failure(Exit::Usage, &format!("`{image}` is the beginning of several digests"), None)),
        }
    }
    let name = reference(image)?.to_string();
    let root = store.lookup_tag(&name).map_err(store_error)?.ok_or_else(unknown)?;
    Ok((name, Descriptor { annotations: Default::default(), ..root }))
}

/// Fetches an image with all of its layers, names it, and unpacks it meanwhile for the steps that will run on it.
pub(crate) fn pull(args: &PullArgs, env: &Environment) -> Result<(), CommandError> {
    let name = reference(&args.name)?;
    let host = platform::host();
    let platform = match &args.platform {
        None => host,
        Some(text) => platform::parse(text, &host).map_err(|error| CommandError::new(Exit::Usage, &error, None))?,
    };
    let remote = RemoteImage::parse(&name.to_string())
        .ok_or_else(|| failure(Exit::Usage, &format!("`{name}` is no name in a registry"), None))?;
    let Some(ownership) = enter_to_unpack()? else { return Ok(()) };
    listen(env)?;
    let store = env.store(args.at.store.as_deref())?;
    let told = Arc::new(Mutex::new(HashSet::new()));
    let quiet = args.quiet;
    let tell = move |digest: &str, bytes: u64| {
        if !quiet && told.lock().unwrap_or_else(PoisonError::into_inner).insert(digest.to_owned()) {
            crate::print_error(&format!("{digest} {}\n", indicatif::DecimalBytes(bytes)));
        }
    };
    let tell_received = tell.clone();
    let progress: Progress = Arc::new(move |digest: &str, received, total| {
        if received == total {
            tell_received(digest, total);
        }
    });
    let sources = sources_at(&store, env.registry(&args.registry), ownership.unwrap_or(Ownership::SingleId))?;
    let sources = SourceContext { progress: Some(progress), ..sources };
    let store = &sources.store;
    let registry = |error| source_error(&SourceError::Registry(error));
    let (bytes, root) = sources.client.manifest(&remote).map_err(registry)?;
    store.put_document(&bytes).map_err(store_error)?;
    // Where its layers are, for a later push to the same registry.
    let resolved = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let remembered = RememberedReference {
        reference: remote.to_string(),
        descriptor: root.clone(),
        resolved: i64::try_from(resolved).unwrap_or(i64::MAX),
    };
    store.remember_reference(&remembered).map_err(store_error)?;
    // By the digest: what has this name in the store does not matter, and the tag may move meanwhile.
    let pinned = RemoteImage { tag: None, digest: Some(root.digest), ..remote };
    let image = resolve_image(&ImageSource::Reference(pinned.to_string()), &platform, &sources)
        .map_err(|error| source_error(&error))?;
    if ownership.is_some() {
        match unpack(&image, &sources) {
            Ok(()) => {}
            // What came is not the image, or nothing came.
            Err(
                error @ (SourceError::Registry(_) | SourceError::BlobMismatch { .. } | SourceError::BlobSize { .. }),
            ) => {
                return Err(source_error(&error));
            }
            Err(error) => warn_not_unpacked(&error),
        }
    }
    fetch_layers(&image, &sources, &tell)?;
    let bytes = store.read_document(&image.manifest_digest).map_err(store_error)?;
    let manifest: Manifest =
        serde_json::from_slice(&bytes).map_err(|error| CommandError::new(Exit::Source, &error, None))?;
    let descriptor = Descriptor {
        media_type: if manifest.media_type.is_empty() {
            nacre_solver::image::media_type::OCI_MANIFEST.to_owned()
        } else {
            manifest.media_type
        },
        digest: image.manifest_digest.clone(),
        size: bytes.len() as u64,
        ..Descriptor::default()
    };
    match &name.tag {
        Some(tag) => {
            let named = Reference { digest: None, tag: Some(tag.clone()), ..name };
            store.tag(&named.to_string(), &descriptor).map_err(store_error)?;
        }
        None => store.tag(&name.to_string(), &descriptor).map_err(store_error)?,
    }
    crate::print_result(&match args.format {
        ListFormat::Table => format!("{}\n", image.manifest_digest),
        ListFormat::Json => {
            let name = format!("{}", RemoteImage { digest: None, ..pinned });
            let bytes = sources.client.received_bytes();
            let list = json!([{"name": name, "digest": image.manifest_digest, "received_bytes": bytes}]);
            format!("{list:#}\n")
        }
    })
}

fn fetch_layers(
    image: &ResolvedImage,
    sources: &SourceContext,
    tell: &(dyn Fn(&str, u64) + Sync),
) -> Result<(), CommandError> {
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..image.layers.len().min(PARALLEL_LAYERS) {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let Some(layer) = image.layers.get(at) else { return };
                    match ensure_blob(image, at, sources) {
                        Ok(()) => tell(&layer.descriptor.digest, layer.descriptor.size),
                        Err(error) => {
                            failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                            next.store(image.layers.len(), Ordering::Relaxed);
                        }
                    }
                }
            });
        }
    });
    match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(source_error(&error)),
        None => Ok(()),
    }
}

/// Sends images of the store to the registries that their names tell.
pub(crate) fn push(args: &PushArgs, env: &Environment) -> Result<(), CommandError> {
    listen(env)?;
    let store = open(env, args.at.store.as_deref())?;
    let sources = sources(&store, env.registry(&args.registry));
    let mut results = Vec::new();
    for name in &args.names {
        let (name, root) = find(&store, &reference(name)?.to_string())?;
        let target = RemoteImage::parse(&name)
            .ok_or_else(|| failure(Exit::Usage, &format!("`{name}` is no name in a registry"), None))?;
        let image = PushImage::of_store(&store, &root).map_err(|error| crate::export_command::push_error(&error))?;
        let show = |event: Event| match event {
            Event::Transfer { what, done_bytes, total_bytes: Some(total), .. }
                if done_bytes == total && !args.quiet =>
            {
                crate::print_error(&format!("{what} {}\n", indicatif::DecimalBytes(total)));
            }
            _ => {}
        };
        let report = send(&image, &[target], &sources, &show, &|| false)?;
        results.push((name, root.digest, report));
    }
    let text = match args.format {
        _ if args.quiet => results.iter().map(|(_, digest, _)| format!("{digest}\n")).collect(),
        ListFormat::Table => {
            let line = |(name, digest, report): &(String, String, nacre_solver::push::PushReport)| {
                format!(
                    "{name} {digest}: {} sent ({}), {} mounted, {} there\n",
                    report.sent,
                    indicatif::DecimalBytes(report.sent_bytes),
                    report.mounted,
                    report.present
                )
            };
            results.iter().map(line).collect()
        }
        ListFormat::Json => {
            let list = results.iter().map(|(name, digest, report)| {
                json!({"name": name, "digest": digest, "sent": report.sent, "sent_bytes": report.sent_bytes,
                       "mounted": report.mounted, "present": report.present})
            });
            format!("{:#}\n", Value::Array(list.collect()))
        }
    };
    crate::print_result(&text)
}

/// Gives an image another name.
pub(crate) fn tag(args: &TagArgs, env: &Environment) -> Result<(), CommandError> {
    let name = reference(&args.name)?;
    if name.digest.is_some() {
        return Err(failure(Exit::Usage, "a name to give has no digest", None));
    }
    let store = open(env, args.at.store.as_deref())?;
    let (_, root) = find(&store, &args.image)?;
    store.tag(&name.to_string(), &root).map_err(store_error)
}

/// Takes names away.
pub(crate) fn remove(args: &RmiArgs, env: &Environment) -> Result<(), CommandError> {
    let store = open(env, args.at.store.as_deref())?;
    let mut removed = Vec::new();
    for name in &args.names {
        let canonical = reference(name)?.to_string();
        let found = store.untag(&canonical).map_err(store_error)?;
        if !found && !args.force {
            let help = Some("`nacre images` lists what there is".to_owned());
            return Err(failure(Exit::Usage, &format!("no image `{name}` in the store"), help));
        }
        if found {
            removed.push(canonical);
        }
    }
    crate::print_result(&match args.format {
        ListFormat::Table => removed.iter().map(|name| format!("{name}\n")).collect(),
        ListFormat::Json => format!("{:#}\n", json!({"removed": removed})),
    })
}

/// Prints manifest and configuration of images.
pub(crate) fn inspect(args: &InspectArgs, env: &Environment) -> Result<(), CommandError> {
    let store = open(env, args.at.store.as_deref())?;
    let document = |digest: &str| -> Result<Value, CommandError> {
        let bytes = store.read_document(digest).map_err(store_error)?;
        serde_json::from_slice(&bytes).map_err(|error| CommandError::new(Exit::Store, &error, None))
    };
    let mut list = Vec::new();
    for image in &args.images {
        let (_, root) = find(&store, image)?;
        let names: Vec<String> = store
            .tags()
            .map_err(store_error)?
            .into_iter()
            .filter(|(_, other)| other.digest == root.digest)
            .map(|(name, _)| name)
            .collect();
        let manifest = document(&root.digest)?;
        let mut value = json!({"names": names, "digest": root.digest, "mediaType": root.media_type});
        match manifest["config"]["digest"].as_str() {
            Some(config) => {
                value["config"] = document(config)?;
                value["manifest"] = manifest;
            }
            None => value["index"] = manifest,
        }
        list.push(value);
    }
    crate::print_result(&format!("{:#}\n", Value::Array(list)))
}

/// Writes an archive that `docker load` and `podman load` read.
pub(crate) fn save(args: &SaveArgs, env: &Environment) -> Result<(), CommandError> {
    let store = open(env, args.at.store.as_deref())?;
    let (name, root) = find(&store, &args.image)?;
    let dest = match &args.output {
        Some(path) => Dest::Path(path.clone()),
        None if env.stdout_terminal => {
            let help = Some("give -o FILE, or pipe the output into a program".to_owned());
            return Err(failure(Exit::Usage, "refusing to write an archive to a terminal", help));
        }
        None => Dest::Stdout,
    };
    let bytes = store.read_document(&root.digest).map_err(store_error)?;
    let manifest: Manifest = serde_json::from_slice(&bytes).map_err(|_| {
        let help = Some("build or pull it for one platform".to_owned());
        failure(Exit::Usage, &format!("{name} is for several platforms; an archive holds one"), help)
    })?;
    let image = Assembled {
        config_bytes: store.read_document(&manifest.config.digest).map_err(store_error)?,
        config_descriptor: manifest.config,
        manifest_bytes: bytes,
        manifest_descriptor: root,
        layers: manifest.layers.unwrap_or_default(),
        diff_ids: Vec::new(),
        created: None,
    };
    let names = [name];
    let image = ExportImage { images: std::slice::from_ref(&image), index: None, names: &names };
    export::export(&image, &store, &export::Output::Docker { dest: &dest }, &mut std::io::stdout().lock())
        .map_err(|error| CommandError::new(Exit::Store, &error, None))
}
