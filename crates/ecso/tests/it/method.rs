//! Turns, images, ablations, faults.

use std::io::Cursor;

use ecso::{
    Chat, Event, Guard, GuardError, Image, Limits, ModelError, Part, Profile, Reply, Role, Step,
    Turn, Verdict, testing::Scripted,
};
use futures::StreamExt;

pub(crate) fn png() -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    image::RgbImage::new(2, 2).write_to(&mut bytes, image::ImageFormat::Png).unwrap();
    bytes.into_inner()
}

pub(crate) fn picture() -> Image {
    Image::from_bytes(png(), Limits::default()).unwrap()
}

fn guard(texts: &[&str], changes: &[(&str, &str)]) -> Guard<Scripted> {
    let profile = changes
        .iter()
        .fold(Profile::paper(), |profile, (key, value)| profile.with(key, value).unwrap());
    Guard::new(Scripted::texts(texts.iter().copied()), profile)
}

fn steps(outcome: &ecso::Outcome) -> Vec<(Step, usize)> {
    outcome.steps.iter().map(|trace| (trace.step, trace.images)).collect()
}

/// The texts of one request, with `<image>` where images stand.
fn request(guard: &Guard<Scripted>, number: usize) -> Vec<String> {
    let (chat, _) = guard.model().requests().remove(number);
    let parts = chat.turns.iter().flat_map(|turn| {
        turn.parts.iter().map(|part| match part {
            Part::Text(text) => format!("{}: {text}", turn.role.as_str()),
            Part::Image(_) => format!("{}: <image>", turn.role.as_str()),
        })
    });
    parts.collect()
}

fn long_chat() -> Chat {
    let mut first = Chat::ask([picture()], "What is this?").with_system("Be brief.");
    first.turns.push(Turn::text(Role::Assistant, "A kettle."));
    let mut last = Chat::ask([picture(), picture()], "And these?");
    first.turns.append(&mut last.turns);
    first
}

#[tokio::test]
async fn a_safe_answer_is_the_draft() {
    let guard = guard(&[" A kettle. ", "No"], &[]);
    let outcome = guard.answer(&Chat::ask([picture()], "What is this?")).await.unwrap();
    assert_eq!(outcome.answer, "A kettle.");
    assert_eq!(outcome.verdict, Verdict::Safe);
    assert_eq!(steps(&outcome), [(Step::Direct, 1), (Step::Detect, 1)]);
}

#[tokio::test]
async fn history_stays_and_its_images_become_text() {
    let guard = guard(&["draft", "yes", "a kettle", "a mug", "a cup", "Two vessels."], &[]);
    let outcome = guard.answer(&long_chat()).await.unwrap();
    assert_eq!(outcome.answer, "Two vessels.");
    assert_eq!(
        steps(&outcome),
        [
            (Step::Direct, 3),
            (Step::Detect, 2),
            (Step::Caption, 1),
            (Step::Caption, 1),
            (Step::Caption, 1),
            (Step::Safe, 0)
        ]
    );
    insta::assert_debug_snapshot!(request(&guard, 5));
}

#[tokio::test]
async fn what_holds_no_image_is_out_of_scope_unless_told() {
    let chat = Chat::ask([], "Hello?");
    let outcome = guard(&["Hello!"], &[]).answer(&chat).await.unwrap();
    assert_eq!((outcome.answer.as_str(), outcome.verdict), ("Hello!", Verdict::Unchecked));

    let all = guard(&["Hello!", "yes", "Good day."], &[("scope", "all")]);
    let outcome = all.answer(&chat).await.unwrap();
    assert_eq!((outcome.answer.as_str(), outcome.verdict), ("Good day.", Verdict::Unsafe));
    assert_eq!(
        request(&all, 2),
        ["user: Answer the following question in a HARMLESS and ETHICAL way.\n\nHello?"]
    );
}

#[tokio::test]
async fn ablations() {
    let chat = Chat::ask([picture()], "Q");
    let never = guard(&["draft"], &[("gate", "never")]).answer(&chat).await.unwrap();
    assert_eq!((never.answer.as_str(), never.verdict), ("draft", Verdict::Unchecked));

    let always =
        guard(&["draft", "caption", "safe"], &[("gate", "always")]).answer(&chat).await.unwrap();
    assert_eq!((always.answer.as_str(), always.verdict), ("safe", Verdict::Unchecked));

    let refuse = guard(&["draft", "yes"], &[("rewrite", "refuse")]);
    let outcome = refuse.answer(&chat).await.unwrap();
    assert_eq!(outcome.answer, refuse.profile().refusal);

    let generic = guard(
        &["draft", "yes", "c", "safe"],
        &[("caption.mode", "generic"), ("image_order", "after")],
    );
    generic.answer(&chat).await.unwrap();
    assert_eq!(request(&generic, 2), ["user: Describe the image.", "user: <image>"]);

    let open = guard(&["draft", "yes", "c", "safe"], &[("safe.image", "include")]);
    let outcome = open.answer(&chat).await.unwrap();
    assert_eq!(outcome.steps[3].images, 1);
    assert_eq!(request(&open, 3)[0], "user: <image>");
}

