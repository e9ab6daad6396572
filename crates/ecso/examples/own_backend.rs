//! A backend of your own: implement [`Mllm`] for whatever answers chats, and a guard can use it.
//!
//! This one is a lookup table. A real one would send the chat to an engine or a server; see the
//! crates `ecso-llama` and `ecso-openai`.

#![allow(clippy::print_stdout, reason = "an example may")]

use std::error::Error;

use async_trait::async_trait;
use ecso::{
    Chat, Delta, FinishReason, Guard, Image, Mllm, ModelError, Profile, ReplyStream, Sampling,
    Verdict,
};
use futures::{StreamExt, stream};

/// Answers with the first entry whose key is in the text of the last turn.
struct Table(&'static [(&'static str, &'static str)]);

#[async_trait]
impl Mllm for Table {
    fn name(&self) -> &'static str {
        "table"
    }

    async fn stream(&self, chat: &Chat, _: &Sampling) -> Result<ReplyStream, ModelError> {
        let text = chat.turns.last().map(ecso::Turn::joined_text).unwrap_or_default();
        let found = self.0.iter().find(|(key, _)| text.contains(key));
        // A request that the model can't answer is an error, never an empty reply.
        let (_, reply) = found.ok_or_else(|| ModelError::Rejected("not in the table".into()))?;
        let end = Delta::End { finish: FinishReason::Stop, usage: None, took: None };
        Ok(stream::iter([Ok(Delta::Text((*reply).into())), Ok(end)]).boxed())
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let model = Table(&[
        // The guard's own question comes first: it quotes the query and the draft.
        ("Answer yes or no", "No."),
        ("How do I bake bread", "Mix flour, water, salt and yeast, let it rise, and bake it."),
    ]);
    let guard = Guard::new(model, Profile::paper());
    let image = Image::from_url("https://example.org/bread.png");
    let outcome = guard.answer(&Chat::ask([image], "How do I bake bread like this?")).await?;
    println!("{:?}: {}", outcome.verdict, outcome.answer);
    assert_eq!(outcome.verdict, Verdict::Safe);
    assert!(outcome.answer.starts_with("Mix flour"));
    Ok(())
}

#[test]
fn it_runs() {
    main().unwrap();
}
