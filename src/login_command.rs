//! `nacre login` and `nacre logout`.

use crate::build_command::failure;
use crate::cli::{LoginArgs, LogoutArgs};
use crate::report::{CommandError, Exit};
use crate::request::Environment;
use nacre_frontend::reference::Reference;
use nacre_solver::registry::auth::Credentials;
use nacre_solver::registry::login::{self, Kept};
use nacre_solver::registry::{Client, ClientOptions, RegistryError};
use std::io::{BufRead, IsTerminal, Read};

/// No password that somebody chose comes near it; tokens do not either.
const PASSWORD_LIMIT_BYTES: u64 = 64 << 10;

/// The host as references name it.
fn host(text: Option<&str>) -> Result<String, CommandError> {
    let Some(text) = text else { return Ok("docker.io".to_owned()) };
    let name = text.trim_start_matches("https://").trim_start_matches("http://");
    let name = name.split('/').next().unwrap_or_default();
    if matches!(name, "docker.io" | "index.docker.io" | "registry-1.docker.io") {
        return Ok("docker.io".to_owned());
    }
    // A host is what stands before the path of a reference; `localhost` and names with a dot or port are.
    let parsed = Reference::parse(&format!("{name}/x")).ok().filter(|reference| reference.host == name);
    parsed.map(|reference| reference.host).ok_or_else(|| {
        let help = Some("give a name with a dot or a port, as registry.example.com or localhost:5000".to_owned());
        failure(Exit::Usage, &format!("`{text}` is no registry"), help)
    })
}

/// Tries credentials and keeps them.
pub(crate) fn login(args: &LoginArgs, env: &Environment) -> Result<(), CommandError> {
    let host = host(args.host.as_deref())?;
    let file = env.login_file()?;
    let usage = |message: &str, help: &str| failure(Exit::Usage, message, Some(help.to_owned()));
    let stdin = std::io::stdin();
    let unreadable = |error: std::io::Error| CommandError::new(Exit::Usage, &error, None);
    let password = match (&args.password, args.password_stdin) {
        (Some(password), _) => {
            crate::print_error("warning: a password on the command line can be seen by others; use --password-stdin\n");
            password.clone()
        }
        (None, true) => {
            let mut text = String::new();
            stdin.lock().take(PASSWORD_LIMIT_BYTES).read_to_string(&mut text).map_err(unreadable)?;
            text.trim_end_matches(['\n', '\r']).to_owned()
        }
        (None, false) if stdin.is_terminal() => {
            let help = "echo it into --password-stdin, or let a password manager do so";
            return Err(usage("a password is not read from the terminal", help));
        }
        (None, false) => return Err(usage("no password", "give it with --password-stdin")),
    };
    let user = match &args.username {
        Some(user) => user.clone(),
        None if !args.password_stdin && stdin.is_terminal() => {
            crate::print_error("Username: ");
            let mut line = String::new();
            stdin.lock().read_line(&mut line).map_err(unreadable)?;
            line.trim().to_owned()
        }
        None => return Err(usage("no user name", "give it with -u")),
    };
    if user.is_empty() || password.is_empty() {
        return Err(usage("user name and password must not be empty", "give them with -u and --password-stdin"));
    }
    let credentials = Credentials { user, password, ..Credentials::default() };
    let options = ClientOptions { given: Some((host.clone(), credentials.clone())), ..env.registry(&args.registry) };
    let timeout = options.helper_timeout;
    let failed = |error: RegistryError| {
        // Who is just logging in need not be told to.
        let help = error.help().filter(|_| !matches!(error, RegistryError::Denied { .. }));
        CommandError::new(Exit::Source, &error, help)
    };
    let client = Client::new(options);
    client.log_in(&host).map_err(failed)?;
    // A token server may give something in place of the password that can be taken back and opens nothing else.
    let credentials = match client.identity_token(&host, &credentials) {
        Some(identity_token) => Credentials { password: String::new(), identity_token, ..credentials },
        None => credentials,
    };
    let text = match login::store(&file, &host, &credentials, timeout).map_err(failed)? {
        Kept::Helper(program) => format!("logged in to {host}; {program} keeps the password\n"),
        Kept::File(path) if !credentials.identity_token.is_empty() => {
            format!("logged in to {host}; {} keeps a token, not the password\n", path.display())
        }
        Kept::File(path) => format!(
            "logged in to {host}\nnotice: the password stands in {} as it is; a `credsStore` there would keep it safe\n",
            path.display()
        ),
    };
    crate::print_error(&text);
    Ok(())
}

/// Forgets credentials.
pub(crate) fn logout(args: &LogoutArgs, env: &Environment) -> Result<(), CommandError> {
    let host = host(args.host.as_deref())?;
    let file = env.login_file()?;
    let timeout = ClientOptions::default().helper_timeout;
    let found = login::erase(&file, &host, timeout).map_err(|error| CommandError::new(Exit::Source, &error, None))?;
    let text = if found { format!("logged out of {host}\n") } else { format!("not logged in to {host}\n") };
    crate::print_error(&text);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_those_of_references() {
        let check = |text: Option<&str>, expected: Option<&str>| assert_eq!(host(text).ok().as_deref(), expected);
        check(None, Some("docker.io"));
        check(Some("https://index.docker.io/v1/"), Some("docker.io"));
        check(Some("localhost:5000"), Some("localhost:5000"));
        check(Some("https://quay.io"), Some("quay.io"));
        check(Some("quay"), None);
        check(Some(""), None);
        check(Some("a b.io"), None);
    }
}
