//! Solver events become a display on standard error.
//!
//! One thread owns the screen: [`Screen`] gives out sinks, any thread may send, and a [`Painter`] draws what arrives.
//!
//! * plain: lines that look like BuildKit's, each with its step's number; also says why a step ran.
//! * tty: finished steps scroll by, below them a live view of what runs; cached steps are only counted.
//! * rawjson: one JSON object per line and event, described at [`json`].
//! * quiet: nothing.
//!
//! Output of steps is foreign text. Where it goes to a terminal, everything that a terminal would obey is taken out
//! except colours ([`sanitised`]).

use crate::request::ProgressMode;
use indicatif::{HumanBytes, MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use nacre_solver::solve::{Event, Stream, VertexInfo};
use serde_json::{Value, json};
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How often the live view is drawn.
const FRAME: Duration = Duration::from_millis(100);

/// How often plain mode tells of a transfer that goes on.
const TRANSFER_NEWS: Duration = Duration::from_secs(5);

/// A line without end is cut here, so that a step cannot fill the memory.
const LINE_LIMIT_BYTES: usize = 64 * 1024;

/// How to draw.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ScreenOptions {
    /// Which display.
    pub(crate) mode: ProgressMode,
    /// Standard error is a terminal.
    pub(crate) terminal: bool,
    /// With colours.
    pub(crate) color: bool,
    /// Also the live view says why a step ran.
    pub(crate) explain: bool,
}

enum Message {
    Event(Event),
    Finish,
}

/// The display of one build.
pub(crate) struct Screen {
    sender: Sender<Message>,
    thread: Option<JoinHandle<()>>,
}

impl Screen {
    /// Starts the thread that draws. Start it after the process has stopped changing its namespaces.
    pub(crate) fn start(options: ScreenOptions) -> Self {
        let stderr = std::io::stderr();
        match options.mode {
            ProgressMode::Quiet => Self::with(Silent),
            ProgressMode::RawJson => Self::with(JsonLines { out: stderr }),
            ProgressMode::Plain => Self::with(Plain::new(stderr, options)),
            ProgressMode::Tty => Self::with(Live::new(options)),
        }
    }

    fn with(painter: impl Painter + 'static) -> Self {
        let (sender, receiver) = channel();
        let thread = std::thread::spawn(move || draw(painter, &receiver));
        Self { sender, thread: Some(thread) }
    }

    /// Returns a function that takes events; sending to a finished screen does nothing.
    pub(crate) fn sink(&self) -> impl Fn(Event) + Clone + Send + Sync + 'static {
        let sender = self.sender.clone();
        move |event| {
            let _ = sender.send(Message::Event(event));
        }
    }

    /// Draws what was sent so far and gives the screen back. Error messages are printed after this.
    pub(crate) fn finish(mut self) {
        self.stop();
    }

    fn stop(&mut self) {
        let _ = self.sender.send(Message::Finish);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        self.stop();
    }
}

fn draw(mut painter: impl Painter, messages: &Receiver<Message>) {
    let start = Instant::now();
    loop {
        match messages.recv_timeout(FRAME) {
            Ok(Message::Event(event)) => painter.event(start.elapsed(), &event),
            Ok(Message::Finish) | Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {}
        }
        painter.tick(start.elapsed());
    }
    painter.finish(start.elapsed());
}

/// Draws events. Times count from the start of the build.
trait Painter: Send {
    fn event(&mut self, at: Duration, event: &Event);
    fn tick(&mut self, _at: Duration) {}
    fn finish(&mut self, _at: Duration) {}
}

struct Silent;

impl Painter for Silent {
    fn event(&mut self, _at: Duration, _event: &Event) {}
}

struct JsonLines<W> {
    out: W,
}

impl<W: Write + Send> Painter for JsonLines<W> {
    fn event(&mut self, at: Duration, event: &Event) {
        let _ = writeln!(self.out, "{}", json(at, event));
    }
}

