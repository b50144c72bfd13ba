//! `nacre images`: lists what the store's index names.

use crate::cli::{ImagesArgs, ListFormat};
use crate::report::{CommandError, Exit, Failure};
use serde_json::{Value, json};
use std::path::Path;

/// One line of the list.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Row {
    name: String,
    digest: String,
    created: String,
    size_bytes: u64,
}

/// Prints the list.
pub(crate) fn run(args: &ImagesArgs, store: &Path) -> Result<(), CommandError> {
    let rows = rows(store)?;
    let text = match args.format {
        _ if args.quiet => {
            let mut digests: Vec<&str> = rows.iter().map(|row| row.digest.as_str()).collect();
            digests.dedup();
            digests.iter().map(|digest| format!("{digest}\n")).collect()
        }
        ListFormat::Table => table(&rows),
        ListFormat::Json => {
            let list: Vec<Value> = rows
                .iter()
                .map(|row| {
                    json!({"name": row.name, "digest": row.digest, "created": row.created, "size_bytes": row.size_bytes})
                })
                .collect();
            format!("{:#}\n", Value::Array(list))
        }
    };
    crate::print_result(&text)
}

/// Reads the index. A store that is not there yet has no images.
fn rows(store: &Path) -> Result<Vec<Row>, CommandError> {
    let path = store.join("index.json");
    let text = match std::fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(unreadable(&path, &error)),
    };
    let index: Value = serde_json::from_slice(&text).map_err(|error| unreadable(&path, &error))?;
    let mut rows: Vec<Row> = members(&index, "manifests").map(|descriptor| row(store, descriptor)).collect();
    rows.sort_by(|a, b| (&a.name, &a.digest).cmp(&(&b.name, &b.digest)));
    // The index has an image once for every spelling of its name that other tools look for.
    rows.dedup();
    Ok(rows)
}

fn row(store: &Path, descriptor: &Value) -> Row {
    let digest = descriptor["digest"].as_str().unwrap_or_default().to_owned();
    let annotation = |name: &str| descriptor["annotations"][name].as_str();
    let name = annotation("io.containerd.image.name").or_else(|| annotation("org.opencontainers.image.ref.name"));
    // Of an index, its first image stands for all in the columns.
    let mut manifest = blob(store, &digest);
    let mut size_bytes = 0;
    let nested: Vec<Value> = members(&manifest, "manifests").cloned().collect();
    if let Some(first) = nested.first() {
        manifest = blob(store, first["digest"].as_str().unwrap_or_default());
    }
    size_bytes += members(&manifest, "layers").filter_map(|layer| layer["size"].as_u64()).sum::<u64>();
    let config = blob(store, manifest["config"]["digest"].as_str().unwrap_or_default());
    let created = config["created"].as_str().unwrap_or_default().to_owned();
    Row { name: name.unwrap_or_default().to_owned(), digest, created, size_bytes }
}

fn members<'a>(value: &'a Value, name: &str) -> impl Iterator<Item = &'a Value> {
    value[name].as_array().map(Vec::as_slice).unwrap_or_default().iter()
}

/// A JSON blob; `null` when it is not there or no JSON, which leaves columns empty.
fn blob(store: &Path, digest: &str) -> Value {
    let safe = |part: &str| !part.is_empty() && part.chars().all(|c| c.is_ascii_alphanumeric());
    match digest.split_once(':') {
        Some((algorithm, hex)) if safe(algorithm) && safe(hex) => {
            let text = std::fs::read(store.join("blobs").join(algorithm).join(hex)).unwrap_or_default();
            serde_json::from_slice(&text).unwrap_or_default()
        }
        _ => Value::Null,
    }
}

fn unreadable(path: &Path, error: &dyn std::error::Error) -> CommandError {
    CommandError::Failure(Box::new(Failure {
        exit: Exit::Store,
        message: format!("cannot read {}: {error}", path.display()),
        place: None,
        help: None,
    }))
}

fn table(rows: &[Row]) -> String {
    let width = rows.iter().map(|row| row.name.len()).max().unwrap_or(0).max(4);
    let mut text = format!("{:width$}  {:19}  {:20}  {:>10}\n", "NAME", "DIGEST", "CREATED", "SIZE");
    for row in rows {
        // Twelve hex digits, as docker shows.
        let short: String = row.digest.chars().take(19).collect();
        let size = indicatif::DecimalBytes(row.size_bytes).to_string();
        text.push_str(&format!("{:width$}  {short:19}  {:20}  {size:>10}\n", row.name, row.created));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_becomes_rows() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let store = dir.path();
        assert_eq!(rows(store).expect("no images"), []);
        std::fs::create_dir_all(store.join("blobs/sha256")).expect("a directory");
        let write = |path: &str, value: Value| std::fs::write(store.join(path), value.to_string()).expect("a file");
        write("blobs/sha256/aa", json!({"config": {"digest": "sha256:bb"}, "layers": [{"size": 1000}, {"size": 500}]}));
        write("blobs/sha256/bb", json!({"created": "2024-01-01T00:00:00Z"}));
        let descriptor = |name: &str, digest: &str| json!({"digest": digest, "annotations": {"org.opencontainers.image.ref.name": name}});
        let manifests = [descriptor("b:1", "sha256:../../x"), descriptor("a:1", "sha256:aa")];
        write("index.json", json!({ "manifests": manifests }));
        let rows = rows(store).expect("two rows");
        assert_eq!((rows[0].name.as_str(), rows[0].size_bytes), ("a:1", 1500));
        assert_eq!(rows[0].created, "2024-01-01T00:00:00Z");
        assert_eq!((rows[1].name.as_str(), rows[1].size_bytes), ("b:1", 0));
        let text = table(&rows);
        assert!(text.contains("a:1   sha256:aa            2024-01-01T00:00:00Z     1.50 kB\n"), "{text}");
    }
}
