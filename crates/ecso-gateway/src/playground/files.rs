//! The files of the page, which are part of the program.

use axum::{
    http::{HeaderValue, header},
    response::{IntoResponse, Response},
};

/// A file and its content type.
#[derive(Clone, Copy)]
pub(super) struct File {
    kind: &'static str,
    content: &'static [u8],
}

impl File {
    const fn html(text: &'static str) -> Self {
        Self { kind: "text/html; charset=utf-8", content: text.as_bytes() }
    }

    const fn script(text: &'static str) -> Self {
        Self { kind: "text/javascript; charset=utf-8", content: text.as_bytes() }
    }
}

impl IntoResponse for File {
    fn into_response(self) -> Response {
        ([(header::CONTENT_TYPE, HeaderValue::from_static(self.kind))], self.content)
            .into_response()
    }
}

/// The page itself.
pub(super) const PAGE: File = File::html(include_str!("page.html"));

/// For a browser with a link: a form that opens the playground with it.
pub(super) const ENTER: File = File::html(include_str!("enter.html"));

/// Submits that form.
pub(super) const ENTER_SCRIPT: File = File::script(include_str!("enter.js"));

/// For a browser that was let in.
pub(super) const OPENED: File = File::html(
    "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><meta http-equiv=\"refresh\" \
     content=\"0; url=/\"><title>ecso</title><p><a href=\"/\">Continue</a></p></html>",
);

/// For a browser without a session.
pub(super) const CLOSED: File = File::html(include_str!("closed.html"));

const FILES: &[(&str, File)] = &[
    ("page.css", File { kind: "text/css; charset=utf-8", content: include_bytes!("page.css") }),
    // By Rachel Michetti, CC0.
    ("photograph.jpg", File { kind: "image/jpeg", content: include_bytes!("photograph.jpg") }),
    ("page.js", File::script(include_str!("page.js"))),
    ("arm.js", File::script(include_str!("arm.js"))),
    ("curve.js", File::script(include_str!("curve.js"))),
    ("dom.js", File::script(include_str!("dom.js"))),
    ("editor.js", File::script(include_str!("editor.js"))),
    ("events.js", File::script(include_str!("events.js"))),
    ("examples.js", File::script(include_str!("examples.js"))),
    ("pictures.js", File::script(include_str!("pictures.js"))),
    ("words.js", File::script(include_str!("words.js"))),
];

/// A file by its name.
pub(super) fn named(name: &str) -> Option<File> {
    FILES.iter().find(|(known, _)| *known == name).map(|(_, file)| *file)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use ecso::{Profile, profile::Method};

    #[test]
    fn both_languages_have_all_texts_and_a_name_for_each_question() {
        let (english, chinese) = include_str!("words.js").split_once("\n  zh: {").unwrap();
        let keys = |text: &'static str| -> BTreeSet<&str> {
            let line =
                |line: &'static str| Some(line.strip_prefix("    \"")?.split_once("\": ")?.0);
            text.lines().filter_map(line).collect()
        };
        let (english, chinese) = (keys(english), keys(chinese));
        let one_sided: Vec<_> = english.symmetric_difference(&chinese).collect();
        assert!(one_sided.is_empty(), "in one language only: {one_sided:?}");
        let Method::Hardened(hardened) = Profile::hardened().method else {
            panic!("another method")
        };
        // The question of `paper` has no name.
        for name in hardened.questions.keys().map(String::as_str).chain([""]) {
            assert!(english.contains(format!("q-{name}").as_str()), "no name for {name:?}");
        }
    }
}
