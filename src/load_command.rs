//! `nacre load` and `nacre manifest inspect`.

use crate::build_command::{enter_to_unpack, failure};
use crate::cli::{ListFormat, LoadArgs, ManifestInspectArgs};
use crate::image_commands::{listen, reference, source_error, sources_at, store_error, unpack, warn_not_unpacked};
use crate::report::{CommandError, Exit};
use crate::request::Environment;
use nacre_frontend::llb::ImageSource;
use nacre_frontend::platform;
use nacre_solver::load::{LoadError, Loaded, load as load_archive};
use nacre_solver::materialize::Ownership;
use nacre_solver::op::source::{PullPolicy, SourceContext, SourceError, resolve_image};
use nacre_solver::registry::{Client, ClientOptions, RemoteImage};
use serde_json::{Value, json};
use std::fs::File;
use std::io::{IsTerminal, Read};

fn load_error(error: &LoadError) -> CommandError {
    let exit = if matches!(error, LoadError::Store(_)) { Exit::Store } else { Exit::Source };
    CommandError::new(exit, error, None)
}

/// Puts images of an archive into the store under their names, and unpacks them for the steps that will run on them.
pub(crate) fn load(args: &LoadArgs, env: &Environment) -> Result<(), CommandError> {
    if args.input.is_none() && std::io::stdin().is_terminal() {
        let help = Some("give it with -i FILE, or on standard input".to_owned());
        return Err(failure(Exit::Usage, "no archive", help));
    }
    let name = args.tag.as_deref().map(reference).transpose()?;
    if name.as_ref().is_some_and(|name| name.digest.is_some()) {
        return Err(failure(Exit::Usage, "a name to give has no digest", None));
    }
    // Before the archive is opened, which may be a pipe.
    let Some(ownership) = enter_to_unpack()? else { return Ok(()) };
    let input: Box<dyn Read + Send> = match &args.input {
        Some(path) => {
            let unreadable = |error| failure(Exit::Usage, &format!("cannot read {}: {error}", path.display()), None);
            Box::new(File::open(path).map_err(unreadable)?)
        }
        None => Box::new(std::io::stdin()),
    };
    listen(env)?;
    let store = env.store(args.at.store.as_deref())?;
    let sources = sources_at(&store, ClientOptions::default(), ownership.unwrap_or(Ownership::SingleId))?;
    let sources = SourceContext { pull: PullPolicy::Missing, offline: true, ..sources };
    let store = &sources.store;
    let mut images = load_archive(input, store).map_err(|error| load_error(&error))?;
    match (name, images.as_mut_slice()) {
        (None, _) => {}
        (Some(name), [image]) => image.names = vec![name.to_string()],
        (Some(_), images) => {
            let message = format!("the archive holds {} images, and one name for them", images.len());
            return Err(failure(Exit::Usage, &message, Some("leave --tag out".to_owned())));
        }
    }
    if let Some(image) = images.iter().find(|image| image.names.is_empty()) {
        let message = format!("image {} has no name in the archive", image.root.digest);
        return Err(failure(Exit::Usage, &message, Some("give it one with --tag NAME".to_owned())));
    }
    for Loaded { names, root } in &images {
        for name in names {
            store.tag(name, root).map_err(store_error)?;
        }
    }
    let text = match args.format {
        _ if args.quiet => images.iter().map(|image| format!("{}\n", image.root.digest)).collect(),
        ListFormat::Table => {
            let named = images.iter().flat_map(|image| image.names.iter().map(|name| (name, &image.root.digest)));
            named.map(|(name, digest)| format!("{name} {digest}\n")).collect()
        }
        ListFormat::Json => {
            let list = images.iter().map(|image| json!({"names": image.names, "digest": image.root.digest}));
            format!("{:#}\n", Value::Array(list.collect()))
        }
    };
    crate::print_result(&text)?;
    for Loaded { names, root } in images.iter().filter(|_| ownership.is_some()) {
        let Some(name) = names.first() else { continue };
        let image = match resolve_image(&ImageSource::Reference(name.clone()), &platform::host(), &sources) {
            // Another image that has this name elsewhere, as ours is not for this machine.
            Ok(image) if image.root_digest != root.digest => continue,
            Err(SourceError::NoSuchPlatform { .. } | SourceError::NotPulled { .. }) => continue,
            found => found,
        };
        if let Err(error) = image.and_then(|image| unpack(&image, &sources)) {
            // The image is there all the same.
            warn_not_unpacked(&error);
        }
    }
    Ok(())
}

/// Prints what a registry has under a name.
pub(crate) fn manifest(args: &ManifestInspectArgs, env: &Environment) -> Result<(), CommandError> {
    let name = reference(&args.name)?;
    let remote = RemoteImage::parse(&name.to_string())
        .ok_or_else(|| failure(Exit::Usage, &format!("`{name}` is no name in a registry"), None))?;
    let mut options = env.registry(&args.registry);
    if args.unchecked {
        options.insecure.push(remote.host.clone());
    }
    listen(env)?;
    let (bytes, _) =
        Client::new(options).manifest(&remote).map_err(|error| source_error(&SourceError::Registry(error)))?;
    let text = String::from_utf8_lossy(&bytes).into_owned();
    if args.raw {
        return crate::print_result(&text);
    }
    let value: Value = serde_json::from_str(&text).map_err(|error| CommandError::new(Exit::Source, &error, None))?;
    crate::print_result(&format!("{value:#}\n"))
}
