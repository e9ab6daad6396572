//! Streaming: each step as it happens, and the answer piece by piece, after its verdict.

#![allow(clippy::print_stdout, reason = "an example may")]

use std::{
    error::Error,
    io::{self, Write as _},
};

use ecso::{Chat, Event, Guard, Image, Profile, testing::Scripted};
use futures::{StreamExt, pin_mut};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    // A scripted model stands in for a real one. It calls its first answer harmful, so the guard
    // describes the image and lets the model answer again without it.
    let model = Scripted::texts(["Use raw eggs.", "Yes.", "A bowl of eggs.", "Boil the eggs."]);
    let guard = Guard::new(model, Profile::paper());
    let chat = Chat::ask([Image::from_url("https://example.org/eggs.png")], "How do I eat these?");

    let mut answer = String::new();
    // Dropping the stream cancels the work.
    let events = guard.answer_events(&chat);
    pin_mut!(events);
    while let Some(event) = events.next().await {
        match event? {
            Event::Started { step, images } => println!("{step}: {images} image(s)"),
            Event::Finished(trace) => println!("{}: done in {} ms", trace.step, trace.ms),
            Event::Decided { verdict, rewritten } => println!("{verdict:?}, new: {rewritten}"),
            Event::Answer(text) => {
                print!("{text}");
                io::stdout().flush()?;
                answer.push_str(&text);
            }
            Event::Done(outcome) => {
                println!("\n{} calls", outcome.steps.len());
                assert!(outcome.rewritten);
                assert_eq!(outcome.steps.len(), 4);
            }
            _ => {}
        }
    }
    assert_eq!(answer, "Boil the eggs.");
    Ok(())
}

#[test]
fn it_runs() {
    main().unwrap();
}
