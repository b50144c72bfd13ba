//! A proxy before a real registry that counts, asks for tokens, and does what networks do to people.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// What happens to one request.
pub(crate) enum Fault {
    /// Nothing.
    None,
    /// The connection ends before an answer.
    Drop,
    /// Only so much of the body arrives at the registry, then both connections end.
    CutBody(usize),
    /// The registry gets all, the client no answer.
    LoseAnswer,
    /// The proxy answers itself.
    Answer(&'static str, String),
    /// Only so many bytes of the answer arrive.
    CutAnswer(usize),
    /// The last byte of the answer is another one.
    Corrupt,
    /// The answer comes in pieces of this size with pauses.
    Slow(usize),
    /// So much of the answer arrives at once, and then a byte now and then.
    Trickle(usize),
    /// Nothing is read beyond the head, and nothing is answered, for as long as the client waits.
    Hang,
    /// A header of the answer has another value.
    Header(&'static str, String),
}

/// One request as the proxy saw it.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) line: String,
    pub(crate) headers: BTreeMap<String, String>,
    /// Bytes of its body that arrived.
    pub(crate) body_bytes: usize,
    /// Status of the answer.
    pub(crate) status: u16,
}

pub(crate) struct Proxy {
    pub(crate) host: String,
    seen: Arc<Mutex<Vec<Seen>>>,
    faults: Arc<AtomicUsize>,
}

type Rule = Arc<BoxedRule>;
/// What decides about a request by its number, first line and headers.
pub(crate) type BoxedRule = dyn Fn(usize, &str, &BTreeMap<String, String>) -> Fault + Send + Sync;

impl Proxy {
    /// Starts one; `rule` gets the request's number, first line and headers.
    pub(crate) fn start(
        registry: &str,
        rule: impl Fn(usize, &str, &BTreeMap<String, String>) -> Fault + Send + Sync + 'static,
    ) -> Proxy {
        let faults = Arc::new(AtomicUsize::new(0));
        let injected = faults.clone();
        let rule = move |at, line: &str, headers: &BTreeMap<String, String>| {
            let fault = rule(at, line, headers);
            if !matches!(fault, Fault::None) {
                injected.fetch_add(1, Ordering::SeqCst);
            }
            fault
        };
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (registry, log, rule) = (registry.to_owned(), seen.clone(), Arc::new(rule) as Rule);
        let number = Arc::new(Mutex::new(0));
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let Ok(client) = client else { return };
                let (registry, log, rule, number) = (registry.clone(), log.clone(), rule.clone(), number.clone());
                std::thread::spawn(move || drop(serve(client, &registry, &log, &rule, &number)));
            }
        });
        Proxy { host, seen, faults }
    }

    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    /// Bytes of blobs that clients sent.
    pub(crate) fn blob_bytes(&self) -> usize {
        self.seen().iter().filter(|seen| seen.line.contains("/blobs/uploads/")).map(|seen| seen.body_bytes).sum()
    }

    pub(crate) fn count(&self, method: &str, part: &str) -> usize {
        self.seen().iter().filter(|seen| seen.line.starts_with(method) && seen.line.contains(part)).count()
    }

    /// Requests that something happened to.
    pub(crate) fn faults(&self) -> usize {
        self.faults.load(Ordering::SeqCst)
    }

    pub(crate) fn forget(&self) {
        self.seen.lock().unwrap().clear();
    }
}

