//! Reads an image back and compares it with a record: what the conformance cases' `expected.json` holds.
//!
//! A record is the image without what may differ between builders: layers as the paths they add and remove however
//! whiteouts are encoded, the flattened file system without what comes unchanged from a base image, times only where
//! they are not those of the build.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// Members of the image config that are compared.
const CONFIG: [&str; 13] = [
    "Env",
    "Cmd",
    "Entrypoint",
    "User",
    "WorkingDir",
    "Labels",
    "ExposedPorts",
    "Volumes",
    "StopSignal",
    "Healthcheck",
    "Shell",
    "OnBuild",
    "ArgsEscaped",
];

/// Where bytes that are no UTF-8 are kept in texts: 256 characters that nobody uses.
const RAW_BYTES: u32 = 0x0010_dc00;

/// An image, normalised.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) config: Map<String, Value>,
    pub(crate) platform: String,
    pub(crate) history: Vec<(String, bool)>,
    pub(crate) layers: Vec<LayerDiff>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) created: Option<Value>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) problems: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) base: Option<String>,
    #[serde(default)]
    pub(crate) gone: Vec<String>,
    pub(crate) fs: BTreeMap<String, Entry>,
}

/// What a layer means: paths it adds or changes, topmost paths it removes.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct LayerDiff {
    pub(crate) add: Vec<String>,
    pub(crate) del: Vec<String>,
}

/// A file: `t`ype, `own`er, `mode`, `mtime`, and what its type has.
pub(crate) type Entry = Map<String, Value>;

type Files = BTreeMap<String, Arc<Entry>>;

/// Base images by name; what an image has from one of them is left out of its record.
#[derive(Debug, Default)]
pub(crate) struct Bases(Vec<(String, Record)>);

impl Bases {
    /// Reads the layouts `DIR/NAME`.
    pub(crate) fn read(dir: &Path, names: &[&str]) -> Result<Self, String> {
        let read = |name: &&str| Ok(((*name).to_owned(), read_image(&dir.join(name), &Bases::default(), false)?));
        names.iter().map(read).collect::<Result<_, String>>().map(Self)
    }
}

/// What is compared beyond files, config and layers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Strictness {
    /// The history's text, `ArgsEscaped`, a working directory of `/`.
    pub(crate) strict: bool,
}

/// Reads an OCI or docker archive, or an OCI layout directory. With `epoch`, dates are part of the record.
pub(crate) fn read_image(path: &Path, bases: &Bases, epoch: bool) -> Result<Record, String> {
    let blobs = Blobs::open(path)?;
    let (config, layers) = if blobs.has("index.json") {
        let mut descriptor = first_manifest(&blobs.json("index.json")?)?;
        while is_index(&descriptor) {
            descriptor = first_manifest(&blobs.blob_json(&descriptor)?)?;
        }
        let manifest = blobs.blob_json(&descriptor)?;
        let layers = manifest["layers"].as_array().cloned().unwrap_or_default();
        let layers = layers.iter().map(|layer| blobs.blob(layer)).collect::<Result<Vec<_>, _>>()?;
        (blobs.blob_json(&manifest["config"])?, layers)
    } else {
        let manifest = blobs.json("manifest.json")?[0].clone();
        let layers = manifest["Layers"].as_array().cloned().unwrap_or_default();
        let layers = layers.iter().map(|name| blobs.get(text(name))).collect::<Result<Vec<_>, _>>()?;
        (blobs.json(text(&manifest["Config"]))?, layers)
    };

    let mut problems = Vec::new();
    let diff_ids = config["rootfs"]["diff_ids"].as_array().cloned().unwrap_or_default();
    if diff_ids.len() != layers.len() {
        problems.push("rootfs.diff_ids and manifest layers differ in number".to_owned());
    }
    let mut files = Files::new();
    let mut diffs = Vec::new();
    for (number, layer) in layers.iter().enumerate() {
        let raw = decompressed(layer)?;
        if diff_ids.get(number).is_some_and(|id| text(id) != format!("sha256:{}", hex(&raw))) {
            problems.push(format!("diff_id of layer {number} does not match its content"));
        }
        let next = apply_layer(files.clone(), &raw).map_err(|error| format!("layer {number}: {error}"))?;
        diffs.push(layer_diff(&files, &next));
        files = next;
    }
    let history = config["history"].as_array().cloned().unwrap_or_default();
    let with_layer = history.iter().filter(|entry| !truthy(&entry["empty_layer"])).count();
    if with_layer != 0 && with_layer != layers.len() {
        problems.push("history entries that are not empty differ in number from the layers".to_owned());
    }
    let mut record = Record {
        platform: ["os", "architecture", "variant"]
            .iter()
            .map(|name| text(&config[name]))
            .filter(|part| !part.is_empty())
            .collect::<Vec<_>>()
            .join("/"),
        history: history
            .iter()
            .map(|entry| (text(&entry["created_by"]).to_owned(), truthy(&entry["empty_layer"])))
            .collect(),
        layers: diffs,
        problems,
        fs: describe(&files),
        ..Record::default()
    };
    for name in CONFIG {
        if truthy(&config["config"][name]) {
            record.config.insert(name.to_owned(), config["config"][name].clone());
        }
    }
    if truthy(&config["author"]) {
        record.config.insert("Author".to_owned(), config["author"].clone());
    }
    if epoch {
        let dates: BTreeSet<&str> = history.iter().map(|entry| text(&entry["created"])).collect();
        record.created = Some(json!([config["created"], dates]));
    }
    against_base(&mut record, bases);
    Ok(record)
}

