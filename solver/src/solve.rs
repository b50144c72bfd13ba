//! What a build tells its caller while it runs.

use std::time::Duration;

/// Where a step wrote to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Out,
    /// Standard error.
    Err,
}

/// A vertex as displays know it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VertexInfo {
    /// Its position in the graph; names it in the other events.
    pub id: usize,
    /// Words for it: `[builder 2/5] RUN make`.
    pub name: String,
    /// Stage it belongs to.
    pub stage: String,
}

/// Something happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The graph is known. Comes first, once for each graph (platform).
    Planned {
        /// All vertices that the target needs.
        vertices: Vec<VertexInfo>,
    },
    /// A vertex begins to run.
    Started {
        /// Which.
        id: usize,
    },
    /// A vertex's result was found; it does not run.
    Cached {
        /// Which.
        id: usize,
    },
    /// A step wrote something. Not cut at line ends.
    Log {
        /// Which vertex.
        id: usize,
        /// Where to.
        stream: Stream,
        /// What, as it was.
        data: Vec<u8>,
    },
    /// Bytes move: a base image, a fetched file, the context.
    Transfer {
        /// For which vertex; `None` when it is for the build as a whole.
        id: Option<usize>,
        /// Words for it; names the transfer in later events.
        what: String,
        /// So far.
        done_bytes: u64,
        /// In the end, when that is known.
        total_bytes: Option<u64>,
    },
    /// Why a vertex ran.
    Explained {
        /// Which.
        id: usize,
        /// `package.json changed`, `first build`.
        reason: String,
    },
    /// A vertex is done.
    Finished {
        /// Which.
        id: usize,
        /// How long it ran.
        duration: Duration,
    },
    /// A vertex failed.
    Failed {
        /// Which.
        id: usize,
        /// Why, in a few words.
        message: String,
    },
    /// A vertex was stopped because another failed, or by the user.
    Canceled {
        /// Which.
        id: usize,
    },
    /// An output is being written.
    Exporting {
        /// Words for it.
        what: String,
    },
    /// An output is there.
    Exported {
        /// Words for it, as in `Exporting`.
        what: String,
        /// How long that took.
        duration: Duration,
    },
    /// Something to know that ends nothing.
    Warning {
        /// What.
        message: String,
    },
}
