//! Time, CPU time and memory of a command and of a daemon beside it.

use crate::Failure;
use std::collections::HashMap;
use std::fs;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Between two looks at the memory, which take a few milliseconds themselves.
const SAMPLE: Duration = Duration::from_millis(40);

/// One timed build.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sample {
    /// Seconds.
    pub(crate) wall: f64,
    /// Seconds of all processors.
    pub(crate) cpu: f64,
    pub(crate) peak_bytes: u64,
    /// Size of the archive that came out, if one did.
    pub(crate) output_bytes: u64,
}

pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = |at: usize| values.get(at).copied().unwrap_or_default();
    (middle(values.len() / 2) + middle(values.len().saturating_sub(1) / 2)) / 2.0
}

/// Runs the commands one after the other; the first that fails is the error, with what it wrote.
pub(crate) fn timed(commands: &mut [Command], daemon: Option<u32>) -> Result<Sample, Failure> {
    let before = daemon.map(tree_cpu).unwrap_or_default();
    let (peak, done) = (AtomicU64::new(0), AtomicBool::new(false));
    let current = AtomicU64::new(0);
    let own_before = children_cpu();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                std::thread::sleep(SAMPLE);
                let roots = [current.load(Ordering::Relaxed) as u32, daemon.unwrap_or(0)];
                peak.fetch_max(tree_memory(&roots), Ordering::Relaxed);
            }
        });
        let started = Instant::now();
        let result = commands.iter_mut().try_for_each(|command| {
            let text = format!("{command:?}");
            let log = tempfile::tempfile()?;
            let mut child = command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log.try_clone()?).spawn()?;
            current.store(u64::from(child.id()), Ordering::Relaxed);
            let status = child.wait()?;
            if status.success() {
                return Ok(());
            }
            let mut log = log;
            let mut output = String::new();
            std::io::Seek::rewind(&mut log)?;
            std::io::Read::read_to_string(&mut log, &mut output)?;
            Err(Failure::from(format!("{text}: {status}\n{output}")))
        });
        let wall = started.elapsed().as_secs_f64();
        done.store(true, Ordering::Relaxed);
        result?;
        let own_after = children_cpu();
        let daemon_cpu = daemon.map(tree_cpu).unwrap_or_default() - before;
        Ok(Sample {
            wall,
            cpu: own_after - own_before + daemon_cpu,
            peak_bytes: peak.load(Ordering::Relaxed),
            output_bytes: 0,
        })
    })
}

/// CPU seconds of children that have ended.
fn children_cpu() -> f64 {
    // SAFETY: `usage` is a plain structure that the call fills in.
    #[allow(unsafe_code, reason = "std does not tell the CPU time of children")]
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_CHILDREN, &mut usage);
        usage
    };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

/// Fields of /proc/PID/stat from number 3 on.
fn stat(pid: u32) -> Option<Vec<u64>> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let rest = &text[text.rfind(')')? + 2..];
    Some(rest.split(' ').map(|field| field.trim().parse().unwrap_or(0)).collect())
}

/// These processes and all below them.
fn descendants(roots: &[u32]) -> Vec<u32> {
    let mut children: HashMap<u32, Vec<u32>> = HashMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        if let Some(fields) = stat(pid) {
            children.entry(fields[1] as u32).or_default().push(pid);
        }
    }
    let mut found: Vec<u32> = roots.iter().copied().filter(|&pid| pid != 0).collect();
    let mut at = 0;
    while at < found.len() {
        let below = children.remove(&found[at]).unwrap_or_default();
        found.extend(below);
        at += 1;
    }
    found
}

/// Memory of their own: pages of files, the programs among them, belong to the page cache.
fn tree_memory(roots: &[u32]) -> u64 {
    let own = |pid: u32| -> Option<u64> {
        let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let field = |name: &str| -> Option<u64> {
            text.lines().find_map(|line| line.strip_prefix(name))?.split_whitespace().next()?.parse().ok()
        };
        Some(field("RssAnon:")? + field("RssShmem:")?)
    };
    descendants(roots).into_iter().filter_map(own).sum::<u64>() * 1024
}

/// CPU seconds that a daemon's processes have used, with those that it has waited for.
fn tree_cpu(root: u32) -> f64 {
    let ticks = |pid: u32| stat(pid).map_or(0, |fields| fields[11..15].iter().sum::<u64>());
    descendants(&[root]).into_iter().map(ticks).sum::<u64>() as f64 / 100.0
}