/// One event as JSON: `time` in seconds since the start, `event` with its name, and the event's members. Durations are
/// seconds, sizes bytes, `text` of a log event is the step's output with invalid UTF-8 replaced.
///
/// ```text
/// {"time":0.01,"event":"planned","vertices":[{"id":0,"name":"[1/2] FROM debian:12","stage":"0"}]}
/// {"time":0.02,"event":"started","id":1}
/// {"time":0.02,"event":"cached","id":0}
/// {"time":0.02,"event":"explained","id":1,"reason":"first build"}
/// {"time":0.30,"event":"log","id":1,"stream":"stdout","text":"hello\n"}
/// {"time":0.30,"event":"transfer","id":0,"what":"debian:12","done_bytes":10,"total_bytes":100}
/// {"time":0.31,"event":"finished","id":1,"seconds":0.29}
/// {"time":0.31,"event":"failed","id":1,"message":"exit code 1"}
/// {"time":0.31,"event":"canceled","id":2}
/// {"time":0.01,"event":"loading","what":"https://example.com/repository.git"}
/// {"time":0.02,"event":"loaded","what":"https://example.com/repository.git","seconds":0.01}
/// {"time":0.32,"event":"exporting","what":"OCI archive out.tar"}
/// {"time":0.40,"event":"exported","what":"OCI archive out.tar","seconds":0.08}
/// {"time":0.40,"event":"traffic","received_bytes":123}
/// {"time":0.40,"event":"warning","message":"…"}
/// {"time":0.31,"event":"span","id":1,"phase":"run","seconds":0.25,"bytes":0}
/// {"time":0.01,"event":"check","rule":"StageNameCasing","message":"…","url":"…","file":"Dockerfile","line":1,"column":6}
/// ```
fn json(at: Duration, event: &Event) -> Value {
    let mut value = match event {
        Event::Planned { vertices } => {
            let vertices: Vec<Value> = vertices
                .iter()
                .map(|vertex| json!({"id": vertex.id, "name": vertex.name, "stage": vertex.stage}))
                .collect();
            json!({"event": "planned", "vertices": vertices})
        }
        Event::Started { id } => json!({"event": "started", "id": id}),
        Event::Cached { id } => json!({"event": "cached", "id": id}),
        Event::Log { id, stream, data } => {
            let stream = match stream {
                Stream::Stdout => "stdout",
                Stream::Stderr => "stderr",
            };
            json!({"event": "log", "id": id, "stream": stream, "text": String::from_utf8_lossy(data)})
        }
        Event::Transfer { id, what, done_bytes, total_bytes } => {
            json!({"event": "transfer", "id": id, "what": what, "done_bytes": done_bytes, "total_bytes": total_bytes})
        }
        Event::Explained { id, reason } => json!({"event": "explained", "id": id, "reason": reason}),
        Event::Finished { id, duration } => json!({"event": "finished", "id": id, "seconds": duration.as_secs_f64()}),
        Event::Failed { id, message } => json!({"event": "failed", "id": id, "message": message}),
        Event::Canceled { id } => json!({"event": "canceled", "id": id}),
        Event::Loading { what } => json!({"event": "loading", "what": what}),
        Event::Loaded { what, duration } => {
            json!({"event": "loaded", "what": what, "seconds": duration.as_secs_f64()})
        }
        Event::Exporting { what } => json!({"event": "exporting", "what": what}),
        Event::Exported { what, duration } => {
            json!({"event": "exported", "what": what, "seconds": duration.as_secs_f64()})
        }
        Event::Check { rule, message, url, file, line, column } => json!({
            "event": "check", "rule": rule, "message": message, "url": url, "file": file, "line": line, "column": column
        }),
        Event::Traffic { received_bytes } => json!({"event": "traffic", "received_bytes": received_bytes}),
        Event::Warning { message } => json!({"event": "warning", "message": message}),
        Event::Span(span) => json!({
            "event": "span", "id": span.id, "phase": span.phase.name(), "seconds": span.duration.as_secs_f64(),
            "bytes": span.bytes
        }),
    };
    // First in the line: what reads along wants to see it there.
    if let Value::Object(members) = &mut value {
        members.shift_insert(0, "time".to_owned(), json!(at.as_secs_f64()));
    }
    value
}

/// What is known of the graph, and how far it is.
#[derive(Default)]
struct Totals {
    vertices: BTreeMap<usize, VertexInfo>,
    ran: BTreeSet<usize>,
    cached: BTreeSet<usize>,
    failed: BTreeSet<usize>,
    received_bytes: u64,
}

impl Totals {
    fn event(&mut self, event: &Event) {
        match event {
            Event::Planned { vertices } => {
                self.vertices.extend(vertices.iter().map(|vertex| (vertex.id, vertex.clone())));
            }
            // A step may have to run after all, when what only a cache knows of it is not enough.
            Event::Started { id } => {
                self.cached.remove(id);
            }
            Event::Traffic { received_bytes } => self.received_bytes = *received_bytes,
            Event::Cached { id } => {
                self.cached.insert(*id);
            }
            Event::Finished { id, .. } => {
                self.ran.insert(*id);
            }
            Event::Failed { id, .. } => {
                self.failed.insert(*id);
            }
            _ => {}
        }
    }

