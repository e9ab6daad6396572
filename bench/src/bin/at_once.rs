//! What the engine gains by computing several requests at the same time: `at_once MODEL.gguf [SLOTS]`
//!
//! Each of the two kinds of work by itself, eight requests one by one and at once: reading prompts
//! of 400 words, and writing 64 tokens (the time for a whole reply less that for its first token).
//! Then a hundred questions, alone and beside replies that are being written: whether the first
//! token has the same probabilities to the last bit.
#![expect(clippy::print_stdout, reason = "it reports")]

use std::{num::NonZeroU32, time::Instant};

use anyhow::Context;
use ecso::{Chat, Mllm, Reply, Sampling};
use ecso_llama::{Llama, Options};
use futures::future::try_join_all;

const AT_ONCE: usize = 8;
const QUESTIONS: usize = 100;
const ROUNDS: usize = 3;

fn sampling(max_tokens: u32) -> Sampling {
    Sampling { max_tokens: Some(max_tokens), top_logprobs: 20, ..Sampling::default() }
}

/// Chats that share next to nothing.
fn chats(text: &str, from: usize) -> Vec<Chat> {
    let chat = |n| Chat::ask([], text).with_system(format!("{n} is the number of this request."));
    (from..from + AT_ONCE).map(chat).collect()
}

async fn one_by_one(model: &Llama, chats: &[Chat], tokens: u32) -> anyhow::Result<Vec<Reply>> {
    let mut replies = Vec::new();
    for chat in chats {
        replies.push(model.generate(chat, &sampling(tokens)).await?);
    }
    Ok(replies)
}

async fn at_once(model: &Llama, chats: &[Chat], tokens: u32) -> anyhow::Result<Vec<Reply>> {
    let sampling = sampling(tokens);
    Ok(try_join_all(chats.iter().map(|chat| model.generate(chat, &sampling))).await?)
}

/// Seconds for replies to eight new prompts, one by one and at once.
async fn seconds(
    model: &Llama,
    text: &str,
    tokens: u32,
    number: &mut usize,
) -> anyhow::Result<[f64; 2]> {
    let mut new = || {
        *number += AT_ONCE;
        chats(text, *number)
    };
    let (apart, together) = (new(), new());
    let start = Instant::now();
    one_by_one(model, &apart, tokens).await?;
    let middle = Instant::now();
    at_once(model, &together, tokens).await?;
    Ok([middle - start, middle.elapsed()].map(|time| time.as_secs_f64()))
}

fn tell(what: &str, [apart, together]: [f64; 2]) {
    let ratio = apart / together;
    println!(
        "{AT_ONCE} {what}: {apart:.2} s one by one, {together:.2} s at once, {ratio:.2} times"
    );
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let file = arguments.next().context("usage: at_once MODEL.gguf [SLOTS]")?;
    let slots = arguments.next().map(|slots| slots.parse::<NonZeroU32>()).transpose()?;
    let model = Llama::load(file, Options { slots, ..Options::default() }).await?;
    let story = "Tell a long story about a baker.";
    let prompt = "bread and butter ".repeat(133);
    let mut number = 0;
    for _ in 0..ROUNDS {
        let first = seconds(&model, story, 1, &mut number).await?;
        let whole = seconds(&model, story, 65, &mut number).await?;
        tell("replies", [whole[0] - first[0], whole[1] - first[1]]);
        tell("prompts", seconds(&model, &prompt, 1, &mut number).await?);
    }

    let question =
        |n| format!("A loaf has {n} slices. Is that enough for a family? Answer yes or no:");
    let questions: Vec<Chat> = (0..QUESTIONS).map(|n| Chat::ask([], question(n))).collect();
    let alone = one_by_one(&model, &questions, 1).await?;
    let stories = chats(story, 0);
    let (beside, _) =
        futures::try_join!(at_once(&model, &questions, 1), at_once(&model, &stories, 64))?;
    let differ = alone.iter().zip(&beside).filter(|(a, b)| a.first_token != b.first_token).count();
    println!("{QUESTIONS} questions beside {AT_ONCE} replies: {differ} differ");
    Ok(())
}
