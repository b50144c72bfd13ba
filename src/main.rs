//! The program `nacre`: reads the command line, runs one command, reports, exits.
//!
//! Only this crate prints, reads the environment or exits. Standard output carries results, standard error the rest.

mod blame;
mod build_command;
mod cache_command;
mod cache_options;
mod call_command;
mod cli;
mod doctor_command;
mod export_command;
mod fsck_command;
mod image_commands;
mod images_command;
mod input;
mod interrupt;
mod load_command;
mod login_command;
mod progress;
mod prune_command;
mod report;
mod request;
mod ssh_agents;
mod timings;

use clap::Parser;
use cli::{Cli, Command};
use report::{CommandError, Exit, Failure, Severity, Style};
use request::Environment;
use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Trees of files are many small pieces of memory, made and dropped by several threads: glibc's allocator takes a third of the
/// time of a build that finds everything cached.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().collect();
    // Before anything else: a step's first process must have one thread and as little state as possible.
    if args.get(1).is_some_and(|word| word == "__sandbox") {
        return build_command::sandbox();
    }
    nacre_solver::sys::forgo_huge_pages();
    nacre_solver::sys::return_memory_at_once();
    // Ends by itself with code 2 and a usage line, or with 0 after --help.
    let cli = Cli::parse_from(cli::without_docker_groups(args));
    let env = Environment::of_process();
    let style = Style { color: env.color };
    report_panics();
    let cancel = Arc::new(AtomicBool::new(false));
    let result = std::panic::catch_unwind(|| run(cli.command, &env, &cancel));
    match result {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(CommandError::Inside(code))) => ExitCode::from(code),
        Ok(Err(error)) => {
            // Whatever a cancelled build stumbled over, the user's wish is the cause.
            let error = if cancel.load(Ordering::SeqCst) { CommandError::Interrupted } else { error };
            print_error(&style.error(&error));
            error.exit().into()
        }
        Err(_) => Exit::General.into(),
    }
}

fn run(command: Command, env: &Environment, cancel: &Arc<AtomicBool>) -> Result<(), CommandError> {
    match command {
        Command::Build(args) => {
            let request = request::build_request(*args, env)?;
            if !request.quiet {
                for notice in &request.notices {
                    print_error(&Style { color: env.color }.block(Severity::Warning, notice, None, &[], None));
                }
            }
            build_command::run(&request, env, cancel)
        }
        Command::Images(args) => images_command::run(&args, &env.store(args.at.store.as_deref())?),
        Command::Pull(args) => image_commands::pull(&args, env),
        Command::Push(args) => image_commands::push(&args, env),
        Command::Tag(args) => image_commands::tag(&args, env),
        Command::Rmi(args) => image_commands::remove(&args, env),
        Command::Inspect(args) => image_commands::inspect(&args, env),
        Command::Save(args) => image_commands::save(&args, env),
        Command::Load(args) => load_command::load(&args, env),
        Command::Manifest(args) => match args.command {
            cli::ManifestCommand::Inspect(args) => load_command::manifest(&args, env),
        },
        Command::Login(args) => login_command::login(&args, env),
        Command::Logout(args) => login_command::logout(&args, env),
        Command::Prune(args) => prune_command::prune(&args, env),
        Command::Doctor(args) => doctor_command::run(&args, env),
        Command::Fsck(args) => fsck_command::run(&args, env),
        Command::Usage(args) => prune_command::usage(&args, env),
        Command::Version => print_result(&format!("nacre {}\n", env!("CARGO_PKG_VERSION"))),
        Command::Sandbox => unreachable!("dispatched before the command line is read"),
    }
}

/// A panic is a mistake in nacre; say so in the form of every other error.
fn report_panics() {
    std::panic::set_hook(Box::new(|info| {
        let payload = info.payload();
        let text =
            payload.downcast_ref::<&str>().copied().or_else(|| payload.downcast_ref::<String>().map(String::as_str));
        let text = text.unwrap_or("no message");
        let place = info.location().map(|place| format!(" at {}:{}", place.file(), place.line())).unwrap_or_default();
        print_error(&format!(
            "error: internal error{place}: {text}\nhelp: this is a mistake in nacre, not in your Dockerfile; please report it\n"
        ));
    }));
}

/// Writes to standard error. That nobody reads there is no reason to stop.
pub(crate) fn print_error(text: &str) {
    let _ = std::io::stderr().lock().write_all(text.as_bytes());
}

/// Writes to standard output. A reader that has gone (`| head`) is no error.
pub(crate) fn print_result(text: &str) -> Result<(), CommandError> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(CommandError::Failure(Box::new(Failure {
            exit: Exit::Store,
            message: format!("cannot write to standard output: {error}"),
            place: None,
            help: None,
        }))),
        _ => Ok(()),
    }
}
