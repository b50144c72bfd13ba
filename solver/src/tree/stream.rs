//! Streams of bytes: reading ahead in a thread of its own (a pulled layer is received, decompressed and unpacked at the same
//! time), and copying without a buffer of one's own.

use std::io::{self, BufRead, Read, Write};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{Scope, ScopedJoinHandle};

/// Long enough that handing a buffer over costs nothing beside filling it.
const BUFFER_BYTES: usize = 256 << 10;

/// Filled buffers that wait at most; the reader holds another, and so does the thread.
const WAITING: usize = 4;

/// What a thread reads ahead, in order. A failure comes where it happened; behind it is the end.
#[derive(Debug)]
pub struct Ahead {
    filled: Receiver<io::Result<Vec<u8>>>,
    empty: Sender<Vec<u8>>,
    current: Vec<u8>,
    at: usize,
}

/// Starts to read. The thread ends at the end of `inner`, after a failure, or when nobody reads any more, and gives `inner` back.
pub fn ahead<'scope, R: Read + Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    mut inner: R,
) -> (Ahead, ScopedJoinHandle<'scope, R>) {
    let (send, filled) = mpsc::sync_channel(WAITING);
    let (empty, emptied) = mpsc::channel::<Vec<u8>>();
    let thread = scope.spawn(move || {
        loop {
            let mut buffer = emptied.try_recv().unwrap_or_default();
            buffer.clear();
            buffer.reserve_exact(BUFFER_BYTES);
            let outcome = inner.by_ref().take(BUFFER_BYTES as u64).read_to_end(&mut buffer);
            let ends = buffer.len() < BUFFER_BYTES;
            // What came before a failure is handed over too.
            if !buffer.is_empty() && send.send(Ok(buffer)).is_err() {
                return inner;
            }
            if let Err(error) = outcome {
                // Nobody may be there to hear it.
                let _ = send.send(Err(error));
                return inner;
            }
            if ends {
                return inner;
            }
        }
    });
    (Ahead { filled, empty, current: Vec::new(), at: 0 }, thread)
}

impl Ahead {
    /// Shows all bytes to `look`, in order and in a thread of its own, before they are read. What comes of it when all have been
    /// read, or nobody reads any more.
    pub fn watched<'scope, T: Send + 'scope>(
        self,
        scope: &'scope Scope<'scope, '_>,
        mut state: T,
        look: impl Fn(&mut T, &[u8]) + Send + 'scope,
    ) -> (Ahead, ScopedJoinHandle<'scope, T>) {
        let (send, filled) = mpsc::sync_channel(WAITING);
        let Ahead { filled: before, empty, .. } = self;
        let thread = scope.spawn(move || {
            while let Ok(next) = before.recv() {
                if let Ok(bytes) = &next {
                    look(&mut state, bytes);
                }
                if send.send(next).is_err() {
                    break;
                }
            }
            state
        });
        (Ahead { filled, empty, current: Vec::new(), at: 0 }, thread)
    }
}

impl Read for Ahead {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.fill_buf()?.read(buffer)?;
        self.consume(count);
        Ok(count)
    }
}

impl BufRead for Ahead {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.at == self.current.len()
            && let Ok(next) = self.filled.recv()
        {
            let emptied = std::mem::replace(&mut self.current, next?);
            self.at = 0;
            // The thread may have ended.
            let _ = self.empty.send(emptied);
        }
        Ok(&self.current[self.at..])
    }

    fn consume(&mut self, count: usize) {
        self.at = self.current.len().min(self.at + count);
    }
}

/// Copies all that is there from the reader's own buffer; the number of bytes.
pub(crate) fn copy_buffered(reader: &mut dyn BufRead, writer: &mut dyn Write) -> io::Result<u64> {
    let mut total = 0;
    loop {
        let count = match reader.fill_buf() {
            Ok([]) => return Ok(total),
            Ok(bytes) => {
                writer.write_all(bytes)?;
                bytes.len()
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        reader.consume(count);
        total += count as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives up to three bytes at a time, then fails if told to.
    struct Slow {
        left: usize,
        fails: bool,
    }

    impl Read for Slow {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let count = self.left.min(buffer.len()).min(3000);
            buffer[..count].fill(b'x');
            self.left -= count;
            if count == 0 && self.fails { Err(io::ErrorKind::ConnectionReset.into()) } else { Ok(count) }
        }
    }

    #[test]
    fn all_bytes_come_in_order_and_the_reader_comes_back() {
        for size in [0, 1, BUFFER_BYTES - 1, BUFFER_BYTES, BUFFER_BYTES * 9 + 5] {
            let bytes: Vec<u8> = (0..size).map(|at| (at % 251) as u8).collect();
            std::thread::scope(|scope| {
                let (mut reader, thread) = ahead(scope, bytes.as_slice());
                let mut found = Vec::new();
                reader.read_to_end(&mut found).unwrap();
                assert!(found == bytes);
                assert!(thread.join().unwrap().is_empty());
            });
        }
    }

    #[test]
    fn who_watches_sees_all_bytes_and_failures_pass() {
        for fails in [false, true] {
            std::thread::scope(|scope| {
                let (reader, _) = ahead(scope, Slow { left: BUFFER_BYTES * 3 + 10, fails });
                let (mut reader, watcher) =
                    reader.watched(scope, Vec::new(), |seen: &mut Vec<u8>, bytes: &[u8]| seen.extend(bytes));
                let mut found = Vec::new();
                assert_eq!(reader.read_to_end(&mut found).is_err(), fails);
                drop(reader);
                assert!(watcher.join().unwrap() == found && found.len() == BUFFER_BYTES * 3 + 10);
            });
        }
        // Nobody reads to the end.
        std::thread::scope(|scope| {
            let (reader, thread) = ahead(scope, Slow { left: BUFFER_BYTES * 50, fails: false });
            let (mut reader, watcher) = reader.watched(scope, 0, |count, bytes| *count += bytes.len());
            reader.read_exact(&mut [0; 10]).unwrap();
            drop(reader);
            assert!(watcher.join().unwrap() < BUFFER_BYTES * 50);
            assert!(thread.join().unwrap().left > 0);
        });
    }

    #[test]
    fn a_failure_comes_behind_the_bytes_before_it_and_once() {
        std::thread::scope(|scope| {
            let (mut reader, _) = ahead(scope, Slow { left: BUFFER_BYTES + 10, fails: true });
            let mut found = Vec::new();
            let error = reader.read_to_end(&mut found).unwrap_err();
            assert_eq!((found.len(), error.kind()), (BUFFER_BYTES + 10, io::ErrorKind::ConnectionReset));
            assert_eq!(reader.read(&mut [0]).unwrap(), 0);
        });
    }

    #[test]
    fn the_thread_ends_when_nobody_reads() {
        std::thread::scope(|scope| {
            let (mut reader, thread) = ahead(scope, io::repeat(7));
            assert_eq!(reader.fill_buf().unwrap().first(), Some(&7));
            drop(reader);
            thread.join().unwrap();
        });
    }
}