/// Leaves out what comes unchanged from the base image with the most layers.
fn against_base(record: &mut Record, bases: &Bases) {
    let below = bases
        .0
        .iter()
        .filter(|(_, base)| !base.layers.is_empty() && record.layers.starts_with(&base.layers))
        // `max_by_key` takes the last of equals, the first is wanted.
        .rev()
        .max_by_key(|(_, base)| base.layers.len());
    if let Some((name, base)) = below {
        record.base = Some(name.clone());
        record.layers.drain(..base.layers.len());
        record.gone = base.fs.keys().filter(|path| !record.fs.contains_key(*path)).cloned().collect();
        record.fs.retain(|path, entry| base.fs.get(path) != Some(entry));
    }
}

/// Reads a record as it was written by Python, which keeps bytes that are no UTF-8 as lone surrogates.
pub(crate) fn parse_record(json_text: &str) -> Result<Record, String> {
    let mut clean = String::with_capacity(json_text.len());
    let mut rest = json_text;
    let mut after_high = false;
    while let Some(at) = rest.find('\\') {
        clean.push_str(&rest[..at]);
        let escape = &rest[at..];
        after_high &= at == 0;
        let code = escape.strip_prefix("\\u").and_then(|hex| u32::from_str_radix(hex.get(..4)?, 16).ok());
        let length = if code.is_some() { 6 } else { 2.min(escape.len()) };
        match code {
            Some(code @ 0xdc80..=0xdcff) if !after_high => {
                clean.extend(char::from_u32(RAW_BYTES + (code & 0xff)));
            }
            _ => clean.push_str(&escape[..length]),
        }
        after_high = matches!(code, Some(0xd800..=0xdbff));
        rest = &escape[length..];
    }
    clean.push_str(rest);
    let mut record: Record = serde_json::from_str(&clean).map_err(|error| error.to_string())?;
    // The order of odd names differs between the two encodings.
    record.gone.sort();
    for layer in &mut record.layers {
        layer.add.sort();
        layer.del.sort();
    }
    Ok(record)
}

/// Differences in words; empty when the images agree.
pub(crate) fn compare(expected: &Record, got: &Record, how: Strictness) -> Vec<String> {
    let mut diffs = Vec::new();
    let strict = how.strict;
    let names: BTreeSet<&String> = expected.config.keys().chain(got.config.keys()).collect();
    for name in names {
        let (a, b) = (expected.config.get(name), got.config.get(name));
        let top = |value: Option<&Value>| value.is_none_or(|value| value == "/");
        let unspecified = name == "ArgsEscaped" || name == "WorkingDir" && top(a) && top(b);
        if strict || !unspecified {
            put(&mut diffs, &format!("config.{name}"), &a, &b);
        }
    }
    put(&mut diffs, "platform", &expected.platform, &got.platform);
    if expected.created.is_some() {
        put(&mut diffs, "created", &expected.created, &got.created);
    }
    put(&mut diffs, "base", &expected.base, &got.base);
    put(&mut diffs, "base paths missing", &expected.gone, &got.gone);
    let paths: BTreeSet<&String> = expected.fs.keys().chain(got.fs.keys()).collect();
    for path in paths {
        match (expected.fs.get(path), got.fs.get(path)) {
            (Some(a), Some(b)) => compare_entry(&mut diffs, path, a, b),
            (None, Some(b)) => diffs.push(format!("{path}: unexpected {}", brief(b))),
            (Some(a), None) => diffs.push(format!("{path}: missing, expected {}", brief(a))),
            (None, None) => {}
        }
    }
    put(&mut diffs, "number of layers above the base", &expected.layers.len(), &got.layers.len());
    if expected.layers.len() == got.layers.len() {
        for (number, (a, b)) in expected.layers.iter().zip(&got.layers).enumerate() {
            put(&mut diffs, &format!("layer {number} adds"), &a.add, &b.add);
            put(&mut diffs, &format!("layer {number} removes"), &a.del, &b.del);
        }
    }
    let empty = |record: &Record| record.history.iter().map(|(_, empty)| *empty).collect::<Vec<_>>();
    put(&mut diffs, "history, empty entries", &empty(expected), &empty(got));
    if strict {
        let texts = |record: &Record| {
            record.history.iter().map(|(text, _)| text.replace(" # buildkit", "")).collect::<Vec<_>>()
        };
        put(&mut diffs, "history", &texts(expected), &texts(got));
    }
    diffs.extend(got.problems.iter().map(|problem| format!("malformed image: {problem}")));
    diffs
}

