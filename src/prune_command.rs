//! `nacre prune` and `nacre du`. Both look at files of mapped users, so an ordinary user's go on in a user namespace.

use crate::build_command::failure;
use crate::cli::{ListFormat, PruneArgs, UsageArgs};
use crate::interrupt::end_on_signals;
use crate::report::{CommandError, Exit};
use crate::request::Environment;
use nacre_frontend::units;
use nacre_solver::sandbox::idmap;
use nacre_solver::store::prune::{Amount, ExclusiveStore, Kind, PruneOptions, usage as store_usage};
use nacre_solver::store::{Store, StoreError};
use serde_json::{Map, Value, json};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

pub(crate) fn store_error(error: StoreError) -> CommandError {
    CommandError::new(Exit::Store, &error, None)
}

/// Goes where files of mapped users are ours; `false` when a process there has done the work. Without a namespace those
/// that are our own can be seen all the same.
pub(crate) fn enter() -> Result<bool, CommandError> {
    match idmap::enter(idmap::EnterRequest::Best) {
        Ok(idmap::Entered::Parent { exit_code: 0 }) => Ok(false),
        Ok(idmap::Entered::Parent { exit_code }) => {
            Err(CommandError::Inside(u8::try_from(exit_code).unwrap_or(u8::MAX)))
        }
        Ok(idmap::Entered::Root | idmap::Entered::Inside { .. }) | Err(_) => Ok(true),
    }
}

fn listen(env: &Environment) -> Result<(), CommandError> {
    end_on_signals(env.color).map_err(|error| CommandError::new(Exit::Host, &error, None))
}

/// Removes what may go. A signal ends it at once, which the store bears.
pub(crate) fn prune(args: &PruneArgs, env: &Environment) -> Result<(), CommandError> {
    let path = env.store(args.at.store.as_deref())?;
    let options = options(args)?;
    if !enter()? {
        return Ok(());
    }
    listen(env)?;
    let told = Cell::new(false);
    let wait = || {
        if !told.replace(true) {
            crate::print_error("waiting for builds that use the store\n");
        }
        true
    };
    let pruned = match ExclusiveStore::open(&path, &wait).map_err(store_error)? {
        Some(store) => store.prune(&options, &|| false).map_err(store_error)?,
        // No store is one with nothing in it.
        None => Default::default(),
    };
    for left in &pruned.left {
        crate::print_error(&format!("warning: not removed: {left}\n"));
    }
    let text = match args.format {
        ListFormat::Table => {
            let freed = format!("freed  {}\n", indicatif::DecimalBytes(pruned.freed_bytes));
            format!("{}{freed}", table(&pruned.removed))
        }
        ListFormat::Json => {
            let removed = amounts(&pruned.removed);
            let value = json!({"removed": removed, "freed_bytes": pruned.freed_bytes, "left": pruned.left});
            format!("{value:#}\n")
        }
    };
    crate::print_result(&text)
}

fn options(args: &PruneArgs) -> Result<PruneOptions, CommandError> {
    let mut options = PruneOptions { all: args.all, ..PruneOptions::default() };
    let usage = |message: String, help: &str| failure(Exit::Usage, &message, Some(help.to_owned()));
    for filter in &args.filters {
        let help = "there is until=, with a duration as 24h";
        let since = match filter.split_once('=') {
            Some(("until" | "unused-for", duration)) => units::parse_duration(duration).ok(),
            _ => None,
        };
        let since = since.and_then(|nanoseconds| u64::try_from(nanoseconds).ok());
        let since = since.ok_or_else(|| usage(format!("invalid --filter `{filter}`"), help))?;
        options.unused_since = SystemTime::now().checked_sub(Duration::from_nanos(since));
    }
    if let Some(text) = &args.keep_storage {
        let bytes = units::parse_size(text).ok().and_then(|bytes| u64::try_from(bytes).ok());
        let bytes = bytes.ok_or_else(|| usage(format!("invalid --keep-storage `{text}`"), "give a size as 10GB"))?;
        options.keep_bytes = Some(bytes);
    }
    Ok(options)
}

/// Shows what the store holds.
pub(crate) fn usage(args: &UsageArgs, env: &Environment) -> Result<(), CommandError> {
    let path = env.store(args.at.store.as_deref())?;
    if !enter()? {
        return Ok(());
    }
    let usage = if path.exists() {
        let store = Store::open(&path).map_err(store_error)?;
        store_usage(&store).map_err(store_error)?
    } else {
        Default::default()
    };
    let text = match args.format {
        ListFormat::Table => {
            let total = indicatif::DecimalBytes(usage.total_bytes);
            let unnamed = indicatif::DecimalBytes(usage.unnamed_bytes);
            format!("{}total  {total}\nof that no image with a name needs {unnamed}\n", table(&usage.kinds))
        }
        ListFormat::Json => {
            let value = json!({"kinds": amounts(&usage.kinds), "total_bytes": usage.total_bytes, "unnamed_bytes": usage.unnamed_bytes});
            format!("{value:#}\n")
        }
    };
    crate::print_result(&text)
}

fn amounts(kinds: &BTreeMap<Kind, Amount>) -> Value {
    let one = |(kind, amount): (&Kind, &Amount)| {
        (kind.name().to_owned(), json!({"count": amount.count, "bytes": amount.bytes}))
    };
    Value::Object(kinds.iter().map(one).collect::<Map<_, _>>())
}

fn table(kinds: &BTreeMap<Kind, Amount>) -> String {
    let line = |(kind, amount): (&Kind, &Amount)| {
        format!("{:10}  {:>6}  {:>10}\n", kind.name(), amount.count, indicatif::DecimalBytes(amount.bytes).to_string())
    };
    kinds.iter().map(line).collect()
}