    fn name(&self, id: usize) -> &str {
        self.vertices.get(&id).map_or("(step)", |vertex| vertex.name.as_str())
    }

    /// `12 steps: 3 ran, 9 cached, 4.5 MiB received, 1.2s`; nothing before a graph is known.
    fn sum(&self, at: Duration) -> Option<String> {
        let all = self.vertices.len();
        let (ran, cached, failed) = (self.ran.len(), self.cached.len(), self.failed.len());
        let steps = if all == 1 { "1 step".to_owned() } else { format!("{all} steps") };
        let time = seconds(at);
        let received = match self.received_bytes {
            0 => String::new(),
            bytes => format!("{} received, ", HumanBytes(bytes)),
        };
        match (all, failed) {
            (0, _) => None,
            (_, 0) if cached == all => Some(format!("{steps}, all cached, {received}{time}")),
            (_, 0) => Some(format!("{steps}: {ran} ran, {cached} cached, {received}{time}")),
            _ => Some(format!("{steps}: {ran} ran, {cached} cached, {failed} failed, {received}{time}")),
        }
    }
}

/// `0.12s`, `3.4s`, `125s`: enough digits to compare, not more.
fn seconds(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    match seconds {
        s if s < 1.0 => format!("{s:.2}s"),
        s if s < 100.0 => format!("{s:.1}s"),
        s => format!("{s:.0}s"),
    }
}

/// Puts a step's output together to lines.
#[derive(Default)]
struct Lines {
    partial: BTreeMap<(usize, bool), Vec<u8>>,
}

impl Lines {
    /// Returns the lines that `data` completes, without their ends.
    fn push(&mut self, id: usize, stream: Stream, data: &[u8]) -> Vec<Vec<u8>> {
        let partial = self.partial.entry((id, stream == Stream::Stderr)).or_default();
        let mut lines = Vec::new();
        for piece in data.split_inclusive(|byte| *byte == b'\n') {
            partial.extend_from_slice(piece);
            if partial.last() == Some(&b'\n') {
                partial.pop();
                lines.push(overwritten(std::mem::take(partial)));
            } else if partial.len() >= LINE_LIMIT_BYTES {
                lines.push(overwritten(std::mem::take(partial)));
            }
        }
        lines
    }

    /// What stands in the line that is not complete yet.
    fn unfinished(&self, id: usize, stream: Stream) -> Option<Vec<u8>> {
        let line = self.partial.get(&(id, stream == Stream::Stderr)).filter(|line| !line.is_empty())?;
        Some(overwritten(line.clone()))
    }

    /// Returns what is left of a step's output when it has ended.
    fn end(&mut self, id: usize) -> Vec<Vec<u8>> {
        let mut rest: Vec<Vec<u8>> = [false, true].iter().filter_map(|err| self.partial.remove(&(id, *err))).collect();
        rest.retain(|line| !line.is_empty());
        rest.into_iter().map(overwritten).collect()
    }
}

/// A carriage return starts the line again, as programs do that show their progress: only the last text counts.
fn overwritten(mut line: Vec<u8>) -> Vec<u8> {
    while line.last() == Some(&b'\r') {
        line.pop();
    }
    match line.iter().rposition(|byte| *byte == b'\r') {
        Some(at) => line.split_off(at + 1),
        None => line,
    }
}

struct Plain<W> {
    out: W,
    options: ScreenOptions,
    totals: Totals,
    lines: Lines,
    /// Steps whose name was printed, and when they started.
    shown: BTreeMap<usize, Duration>,
    /// Transfers: when they were last told of.
    transfers: BTreeMap<String, Duration>,
}

impl<W: Write + Send> Plain<W> {
    fn new(out: W, options: ScreenOptions) -> Self {
        let (totals, lines) = (Totals::default(), Lines::default());
        Self { out, options, totals, lines, shown: BTreeMap::new(), transfers: BTreeMap::new() }
    }

    fn line(&mut self, text: &str) {
        let _ = writeln!(self.out, "{text}");
    }

    /// Prints a step's name once.
    fn head(&mut self, at: Duration, id: usize) {
        if let Entry::Vacant(entry) = self.shown.entry(id) {
            entry.insert(at);
            let text = format!("#{} {}", id + 1, sanitised(self.totals.name(id).as_bytes(), false));
            self.line(&text);
        }
    }

