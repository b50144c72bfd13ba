//! Writing caches at the end of `nacre build`.

use crate::build_command::failure;
use crate::cache_options::{CachePlace, CacheTarget};
#[cfg(feature = "s3")]
use crate::export_command::shown;
use crate::export_command::{Built, Live, codec, export_error, layer_blobs, push_blob, send, snapshot_error};
use crate::report::{CommandError, Exit};
#[cfg(feature = "s3")]
use nacre_solver::cache::bucket::BucketError;
use nacre_solver::cache::export::{StepResult, assemble, document, indexes, keep, layers};
use nacre_solver::export::{self, Dest, ExportImage};
use nacre_solver::image::Descriptor;
use nacre_solver::op::source::ensure_blob;
use nacre_solver::push::{PushBlob, PushImage};
use nacre_solver::snapshot::{self, Layer, Snapshot, Workspace};
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
            #[cfg(feature = "s3")]
            CachePlace::Bucket(bucket) => format!("cache to {bucket}"),
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

/// What the caches that were read turn out to lack is not needed for a new one: it is written without.
fn write_cache(
    target: &CacheTarget,
    workspace: &Workspace,
    built: &[Built],
    live: &Live<'_>,
) -> Result<(), CommandError> {
    loop {
        let before = workspace.imports.lost();
        let result = try_write_cache(target, workspace, built, live);
        if result.is_ok() || workspace.imports.lost() == before || (live.stop)() {
            return result;
        }
    }
}

fn try_write_cache(
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
    let later = !matches!(target.place, CachePlace::Local { .. });
    let blobs =
        layer_blobs(workspace, &layers, compression, later, None, live.events, &|_, _| ()).map_err(snapshot_error)?;
    let by_layer = layers.iter().map(|layer| layer.id().clone()).zip(blobs.iter().cloned()).collect::<HashMap<_, _>>();
    let bases = results.iter().flat_map(|snapshot| snapshot.layers()).filter_map(|layer| {
        let (image, at) = layer.image()?;
        let diff_id = image.layers[at].diff_id.clone();
        Some((layer, diff_id))
    });
    let described: Vec<(Layer, String)> =
        layers.iter().cloned().zip(blobs.iter().map(|blob| blob.diff_id.clone())).chain(bases).collect();
    let store_error = |error| CommandError::new(Exit::Store, &error, None);
    let indexes = indexes(workspace, &described).map_err(store_error)?;
    let mut document = document(&steps, &by_layer);
    document.indexes = indexes.iter().map(|(diff_id, (blob, _))| (diff_id.clone(), blob.digest.clone())).collect();
    let index_blobs: Vec<Descriptor> = indexes.values().map(|(blob, _)| blob.clone()).collect();
    let cache =
        assemble(&document, blobs, &index_blobs).map_err(|error| CommandError::new(Exit::General, &error, None))?;
    let image = || {
        workspace.store.put_document(&cache.config_bytes).map_err(store_error)?;
        let mut image = PushImage::default();
        for layer in &layers {
            let Some(blob) = by_layer.get(layer.id()) else { continue };
            image.add_blob(push_blob(layer, &blob.descriptor));
        }
        for (descriptor, image_of_it) in indexes.values() {
            let base = image_of_it.clone().map(|image| (image, 0));
            image.add_blob(PushBlob { descriptor: descriptor.clone(), base });
        }
        image.add_blob(PushBlob { descriptor: cache.config_descriptor.clone(), base: None });
        image.manifests.push((cache.manifest_descriptor.clone(), cache.manifest_bytes.clone()));
        Ok::<_, CommandError>(image)
    };
    match &target.place {
        CachePlace::Inline => Ok(()),
        #[cfg(feature = "s3")]
        CachePlace::Bucket(bucket) => {
            let written = bucket.write(&image()?, &workspace.sources, &shown(live.events), live.stop);
            written.map_err(|error| match error {
                BucketError::Interrupted => CommandError::Interrupted,
                error => CommandError::new(Exit::Source, &error, None),
            })
        }
        CachePlace::Local { dest, tag } => {
            for image in indexes.values().filter_map(|(_, image)| image.as_ref()) {
                ensure_blob(image, 0, &workspace.sources)
                    .map_err(|error| CommandError::new(Exit::Source, &error, None))?;
            }
            let images = [cache.clone()];
            let image = ExportImage { images: &images, index: None, names: &[format!("cache:{tag}")] };
            let output = export::Output::Oci { dest: &Dest::Path(dest.clone()), tar: false };
            export::export(&image, &workspace.store, &output, &mut io::sink()).map_err(export_error)
        }
        CachePlace::Registry(remote) => {
            let image = image()?;
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
