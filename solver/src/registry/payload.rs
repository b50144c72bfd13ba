//! What a request sends: bytes in memory, or a part of a file that is read while it is sent.

use futures_core::Stream;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

/// Bytes handed to the connection at once.
const PIECE_BYTES: u64 = 128 << 10;

/// Is told how many bytes of a blob have been handed to the connection.
pub type SendProgress = Arc<dyn Fn(u64) + Send + Sync>;

/// The body of a request; it can be sent any number of times.
#[derive(Clone)]
pub(super) enum Payload {
    Bytes(Vec<u8>),
    File { path: PathBuf, offset: u64, length: u64, progress: Option<SendProgress> },
}

impl std::fmt::Debug for Payload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Payload").field("length", &self.length()).finish_non_exhaustive()
    }
}

impl Payload {
    pub(super) fn length(&self) -> u64 {
        match self {
            Payload::Bytes(bytes) => bytes.len() as u64,
            Payload::File { length, .. } => *length,
        }
    }

    /// The body for one attempt, and how much of it has been taken.
    pub(super) fn body(&self) -> io::Result<(reqwest::Body, Arc<AtomicU64>)> {
        let sent = Arc::new(AtomicU64::new(0));
        let body = match self {
            Payload::Bytes(bytes) => reqwest::Body::from(bytes.clone()),
            Payload::File { path, offset, length, progress } => reqwest::Body::wrap_stream(Pieces {
                file: File::open(path)?,
                at: *offset,
                end: offset + length,
                start: *offset,
                sent: sent.clone(),
                progress: progress.clone(),
            }),
        };
        Ok((body, sent))
    }
}

struct Pieces {
    file: File,
    start: u64,
    at: u64,
    end: u64,
    sent: Arc<AtomicU64>,
    progress: Option<SendProgress>,
}

impl Stream for Pieces {
    type Item = io::Result<Vec<u8>>;

    /// Reads on the thread that sends. A piece of a file that was just written comes out of memory, and the threads for the
    /// network have nothing else to do meanwhile that is worth a copy through a third one.
    fn poll_next(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<io::Result<Vec<u8>>>> {
        let this = self.get_mut();
        if this.at == this.end {
            return Poll::Ready(None);
        }
        let mut piece = vec![0; usize::try_from((this.end - this.at).min(PIECE_BYTES)).unwrap_or(0)];
        if let Err(error) = this.file.read_exact_at(&mut piece, this.at) {
            this.at = this.end;
            return Poll::Ready(Some(Err(error)));
        }
        this.at += piece.len() as u64;
        this.sent.store(this.at - this.start, Ordering::Relaxed);
        if let Some(progress) = &this.progress {
            progress(this.at);
        }
        Poll::Ready(Some(Ok(piece)))
    }
}
