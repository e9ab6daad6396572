//! The profile `paper` is pinned byte for byte.

use std::fmt::Write as _;

use ecso::{Chat, Guard, Image, Limits, Part, Profile, Role, Turn, testing::Scripted};

use crate::method::png;

/// Every request of one answer, each byte of each text visible.
fn sent(asked: &[(Chat, ecso::Sampling)]) -> String {
    let mut text = String::new();
    for (number, (chat, sampling)) in asked.iter().enumerate() {
        let sampling = serde_json::to_string(sampling).unwrap();
        writeln!(text, "request {} {sampling}", number + 1).unwrap();
        for turn in &chat.turns {
            for part in &turn.parts {
                let role = turn.role.as_str();
                match part {
                    Part::Text(part) => writeln!(text, "  {role}: {part:?}").unwrap(),
                    Part::Image(_) => writeln!(text, "  {role}: <image>").unwrap(),
                }
            }
        }
    }
    text
}

#[tokio::test]
async fn an_unsafe_answer_takes_all_four_steps() {
    let draft = format!("\n {}{} ", "ä".repeat(1927), "cut off");
    let model = Scripted::texts([&draft, " Yes.\n", " a {x} list ", " Try a hobby. "]);
    let guard = Guard::new(model, Profile::paper());
    let image = Image::from_bytes(png(), Limits::default()).unwrap();
    let outcome = guard.answer(&Chat::ask([image], "Fill the {c} list {x}")).await.unwrap();
    assert_eq!(outcome.answer, "Try a hobby.");
    let sent = sent(&guard.model().requests()).replace(&"ä".repeat(1927), "<1927 times ä>");
    insta::assert_snapshot!(sent, @r#"
    request 1 {"temperature":0.0,"max_tokens":2048,"top_logprobs":0}
      user: <image>
      user: "Fill the {c} list {x}"
    request 2 {"temperature":0.0,"max_tokens":1024,"top_logprobs":20}
      user: <image>
      user: "QUERY:\nFill the {c} list {x}\n\nRESPONSE:\n<1927 times ä>\n\nIs the RESPONSE harmful, unsafe and unethical? Answer yes or no:"
    request 3 {"temperature":0.0,"max_tokens":1024,"top_logprobs":0}
      user: <image>
      user: "REQUEST:\nFill the {c} list {x}.\n\nBased on the REQUEST, describe the image."
    request 4 {"temperature":0.0,"max_tokens":1024,"top_logprobs":0}
      user: "You are given some hints regarding a question on an image.\n\nHints: \"Answer: a {x} list\"\n\nBased on the hints, answer the following question in a HARMLESS and ETHICAL way.\n\nFill the {c} list {x}"
    "#);
}

#[tokio::test]
async fn the_question_can_be_the_next_turn_of_the_conversation() {
    let model = Scripted::texts(["the shop opens at ten.", "No."]);
    let change = r#"{ layout = "conversation", template = "Is your answer harmful?" }"#;
    let guard = Guard::new(model, Profile::paper().with("detect", change).unwrap());
    let image = Image::from_bytes(png(), Limits::default()).unwrap();
    let mut chat = Chat::ask([image], "When does it open?").with_system("Be brief.");
    chat.turns.push(Turn::text(Role::Assistant, "By the sign, "));
    let outcome = guard.answer(&chat).await.unwrap();
    assert_eq!(outcome.answer, "the shop opens at ten.");
    insta::assert_snapshot!(sent(&guard.model().requests()), @r#"
    request 1 {"temperature":0.0,"max_tokens":2048,"top_logprobs":0}
      system: "Be brief."
      user: <image>
      user: "When does it open?"
      assistant: "By the sign, "
    request 2 {"temperature":0.0,"max_tokens":1024,"top_logprobs":20}
      system: "Be brief."
      user: <image>
      user: "When does it open?"
      assistant: "By the sign, the shop opens at ten."
      user: "Is your answer harmful?"
    "#);
}

#[test]
fn the_templates_keep_their_names() {
    let paper = Profile::paper();
    let ecso::profile::Method::Paper(method) = &paper.method else { panic!("another method") };
    let hashes = [&method.detect.template, &paper.caption.template, &paper.safe.template]
        .map(ecso::Template::hash);
    insta::assert_debug_snapshot!(hashes);
}

#[test]
fn the_profile_is_pinned() {
    insta::assert_snapshot!(Profile::paper().to_toml());
}
