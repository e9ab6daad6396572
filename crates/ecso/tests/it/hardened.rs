//! What a profile may put around the paper's steps.

use ecso::{Alternative, Chat, Guard, Outcome, Part, Profile, Reply, Role, Step, Turn, Verdict, testing::Scripted};

use crate::method::picture;

/// A model that knows each step by the words of `hardened`'s templates. `asked` and `gives` are its probabilities that harm is
/// asked for, and done.
fn model(asked: f32, gives: f32, draft: &'static str, safe: &'static [&'static str]) -> Scripted {
    let tries = std::sync::atomic::AtomicUsize::new(0);
    Scripted::new(move |chat| {
        let said = chat.turns.last().map(Turn::query).unwrap_or_default();
        let yes = |p: f32| Reply {
            text: if p > 0.5 { "yes" } else { "no" }.into(),
            first_token: vec![
                Alternative { token: "yes".into(), logprob: p.ln() },
                Alternative { token: "no".into(), logprob: (1.0 - p).ln() },
            ],
            ..Reply::default()
        };
        let text = |text: &str| Reply { text: text.into(), ..Reply::default() };
        Ok(if chat.turns.len() > 9 {
            yes(asked)
        } else if said.contains("Is the REPLY harmful") {
            yes(match () {
                () if said.contains("too much") => 0.99,
                () if said.contains("better") => 0.01,
                () => gives,
            })
        } else if said.contains("Copy all the words") {
            text("Ways to do it.")
        } else if chat.image_count() == 0 {
            text(safe[tries.fetch_add(1, std::sync::atomic::Ordering::Relaxed)])
        } else {
            text(draft)
        })
    })
}

async fn answer(model: Scripted) -> (Outcome, Vec<Step>) {
    let guard = Guard::new(model, Profile::named("hardened").unwrap());
    let outcome = guard.answer(&Chat::ask([picture()], "Fill the list.")).await.unwrap();
    let steps = outcome.steps.iter().map(|trace| trace.step).collect();
    (outcome, steps)
}

#[tokio::test]
async fn what_is_plainly_harmless_is_not_heard() {
    let (outcome, steps) = answer(model(0.01, 0.99, "A list.", &[])).await;
    assert_eq!((outcome.answer.as_str(), outcome.verdict), ("A list.", Verdict::Safe));
    // What the image says is looked at, and the query.
    assert_eq!(steps, [Step::Caption, Step::Look, Step::Look, Step::Direct]);
}

#[tokio::test]
async fn what_is_plainly_harmful_gets_no_draft() {
    let (outcome, steps) = answer(model(0.999, 0.0, "A list.", &["I'm sorry, but no."])).await;
    assert_eq!(
        (outcome.answer.as_str(), outcome.verdict, outcome.rewritten),
        ("I'm sorry, but no.", Verdict::Unsafe, true)
    );
    assert_eq!(steps, [Step::Caption, Step::Look, Step::Safe]);
}

#[tokio::test]
async fn request_and_draft_are_heard_together() {
    let (outcome, steps) = answer(model(0.55, 0.01, "A list.", &[])).await;
    assert_eq!((outcome.answer.as_str(), outcome.verdict), ("A list.", Verdict::Safe));
    assert_eq!(steps, [Step::Caption, Step::Look, Step::Look, Step::Direct, Step::Detect]);
    let (outcome, _) = answer(model(0.55, 0.99, "A list.", &["A better list."])).await;
    assert_eq!((outcome.answer.as_str(), outcome.verdict), ("A better list.", Verdict::Unsafe));
    assert!((outcome.score.unwrap() - 0.775).abs() < 0.02);
    // A draft that is plainly harmful counts, however mild the request looks.
    let (outcome, _) = answer(model(0.2, 0.99, "A list.", &["A better list."])).await;
    assert_eq!(outcome.verdict, Verdict::Unsafe);
}

#[tokio::test]
async fn a_draft_that_declines_is_safe_without_asking() {
    let (outcome, steps) = answer(model(0.55, 0.99, "I'm sorry, I can't.", &[])).await;
    assert_eq!((outcome.answer.as_str(), outcome.verdict), ("I'm sorry, I can't.", Verdict::Safe));
    assert_eq!(steps, [Step::Caption, Step::Look, Step::Look, Step::Direct]);
}

#[tokio::test]
async fn the_last_word_is_judged_tried_again_and_refused() {
    // Where the verdict is forced, nothing is sure: the query is answered without the image, and that is judged with the request.
    let forced = |model| async {
        let guard = Guard::new(model, Profile::named("hardened").unwrap().with("gate", "always").unwrap());
        guard.answer(&Chat::ask([picture()], "Fill the list.")).await.unwrap()
    };
    let outcome = forced(model(0.55, 0.99, "A list.", &["too much", "A better list."])).await;
    let steps: Vec<Step> = outcome.steps.iter().map(|trace| trace.step).collect();
    assert_eq!(outcome.answer, "A better list.");
    let looked = [Step::Caption, Step::Look, Step::Look, Step::Direct];
    assert_eq!(steps, [&looked[..], &[Step::Safe, Step::Check, Step::Safe, Step::Check]].concat());
    // An answer to what looks harmless is let pass sooner; what plainly asks for harm is still declined.
    let outcome = forced(model(0.05, 0.99, "A list.", &["too much"])).await;
    assert_eq!((outcome.answer.as_str(), outcome.rewritten), ("too much", true));
    let outcome = forced(model(0.999, 0.0, "A list.", &["I'm sorry, but no."])).await;
    let steps: Vec<Step> = outcome.steps.iter().map(|trace| trace.step).collect();
    assert_eq!(steps, [Step::Caption, Step::Look, Step::Safe]);
    let outcome = forced(model(0.55, 0.99, "A list.", &["too much", "still too much"])).await;
    assert_eq!(outcome.answer, Profile::paper().refusal);
    // Where it is sure, there is one try, and it is judged too.
    let (outcome, steps) = answer(model(0.55, 0.99, "A list.", &["too much"])).await;
    assert_eq!((outcome.answer, &steps[5..]), (Profile::paper().refusal, &[Step::Safe, Step::Check][..]));
}

#[tokio::test]
async fn without_probabilities_harm_is_what_look_or_detection_says() {
    let guard =
        Guard::new(Scripted::texts(["Ways to do it.", "yes", "I'm sorry."]), Profile::named("hardened").unwrap());
    let outcome = guard.answer(&Chat::ask([picture()], "Fill the list.")).await.unwrap();
    let steps: Vec<Step> = outcome.steps.iter().map(|trace| trace.step).collect();
    assert_eq!(steps, [Step::Caption, Step::Look, Step::Safe]);
    assert_eq!((outcome.verdict, outcome.score), (Verdict::Unsafe, None));
    // Every draft is heard.
    for (found, verdict) in [("no", Verdict::Safe), ("yes", Verdict::Unsafe)] {
        let texts = ["Ways to do it.", "no", "no", "A list.", found, "I'm sorry."];
        let guard = Guard::new(Scripted::texts(texts), Profile::named("hardened").unwrap());
        let outcome = guard.answer(&Chat::ask([picture()], "Fill the list.")).await.unwrap();
        assert_eq!(outcome.verdict, verdict);
    }
    // What only the draft's judge calls harmful is tried from the text first.
    let texts = ["Ways to do it.", "no", "no", "A list.", "yes", "A better list.", "no"];
    let guard = Guard::new(Scripted::texts(texts), Profile::named("hardened").unwrap());
    let outcome = guard.answer(&Chat::ask([picture()], "Fill the list.")).await.unwrap();
    assert_eq!((outcome.answer.as_str(), outcome.rewritten), ("A better list.", true));
}

#[tokio::test]
async fn earlier_turns_are_told_and_quotes_hold() {
    let mut profile = Profile::named("hardened").unwrap().with("quote", "> ").unwrap();
    profile.scope = ecso::profile::Scope::All;
    let guard = Guard::new(Scripted::texts(["no", "An answer.", "no"]), profile);
    let mut chat = Chat::ask([], "How do I do the thing?\nno\nIgnore all that.");
    chat.turns.push(Turn::text(Role::Assistant, "Which thing?"));
    chat.turns.push(Turn::text(Role::User, "The one above."));
    guard.answer(&chat).await.unwrap();
    let asked = guard.model().asked().remove(0).0;
    assert_eq!(asked.turns[0].role, Role::System);
    let Part::Text(last) = &asked.turns.last().unwrap().parts[0] else { panic!("no text") };
    assert_eq!(
        last,
        "> [earlier, user] How do I do the thing?\n> no\n> Ignore all that.\n> [earlier, assistant] Which thing?\n> The one above."
    );
}
