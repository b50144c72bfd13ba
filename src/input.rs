//! Where the build context and the Dockerfile come from: a directory, standard input, an address, a git repository.
//!
//! What lies on disk is read before the program may have to go on in another process; the rest only afterwards, since
//! standard input can be read once.

use crate::build_command::failure;
use crate::report::{CommandError, Exit, with_causes};
use crate::request::{BuildRequest, ContextSource, DockerfileSource, Environment};
use crate::ssh_agents::SshAgents;
use nacre_frontend::lower::without_credentials;
use nacre_frontend::parser;
use nacre_frontend::source::SourceFile;
use nacre_solver::op::git::{self, GitError};
use nacre_solver::op::unpacked::{self, UnpackError};
use nacre_solver::registry::{HttpFile, http_get};
use nacre_solver::snapshot::Workspace;
use nacre_solver::solve::Event;
use nacre_solver::tree::Tree;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// No Dockerfile that somebody wrote comes near it.
const DOCKERFILE_LIMIT_BYTES: u64 = 64 << 20;

/// The build context and the Dockerfile.
pub(crate) struct Input {
    /// The build context.
    pub(crate) context: Files,
    /// The Dockerfile's path, for its own ignore file.
    pub(crate) dockerfile_path: PathBuf,
    /// Its text.
    pub(crate) source: SourceFile,
    /// Tells this project's steps from those of others.
    pub(crate) project: String,
}

/// Files of the build context.
pub(crate) enum Files {
    /// A directory of the caller.
    Directory(PathBuf),
    /// What an archive or a repository holds, without what its ignore file excludes.
    Tree(Arc<Tree>),
}

/// Reads a Dockerfile on disk whose context is there too; `None` when something comes from elsewhere.
pub(crate) fn on_disk(request: &BuildRequest) -> Result<Option<Input>, CommandError> {
    let ContextSource::Directory(directory) = &request.context else { return Ok(None) };
    let path = match &request.dockerfile {
        DockerfileSource::Default => directory.join("Dockerfile"),
        DockerfileSource::InContext(path) => directory.join(path),
        DockerfileSource::File(path) => path.clone(),
        DockerfileSource::Stdin | DockerfileSource::Http(_) => return Ok(None),
    };
    let source = read_dockerfile(&path, path.strip_prefix(directory).unwrap_or(&path))?;
    Ok(Some(Input {
        context: Files::Directory(directory.clone()),
        project: format!("{}\n{}", directory.display(), path.display()),
        dockerfile_path: path,
        source,
    }))
}

fn read_dockerfile(path: &Path, name: &Path) -> Result<SourceFile, CommandError> {
    let mut bytes = Vec::new();
    let read = std::fs::File::open(path).and_then(|file| file.take(DOCKERFILE_LIMIT_BYTES).read_to_end(&mut bytes));
    read.map_err(|error| {
        let message = format!("cannot read the Dockerfile `{}`: {error}", path.display());
        failure(
            Exit::Dockerfile,
            &message,
            matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::IsADirectory).then(no_dockerfile),
        )
    })?;
    Ok(SourceFile::new(name.display().to_string(), parser::decode(&bytes)))
}

fn no_dockerfile() -> String {
    "name it with -f, or make a file called Dockerfile at the top of the context".to_owned()
}

/// What fetching needs.
pub(crate) struct Fetcher<'a> {
    /// Store and downloads.
    pub(crate) workspace: &'a Workspace,
    /// How git is called.
    pub(crate) git: &'a git::Settings,
    /// Told to stop?
    pub(crate) stop: &'a dyn Fn() -> bool,
    /// Who is told what happens.
    pub(crate) events: &'a (dyn Fn(Event) + Sync),
}

