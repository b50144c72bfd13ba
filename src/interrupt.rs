//! SIGINT and SIGTERM: the first asks the build to stop, the second ends the process, and so does time.

use crate::report::{CommandError, Exit};
use nacre_solver::sandbox::Cancel;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

/// A signal that comes so soon after another is the same wish: who signals a process group reaches this process twice,
/// by itself and through the process that waits for it outside of the user namespace.
const SAME_WISH: Duration = Duration::from_millis(300);
/// After this time a build that has not stopped is left as it is. The store can bear it, and the kernel ends the steps.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long somebody may take to read the last words.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// How often the flags are looked at.
const PAUSE: Duration = Duration::from_millis(20);

/// Flags that the signals set.
pub(crate) struct Signals {
    wish: Arc<AtomicBool>,
    again: Arc<AtomicBool>,
}

impl Signals {
    /// Takes the signals over. Before, they end the process at once, which is right while nothing has begun.
    pub(crate) fn listen(wish: &Arc<AtomicBool>) -> std::io::Result<Self> {
        let again = Arc::new(AtomicBool::new(false));
        for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
            signal_hook::flag::register(signal, Arc::clone(wish))?;
            signal_hook::flag::register(signal, Arc::clone(&again))?;
        }
        Ok(Self { wish: Arc::clone(wish), again })
    }

    /// Runs `work` while another thread passes the user's wish to stop on. `last_words` are printed when the process
    /// ends without waiting for it.
    pub(crate) fn watched<T>(&self, cancel: &Cancel, last_words: String, work: impl FnOnce() -> T) -> T {
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let watcher = scope.spawn(|| self.watch(cancel, last_words, &done));
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
            done.store(true, Ordering::SeqCst);
            watcher.thread().unpark();
            result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    fn watch(&self, cancel: &Cancel, last_words: String, done: &AtomicBool) {
        let mut asked: Option<Instant> = None;
        while !done.load(Ordering::SeqCst) {
            match asked {
                None if self.wish.load(Ordering::SeqCst) => {
                    asked = Some(Instant::now());
                    cancel.cancel();
                }
                None => {}
                Some(at) if at.elapsed() < SAME_WISH => self.again.store(false, Ordering::SeqCst),
                Some(at) if self.again.load(Ordering::SeqCst) || at.elapsed() > PATIENCE => break,
                Some(_) => {}
            }
            std::thread::park_timeout(PAUSE);
        }
        if !done.load(Ordering::SeqCst) {
            print_in_time(last_words);
            std::process::exit(Exit::Interrupted as i32);
        }
    }
}

/// Prints, or gives up: nobody may be reading, and then the words would wait for ever.
fn print_in_time(words: String) {
    let (printed, done) = mpsc::channel::<()>();
    std::thread::spawn(move || {
        crate::print_error(&words);
        drop(printed);
    });
    // Ends with an error either way: nothing is ever sent.
    let _ = done.recv_timeout(LAST_WORDS);
}

/// Lets signals end the process with the code of the signal, as a shell counts (130, 143), after a word about it. For
/// commands that may end at any moment: the store bears it, and so do registries.
pub(crate) fn end_on_signals(color: bool) -> std::io::Result<()> {
    use signal_hook::consts::{SIGINT, SIGTERM};
    let seen = Arc::new(AtomicUsize::new(0));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register_usize(signal, Arc::clone(&seen), usize::try_from(signal).unwrap_or_default())?;
    }
    std::thread::Builder::new().name("signals".to_owned()).spawn(move || wait_for_end(&seen, last_words(color)))?;
    Ok(())
}

#[expect(clippy::exit, reason = "there is nothing to wait for")]
fn wait_for_end(seen: &AtomicUsize, last_words: String) -> ! {
    while seen.load(Ordering::SeqCst) == 0 {
        std::thread::sleep(PAUSE);
    }
    print_in_time(last_words);
    std::process::exit(128 + i32::try_from(seen.load(Ordering::SeqCst)).unwrap_or_default())
}

/// What a build that was interrupted ends with.
pub(crate) fn last_words(color: bool) -> String {
    crate::report::Style { color }.error(&CommandError::Interrupted)
}
