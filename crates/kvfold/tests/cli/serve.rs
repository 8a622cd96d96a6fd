//! The server as a process: its address, its key, its limits, its end.

use crate::common::Dir;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

/// A server that runs, killed when the test ends.
struct Server {
    child: Child,
    address: String,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    fn start(dir: &Dir, args: &[&str]) -> Self {
        let args = [&["serve", "stories260k", "--port", "0", "--kv-memory", "8MiB"], args].concat();
        let mut child = dir.command(&args).stderr(Stdio::piped()).spawn().expect("the command starts");
        let mut lines = BufReader::new(child.stderr.take().expect("a pipe")).lines();
        let said = lines.by_ref().map(|line| line.expect("UTF-8")).find(|line| line.starts_with("listening on "));
        let address = said.expect("an address").trim_start_matches("listening on http://").to_owned();
        // What it says later is read, so that it can go on saying it.
        std::thread::spawn(move || lines.for_each(drop));
        Self { child, address }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.address).expect("a connection");
        stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a timeout");
        stream
    }

    /// Status line, headers and body of an answer to these bytes; empty if there is none.
    fn send(&self, request: impl AsRef<[u8]>) -> String {
        let mut stream = self.connect();
        stream.write_all(request.as_ref()).expect("sent");
        let mut answer = Vec::new();
        // A server that hangs up in the middle of what it does not read is within its rights.
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    }

    fn get(&self, path: &str, headers: &str) -> String {
        self.send(format!("GET {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n{headers}\r\n", self.address))
    }

    fn post(&self, path: &str, body: &str) -> String {
        let length = body.len();
        let head = format!("POST {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n", self.address);
        self.send(format!("{head}Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"))
    }

    fn signal(&self, name: &str) {
        let status =
            std::process::Command::new("kill").args([&format!("-{name}"), &self.child.id().to_string()]).status();
        assert!(status.expect("kill runs").success());
    }

    /// The exit code, once it has ended.
    fn code(&mut self) -> Option<i32> {
        self.until("it ends", |server| server.child.try_wait().expect("a child")).code()
    }

    /// Waits for what `done` finds.
    fn until<T>(&mut self, what: &str, done: impl Fn(&mut Self) -> Option<T>) -> T {
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(60) {
            if let Some(found) = done(self) {
                return found;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("a minute has passed and it is not true that {what}");
    }
}

#[test]
fn it_serves_until_it_is_told_to_stop_and_lets_what_runs_end() {
    let dir = Dir::new();
    let mut server = Server::start(&dir, &[]);
    assert!(server.get("/health", "").starts_with("HTTP/1.1 200"));
    let answer = server.post("/v1/completions", r#"{"prompt": "Once upon a time", "temperature": 0, "max_tokens": 8}"#);
    assert!(answer.contains("\"text_completion\"") && answer.contains("x-request-id"), "{answer}");
    // A stream that is under way goes on to its end; a connection that came after it is not taken.
    let body = r#"{"prompt": "Once", "max_tokens": 200, "ignore_eos": true, "stream": true}"#;
    let mut stream = server.connect();
    let head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length:";
    write!(stream, "{head} {}\r\n\r\n{body}", body.len()).expect("sent");
    let mut first = [0; 15];
    stream.read_exact(&mut first).expect("an answer begins");
    server.signal("TERM");
    let mut rest = String::new();
    stream.read_to_string(&mut rest).expect("the answer ends");
    assert!(rest.contains("data: [DONE]"), "{rest}");
    assert_eq!(server.code(), Some(0));
    assert!(TcpStream::connect(&server.address).is_err());
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let dir = Dir::new();
    let mut server = Server::start(&dir, &[]);
    // A request whose body never comes. That the server says to go on with it is the sign that it waits for the body:
    // a connection on which nothing has begun would end at the first signal.
    let mut stream = server.connect();
    let head =
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9";
    write!(stream, "{head}\r\nExpect: 100-continue\r\n\r\n").expect("sent");
    let mut go_on = [0; 21];
    stream.read_exact(&mut go_on).expect("an answer begins");
    assert_eq!(&go_on, b"HTTP/1.1 100 Continue");
    server.signal("INT");
    // Once it listens no more it has heard the first signal, so that the next one is the second.
    server.until("it listens no more", |server| TcpStream::connect(&server.address).is_err().then_some(()));
    server.signal("INT");
    assert_eq!(server.code(), Some(130));
}

#[test]
fn a_key_is_asked_for_everywhere_but_at_health() {
    let dir = Dir::new();
    dir.write("key", "correct-horse-battery\n");
    let server = Server::start(&dir, &["--api-key-file", "key"]);
    for path in ["/", "/v1/models", "/metrics", "/ready", "/version", "/openapi.json", "/page/app.js", "/nowhere"] {
        let answer = server.get(path, "");
        assert!(answer.starts_with("HTTP/1.1 401") && answer.contains("www-authenticate: Basic"), "{path}: {answer}");
        let with = server.get(path, "Authorization: Bearer correct-horse-battery\r\n");
        assert!(!with.starts_with("HTTP/1.1 401"), "{path}: {with}");
    }
    assert!(server.get("/health", "").starts_with("HTTP/1.1 200"));
}

#[test]
fn other_sites_and_nonsense_are_refused_and_the_server_lives() {
    let dir = Dir::new();
    let server = Server::start(&dir, &[]);
    assert!(server.get("/v1/models", "Origin: http://evil.example\r\n").starts_with("HTTP/1.1 403"));
    assert!(
        server.send("GET / HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n").starts_with("HTTP/1.1 403")
    );
    for nonsense in [
        &b"\x16\x03\x01 TLS to a plain port"[..],
        b"GET",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
        b"\0\0\0\0\r\n\r\n",
    ] {
        let mut stream = server.connect();
        stream.write_all(nonsense).expect("sent");
    }
    let flood = format!("GET / HTTP/1.1\r\nHost: localhost\r\n{}\r\n", "X-A: b\r\n".repeat(1000));
    assert!(!server.send(flood).starts_with("HTTP/1.1 200"));
    let huge = format!(
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        1u64 << 40
    );
    assert!(server.send(huge).starts_with("HTTP/1.1 413"));
    assert!(server.get("/ready", "").starts_with("HTTP/1.1 200"));
}

#[test]
fn what_cannot_be_served_is_said_before_anything_listens() {
    let dir = Dir::new();
    let serve = |args: &[&str]| dir.run(&[&["serve"], args].concat());
    serve(&["stories260k", "--host", "0.0.0.0"]).fails(3, &["--host 0.0.0.0", "no key", "--api-key-file"]);
    serve(&["stories260k", "--api-key-file", "none"]).fails(3, &["none", "cannot read"]);
    dir.write("short", "short\n");
    serve(&["stories260k", "--api-key-file", "short"]).fails(3, &["short", "8 characters"]);
    serve(&["stories260k", "--kv-memory", "1000"]).fails(3, &["--kv-memory", "too few"]);
    serve(&["nothing"]).fails(3, &["nothing"]);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("an address").port().to_string();
    serve(&["stories260k", "--port", &port]).fails(1, &[&port, "--port"]);
}