fn serve(
    client: TcpStream,
    registry: &str,
    log: &Mutex<Vec<Seen>>,
    rule: &Rule,
    number: &Mutex<usize>,
) -> std::io::Result<()> {
    let mut client_reader = BufReader::new(client.try_clone()?);
    let mut client = client;
    let mut line = String::new();
    if client_reader.read_line(&mut line)? == 0 {
        return Ok(());
    }
    let mut headers = BTreeMap::new();
    for header in client_reader.by_ref().lines() {
        let header = header?;
        let Some((name, value)) = header.split_once(':') else { break };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    let at = {
        let mut number = number.lock().unwrap();
        *number += 1;
        *number - 1
    };
    let line = line.trim().to_owned();
    let length: usize = headers.get("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    let fault = rule(at, &line, &headers);
    let mut seen = Seen { line: line.clone(), headers: headers.clone(), body_bytes: 0, status: 0 };
    if let Fault::Drop = fault {
        log.lock().unwrap().push(seen);
        return Ok(());
    }
    if let Fault::Hang = fault {
        log.lock().unwrap().push(seen);
        // Not even the end of the connection is seen, as with a host that has vanished.
        std::thread::sleep(std::time::Duration::from_secs(120));
        return Ok(());
    }
    if let Fault::Answer(status, extra) = &fault {
        let mut body = vec![0; length];
        client_reader.read_exact(&mut body)?;
        seen.status = status.split(' ').next().unwrap().parse().unwrap();
        log.lock().unwrap().push(seen);
        let (head, body) = extra.split_once("\r\n\r\n").unwrap_or((extra, ""));
        let head = if head.is_empty() { String::new() } else { format!("{}\r\n", head.trim_end()) };
        return write!(
            client,
            "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\n{head}\r\n{body}",
            body.len()
        );
    }
    let mut upstream = TcpStream::connect(registry)?;
    let mut head = format!("{line}\r\n");
    for (name, value) in headers.iter().filter(|(name, _)| !matches!(name.as_str(), "connection" | "authorization")) {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    // A registry with passwords of its own gets what the client sent.
    if let Some(value) =
        headers.get("authorization").filter(|value| value.starts_with("Basic") || value.starts_with("AWS4-"))
    {
        head.push_str(&format!("authorization: {value}\r\n"));
    }
    head.push_str("connection: close\r\n\r\n");
    upstream.write_all(head.as_bytes())?;
    let limit = if let Fault::CutBody(limit) = fault { limit.min(length) } else { length };
    let mut buffer = vec![0; 64 << 10];
    while seen.body_bytes < limit {
        let want = buffer.len().min(limit - seen.body_bytes);
        let count = client_reader.read(&mut buffer[..want])?;
        if count == 0 {
            break;
        }
        seen.body_bytes += count;
        upstream.write_all(&buffer[..count])?;
    }
    if let Fault::CutBody(_) = fault {
        log.lock().unwrap().push(seen);
        let _ = upstream.shutdown(std::net::Shutdown::Write);
        // The registry notices and keeps what it has before the client asks for it.
        let _ = upstream.set_read_timeout(Some(std::time::Duration::from_millis(300)));
        let _ = upstream.read(&mut buffer);
        return Ok(());
    }
    let mut answer = Vec::new();
    let _ = upstream.read_to_end(&mut answer);
    seen.status = std::str::from_utf8(answer.get(9..12).unwrap_or_default()).unwrap_or("0").parse().unwrap_or(0);
    log.lock().unwrap().push(seen);
    match fault {
        Fault::LoseAnswer => Ok(()),
        Fault::Corrupt => {
            if let Some(last) = answer.last_mut() {
                *last ^= 0xff;
            }
            client.write_all(&answer)
        }
        Fault::Slow(size) => answer.chunks(size).try_for_each(|piece| {
            std::thread::sleep(std::time::Duration::from_millis(10));
            client.write_all(piece)
        }),
        Fault::Trickle(limit) => {
            let (at_once, rest) = answer.split_at(limit.min(answer.len()));
            client.write_all(at_once)?;
            rest.chunks(1).try_for_each(|byte| {
                std::thread::sleep(std::time::Duration::from_millis(20));
                client.write_all(byte)
            })
        }
        Fault::CutAnswer(limit) => client.write_all(&answer[..limit.min(answer.len())]),
        Fault::Header(name, value) => {
            let end = answer.windows(4).position(|window| window == b"\r\n\r\n").unwrap_or(answer.len());
            let head = String::from_utf8_lossy(&answer[..end]).into_owned();
            let kept = head.lines().filter(|line| !line.to_ascii_lowercase().starts_with(name));
            let mut changed = kept.map(|line| format!("{line}\r\n")).collect::<String>();
            changed.push_str(&format!("{name}: {value}\r\n"));
            client.write_all(changed.as_bytes())?;
            client.write_all(&answer[(end + 2).min(answer.len())..])
        }
        _ => client.write_all(&answer),
    }
}
