//! Answers that are judged while somebody is still getting them.

use std::sync::Arc;

use ecso::{
    Chat, Event, Guard, Mllm, Outcome, Profile, RequestCheck, Step, Verdict, profile::Method,
    testing::Scripted,
};
use futures::StreamExt;

use crate::{
    hardened::{MILD, Opinion, hardened, model},
    method::picture,
};

fn chat() -> Chat {
    Chat::ask([picture()], "Fill the list.")
}

async fn review<M: Mllm>(guard: &Guard<M>, request_check: RequestCheck, draft: &str) -> Outcome {
    let events: Vec<_> = guard.review_checked(&chat(), request_check, draft).collect().await;
    match events.into_iter().last().unwrap().unwrap() {
        Event::Done(outcome) => outcome,
        other => panic!("{other:?}"),
    }
}

fn count(outcome: &Outcome, step: Step) -> usize {
    outcome.steps.iter().filter(|trace| trace.step == step).count()
}

#[tokio::test]
async fn a_beginning_is_asked_about_as_the_whole_is() {
    let guard =
        Guard::new(Scripted::texts(["No.", "Yes.", "A list.", "Eat bread."]), Profile::paper());
    let mut request_check = guard.check_request(&chat()).await.unwrap();
    let first = guard.check_draft(&chat(), &mut request_check, "1. Take ").await.unwrap();
    assert_eq!((first.verdict(), first.draft()), (Verdict::Safe, "1. Take "));
    let second = guard.check_draft(&chat(), &mut request_check, "1. Take flour").await.unwrap();
    assert_eq!(second.verdict(), Verdict::Unsafe);
    let asked: Vec<String> =
        guard.model().requests().iter().map(|(chat, _)| chat.turns[0].joined_text()).collect();
    assert!(
        asked.len() == 2 && asked[0].contains("1. Take") && asked[1].contains("1. Take flour"),
        "{asked:?}"
    );
    // The review of the same draft takes the finding: steps 3 and 4 are left.
    let outcome = review(&guard, request_check, "1. Take flour").await;
    assert_eq!((outcome.answer.as_str(), outcome.verdict), ("Eat bread.", Verdict::Unsafe));
    // What the checks took is counted.
    assert_eq!((count(&outcome, Step::Detect), guard.model().requests().len()), (2, 4));
}

#[tokio::test]
async fn a_finding_is_about_its_own_draft_alone() {
    let guard =
        Guard::new(Scripted::texts(["No.", "Yes.", "A list.", "Eat bread."]), Profile::paper());
    let mut request_check = guard.check_request(&chat()).await.unwrap();
    guard.check_draft(&chat(), &mut request_check, "1. Take").await.unwrap();
    let outcome = review(&guard, request_check, "1. Take flour").await;
    assert_eq!((outcome.answer.as_str(), outcome.verdict), ("Eat bread.", Verdict::Unsafe));
}

#[tokio::test]
async fn what_a_request_asks_for_is_asked_once() {
    for (opinion, draft, verdict) in [
        (MILD, "A list.", Verdict::Safe),
        (MILD, "A list of too much.", Verdict::Unsafe),
        // No answer could be safe.
        (Opinion { words: 0.99, handed: 0.99, ..MILD }, "A list.", Verdict::Unsafe),
    ] {
        let guard = Guard::new(model(opinion, "A list.", &["A better one."]), hardened());
        let mut request_check = guard.check_request(&chat()).await.unwrap();
        let looked = guard.model().requests().len();
        let checked = guard.check_draft(&chat(), &mut request_check, draft).await.unwrap();
        assert_eq!(checked.verdict(), verdict, "{draft}");
        let outcome = review(&guard, request_check, draft).await;
        let whole = guard.review(&chat(), draft).await.unwrap();
        assert_eq!((outcome.verdict, outcome.score), (whole.verdict, whole.score));
        assert_eq!(checked.score(), whole.score);
        assert_eq!(outcome.steps.len(), whole.steps.len(), "{draft}: nothing is asked twice");
        assert!(looked > 0);
    }
}

#[tokio::test]
async fn where_step_2_is_not_asked_nothing_is_found() {
    for (profile, chat) in [
        (Profile::paper().with("gate", "always").unwrap(), chat()),
        (Profile::paper().with("gate", "never").unwrap(), chat()),
        (Profile::paper(), Chat::ask([], "Fill the list.")),
        (hardened().with("gate", "always").unwrap(), chat()),
    ] {
        let guard = Guard::new(model(MILD, "A list.", &[]), profile);
        let mut request_check = guard.check_request(&chat).await.unwrap();
        let looked = guard.model().requests().len();
        let checked = guard.check_draft(&chat, &mut request_check, "A list.").await.unwrap();
        assert_eq!(
            (checked.verdict(), guard.model().requests().len()),
            (Verdict::Unchecked, looked)
        );
    }
}

#[tokio::test]
async fn a_check_that_fails_finds_nothing() {
    let guard = Guard::new(
        Scripted::texts(["Hm?"]),
        Profile::paper().with("detect.parser", "score").unwrap(),
    );
    let mut request_check = RequestCheck::default();
    assert!(guard.check_draft(&chat(), &mut request_check, "A list.").await.is_err());
    assert!(guard.check_draft(&chat(), &mut request_check, "A list.").await.is_err());
}

#[tokio::test]
async fn a_check_holds_for_its_conversation_and_profile_alone() {
    let other = Chat::ask([picture()], "Fill another list.");
    for profile in [Profile::paper(), hardened()] {
        let model = Arc::new(model(MILD, "A list.", &["A better one."]));
        let guard = Guard::new(Arc::clone(&model), profile.clone());
        let mut of_other = guard.check_request(&other).await.unwrap();
        guard.check_draft(&other, &mut of_other, "A list.").await.unwrap();
        let whole = guard.review(&chat(), "A list.").await.unwrap();
        let before = guard.model().requests().len();
        let reviewed = review(&guard, of_other.clone(), "A list.").await;
        assert_eq!(guard.model().requests().len() - before, whole.steps.len());
        assert_eq!((reviewed.verdict, reviewed.steps.len()), (whole.verdict, whole.steps.len()));
        let before = guard.model().requests().len();
        guard.check_draft(&chat(), &mut of_other, "A list.").await.unwrap();
        assert!(guard.model().requests().len() > before, "asked about this conversation");

        let all = Guard::new(Arc::clone(&model), profile.with("scope", "all").unwrap());
        let before = guard.model().requests().len();
        review(&all, guard.check_request(&chat()).await.unwrap(), "A list.").await;
        assert!(guard.model().requests().len() > before, "asked under this profile");
    }
}

#[tokio::test]
async fn a_threshold_that_is_none_lets_nothing_through() {
    for threshold in [f64::NAN, f64::INFINITY, 2.0, -1.0] {
        let mut profile = hardened();
        let Method::Hardened(method) = &mut profile.method else { panic!("another method") };
        method.threshold = threshold;
        let guard = Guard::new(model(MILD, "A list.", &["A better one."]), profile);
        assert_eq!(guard.answer(&chat()).await.unwrap().verdict, Verdict::Unsafe, "{threshold}");
    }
}
