//! Where the time of a build went: `--timings` prints a table, `--trace FILE` writes a file for a trace viewer.
//!
//! The recorder sees every event of the build on its way to the display. What a vertex did comes as [`Span`]s; a layer is
//! made a blob long after its vertex has ended, so such spans name the layer, and the vertex is found through it.
//!
//! The file is in the Trace Event Format (JSON object form, complete events; times are microseconds since the start of the
//! build), which Perfetto (ui.perfetto.dev) and chrome://tracing show: a row for each vertex, one for outputs.

use crate::progress::sanitised;
use indicatif::HumanBytes;
use nacre_solver::solve::{Event, Phase, Span};
use nacre_solver::tree::LayerId;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Collects what happens in a build.
pub(crate) struct Recorder {
    start: Instant,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    /// When the graphs became known, one for each platform; steps wait from the last one on.
    planned: Vec<Instant>,
    names: BTreeMap<usize, String>,
    spans: Vec<Span>,
    /// Outputs: what, when it was done, how long it took.
    exports: Vec<(String, Instant, Duration)>,
}

/// One line of the table.
#[derive(Debug, Default, Clone, PartialEq)]
struct Row {
    waited: Duration,
    looked_up: Duration,
    ran: Duration,
    hashed: Duration,
    compressed: Duration,
    bytes: u64,
}

impl Recorder {
    /// Starts the clock.
    pub(crate) fn new() -> Self {
        Self { start: Instant::now(), seen: Mutex::default() }
    }

    /// Takes an event in. Called by many threads.
    pub(crate) fn note(&self, event: &Event) {
        let mut seen = match event {
            Event::Planned { .. } | Event::Span(_) | Event::Exported { .. } => {
                self.seen.lock().unwrap_or_else(PoisonError::into_inner)
            }
            _ => return,
        };
        match event {
            Event::Planned { vertices } => {
                seen.planned.push(Instant::now());
                seen.names.extend(vertices.iter().map(|vertex| (vertex.id, vertex.name.clone())));
            }
            Event::Span(span) => seen.spans.push(span.clone()),
            Event::Exported { what, duration } => seen.exports.push((what.clone(), Instant::now(), *duration)),
            _ => {}
        }
    }

    /// The table of `--timings`: a line for each step, times in seconds.
    pub(crate) fn table(&self) -> String {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let mut text = format!("timings: {:.3} s in all\n", self.start.elapsed().as_secs_f64());
        text.push_str("   waited  look-up      ran   hashed compressed       bytes\n");
        for (id, row) in seen.rows() {
            let seconds = |duration: Duration| format!("{:.3}", duration.as_secs_f64());
            let bytes = if row.bytes == 0 { String::new() } else { HumanBytes(row.bytes).to_string() };
            text.push_str(&format!(
                "{:>9}{:>9}{:>9}{:>9}{:>11}{:>12}  {}\n",
                seconds(row.waited),
                seconds(row.looked_up),
                seconds(row.ran),
                seconds(row.hashed),
                seconds(row.compressed),
                bytes,
                sanitised(seen.name(Some(id)).as_bytes(), false),
            ));
        }
        for (what, _, duration) in &seen.exports {
            let what = sanitised(what.as_bytes(), false);
            text.push_str(&format!("{:9.3} s exporting {what}\n", duration.as_secs_f64()));
        }
        text
    }

    /// The content of the trace file.
    pub(crate) fn trace(&self) -> Vec<u8> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let micros = |duration: Duration| u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        let since = |at: Instant| micros(at.saturating_duration_since(self.start));
        // Row 0 is for what belongs to no vertex.
        let row = |id: Option<usize>| id.map_or(0, |id| id + 1);
        let name = |row: usize, name: &str| json!({"name": "thread_name", "ph": "M", "pid": 1, "tid": row, "args": {"name": name}});
        let mut events: Vec<Value> = vec![name(0, "outputs")];
        events.extend(seen.names.iter().map(|(id, text)| name(row(Some(*id)), text)));
        let layers = seen.layers();
        for span in &seen.spans {
            let id = span.vertex(&layers);
            events.push(json!({
                "name": span.phase.name(), "cat": "step", "ph": "X", "pid": 1, "tid": row(id),
                "ts": since(span.started), "dur": micros(span.duration),
                "args": {"step": seen.name(id), "bytes": span.bytes},
            }));
        }
        for (what, done, duration) in &seen.exports {
            let started = done.checked_sub(*duration).unwrap_or(self.start);
            events.push(json!({
                "name": what, "cat": "output", "ph": "X", "pid": 1, "tid": 0,
                "ts": since(started), "dur": micros(*duration),
            }));
        }
        let mut bytes = json!({"displayTimeUnit": "ms", "traceEvents": events}).to_string().into_bytes();
        bytes.push(b'\n');
        bytes
    }
}