fn compare_entry(diffs: &mut Vec<String>, path: &str, a: &Entry, b: &Entry) {
    let members: BTreeSet<&String> = a.keys().chain(b.keys()).collect();
    for member in members {
        // A time is only known where the record has one; short contents are compared as text.
        let unknown_time = member == "mtime" && !a.contains_key("mtime");
        let shown_as_text = member == "sha256" && a.contains_key("data") && b.contains_key("data");
        if !unknown_time && !shown_as_text {
            put(diffs, &format!("{path} {member}"), &a.get(member), &b.get(member));
        }
    }
}

fn put<T: PartialEq + Serialize>(diffs: &mut Vec<String>, what: &str, expected: &T, got: &T) {
    if expected != got {
        diffs.push(format!("{what}: expected {}, got {}", json!(expected), json!(got)));
    }
}

fn brief(entry: &Entry) -> String {
    let shown = entry.iter().filter(|(member, _)| !matches!(member.as_str(), "sha256" | "mtime"));
    shown.map(|(member, value)| format!("{member}={value}")).collect::<Vec<_>>().join(" ")
}

/// The files of an archive or directory, by name.
enum Blobs<'a> {
    Dir(&'a Path),
    Tar(HashMap<String, Vec<u8>>),
}

impl<'a> Blobs<'a> {
    fn open(path: &'a Path) -> Result<Self, String> {
        if path.is_dir() {
            return Ok(Self::Dir(path));
        }
        let open = || -> std::io::Result<_> {
            let mut members = HashMap::new();
            for entry in tar::Archive::new(std::fs::File::open(path)?).entries()? {
                let mut entry = entry?;
                let mut content = Vec::new();
                entry.read_to_end(&mut content)?;
                members.insert(String::from_utf8_lossy(&entry.path_bytes()).into_owned(), content);
            }
            Ok(members)
        };
        open().map(Self::Tar).map_err(|error| format!("{}: {error}", path.display()))
    }

    fn has(&self, name: &str) -> bool {
        match self {
            Self::Dir(_) => true,
            Self::Tar(members) => members.contains_key(name),
        }
    }

    fn get(&self, name: &str) -> Result<Vec<u8>, String> {
        match self {
            Self::Dir(dir) => std::fs::read(dir.join(name)).map_err(|error| format!("{name}: {error}")),
            Self::Tar(members) => members.get(name).cloned().ok_or_else(|| format!("{name} is not in the archive")),
        }
    }

    fn json(&self, name: &str) -> Result<Value, String> {
        serde_json::from_slice(&self.get(name)?).map_err(|error| format!("{name}: {error}"))
    }

    fn blob(&self, descriptor: &Value) -> Result<Vec<u8>, String> {
        self.get(&format!("blobs/{}", text(&descriptor["digest"]).replace(':', "/")))
    }