    fn step(&mut self, at: Duration, id: usize, text: &str) {
        self.head(at, id);
        self.line(&format!("#{} {}", id + 1, sanitised(text.as_bytes(), false)));
    }

    fn output(&mut self, at: Duration, id: usize, lines: Vec<Vec<u8>>) {
        self.head(at, id);
        let since = at.saturating_sub(self.shown.get(&id).copied().unwrap_or_default()).as_secs_f64();
        for line in lines {
            let mut text = format!("#{} {since:.3} ", id + 1).into_bytes();
            // A file gets what the step wrote, a terminal only what cannot harm it.
            match self.options.terminal {
                true => text.extend(sanitised(&line, self.options.color).into_bytes()),
                false => text.extend(line),
            }
            text.push(b'\n');
            let _ = self.out.write_all(&text);
        }
    }
}

impl<W: Write + Send> Painter for Plain<W> {
    fn event(&mut self, at: Duration, event: &Event) {
        self.totals.event(event);
        match event {
            Event::Planned { .. } => {}
            Event::Started { id } => self.head(at, *id),
            Event::Cached { id } => self.step(at, *id, "CACHED"),
            Event::Log { id, stream, data } => {
                let lines = self.lines.push(*id, *stream, data);
                self.output(at, *id, lines);
            }
            Event::Transfer { id, what, done_bytes, total_bytes } => {
                let complete = *total_bytes == Some(*done_bytes);
                let last = self.transfers.get(what).copied();
                if complete || last.is_none_or(|last| at.saturating_sub(last) >= TRANSFER_NEWS) {
                    self.transfers.insert(what.clone(), at);
                    let text = format!("{what} {}", amount(*done_bytes, *total_bytes));
                    match id {
                        Some(id) => self.step(at, *id, &text),
                        None => self.line(&sanitised(text.as_bytes(), false)),
                    }
                }
            }
            Event::Explained { id, reason } => self.step(at, *id, &format!("runs because: {reason}")),
            Event::Finished { id, duration } => {
                let rest = self.lines.end(*id);
                self.output(at, *id, rest);
                self.step(at, *id, &format!("DONE {}", seconds(*duration)));
            }
            Event::Failed { id, message } => {
                let rest = self.lines.end(*id);
                self.output(at, *id, rest);
                self.step(at, *id, &format!("ERROR: {message}"));
            }
            Event::Canceled { id } => {
                let rest = self.lines.end(*id);
                self.output(at, *id, rest);
                self.step(at, *id, "CANCELED");
            }
            Event::Loading { what } => self.line(&sanitised(format!("loading {what}").as_bytes(), false)),
            Event::Loaded { what, duration } => {
                let text = format!("loading {what} DONE {}", seconds(*duration));
                self.line(&sanitised(text.as_bytes(), false));
            }
            Event::Exporting { what } => self.line(&format!("exporting {what}")),
            Event::Exported { what, duration } => self.line(&format!("exporting {what} DONE {}", seconds(*duration))),
            // Shown with their places, or added up, when the steps are done.
            Event::Check { .. } | Event::Traffic { .. } | Event::Span(_) => {}
            Event::Warning { message } => self.line(&format!("warning: {}", sanitised(message.as_bytes(), false))),
        }
    }

    fn finish(&mut self, at: Duration) {
        if let Some(sum) = self.totals.sum(at) {
            self.line(&sum);
        }
    }
}

fn amount(done_bytes: u64, total_bytes: Option<u64>) -> String {
    match total_bytes {
        Some(total) if total == done_bytes => format!("{} done", HumanBytes(total)),
        Some(total) => format!("{} / {}", HumanBytes(done_bytes), HumanBytes(total)),
        None => HumanBytes(done_bytes).to_string(),
    }
}

/// The live view without its drawing: what scrolls by, and what stands below.
struct LiveModel {
    explain: bool,
    totals: Totals,
    lines: Lines,
    /// When a step started, and its last line of output.
    running: BTreeMap<usize, (Duration, String)>,
    transfers: Vec<(String, u64, Option<u64>)>,
    loading: Vec<(String, Duration)>,
    exporting: Vec<(String, Duration)>,
}

impl LiveModel {
    fn new(explain: bool) -> Self {
        Self {
            explain,
            totals: Totals::default(),
            lines: Lines::default(),
            running: BTreeMap::new(),
            transfers: Vec::new(),
            loading: Vec::new(),
            exporting: Vec::new(),
        }
    }

