//! Keeps credentials for later: in a helper program where the configuration names one, else in the configuration itself.

use super::auth::{CredentialFile, Credentials, encode_base64};
use super::{RegistryError, helper};
use serde_json::{Map, Value, json};
use std::fs::{self, DirBuilder};
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where credentials ended or came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kept {
    /// A helper program has them.
    Helper(String),
    /// They stand in the file, encoded but readable.
    File(PathBuf),
}

/// Keeps credentials for a host.
pub fn store(path: &Path, host: &str, credentials: &Credentials, timeout: Duration) -> Result<Kept, RegistryError> {
    let file = CredentialFile::read(path)?;
    if let Some(program) = file.helper(host) {
        helper::store(program, host, credentials, timeout)?;
        // An empty entry shows other tools that there was a login.
        edit(path, |auths| {
            auths.insert(helper::server(host), json!({}));
        })?;
        return Ok(Kept::Helper(format!("docker-credential-{program}")));
    }
    let mut entry = Map::new();
    let text = format!("{}:{}", credentials.user, credentials.password);
    entry.insert("auth".into(), encode_base64(text.as_bytes()).into());
    if !credentials.identity_token.is_empty() {
        entry.insert("identitytoken".into(), credentials.identity_token.clone().into());
    }
    edit(path, |auths| {
        auths.insert(helper::server(host), Value::Object(entry));
    })?;
    Ok(Kept::File(path.to_owned()))
}

/// Forgets the credentials for a host; whether there were any.
pub fn erase(path: &Path, host: &str, timeout: Duration) -> Result<bool, RegistryError> {
    let file = CredentialFile::read(path)?;
    let mut found = false;
    if let Some(program) = file.helper(host) {
        found = helper::get(program, host, timeout)?.is_some();
        if found {
            helper::erase(program, host, timeout)?;
        }
    }
    if path.exists() {
        edit(path, |auths| {
            let known: Vec<String> = auths.keys().filter(|key| super::auth::is_for(key, host)).cloned().collect();
            for key in known {
                found |= auths.shift_remove(&key).is_some_and(|entry| entry != json!({}));
            }
        })?;
    }
    Ok(found)
}

/// Changes `auths`, keeps all else, and replaces the file in one step. Nobody else may read it.
fn edit(path: &Path, change: impl FnOnce(&mut Map<String, Value>)) -> Result<(), RegistryError> {
    let fail = |reason: String| RegistryError::WriteCredentials { path: path.to_owned(), reason };
    let io = |error: io::Error| fail(error.to_string());
    // A link stays one.
    let target = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let directory = target.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !directory.is_dir() {
        DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(io)?;
    }
    // Several logins at once must not lose each other's.
    let lock = fs::File::open(directory).map_err(io)?;
    lock.lock().map_err(io)?;
    let mut config: Map<String, Value> = match fs::read(&target) {
        Ok(bytes) if bytes.trim_ascii().is_empty() => Map::new(),
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(|_| fail("it is not a JSON object".to_owned()))?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Map::new(),
        Err(error) => return Err(io(error)),
    };
    let mut auths = match config.get_mut("auths").map(Value::take) {
        Some(Value::Object(auths)) => auths,
        _ => Map::new(),
    };
    change(&mut auths);
    config.insert("auths".into(), Value::Object(auths));
    let mut text = serde_json::to_vec_pretty(&config).expect("a configuration has string keys only");
    text.push(b'\n');
    // Made readable for its owner alone.
    let mut temporary = tempfile::Builder::new().prefix(".nacre-").tempfile_in(directory).map_err(io)?;
    temporary.write_all(&text).and_then(|()| temporary.as_file().sync_data()).map_err(io)?;
    temporary.persist(&target).map_err(|error| io(error.error))?;
    Ok(())
}
