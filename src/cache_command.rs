//! Writing caches at the end of `nacre build`.

use crate::build_command::failure;
use crate::cache_options::{CachePlace, CacheTarget};
use crate::export_command::{Built, Live, codec, export_error, layer_blobs, send, snapshot_error};
use crate::report::{CommandError, Exit};
use nacre_solver::cache::export::{StepResult, assemble, document, keep, layers};
use nacre_solver::export::{self, Dest, ExportImage};
use nacre_solver::push::{PushBlob, PushImage};
use nacre_solver::snapshot::{self, Snapshot, Workspace};
use nacre_solver::solve::Event;
use std::collections::HashMap;
use std::io;
use std::time::Instant;

/// Writes the caches that were asked for. One that cannot be written is a warning, unless the caller said otherwise.
pub(crate) fn write_caches(
    targets: &[CacheTarget],
    workspace: &Workspace,
    built: &[Built],
    live: &Live<'_>,
) -> Result<(), CommandError> {
    for target in targets.iter().filter(|target| target.place != CachePlace::Inline) {
        if (live.stop)() {
            return Err(CommandError::Interrupted);
        }
        let what = match &target.place {
            CachePlace::Registry(remote) => format!("cache to {remote}"),
            CachePlace::Local { dest, .. } => format!("cache to {}", dest.display()),
            CachePlace::Inline => continue,
        };
        let started = Instant::now();
        (live.events)(Event::Exporting { what: what.clone() });
        match write_cache(target, workspace, built, live) {
            Ok(()) => {}
            Err(CommandError::Interrupted) => return Err(CommandError::Interrupted),
            Err(error) if target.must_succeed => return Err(error),
            Err(error) => {
                let message = format!("the {what} was not written: {}", error.message());
                (live.events)(Event::Warning { message });
            }
        }
        (live.events)(Event::Exported { what, duration: started.elapsed() });
    }
    Ok(())
}

fn write_cache(
    target: &CacheTarget,
    workspace: &Workspace,
    built: &[Built],
    live: &Live<'_>,
) -> Result<(), CommandError> {
    let steps: Vec<StepResult> = built.iter().flat_map(|one| one.steps().iter().cloned()).collect();
    let results: Vec<&Snapshot> = built.iter().map(Built::snapshot).collect();
    let layers = layers(&steps, &results, target.mode);
    let (codec, level) = codec(target.compression);
    let compression = snapshot::Compression { codec, level, clamp_mtime: None, force: target.force_compression };
    // What a registry has may be in the one where the cache goes.
    let later = matches!(target.place, CachePlace::Registry(_));
    let blobs = layer_blobs(workspace, &layers, compression, later, live.events).map_err(snapshot_error)?;
    let by_layer = layers.iter().map(|layer| layer.id().clone()).zip(blobs.iter().cloned()).collect::<HashMap<_, _>>();
    let document = document(&steps, &by_layer);
    let cache = assemble(&document, blobs).map_err(|error| CommandError::new(Exit::General, &error, None))?;
    match &target.place {
        CachePlace::Inline => Ok(()),
        CachePlace::Local { dest, tag } => {
            let images = [cache];
            let image = ExportImage { images: &images, index: None, names: &[format!("cache:{tag}")] };
            let output = export::Output::Oci { dest: &Dest::Path(dest.clone()), tar: false };
            export::export(&image, &workspace.store, &output, &mut io::sink()).map_err(export_error)
        }
        CachePlace::Registry(remote) => {
            let put = |bytes: &[u8]| {
                workspace.store.put_document(bytes).map_err(|error| CommandError::new(Exit::Store, &error, None))
            };
            put(&cache.config_bytes)?;
            let mut image = PushImage::default();
            for layer in &layers {
                let Some(blob) = by_layer.get(layer.id()) else { continue };
                let base = layer.image().map(|(base, at)| (base.clone(), at));
                let base = base.filter(|(base, at)| {
                    base.layers.get(*at).is_some_and(|layer| layer.descriptor.digest == blob.descriptor.digest)
                });
                image.add_blob(PushBlob { descriptor: blob.descriptor.clone(), base });
            }
            image.add_blob(PushBlob { descriptor: cache.config_descriptor.clone(), base: None });
            image.manifests.push((cache.manifest_descriptor.clone(), cache.manifest_bytes.clone()));
            send(&image, std::slice::from_ref(remote), &workspace.sources, live.events, live.stop).map(drop)
        }
    }
}

/// Makes records of what came from other machines' caches and is here now.
pub(crate) fn keep_imported(workspace: &Workspace, built: &[Built]) -> Result<(), CommandError> {
    built.iter().try_for_each(|one| {
        keep(one.steps(), one.names(), &workspace.store).map_err(|error| failure(Exit::Store, &error.to_string(), None))
    })
}