    /// Takes an event in; returns lines that stay.
    fn event(&mut self, at: Duration, event: &Event) -> Vec<String> {
        self.totals.event(event);
        match event {
            Event::Planned { .. }
            | Event::Cached { .. }
            | Event::Check { .. }
            | Event::Traffic { .. }
            | Event::Span(_) => Vec::new(),
            Event::Started { id } => {
                self.running.insert(*id, (at, String::new()));
                Vec::new()
            }
            Event::Log { id, stream, data } => {
                let complete = self.lines.push(*id, *stream, data).pop();
                let last = self.lines.unfinished(*id, *stream).or(complete);
                let text = last.map(|line| sanitised(&line, false)).unwrap_or_default();
                if let Some((_, last)) = self.running.get_mut(id)
                    && !text.trim().is_empty()
                {
                    text.trim().clone_into(last);
                }
                Vec::new()
            }
            Event::Transfer { what, done_bytes, total_bytes, .. } => {
                self.transfers.retain(|(other, ..)| other != what);
                if *total_bytes != Some(*done_bytes) {
                    self.transfers.push((what.clone(), *done_bytes, *total_bytes));
                }
                Vec::new()
            }
            Event::Explained { id, reason } if self.explain => {
                vec![format!("        {} runs because: {}", self.name(*id), sanitised(reason.as_bytes(), false))]
            }
            Event::Explained { .. } => Vec::new(),
            Event::Finished { id, duration } => {
                self.ended(*id);
                vec![format!("{:>7} {}", seconds(*duration), self.name(*id))]
            }
            Event::Failed { id, message } => {
                self.ended(*id);
                vec![format!(" FAILED {}: {}", self.name(*id), sanitised(message.as_bytes(), false))]
            }
            Event::Canceled { id } => {
                self.ended(*id);
                Vec::new()
            }
            Event::Loading { what } => {
                self.loading.push((sanitised(what.as_bytes(), false), at));
                Vec::new()
            }
            Event::Loaded { what, duration } => {
                let what = sanitised(what.as_bytes(), false);
                self.loading.retain(|(other, _)| *other != what);
                vec![format!("{:>7} loading {what}", seconds(*duration))]
            }
            Event::Exporting { what } => {
                self.exporting.push((what.clone(), at));
                Vec::new()
            }
            Event::Exported { what, duration } => {
                self.exporting.retain(|(other, _)| other != what);
                vec![format!("{:>7} exporting {what}", seconds(*duration))]
            }
            Event::Warning { message } => vec![format!("warning: {}", sanitised(message.as_bytes(), false))],
        }
    }

    fn ended(&mut self, id: usize) {
        self.running.remove(&id);
        self.lines.end(id);
    }

    fn name(&self, id: usize) -> String {
        sanitised(self.totals.name(id).as_bytes(), false)
    }

    /// Rows of the live view, at most `limit` of them.
    fn rows(&self, at: Duration, limit: usize) -> Vec<String> {
        let totals = &self.totals;
        let (done, all) = (totals.ran.len() + totals.cached.len(), totals.vertices.len());
        let mut head = format!("{:>7} {done}/{all} steps", seconds(at));
        if !totals.cached.is_empty() {
            head.push_str(&format!(", {} cached", totals.cached.len()));
        }
        let mut rows = vec![head];
        for (id, (start, last)) in &self.running {
            let mut row = format!("{:>7} {}", seconds(at.saturating_sub(*start)), shortened(&self.name(*id), 60));
            if !last.is_empty() {
                row.push_str(" | ");
                row.push_str(last);
            }
            rows.push(row);
        }
        for (what, done, total) in &self.transfers {
            rows.push(format!("        {} {}", sanitised(what.as_bytes(), false), amount(*done, *total)));
        }
        for (what, start) in &self.loading {
            rows.push(format!("{:>7} loading {what}", seconds(at.saturating_sub(*start))));
        }
        for (what, start) in &self.exporting {
            rows.push(format!("{:>7} exporting {what}", seconds(at.saturating_sub(*start))));
        }
        let limit = limit.max(2);
        if rows.len() > limit {
            let more = rows.len() - limit + 1;
            rows.truncate(limit - 1);
            rows.push(format!("        and {more} more"));
        }
        rows
    }
}

fn shortened(text: &str, limit: usize) -> String {
    match text.char_indices().nth(limit) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text.to_owned(),
    }
}

