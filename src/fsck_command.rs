//! `nacre fsck`: looks whether the store is whole.

use crate::build_command::failure;
use crate::cli::{FsckArgs, ListFormat};
use crate::prune_command::{enter, store_error};
use crate::report::{CommandError, Exit};
use crate::request::Environment;
use nacre_solver::store::fsck::{Checked, Finding};
use nacre_solver::store::prune::ExclusiveStore;
use serde_json::json;
use std::cell::Cell;

/// Looks, and repairs if asked to. Something wrong that is left is an error.
pub(crate) fn run(args: &FsckArgs, env: &Environment) -> Result<(), CommandError> {
    let path = env.store(args.at.store.as_deref())?;
    if !enter()? {
        return Ok(());
    }
    let told = Cell::new(false);
    let wait = || {
        if !told.replace(true) {
            crate::print_error("waiting for builds that use the store\n");
        }
        true
    };
    let checked = match ExclusiveStore::open(&path, &wait).map_err(store_error)? {
        Some(store) => store.check(args.repair, &|| false).map_err(store_error)?,
        // No store is one with nothing wrong.
        None => Checked::default(),
    };
    let text = match args.format {
        ListFormat::Table => table(&checked),
        ListFormat::Json => {
            let finding = |finding: &Finding| {
                let path = finding.path.display().to_string();
                json!({"path": path, "problem": finding.problem, "repaired": finding.repaired})
            };
            let findings: Vec<_> = checked.findings.iter().map(finding).collect();
            let unreadable: Vec<_> = checked.unreadable.iter().map(|path| path.display().to_string()).collect();
            format!("{:#}\n", json!({"checked": checked.counts, "findings": findings, "unreadable": unreadable}))
        }
    };
    crate::print_result(&text)?;
    match checked.findings.iter().filter(|finding| !finding.repaired).count() {
        0 => Ok(()),
        left => {
            let message = format!("{left} of {} problems are left in the store", checked.findings.len());
            let help = match args.repair {
                true => "remove them by hand, or use another store with --store".to_owned(),
                false => "`nacre fsck --repair` removes what is broken; it is made or fetched anew".to_owned(),
            };
            Err(failure(Exit::Store, &message, Some(help)))
        }
    }
}

fn table(checked: &Checked) -> String {
    let mut text = String::new();
    for (part, count) in &checked.counts {
        text.push_str(&format!("{part:10}  {count:>6}\n"));
    }
    for path in &checked.unreadable {
        text.push_str(&format!("not checked: {} belongs to another user\n", path.display()));
    }
    for finding in &checked.findings {
        let done = if finding.repaired { " (removed)" } else { "" };
        text.push_str(&format!("{}: {}{done}\n", finding.path.display(), finding.problem));
    }
    if checked.findings.is_empty() {
        text.push_str("nothing is wrong\n");
    }
    text
}