/// A span's vertex, by its number or by the layer it made.
trait OfVertex {
    fn vertex(&self, layers: &BTreeMap<&LayerId, usize>) -> Option<usize>;
}

impl OfVertex for Span {
    fn vertex(&self, layers: &BTreeMap<&LayerId, usize>) -> Option<usize> {
        self.id.or_else(|| layers.get(self.layer.as_ref()?).copied())
    }
}

impl Seen {
    fn name(&self, id: Option<usize>) -> &str {
        id.and_then(|id| self.names.get(&id)).map_or("", String::as_str)
    }

    /// Which vertex made a layer, or found it.
    fn layers(&self) -> BTreeMap<&LayerId, usize> {
        self.spans.iter().filter_map(|span| Some((span.layer.as_ref()?, span.id?))).collect()
    }

    fn rows(&self) -> BTreeMap<usize, Row> {
        let layers = self.layers();
        let mut rows: BTreeMap<usize, Row> = BTreeMap::new();
        for span in &self.spans {
            let Some(id) = span.vertex(&layers) else { continue };
            let row = rows.entry(id).or_default();
            match span.phase {
                Phase::LookUp => {
                    // Nothing of a vertex comes before its look-up: until then it waited for its inputs.
                    let planned = self.planned.iter().rev().find(|planned| **planned <= span.started);
                    row.waited = planned.map_or(Duration::ZERO, |planned| span.started - *planned);
                    row.looked_up += span.duration;
                }
                Phase::Run => row.ran += span.duration,
                Phase::Hash => row.hashed += span.duration,
                Phase::Compress => row.compressed += span.duration,
            }
            if matches!(span.phase, Phase::Hash | Phase::Compress) {
                row.bytes = span.bytes;
            }
        }
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nacre_solver::solve::VertexInfo;

    fn recorded() -> Recorder {
        let recorder = Recorder::new();
        let vertex = VertexInfo { id: 1, name: "[2/2] RUN make".into(), stage: "0".into() };
        recorder.note(&Event::Planned { vertices: vec![vertex] });
        let started = Instant::now();
        let layer = Some(LayerId("abc".into()));
        let span = |id, phase, millis, bytes| {
            Event::Span(Span {
                id,
                layer: layer.clone(),
                phase,
                started: started + Duration::from_millis(50),
                duration: Duration::from_millis(millis),
                bytes,
            })
        };
        recorder.note(&span(Some(1), Phase::LookUp, 1, 0));
        recorder.note(&span(Some(1), Phase::Run, 200, 0));
        recorder.note(&span(Some(1), Phase::Hash, 30, 5000));
        // Known by its layer alone.
        recorder.note(&span(None, Phase::Compress, 40, 2000));
        recorder.note(&Event::Exported { what: "OCI image to x".into(), duration: Duration::from_millis(7) });
        recorder
    }

    #[test]
    fn spans_add_up_by_vertex() {
        let recorder = recorded();
        let rows = recorder.seen.lock().unwrap().rows();
        let row = &rows[&1];
        assert_eq!((row.ran, row.hashed), (Duration::from_millis(200), Duration::from_millis(30)));
        assert_eq!((row.compressed, row.bytes), (Duration::from_millis(40), 2000));
        assert!(row.waited >= Duration::from_millis(50));
        let table = recorder.table();
        assert!(table.contains("0.200    0.030      0.040    1.95 KiB  [2/2] RUN make"), "{table}");
        assert!(table.contains("0.007 s exporting OCI image to x"), "{table}");
    }

    #[test]
    fn the_trace_is_valid() {
        let trace: Value = serde_json::from_slice(&recorded().trace()).unwrap();
        let events = trace["traceEvents"].as_array().unwrap();
        let complete: Vec<&Value> = events.iter().filter(|event| event["ph"] == "X").collect();
        let names: Vec<&str> = complete.iter().filter_map(|event| event["name"].as_str()).collect();
        assert_eq!(names, ["look up", "run", "hash", "compress", "OCI image to x"]);
        assert!(complete[..4].iter().all(|event| event["tid"] == 2 && event["dur"].is_u64() && event["ts"].is_u64()));
    }
}
