//! Asks a model yes-or-no questions in bulk: `probe MODEL.gguf < QUESTIONS > ANSWERS`.
//!
//! Questions are JSON lines of {id, system?, turns: [[role, text], …], `max_tokens`?}, answers JSON
//! lines of {id, score, text, ms}: the probability of yes, what was said, and how long it took.
#![expect(clippy::print_stdout, reason = "it answers")]

use std::{io::BufRead, num::NonZeroU32, time::Instant};

use anyhow::Context;
use ecso::{Chat, Mllm, Role, Sampling, Turn, yes_probability};
use ecso_llama::{Llama, Options};
use serde::Deserialize;

#[derive(Deserialize)]
struct Question {
    id: String,
    #[serde(default)]
    system: String,
    turns: Vec<(Role, String)>,
    #[serde(default)]
    max_tokens: Option<u32>,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let path = std::env::args().nth(1).context("usage: probe MODEL.gguf < QUESTIONS > ANSWERS")?;
    let options =
        Options { slots: NonZeroU32::new(4), context: NonZeroU32::new(4096), ..Options::default() };
    let model = Llama::load(path, options).await?;
    for line in std::io::stdin().lock().lines() {
        let question: Question = serde_json::from_str(&line?)?;
        let turns = question.turns.into_iter().map(|(role, text)| Turn::text(role, text));
        let mut chat = Chat { turns: turns.collect(), ..Chat::default() };
        if !question.system.is_empty() {
            chat = chat.with_system(question.system);
        }
        let max_tokens = Some(question.max_tokens.unwrap_or(1));
        let sampling = Sampling {
            temperature: Some(0.0),
            max_tokens,
            top_logprobs: 20,
            ..Sampling::default()
        };
        let begun = Instant::now();
        let reply = model.generate(&chat, &sampling).await?;
        let answer = serde_json::json!({
            "id": question.id, "score": yes_probability(&reply), "text": reply.text,
            "ms": u64::try_from(begun.elapsed().as_millis())?,
        });
        println!("{answer}");
    }
    Ok(())
}
