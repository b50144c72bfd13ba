//! A web server on loopback: `/NAME/FILE` is `DIR/NAME/http/FILE`, dated 2021-01-01 unless the name says `nodate`.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};

const DATE: &str = "Fri, 01 Jan 2021 00:00:00 GMT";

/// Serves until the process ends; returns the address without a slash at its end.
pub(crate) fn serve(dir: PathBuf) -> std::io::Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = format!("http://{}", listener.local_addr()?);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let dir = dir.clone();
            // A client that goes away is none of the server's business.
            std::thread::spawn(move || drop(answer(stream, &dir)));
        }
    });
    Ok(address)
}

fn answer(mut stream: TcpStream, dir: &Path) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let request = lines.next().transpose()?.unwrap_or_default();
    let mut headers = Vec::new();
    for line in lines {
        match line? {
            line if line.is_empty() => break,
            line => headers.push(line),
        }
    }
    let mut words = request.split(' ');
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let path = target.trim_start_matches('/').split('?').next().unwrap_or_default();
    let file = path
        .split_once('/')
        .filter(|_| !path.contains(".."))
        .map(|(name, file)| dir.join(name).join("http").join(file));
    let unchanged =
        headers.iter().any(|line| line.to_lowercase().starts_with("if-modified-since:") && line.contains(DATE));
    let dated = !path.contains("nodate");
    let (status, body) = match file.map(std::fs::read) {
        Some(Ok(_)) if dated && unchanged => ("304 Not Modified", Vec::new()),
        Some(Ok(body)) => ("200 OK", body),
        _ => ("404 Not Found", Vec::new()),
    };
    let modified = if dated { format!("Last-Modified: {DATE}\r\n") } else { String::new() };
    let length = body.len();
    write!(stream, "HTTP/1.1 {status}\r\n{modified}Content-Length: {length}\r\nConnection: close\r\n\r\n")?;
    if method != "HEAD" {
        stream.write_all(&body)?;
    }
    stream.flush()
}