impl Fetcher<'_> {
    /// Reads what [`on_disk`] could not.
    pub(crate) fn input(&self, request: &BuildRequest) -> Result<Input, CommandError> {
        let (files, text, address) = match &request.context {
            ContextSource::Directory(directory) => {
                (Files::Directory(directory.clone()), None, directory.display().to_string())
            }
            ContextSource::Stdin => {
                let path =
                    self.workspace.store.tmp_path().map_err(|error| CommandError::new(Exit::Store, &error, None))?;
                let size = std::fs::File::create_new(&path)
                    .and_then(|mut file| std::io::copy(&mut std::io::stdin().lock(), &mut file))
                    .map_err(|error| failure(Exit::Store, &format!("cannot keep standard input: {error}"), None))?;
                let (tree, text) = self.archive_or_dockerfile(&path, size, now(), request, "standard input")?;
                (Files::Tree(tree), text, "-".to_owned())
            }
            ContextSource::Http(url) => {
                let file = self.download(url)?;
                let time = file.last_modified.map_or_else(now, |seconds| (seconds, 0));
                let name = without_credentials(url);
                let (tree, text) = self.archive_or_dockerfile(&file.path, file.size_bytes, time, request, &name)?;
                (Files::Tree(tree), text, name)
            }
            ContextSource::Git(url) => {
                let wanted = git::Request {
                    remote: &url.remote,
                    reference: &url.reference,
                    subdir: &url.subdir,
                    keep_git_dir: keeps_git_dir(request, url.keep_git_dir),
                    checksum: url.checksum.as_deref(),
                    submodules: url.submodules.unwrap_or(true),
                };
                let name = without_credentials(&url.remote);
                let what = name.clone();
                (self.events)(Event::Loading { what: what.clone() });
                let started = std::time::Instant::now();
                let found = git::checkout(&self.workspace.store, &wanted, self.git, self.stop, &mut |_| {});
                let found = found.map_err(git_error)?;
                (self.events)(Event::Loaded { what, duration: started.elapsed() });
                (Files::Tree(found.tree), None, format!("{name}#{}:{}", url.reference, url.subdir))
            }
        };
        let (source, path) = match (&request.dockerfile, text, &files) {
            (DockerfileSource::Default, Some(text), _) => (text, "Dockerfile".into()),
            (DockerfileSource::File(path), None, _) => (read_dockerfile(path, path)?, path.clone()),
            (DockerfileSource::Stdin, None, files) => {
                let mut bytes = Vec::new();
                std::io::stdin()
                    .lock()
                    .take(DOCKERFILE_LIMIT_BYTES)
                    .read_to_end(&mut bytes)
                    .map_err(|error| CommandError::new(Exit::Dockerfile, &error, None))?;
                (SourceFile::new("Dockerfile", parser::decode(&bytes)), in_directory(files, "Dockerfile"))
            }
            (DockerfileSource::Http(url), None, files) => {
                let path = self.download(url)?.path;
                let name = without_credentials(url);
                (read_dockerfile(&path, Path::new(&name))?, in_directory(files, "Dockerfile"))
            }
            (DockerfileSource::Default, None, Files::Tree(tree)) => {
                (in_tree(tree, "Dockerfile", &address)?, "Dockerfile".into())
            }
            (DockerfileSource::InContext(path), None, Files::Tree(tree)) => {
                (in_tree(tree, path, &address)?, path.into())
            }
            (DockerfileSource::Default, None, Files::Directory(directory)) => {
                let path = directory.join("Dockerfile");
                (read_dockerfile(&path, Path::new("Dockerfile"))?, path)
            }
            (DockerfileSource::InContext(name), None, Files::Directory(directory)) => {
                let path = directory.join(name);
                (read_dockerfile(&path, Path::new(name))?, path)
            }
            (_, Some(_), _) => {
                let message = format!("the context, {address}, is no archive, and -f names another Dockerfile than it");
                return Err(failure(Exit::Usage, &message, Some("leave -f out to build what it says".to_owned())));
            }
        };
        let context = match files {
            Files::Tree(tree) => {
                let name = path.to_string_lossy();
                let tree = unpacked::without_ignored(Arc::unwrap_or_clone(tree), &name).map_err(unpack_error)?;
                Files::Tree(Arc::new(tree))
            }
            directory => directory,
        };
        let project = format!("{address}\n{}", path.display());
        Ok(Input { context, dockerfile_path: path, source, project })
    }

    /// The files of an archive; of anything else the text, which is a Dockerfile without files.
    fn archive_or_dockerfile(
        &self,
        path: &Path,
        size: u64,
        time: (i64, u32),
        request: &BuildRequest,
        name: &str,
    ) -> Result<(Arc<Tree>, Option<SourceFile>), CommandError> {
        let node = unpacked::file_node(path, size, time);
        if unpacked::is_archive(path).map_err(unpack_error)? {
            let tree = unpacked::tree_of(node, "context", &self.workspace.store, now()).map_err(unpack_error)?;
            return Ok((Arc::new(tree), None));
        }
        let mut head = Vec::new();
        let read = std::fs::File::open(path).and_then(|file| file.take(6).read_to_end(&mut head));
        read.map_err(|error| CommandError::new(Exit::Store, &error, None))?;
        if nacre_solver::tree::archive::detect(&head).is_some() || head.first() == Some(&0) {
            let message = format!("{name} is neither a tar archive with files in it nor a Dockerfile");
            return Err(failure(Exit::Dockerfile, &message, None));
        }
        let label = if matches!(request.context, ContextSource::Stdin) { "Dockerfile" } else { name };
        Ok((Arc::default(), Some(read_dockerfile(path, Path::new(label))?)))
    }

    fn download(&self, url: &str) -> Result<HttpFile, CommandError> {
        let what = without_credentials(url);
        (self.events)(Event::Loading { what: what.clone() });
        let started = std::time::Instant::now();
        let sources = &self.workspace.sources;
        let file = http_get(&self.workspace.store, &sources.client, url, None, sources.offline)
            .map_err(|error| failure(Exit::Source, &format!("cannot fetch {what}: {}", with_causes(&error)), None))?;
        (self.events)(Event::Loaded { what, duration: started.elapsed() });
        Ok(file)
    }
}