    fn blob_json(&self, descriptor: &Value) -> Result<Value, String> {
        serde_json::from_slice(&self.blob(descriptor)?).map_err(|error| format!("{descriptor}: {error}"))
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// Python's idea of a value that is worth keeping.
fn truthy(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(value) => *value,
        Value::Number(value) => value.as_f64() != Some(0.0),
        Value::String(value) => !value.is_empty(),
        Value::Array(value) => !value.is_empty(),
        Value::Object(value) => !value.is_empty(),
    }
}

fn is_index(descriptor: &Value) -> bool {
    let media_type = text(&descriptor["mediaType"]);
    media_type.contains("index") || media_type.contains("manifest.list")
}

fn first_manifest(index: &Value) -> Result<Value, String> {
    let manifests = index["manifests"].as_array().map(Vec::as_slice).unwrap_or_default();
    let image = manifests.iter().find(|descriptor| !descriptor["annotations"].to_string().contains("attestation"));
    image.cloned().ok_or_else(|| "index without manifests".to_owned())
}

fn decompressed(blob: &[u8]) -> Result<Vec<u8>, String> {
    if blob.starts_with(&[0x1f, 0x8b]) {
        let mut raw = Vec::new();
        flate2::read::MultiGzDecoder::new(blob).read_to_end(&mut raw).map_err(|error| format!("gzip: {error}"))?;
        Ok(raw)
    } else if blob.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        // The program, so that what was written is read by somebody else's code.
        let failed = |error: std::io::Error| format!("zstd: {error}");
        let mut zstd =
            Command::new("zstd").arg("-dcq").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().map_err(failed)?;
        let mut stdin = zstd.stdin.take().ok_or("zstd has no standard input")?;
        let blob = blob.to_vec();
        let writer = std::thread::spawn(move || stdin.write_all(&blob));
        let output = zstd.wait_with_output().map_err(failed)?;
        let written = writer.join().is_ok_and(|result| result.is_ok());
        if written && output.status.success() { Ok(output.stdout) } else { Err("zstd refuses the layer".to_owned()) }
    } else {
        Ok(blob.to_vec())
    }
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Bytes as text without loss.
fn raw_text(bytes: &[u8]) -> String {
    let mut text = String::new();
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        text.extend(chunk.invalid().iter().filter_map(|byte| char::from_u32(RAW_BYTES + u32::from(*byte))));
    }
    text
}

/// An absolute path without `.`, `..` and double slashes.
fn normal_path(name: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in name.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    format!("/{}", parts.join("/"))
}

fn parent(path: &str) -> &str {
    match path.rfind('/') {
        Some(0) | None => "/",
        Some(at) => &path[..at],
    }
}

struct Member {
    path: String,
    entry: Entry,
    hard_link: Option<String>,
}

/// Applies a layer's archive; whiteouts act on what lower layers left.
fn apply_layer(mut files: Files, raw: &[u8]) -> Result<Files, String> {
    let lower: BTreeSet<String> = files.keys().cloned().collect();
    let drop = |files: &mut Files, path: &str, itself: bool| {
        let below = format!("{}/", path.trim_end_matches('/'));
        files.retain(|other, _| !(lower.contains(other) && (other.starts_with(&below) || itself && other == path)));
    };
    let members = members(raw)?;
    for member in &members {
        let (dir, base) = (parent(&member.path), &member.path[member.path.rfind('/').map_or(0, |at| at + 1)..]);
        if base == ".wh..wh..opq" {
            drop(&mut files, dir, false);
        } else if let Some(hidden) = base.strip_prefix(".wh.") {
            drop(&mut files, &normal_path(&format!("{dir}/{hidden}")), true);
        }
    }
    for member in members {
        let path = member.path;
        if path == "/" || path.rsplit('/').next().is_some_and(|base| base.starts_with(".wh.")) {
            continue;
        }
        let is_dir = |entry: &Entry| entry["t"] == "d";
        if !is_dir(&member.entry) && files.get(&path).is_some_and(|old| is_dir(old)) {
            drop(&mut files, &path, true);
        }
        if let Some(target) = member.hard_link {
            // The shared entry is the inode.
            let inode =
                files.get(&target).ok_or_else(|| format!("hard link {path} to {target}, which is not there"))?;
            files.insert(path, Arc::clone(inode));
            continue;
        }
        let mut above = parent(&path).to_owned();
        files.insert(path, Arc::new(member.entry));
        while above != "/" && !files.contains_key(&above) {
            let implied = json!({"t": "d", "own": "0:0", "mtime": 0, "mode": "0755"});
            let Value::Object(implied) = implied else { unreachable!("an object was written") };
            let next = parent(&above).to_owned();
            files.insert(above, Arc::new(implied));
            above = next;
        }
    }
    Ok(files)
}

fn members(raw: &[u8]) -> Result<Vec<Member>, String> {
    let read = || -> std::io::Result<Vec<Member>> {
        let mut members = Vec::new();
        for entry in tar::Archive::new(raw).entries()? {
            members.push(member(entry?)?);
        }
        Ok(members)
    };
    read().map_err(|error| format!("tar: {error}"))
}