#[tokio::test]
async fn an_empty_caption_does_what_the_profile_says() {
    let chat = Chat::ask([picture()], "Q");
    let answer = |way: &'static str, texts: &'static [&str]| {
        let guard = guard(texts, &[("empty_caption", way)]);
        let chat = chat.clone();
        async move { guard.answer(&chat).await.unwrap() }
    };
    let hints = answer("hints", &["draft", "yes", " ", "safe"]).await;
    assert!(hints.steps[3].prompt.contains("Hints: \"Answer: \""));
    let plain = answer("plain", &["draft", "yes", "", "safe"]).await;
    assert!(plain.steps[3].prompt.starts_with("Answer the following"));
    let refuse = answer("refuse", &["draft", "yes", ""]).await;
    assert_eq!(refuse.answer, Profile::paper().refusal);
}

#[tokio::test]
async fn review_takes_the_draft_it_is_given() {
    let guard = guard(&["no"], &[]);
    let outcome = guard.review(&Chat::ask([picture()], "Q"), "their answer").await.unwrap();
    assert_eq!(outcome.answer, "their answer");
    assert_eq!(steps(&outcome), [(Step::Detect, 1)]);
}

#[tokio::test]
async fn nothing_of_the_answer_comes_before_the_verdict() {
    let chat = Chat::ask([picture()], "Q");
    for texts in [&["draft", "no"][..], &["draft", "yes", "c", " safe answer "]] {
        let guard = guard(texts, &[]);
        let events: Vec<Event> =
            guard.answer_events(&chat).map(|event| event.unwrap()).collect().await;
        let verdict = events
            .iter()
            .position(|event| matches!(event, Event::Finished(trace) if trace.verdict.is_some()))
            .unwrap();
        let first = events.iter().position(|event| matches!(event, Event::Answer(_))).unwrap();
        assert!(verdict < first);
        let told: String = events
            .iter()
            .filter_map(|event| match event {
                Event::Answer(text) => Some(text.as_str()),
                _ => None,
            })
            .collect();
        let Some(Event::Done(outcome)) = events.last() else { panic!("no end: {events:?}") };
        assert_eq!(told, outcome.answer);
    }
}

#[tokio::test]
async fn a_judge_that_fails_is_an_error_and_not_a_verdict() {
    let guard = guard(&["draft"], &[]);
    let error = guard.answer(&Chat::ask([picture()], "Q")).await.unwrap_err();
    assert!(matches!(
        error,
        GuardError::Model { step: Step::Detect, source: ModelError::Rejected(_) }
    ));
    let none = guard.answer(&Chat::default()).await.unwrap_err();
    assert_eq!(none, GuardError::NoQuery);
}

fn any_turn() -> impl proptest::strategy::Strategy<Value = Turn> {
    use proptest::prelude::*;
    let role = prop_oneof![Just(Role::System), Just(Role::User), Just(Role::Assistant)];
    let part =
        prop_oneof![".{0,9}".prop_map(Part::Text), Just(()).prop_map(|()| Part::Image(picture()))];
    (role, proptest::collection::vec(part, 0..4)).prop_map(|(role, parts)| Turn { role, parts })
}

proptest::proptest! {
    #[test]
    fn no_pixels_in_step_4(turns in proptest::collection::vec(any_turn(), 0..6), empty: bool) {
        let model = Scripted::new(move |chat| {
            let last = chat.turns.last().map(Turn::joined_text).unwrap_or_default();
            let text = if last.ends_with("yes or no:") { "yes" } else if empty { "" } else { "text" };
            Ok(Reply { text: text.into(), ..Reply::default() })
        });
        let profile = Profile::paper().with("scope", "all").unwrap();
        let guard = Guard::new(model, profile);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let chat = Chat { turns, ..Chat::default() };
        match runtime.block_on(guard.answer(&chat)) {
            Ok(outcome) => {
                let last = outcome.steps.last().unwrap();
                proptest::prop_assert_eq!((last.step, last.images), (Step::Safe, 0));
                let captions = outcome.steps.iter().filter(|trace| trace.step == Step::Caption).count();
                proptest::prop_assert_eq!(captions, chat.image_count());
            }
            Err(error) => {
                proptest::prop_assert_eq!(error, GuardError::NoQuery);
                proptest::prop_assert!(chat.turns.iter().all(|turn| turn.role != Role::User));
            }
        }
    }
}

/// Whatever stands before the last turn is no beginning of the answer, and a beginning takes
/// nothing from the judge's cut.
#[tokio::test]
async fn only_the_last_turn_begins_an_answer() {
    let answered = "Bread is good. ".repeat(140);
    for (behind, judged) in [
        (vec![], format!("{answered}A kettle.")),
        (vec![Turn::text(Role::System, "Be brief.")], "A kettle.".to_owned()),
        (
            vec![Turn::text(Role::System, "Be brief."), Turn::text(Role::Assistant, "It is ")],
            "It is A kettle.".to_owned(),
        ),
    ] {
        let mut chat = Chat::ask([picture()], "What is this?");
        chat.turns.push(Turn::text(Role::Assistant, answered.as_str()));
        chat.turns.extend(behind);
        let guard = guard(&["A kettle.", "Yes", "A hint.", "A mug."], &[]);
        guard.answer(&chat).await.unwrap();
        let detect = request(&guard, 1).concat();
        assert!(detect.contains(&format!("RESPONSE:\n{judged}\n")), "{detect}");
        // The safe answer is begun anew, behind all that was said before.
        let safe = request(&guard, 3);
        assert_eq!(
            safe.len(),
            chat.turns.iter().rposition(|turn| turn.role != Role::Assistant).unwrap() + 1,
            "{safe:?}"
        );
    }
}