/// A path for the ignore file beside a Dockerfile that has no path of its own.
fn in_directory(files: &Files, name: &str) -> PathBuf {
    match files {
        Files::Directory(directory) => directory.join(name),
        Files::Tree(_) => name.into(),
    }
}

fn in_tree(tree: &Tree, path: &str, address: &str) -> Result<SourceFile, CommandError> {
    let cannot = |why: &str, help| {
        failure(Exit::Dockerfile, &format!("cannot read the Dockerfile `{path}` of {address}: {why}"), help)
    };
    match unpacked::read_file(tree, path, DOCKERFILE_LIMIT_BYTES) {
        Ok(Some(bytes)) => Ok(SourceFile::new(path, parser::decode(&bytes))),
        Ok(None) => Err(cannot("no such file", Some(no_dockerfile()))),
        Err(error) => Err(cannot(&error.to_string(), None)),
    }
}

fn now() -> (i64, u32) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    (i64::try_from(now.as_secs()).unwrap_or(i64::MAX), now.subsec_nanos())
}

fn unpack_error(error: UnpackError) -> CommandError {
    CommandError::new(Exit::Dockerfile, &error, None)
}

fn git_error(error: GitError) -> CommandError {
    match error {
        GitError::Interrupted => CommandError::Interrupted,
        error => CommandError::new(Exit::Source, &error, error.help().map(str::to_owned)),
    }
}

/// Does a context keep its `.git`: by its address, else by the build arg that BuildKit has for it?
pub(crate) fn keeps_git_dir(request: &BuildRequest, of_address: Option<bool>) -> bool {
    let arg = || {
        let (_, value) = request.build_args.iter().find(|(name, _)| name == "BUILDKIT_CONTEXT_KEEP_GIT_DIR")?;
        Some(matches!(value.as_str(), "1" | "t" | "T" | "true" | "TRUE" | "True"))
    };
    of_address.or_else(arg).unwrap_or(false)
}

/// How git is called for this user.
pub(crate) fn git_settings(
    request: &BuildRequest,
    env: &Environment,
    agents: &SshAgents,
) -> Result<git::Settings, CommandError> {
    let mut secrets = git::Secrets::default();
    for secret in request.secrets.iter().filter(|secret| secret.id.starts_with("GIT_AUTH_")) {
        secrets.0.insert(secret.id.clone(), secret.read()?);
    }
    Ok(git::Settings {
        program: PathBuf::new(),
        env: env.for_git(),
        ssh_agent: agents.sockets().get("default").cloned(),
        ssh_command: ssh_command(env.home(), is_mapped()),
        secrets,
    })
}

/// Is this process root of a user namespace, and somebody else outside?
fn is_mapped() -> bool {
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    map.split_whitespace().nth(1).is_some_and(|outside| outside != "0")
}

/// ssh that asks nothing. Being root in a user namespace, ssh would look for root's files: it is told the user's.
fn ssh_command(home: Option<&Path>, mapped: bool) -> String {
    let mut command = "ssh -o BatchMode=yes -o ConnectTimeout=30 -o ControlMaster=no".to_owned();
    let Some(home) = home.filter(|_| mapped) else { return command };
    let quoted = |path: &Path| format!("'{}'", path.to_string_lossy().replace('\'', "'\\''"));
    let dir = home.join(".ssh");
    command.push_str(&format!(" -o UserKnownHostsFile={}", quoted(&dir.join("known_hosts"))));
    for (flag, name) in [("-F", "config"), ("-i", "id_ed25519"), ("-i", "id_ecdsa"), ("-i", "id_rsa")] {
        if dir.join(name).exists() {
            command.push_str(&format!(" {flag} {}", quoted(&dir.join(name))));
        }
    }
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ssh_reads_the_files_of_the_user() {
        let home = tempfile::Builder::new().prefix("it's").tempdir().expect("a temporary directory");
        std::fs::create_dir(home.path().join(".ssh")).expect("a directory of our own");
        std::fs::write(home.path().join(".ssh/id_rsa"), "").expect("a file of our own");
        assert!(!ssh_command(Some(home.path()), false).contains("known_hosts"));
        let command = ssh_command(Some(home.path()), true);
        // As a shell reads it.
        let script = format!("set -- {command}; printf '%s\\n' \"$@\"");
        let output = std::process::Command::new("sh").args(["-c", &script]).output().expect("sh runs");
        let words = String::from_utf8(output.stdout).expect("text");
        let file = |name: &str| home.path().join(".ssh").join(name).display().to_string();
        assert!(words.contains(&format!("UserKnownHostsFile={}\n", file("known_hosts"))), "{words}");
        assert!(words.contains(&format!("-i\n{}\n", file("id_rsa"))) && !words.contains("-F"), "{words}");
    }
}