fn member(mut tar_entry: tar::Entry<'_, &[u8]>) -> std::io::Result<Member> {
    let path = normal_path(&raw_text(&tar_entry.path_bytes()));
    let link = tar_entry.link_name_bytes().map(|name| raw_text(&name)).unwrap_or_default();
    let mut xattrs = Map::new();
    let mut pax_mtime = None;
    if let Some(extensions) = tar_entry.pax_extensions()? {
        for extension in extensions {
            let extension = extension?;
            let value = raw_text(extension.value_bytes());
            if let Some(name) = extension.key_bytes().strip_prefix(b"SCHILY.xattr.") {
                xattrs.insert(raw_text(name), Value::String(value));
            } else if extension.key_bytes() == b"mtime" {
                pax_mtime = value.split('.').next().and_then(|seconds| seconds.parse::<i64>().ok());
            }
        }
    }
    let header = tar_entry.header().clone();
    let kind = header.entry_type();
    let letter = match kind {
        tar::EntryType::Directory => "d",
        tar::EntryType::Symlink => "l",
        tar::EntryType::Fifo => "p",
        tar::EntryType::Char => "c",
        tar::EntryType::Block => "b",
        _ => "f",
    };
    let mtime = match pax_mtime {
        Some(mtime) => mtime,
        // Octal or base 256; the latter may be negative.
        None => header.mtime()?.cast_signed(),
    };
    let mode = header.mode()?;
    let mut entry = Entry::new();
    let mut set = |member: &str, value: Value| entry.insert(member.to_owned(), value);
    set("t", json!(letter));
    set("own", json!(format!("{}:{}", header.uid()?, header.gid()?)));
    set("mtime", json!(mtime));
    match letter {
        "l" => set("to", json!(link)),
        _ => set("mode", json!(format!("{:04o}", mode & 0o7777))),
    };
    if matches!(letter, "c" | "b") {
        let number = |part: Option<u32>| part.unwrap_or_default();
        set("dev", json!(format!("{}:{}", number(header.device_major()?), number(header.device_minor()?))));
    }
    if letter == "f" && !kind.is_hard_link() {
        let mut data = Vec::new();
        tar_entry.read_to_end(&mut data)?;
        let printable = |byte: &u8| matches!(byte, b'\t' | b'\r' | b'\n' | b' '..=b'~');
        if data.len() > 100_000 && mode & 0o111 != 0 && data.windows(7).any(|window| window == b"BusyBox") {
            // The machine's own; any version will do.
            set("sha256", json!("busybox"));
        } else {
            set("size", json!(data.len()));
            set("sha256", json!(hex(&data)));
            if data.len() <= 200 && data.iter().all(printable) {
                set("data", json!(raw_text(&data)));
            }
        }
    }
    if !xattrs.is_empty() {
        set("xattr", Value::Object(xattrs));
    }
    let hard_link = kind.is_hard_link().then(|| normal_path(&link));
    Ok(Member { path, entry, hard_link })
}

/// Compares two states without their times.
fn layer_diff(old: &Files, new: &Files) -> LayerDiff {
    let without_time = |entry: &Entry| -> Entry {
        entry
            .iter()
            .filter(|(member, _)| *member != "mtime")
            .map(|(member, value)| (member.clone(), value.clone()))
            .collect()
    };
    let same = |a: &Arc<Entry>, b: &Arc<Entry>| Arc::ptr_eq(a, b) || without_time(a) == without_time(b);
    let gone: BTreeSet<&String> = old.keys().filter(|path| !new.contains_key(*path)).collect();
    LayerDiff {
        add: new
            .iter()
            .filter(|(path, entry)| !old.get(*path).is_some_and(|before| same(before, entry)))
            .map(|(path, _)| path.clone())
            .collect(),
        del: gone.iter().filter(|path| !gone.contains(&parent(path).to_owned())).map(|path| (*path).clone()).collect(),
    }
}

fn describe(files: &Files) -> BTreeMap<String, Entry> {
    let mut names: HashMap<*const Entry, Vec<&String>> = HashMap::new();
    for (path, entry) in files {
        names.entry(Arc::as_ptr(entry)).or_default().push(path);
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs().cast_signed());
    let recent = now - 86_400;
    files
        .iter()
        .map(|(path, entry)| {
            let mut described = Entry::clone(entry);
            if let Some(names) = names.get(&Arc::as_ptr(entry)).filter(|names| names.len() > 1) {
                described.insert("links".to_owned(), json!(names));
            }
            // Made by the build: any time will do.
            let mtime = described["mtime"].as_i64().unwrap_or_default();
            if described["t"] == "d" || mtime > recent || mtime == 0 {
                described.shift_remove("mtime");
            }
            (path.clone(), described)
        })
        .collect()
}