/// Draws a [`LiveModel`]. The terminal is only written at frames, however fast events come.
struct Live {
    model: LiveModel,
    screen: MultiProgress,
    bars: Vec<ProgressBar>,
    drawn: Duration,
}

impl Live {
    fn new(options: ScreenOptions) -> Self {
        let screen = MultiProgress::with_draw_target(ProgressDrawTarget::stderr());
        Self { model: LiveModel::new(options.explain), screen, bars: Vec::new(), drawn: Duration::ZERO }
    }

    fn rows(&mut self, rows: &[String]) {
        while self.bars.len() > rows.len() {
            if let Some(bar) = self.bars.pop() {
                bar.finish_and_clear();
                self.screen.remove(&bar);
            }
        }
        while self.bars.len() < rows.len() {
            let bar = self.screen.add(ProgressBar::new_spinner());
            if let Ok(style) = ProgressStyle::with_template("{wide_msg}") {
                bar.set_style(style);
            }
            self.bars.push(bar);
        }
        for (bar, row) in self.bars.iter().zip(rows) {
            bar.set_message(row.clone());
        }
    }
}

impl Painter for Live {
    fn event(&mut self, at: Duration, event: &Event) {
        for line in self.model.event(at, event) {
            let _ = self.screen.println(line);
        }
    }

    fn tick(&mut self, at: Duration) {
        if at.saturating_sub(self.drawn) < FRAME {
            return;
        }
        self.drawn = at;
        // A view higher than the screen would scroll with every frame.
        let height = rustix::termios::tcgetwinsize(std::io::stderr()).map_or(24, |size| usize::from(size.ws_row));
        let rows = self.model.rows(at, height.saturating_sub(2).max(4));
        self.rows(&rows);
    }

    fn finish(&mut self, at: Duration) {
        self.rows(&[]);
        let _ = self.screen.clear();
        if let Some(sum) = self.model.totals.sum(at) {
            let _ = writeln!(std::io::stderr(), "{sum}");
        }
    }
}

