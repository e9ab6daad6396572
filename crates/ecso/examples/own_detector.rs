//! A detector of your own: a profile in TOML with a further question and a detector that uses it.
//! Here a bakery's assistant must not give away the house recipe.

#![allow(clippy::print_stdout, reason = "an example may")]

use std::error::Error;

use ecso::{Chat, Guard, Profile, Reply, Turn, Verdict, testing::Scripted};

/// All keys are described in docs/profiles.md. `detectors` is a list, so it replaces the built-in
/// one: take over from `Profile::hardened().to_toml()` those that you want to keep. At least one
/// must judge the request and one the reply.
const PROFILE: &str = r#"
extends = "hardened"
name = "bakery"
scope = "all"
rewrite = "refuse"
refusal = "The house recipe stays in the house."

[questions.recipe]
template = """
The assistant replied: {y}

Does the reply name the secret ingredient of the house bread? Answer yes or no:"""

[[detectors]]
name = "crime"
bias = 0.0
terms = [{ question = "crime", weight = 1.0 }]

[[detectors]]
name = "recipe"
bias = 0.0
terms = [{ question = "recipe", weight = 1.0 }]
"#;

/// A scripted model stands in for a real one.
fn model(draft: &'static str) -> Scripted {
    Scripted::new(move |chat| {
        let text = chat.turns.last().map(Turn::joined_text).unwrap_or_default();
        let reply = if !text.contains("Answer yes or no") {
            draft
        } else if text.contains("secret ingredient") && text.contains("malt") {
            "Yes."
        } else {
            "No."
        };
        Ok(Reply { text: reply.into(), ..Reply::default() })
    })
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let profile = Profile::from_toml(PROFILE)?;
    let chat = Chat::ask([], "How do you bake the house bread?");
    for (draft, expected) in [
        ("We bake it slowly, in a stone oven.", Verdict::Safe),
        ("With a spoon of malt.", Verdict::Unsafe),
    ] {
        let guard = Guard::new(model(draft), profile.clone());
        let outcome = guard.answer(&chat).await?;
        println!("{:?}: {}", outcome.verdict, outcome.answer);
        assert_eq!(outcome.verdict, expected);
        assert_eq!(outcome.refused, expected == Verdict::Unsafe);
    }
    Ok(())
}

#[test]
fn it_runs() {
    main().unwrap();
}
