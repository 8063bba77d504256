//! What a client asks for, and what it is answered. There is one resource and one method; a connection
//! carries one request.

use std::fmt::Write as _;

use httparse::{EMPTY_HEADER, Error, Request, Status};

/// The head of a request has no more bytes.
pub(super) const HEAD_MAX: usize = 8 << 10;
/// It has no more header fields.
const FIELDS_MAX: usize = 64;

/// Where the figures are.
const PATH: &str = "/metrics";
/// What they are (the specification's "Content-Type").
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What a client gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    /// The figures.
    Figures,
    /// There is nothing else here.
    NotFound,
    /// They can only be read.
    NotAllowed,
    /// It is no HTTP/1 request.
    Bad,
    /// It is longer than a request for figures can be.
    TooLarge,
    /// The figures cannot be written down.
    Ours,
}

impl Answer {
    /// Decides on what has come by now; `None` while the head of the request is not all there.
    pub(super) fn to(head: &[u8]) -> Option<Answer> {
        let mut fields = [EMPTY_HEADER; FIELDS_MAX];
        let mut request = Request::new(&mut fields);
        match request.parse(head) {
            Ok(Status::Partial) if head.len() < HEAD_MAX => return None,
            Ok(Status::Partial) | Err(Error::TooManyHeaders) => return Some(Answer::TooLarge),
            Err(_) => return Some(Answer::Bad),
            Ok(Status::Complete(_)) => {}
        }
        let path = request.path.and_then(|target| target.split('?').next());
        Some(match (path, request.method) {
            (Some(PATH), Some("GET")) => Answer::Figures,
            (Some(PATH), _) => Answer::NotAllowed,
            _ => Answer::NotFound,
        })
    }

    /// Whether the client is to blame.
    pub(super) fn is_fault(self) -> bool {
        matches!(self, Answer::Bad | Answer::TooLarge)
    }

    /// The whole answer, `figures` being the text that is asked for.
    pub(super) fn encode(self, figures: &str) -> String {
        let (status, kind, body) = match self {
            Answer::Figures => ("200 OK", OPENMETRICS, figures),
            Answer::NotFound => ("404 Not Found", PLAIN, "the figures are at /metrics\n"),
            Answer::NotAllowed => ("405 Method Not Allowed", PLAIN, "figures can only be read\n"),
            Answer::Bad => ("400 Bad Request", PLAIN, "this is no HTTP/1 request\n"),
            Answer::TooLarge => {
                ("431 Request Header Fields Too Large", PLAIN, "the request is too large\n")
            }
            Answer::Ours => ("500 Internal Server Error", PLAIN, "the figures are not to be had\n"),
        };
        let allow = if self == Answer::NotAllowed { "Allow: GET\r\n" } else { "" };
        let mut answer = String::with_capacity(256 + body.len());
        // Writing to a string does not fail.
        let _ = write!(
            answer,
            "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n{allow}\
             Cache-Control: no-store\r\nConnection: close\r\n\r\n{body}",
            body.len()
        );
        answer
    }
}

const PLAIN: &str = "text/plain; charset=utf-8";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_one_resource_that_can_be_read() {
        for (request, answer) in [
            ("GET /metrics HTTP/1.1\r\nHost: a\r\nAccept: */*\r\n\r\n", Answer::Figures),
            ("GET /metrics HTTP/1.0\r\n\r\n", Answer::Figures),
            ("GET /metrics?name[]=x HTTP/1.1\r\n\r\n", Answer::Figures),
            ("GET / HTTP/1.1\r\n\r\n", Answer::NotFound),
            ("GET /metrics/ HTTP/1.1\r\n\r\n", Answer::NotFound),
            ("GET http://a/metrics HTTP/1.1\r\n\r\n", Answer::NotFound),
            ("DELETE /snapshots HTTP/1.1\r\n\r\n", Answer::NotFound),
            ("POST /metrics HTTP/1.1\r\nContent-Length: 9\r\n\r\n", Answer::NotAllowed),
            ("HEAD /metrics HTTP/1.1\r\n\r\n", Answer::NotAllowed),
            ("get /metrics HTTP/1.1\r\n\r\n", Answer::NotAllowed),
            ("PRI * HTTP/2.0\r\n\r\n", Answer::Bad),
            ("GET /metrics\r\n\r\n", Answer::Bad),
            ("\x16\x03\x01\x02", Answer::Bad),
            ("{\"method\":\"org.criu.ImageRelay.List\"}\0", Answer::Bad),
            ("GET /metrics HTTP/1.1\r\nno field\r\n\r\n", Answer::Bad),
        ] {
            assert_eq!(Answer::to(request.as_bytes()), Some(answer), "{request}");
        }
    }

    #[test]
    fn what_is_not_all_there_is_waited_for() {
        let request = b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n";
        for len in 0..request.len() {
            assert_eq!(Answer::to(&request[..len]), None, "{len}");
        }
        assert_eq!(Answer::to(request), Some(Answer::Figures));
    }

    #[test]
    fn a_head_is_bounded() {
        let mut long = b"GET /metrics HTTP/1.1\r\nA: ".to_vec();
        long.resize(HEAD_MAX - 1, b'a');
        assert_eq!(Answer::to(&long), None);
        long.push(b'a');
        assert_eq!(Answer::to(&long), Some(Answer::TooLarge));
        let many = format!("GET /metrics HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(FIELDS_MAX + 1));
        assert_eq!(Answer::to(many.as_bytes()), Some(Answer::TooLarge));
    }

    #[test]
    fn an_answer_says_its_length_and_that_it_is_the_last() {
        let answer = Answer::Figures.encode("# EOF\n");
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert_eq!(body, "# EOF\n");
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
        assert!(head.contains("\r\nContent-Length: 6\r\n"), "{head}");
        assert!(head.ends_with("\r\nConnection: close"), "{head}");
        assert!(Answer::NotAllowed.encode("").contains("\r\nAllow: GET\r\n"));
    }
}
