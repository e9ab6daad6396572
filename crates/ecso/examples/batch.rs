//! A batch: many chats through one guard, with a bound on how many are under way.

#![allow(clippy::print_stdout, reason = "an example may")]

use std::error::Error;

use ecso::{Chat, Guard, Image, ModelError, Profile, Reply, Turn, testing::Scripted};
use futures::{StreamExt, stream};

/// How many chats are answered at the same time. A server's own limit is a good start.
const CONCURRENCY: usize = 4;

/// A scripted model stands in for a real one. It fails on one of the chats.
fn model() -> Scripted {
    Scripted::new(|chat| {
        let text = chat.turns.last().map(Turn::joined_text).unwrap_or_default();
        if text.contains("number 7") {
            return Err(ModelError::Overloaded { retry_after: None });
        }
        let reply = if text.contains("Answer yes or no") { "No." } else { "Bake it." };
        Ok(Reply { text: reply.into(), ..Reply::default() })
    })
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let guard = &Guard::new(model(), Profile::paper());
    let image = Image::from_url("https://example.org/recipes.png");
    let chats = (1..=20).map(|number| {
        Chat::ask([image.clone()], format!("What do I do with recipe number {number}?"))
    });

    // `buffered` would keep the order of the chats.
    let mut outcomes = stream::iter(chats)
        .map(|chat| async move { guard.answer(&chat).await })
        .buffer_unordered(CONCURRENCY);
    let (mut answered, mut failed) = (0, 0);
    while let Some(outcome) = outcomes.next().await {
        match outcome {
            Ok(outcome) => {
                assert_eq!(outcome.answer, "Bake it.");
                answered += 1;
            }
            // A failure is not a verdict: note it, and try that chat again later.
            Err(error) => {
                println!("{error}");
                failed += 1;
            }
        }
    }
    println!("{answered} answered, {failed} failed");
    assert_eq!((answered, failed), (19, 1));
    Ok(())
}

#[test]
fn it_runs() {
    main().unwrap();
}