/// A line without what a terminal would obey, as text. With `colours`, sequences that only set colours and the like
/// (SGR) stay, and are ended at the end of the line.
pub(crate) fn sanitised(line: &[u8], colours: bool) -> String {
    let text = String::from_utf8_lossy(line);
    let mut clean = String::with_capacity(text.len());
    let mut colour_open = false;
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\t' => clean.push('\t'),
            '\u{1b}' => match chars.next() {
                Some('[') => {
                    let mut sequence = String::new();
                    let mut last = None;
                    for c in chars.by_ref() {
                        if ('\u{40}'..='\u{7e}').contains(&c) {
                            last = Some(c);
                            break;
                        }
                        sequence.push(c);
                    }
                    let plain = sequence.chars().all(|c| c.is_ascii_digit() || c == ';' || c == ':');
                    if colours && last == Some('m') && plain {
                        colour_open = !matches!(sequence.as_str(), "" | "0");
                        clean.push_str(&format!("\u{1b}[{sequence}m"));
                    }
                }
                // Strings for the terminal (titles, clipboard, device control) run to BEL or ESC \.
                Some(']' | 'P' | 'X' | '^' | '_') => {
                    while let Some(c) = chars.next() {
                        if c == '\u{7}' || c == '\u{9c}' || (c == '\u{1b}' && chars.next_if_eq(&'\\').is_some()) {
                            break;
                        }
                    }
                }
                // ESC, intermediates, one final character.
                Some(mut c) => {
                    while ('\u{20}'..='\u{2f}').contains(&c) {
                        match chars.next() {
                            Some(next) => c = next,
                            None => break,
                        }
                    }
                }
                None => {}
            },
            // C0, DEL, C1 (which hold one-character forms of the above), and what turns the writing direction.
            c if c.is_control() || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}') => {}
            c => clean.push(c),
        }
    }
    if colour_open {
        clean.push_str("\u{1b}[0m");
    }
    clean
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    const OPTIONS: ScreenOptions =
        ScreenOptions { mode: ProgressMode::Plain, terminal: false, color: false, explain: false };

    fn planned() -> Event {
        let vertex = |id: usize, name: &str| VertexInfo { id, name: name.to_owned(), stage: "0".to_owned() };
        Event::Planned {
            vertices: vec![vertex(0, "[1/3] FROM a"), vertex(1, "[2/3] RUN make"), vertex(2, "[3/3] COPY . .")],
        }
    }

    fn log(id: usize, stream: Stream, text: &str) -> Event {
        Event::Log { id, stream, data: text.as_bytes().to_vec() }
    }

    fn build() -> Vec<Event> {
        vec![
            planned(),
            Event::Cached { id: 0 },
            Event::Started { id: 1 },
            Event::Explained { id: 1, reason: "package.json changed".to_owned() },
            log(1, Stream::Stdout, "one\ntw"),
            log(1, Stream::Stderr, "err\r\n"),
            log(1, Stream::Stdout, "o\n10%\r20%\rdone"),
            Event::Transfer { id: Some(2), what: "fetching x".to_owned(), done_bytes: 0, total_bytes: Some(2048) },
            Event::Transfer { id: Some(2), what: "fetching x".to_owned(), done_bytes: 1024, total_bytes: Some(2048) },
            Event::Transfer { id: Some(2), what: "fetching x".to_owned(), done_bytes: 2048, total_bytes: Some(2048) },
            Event::Finished { id: 1, duration: Duration::from_millis(1234) },
            Event::Failed { id: 2, message: "disk full".to_owned() },
            Event::Exporting { what: "OCI archive x".to_owned() },
            Event::Exported { what: "OCI archive x".to_owned(), duration: Duration::from_millis(10) },
            Event::Warning { message: "mind the gap".to_owned() },
        ]
    }

    fn plain(events: &[Event], options: ScreenOptions) -> String {
        let mut out = Vec::new();
        let mut painter = Plain::new(&mut out, options);
        for (step, event) in (0u32..).zip(events) {
            painter.event(Duration::from_millis(100) * step, event);
        }
        painter.finish(Duration::from_secs(2));
        String::from_utf8(out).expect("text")
    }

    #[test]
    fn plain_lines() {
        let expected = "\
#1 [1/3] FROM a
#1 CACHED
#2 [2/3] RUN make
#2 runs because: package.json changed
#2 0.200 one
#2 0.300 err
#2 0.400 two
#3 [3/3] COPY . .
#3 fetching x 0 B / 2.00 KiB
#3 fetching x 2.00 KiB done
#2 0.800 done
#2 DONE 1.2s
#3 ERROR: disk full
exporting OCI archive x
exporting OCI archive x DONE 0.01s
warning: mind the gap
3 steps: 1 ran, 1 cached, 1 failed, 2.0s
";
        assert_eq!(plain(&build(), OPTIONS), expected);
    }

    #[test]
    fn a_fully_cached_build_says_so() {
        let events = [planned(), Event::Cached { id: 0 }, Event::Cached { id: 1 }, Event::Cached { id: 2 }];
        assert!(plain(&events, OPTIONS).ends_with("\n3 steps, all cached, 2.0s\n"));
        assert_eq!(plain(&[], OPTIONS), "");
    }

    #[test]
    fn a_file_gets_the_bytes_and_a_terminal_does_not() {
        let events = [planned(), log(1, Stream::Stdout, "\u{1b}[31mred\u{1b}[2J\n")];
        let file = plain(&events, OPTIONS);
        assert!(file.contains("\u{1b}[31mred\u{1b}[2J\n"), "{file:?}");
        let terminal = plain(&events, ScreenOptions { terminal: true, color: true, ..OPTIONS });
        assert!(terminal.contains(" \u{1b}[31mred\u{1b}[0m\n"), "{terminal:?}");
        let grey = plain(&events, ScreenOptions { terminal: true, ..OPTIONS });
        assert!(grey.contains(" red\n"), "{grey:?}");
    }

    #[test]
    fn json_lines() {
        let mut out = Vec::new();
        let mut painter = JsonLines { out: &mut out };
        for event in build() {
            painter.event(Duration::from_millis(500), &event);
        }
        let text = String::from_utf8(out).expect("text");
        let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
        assert_eq!(lines.len(), build().len());
        assert!(text.lines().all(|line| line.starts_with("{\"time\":0.5,\"event\":\"")), "{text}");
        assert_eq!(lines[0]["vertices"][1]["name"], "[2/3] RUN make");
        assert_eq!(lines[4]["text"], "one\ntw");
        assert_eq!(lines[10], json!({"time": 0.5, "event": "finished", "id": 1, "seconds": 1.234}));
    }

    #[test]
    fn live_view_folds_cached_and_shows_what_runs() {
        let mut model = LiveModel::new(false);
        let mut stay = Vec::new();
        let events = build();
        let (before, after) = events.split_at(9);
        for event in before {
            stay.extend(model.event(Duration::from_secs(1), event));
        }
        assert_eq!(stay, Vec::<String>::new());
        let rows = model.rows(Duration::from_secs(3), 10);
        assert_eq!(
            rows,
            ["   3.0s 1/3 steps, 1 cached", "   2.0s [2/3] RUN make | done", "        fetching x 1.00 KiB / 2.00 KiB"]
        );
        assert_eq!(model.rows(Duration::from_secs(3), 2), ["   3.0s 1/3 steps, 1 cached", "        and 2 more"]);
        for event in after {
            stay.extend(model.event(Duration::from_secs(1), event));
        }
        let expected = [
            "   1.2s [2/3] RUN make",
            " FAILED [3/3] COPY . .: disk full",
            "  0.01s exporting OCI archive x",
            "warning: mind the gap",
        ];
        assert_eq!(stay, expected);
        assert_eq!(model.rows(Duration::from_secs(4), 10), ["   4.0s 2/3 steps, 1 cached"]);
    }

    #[test]
    fn live_view_explains_when_asked() {
        let mut model = LiveModel::new(true);
        let lines: Vec<String> = build().iter().flat_map(|event| model.event(Duration::ZERO, event)).collect();
        assert_eq!(lines[0], "        [2/3] RUN make runs because: package.json changed");
    }

    #[test]
    fn terminal_control_is_taken_out() {
        let check = |input: &str, colours: bool, expected: &str| {
            assert_eq!(sanitised(input.as_bytes(), colours), expected, "{input:?}");
        };
        check("plain \t ünï", true, "plain \t ünï");
        check("\u{1b}[1;31mred\u{1b}[0m", true, "\u{1b}[1;31mred\u{1b}[0m");
        check("\u{1b}[1;31mred", true, "\u{1b}[1;31mred\u{1b}[0m");
        check("\u{1b}[1;31mred\u{1b}[m", false, "red");
        check("a\u{1b}[2Jb\u{1b}[?25lc\u{1b}[>4md", true, "abcd");
        check("a\u{1b}]0;title\u{7}b\u{1b}]52;c;eA==\u{1b}\\c", true, "abc");
        check("a\u{1b}]8;;http://x\u{1b}\\link\u{1b}]8;;\u{1b}\\b", true, "alinkb");
        check("a\u{1b}Pq#0\u{1b}\\b\u{1b}_x\u{9c}c", true, "abc");
        check("a\u{1b}(Bb\u{1b}7c\u{1b}cd", true, "abcd");
        check("a\u{9b}31mb\u{8}\u{7f}\u{0}", true, "a31mb");
        check("a\u{202e}b", true, "ab");
        for cut in ["\u{1b}", "\u{1b}[", "\u{1b}[3", "\u{1b}]x", "\u{1b}("] {
            check(cut, true, "");
        }
        assert_eq!(sanitised(b"\xff\x1b[31", true), "\u{fffd}");
    }

    #[test]
    fn lines_without_end_are_cut() {
        let mut lines = Lines::default();
        let piece = vec![b'x'; LINE_LIMIT_BYTES / 2];
        assert!(lines.push(0, Stream::Stdout, &piece).is_empty());
        assert_eq!(lines.push(0, Stream::Stdout, &piece).len(), 1);
        assert!(lines.end(0).is_empty());
    }

    #[test]
    fn times_have_few_digits() {
        let check = |millis, text: &str| assert_eq!(seconds(Duration::from_millis(millis)), text);
        check(4, "0.00s");
        check(1234, "1.2s");
        check(125_400, "125s");
    }

    /// A painter that notes what it is told.
    struct Noted(Arc<Mutex<Vec<String>>>);

    impl Painter for Noted {
        fn event(&mut self, _at: Duration, event: &Event) {
            self.0.lock().expect("no panic").push(format!("{event:?}"));
        }
        fn finish(&mut self, _at: Duration) {
            self.0.lock().expect("no panic").push("finish".to_owned());
        }
    }

    #[test]
    fn a_screen_draws_all_that_was_sent_before_it_ends() {
        let notes = Arc::new(Mutex::new(Vec::new()));
        let screen = Screen::with(Noted(Arc::clone(&notes)));
        let sink = screen.sink();
        let other = sink.clone();
        std::thread::spawn(move || other(Event::Started { id: 1 })).join().expect("no panic");
        sink(Event::Cached { id: 2 });
        screen.finish();
        sink(Event::Cached { id: 3 });
        assert_eq!(*notes.lock().expect("no panic"), ["Started { id: 1 }", "Cached { id: 2 }", "finish"]);
    }
}
