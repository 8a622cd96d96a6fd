//! The page at `/`: files in the binary, and headers that keep everything else out of it.

use crate::error::ApiError;
use axum::extract::Path;
use axum::extract::rejection::PathRejection;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};

/// Nothing but this server's own files and routes.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

const INDEX: &str = include_str!("../page/index.html");

/// A table of files and their contents.
macro_rules! files {
    ($($name:literal),* $(,)?) => {
        /// The other files by their names.
        const FILES: &[(&str, &str)] = &[$(($name, include_str!(concat!("../page/", $name)))),*];
    };
}

files![
    "answer.js",
    "api.js",
    "app.js",
    "cache.css",
    "chart.js",
    "dom.js",
    "folds.js",
    "format.js",
    "heatmap.js",
    "panel.js",
    "style.css",
    "traceview.js",
    "turn.js"
];

pub(crate) async fn index() -> Response {
    file_response("index.html", INDEX)
}

pub(crate) async fn file(name: Result<Path<String>, PathRejection>) -> Result<Response, ApiError> {
    let name = name.map_or_else(|_| String::new(), |Path(name)| name);
    let (name, text) = FILES
        .iter()
        .find(|(file, _)| *file == name)
        .ok_or_else(|| ApiError::new(StatusCode::NOT_FOUND, "the page has no such file"))?;
    Ok(file_response(name, text))
}

fn file_response(name: &str, text: &'static str) -> Response {
    let kind = match name.rsplit_once('.') {
        Some((_, "html")) => "text/html; charset=utf-8",
        Some((_, "css")) => "text/css; charset=utf-8",
        _ => "text/javascript; charset=utf-8",
    };
    let headers = [
        (header::CONTENT_TYPE, kind),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "same-origin"),
        // A new version of the server comes with a new page.
        (header::CACHE_CONTROL, "no-cache"),
    ];
    (headers, text).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_of_the_page_is_served_and_named_once() {
        let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/page");
        let mut there: Vec<String> = std::fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name != "index.html")
            .collect();
        there.sort();
        let mut served: Vec<&str> = FILES.iter().map(|(name, _)| *name).collect();
        served.sort_unstable();
        assert_eq!(there, served);
    }
}
