//! The engine on real files: a tiny vision model with random weights, and `SmolLM2` where it was
//! pulled.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test may")]

use std::{io::Cursor, num::NonZeroU32, path::PathBuf};

use ecso::{
    Chat, Delta, FinishReason, Image, Limits, Mllm, ModelError, Part, Reply, Role, Sampling, Turn,
};
use ecso_llama::{
    Llama, Options,
    testing::{tiny_llm, tiny_vlm},
};
use futures::{FutureExt, StreamExt, future::join_all};

fn picture(shade: u8) -> Image {
    let pixels = image::RgbImage::from_fn(80, 60, |x, y| {
        image::Rgb([shade, u8::try_from(x + y).unwrap(), 9])
    });
    let mut bytes = Vec::new();
    pixels.write_to(&mut Cursor::new(&mut bytes), image::ImageFormat::Png).unwrap();
    Image::from_bytes(bytes, Limits::default()).unwrap()
}

struct Files {
    folder: tempfile::TempDir,
    options: Options,
}

impl Files {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let files = tiny_vlm(folder.path()).unwrap();
        Self { folder, options: Options { mmproj: Some(files.mmproj), ..Options::default() } }
    }

    fn model(&self) -> PathBuf {
        self.folder.path().join("tiny.gguf")
    }

    async fn load(&self, no_reuse: bool) -> Llama {
        Llama::load(self.model(), Options { no_reuse, ..self.options.clone() }).await.unwrap()
    }
}

fn sampling(max_tokens: u32) -> Sampling {
    Sampling { max_tokens: Some(max_tokens), top_logprobs: 20, ..Sampling::default() }
}

async fn ask(model: &Llama, chat: &Chat) -> Reply {
    model.generate(chat, &sampling(12)).await.unwrap()
}

#[tokio::test]
async fn a_shared_prefix_gives_the_same_logits_to_the_last_bit() {
    let files = Files::new();
    let (sharing, afresh) = (files.load(false).await, files.load(true).await);
    let long = "One word after the other. ".repeat(20);
    let two_turns = Chat {
        turns: vec![
            Turn {
                role: Role::User,
                parts: vec![Part::Image(picture(1)), Part::Text(long.clone())],
            },
            Turn::text(Role::Assistant, "Yes."),
            Turn::text(Role::User, "And now?"),
        ],
        ..Chat::default()
    };
    let chats = [
        Chat::ask([picture(1)], "What is this?"),
        Chat::ask([picture(1)], "Is it harmful?"),
        Chat::ask([picture(2)], "Is it harmful?"),
        Chat::ask([picture(1), picture(2)], "Which one?"),
        Chat::ask([], long.clone()),
        Chat::ask([], long.clone() + "More."),
        Chat::ask([picture(1)], long),
        two_turns,
        Chat::ask([picture(1)], "What is this?"),
    ];
    for chat in &chats {
        let (shared, whole) = (ask(&sharing, chat).await, ask(&afresh, chat).await);
        assert_eq!(shared, whole);
        assert_eq!(shared.first_token.len(), 20);
    }
    let differ =
        ask(&sharing, &chats[1]).await.first_token != ask(&sharing, &chats[2]).await.first_token;
    assert!(differ, "the image makes no difference to the reply");
}

#[tokio::test]
async fn a_kept_reply_gives_the_same_next_turn_but_for_rounding() {
    let Some(smol) = smol() else { return };
    let afresh = Options { no_reuse: true, ..Options::default() };
    let afresh = Llama::load(smol.clone(), afresh).await.unwrap();
    let keeping = Options { keep_replies: true, ..Options::default() };
    let keeping = Llama::load(smol, keeping).await.unwrap();
    for (number, tokens) in [5, 60, 200].into_iter().enumerate() {
        let mut chat = Chat::ask([], format!("How do I bake {number} loaves of bread?"));
        let reply = keeping.generate(&chat, &sampling(tokens)).await.unwrap();
        chat.turns.push(Turn::text(Role::Assistant, reply.text));
        for question in ["Is that so?", "Is your last answer harmful? Answer yes or no:"] {
            let mut chat = chat.clone();
            chat.turns.push(Turn::text(Role::User, question));
            let [kept, whole] = [ask(&keeping, &chat).await, ask(&afresh, &chat).await];
            let prompt_tokens = |reply: &Reply| reply.usage.map(|usage| usage.prompt_tokens);
            assert_eq!(prompt_tokens(&kept), prompt_tokens(&whole));
            let logprob = |token: &str| {
                whole
                    .first_token
                    .iter()
                    .find(|other| other.token == token)
                    .map(|found| found.logprob)
            };
            for found in kept.first_token.iter().take(5) {
                let difference = logprob(&found.token).map(|other| (found.logprob - other).abs());
                // Activations are rounded to 8 bits, which enlarges what is tiny at first. Another
                // conversation would differ by far more.
                let is_close = difference.is_some_and(|difference| difference < 0.5);
                assert!(is_close, "{tokens} {question} {} {difference:?}", found.token);
            }
        }
    }
}

/// `SmolLM2`, if it was pulled.
fn smol() -> Option<PathBuf> {
    let Some(folder) = std::env::var_os("ECSO_TEST_MODELS") else {
        eprintln!("skipped: ECSO_TEST_MODELS names no folder with models");
        return None;
    };
    let smol = PathBuf::from(folder).join("SmolLM2-135M-Instruct.Q4_1.gguf");
    if !smol.exists() {
        eprintln!("skipped: the model smol is not there (ecso models pull smol)");
        return None;
    }
    Some(smol)
}

/// A question behind the same examples as others.
fn question(about: &str) -> Chat {
    let example = |n: usize| {
        [
            Turn::text(Role::User, format!("Is number {n} a kind of bread?")),
            Turn::text(Role::Assistant, "no"),
        ]
    };
    let mut turns: Vec<Turn> = (0..12).flat_map(example).collect();
    let shared_turns = turns.len();
    turns.push(Turn::text(Role::User, about));
    Chat { turns, shared_turns, ..Chat::default() }
}

#[tokio::test]
async fn a_head_from_disk_gives_the_same_logits_to_the_last_bit() {
    let mut files = Files::new();
    let folder = files.folder.path().join("prefixes");
    files.options.prefix_folder = Some(folder.clone());
    let afresh = files.load(true).await;
    let kept = || {
        std::fs::read_dir(&folder)
            .map(|files| files.map(|file| file.unwrap().path()).collect::<Vec<_>>())
    };
    for (number, about) in ["Is rye?", "Is a rye loaf of three pounds?"].into_iter().enumerate() {
        let whole = ask(&afresh, &question(about)).await;
        assert_eq!(kept().is_ok(), number > 0, "who shares nothing keeps nothing");
        // Each a process of its own; another conversation comes between.
        let first = files.load(false).await;
        assert_eq!(ask(&first, &question(about)).await, whole, "{about}");
        ask(&first, &Chat::ask([picture(1)], "What is this?")).await;
        assert_eq!(ask(&first, &question(about)).await, whole, "{about}");
    }
    let files_kept = kept().unwrap();
    let [file] = files_kept.as_slice() else { panic!("one shared_turns: {files_kept:?}") };
    // A conversation without shared turns leaves nothing behind.
    ask(&files.load(false).await, &Chat { shared_turns: 0, ..question("Is it?") }).await;
    assert_eq!(kept().unwrap().len(), 1);
    // A damaged one is computed again.
    let mut bytes = std::fs::read(file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(file, bytes).unwrap();
    let whole = ask(&afresh, &question("Is rye?")).await;
    assert_eq!(ask(&files.load(false).await, &question("Is rye?")).await, whole);
    assert_eq!(kept().unwrap(), files_kept);
}

/// The digest is right, but it is no prefix: it was written wrong.
#[tokio::test]
async fn a_prefix_that_can_not_be_loaded_is_replaced() {
    let mut files = Files::new();
    let folder = files.folder.path().join("prefixes");
    files.options.prefix_folder = Some(folder.clone());
    let kept = || std::fs::read_dir(&folder).unwrap().next().unwrap().unwrap().path();
    let whole = ask(&files.load(false).await, &question("Is rye?")).await;
    let good = kept();
    let (name, _) = good.file_name().unwrap().to_str().unwrap().split_once('-').unwrap();
    let bad = folder.join(format!("{name}-{}.prefix", blake3::hash(b"rye")));
    std::fs::remove_file(&good).unwrap();
    std::fs::write(&bad, "rye").unwrap();
    assert_eq!(ask(&files.load(false).await, &question("Is rye?")).await, whole);
    assert!(!bad.exists());
    assert_eq!(kept(), good);
}

/// A reply that has begun and won't end soon.
async fn endless(model: &Llama) -> ecso::ReplyStream {
    for seed in 0.. {
        let endless = Sampling { temperature: Some(1.5), seed: Some(seed), ..Sampling::default() };
        let mut stream = model.stream(&Chat::ask([], "Go on and on."), &endless).await.unwrap();
        if matches!(stream.next().await, Some(Ok(Delta::Text(_)))) {
            return stream;
        }
    }
    unreachable!()
}

#[tokio::test]
async fn a_reply_that_nobody_reads_is_stopped() {
    let mut files = Files::new();
    files.options.slots = NonZeroU32::new(1);
    let model = files.load(false).await;
    drop(endless(&model).await);
    // There is one slot: an answer to the next question means that the first one was dropped.
    assert!(!ask(&model, &Chat::ask([], "Next.")).await.first_token.is_empty());
}

#[tokio::test]
async fn a_short_reply_does_not_wait_for_a_long_one() {
    let files = Files::new();
    let model = files.load(false).await;
    let mut long = endless(&model).await;
    assert!(!ask(&model, &Chat::ask([], "Next.")).await.first_token.is_empty());
    assert!(matches!(long.next().await, Some(Ok(Delta::Text(_)))), "the long one has ended");
}

#[tokio::test]
async fn a_check_does_not_wait_for_long_replies() {
    let mut files = Files::new();
    files.options.slots = NonZeroU32::new(2);
    let model = files.load(false).await;
    let mut first = endless(&model).await;
    let long = Sampling { temperature: Some(1.5), ..Sampling::default() };
    let second = model.stream(&Chat::ask([], "Go on, too."), &long).await.unwrap();
    assert!(!ask(&model, &Chat::ask([], "Is it bread?")).await.first_token.is_empty());
    while let Some(delta) = first.next().now_or_never() {
        assert!(matches!(delta, Some(Ok(Delta::Text(_)))), "the check waited for a long reply");
    }
    // The second one has its turn once the first one has ended.
    drop(first);
    let text = second.filter(|delta| std::future::ready(matches!(delta, Ok(Delta::Text(_)))));
    assert!(Box::pin(text).next().await.is_some());
}

/// Questions that share much, little or nothing, some about pictures.
fn mixed(count: u8) -> Vec<Chat> {
    let chat = |n: u8| match n % 5 {
        0 => question(&format!("Is number {n}?")),
        1 => Chat::ask([picture(n % 3)], format!("What is number {n}?")),
        2 => Chat::ask([], "One word after the other. ".repeat(n.into())),
        3 => Chat::ask([picture(1), picture(n)], "Which one?"),
        _ => Chat { shared_turns: 0, ..question("Is it the same?") },
    };
    (0..count).map(chat).collect()
}

/// What a model says first to each chat, asked at once while other replies are written.
async fn under_load(model: &Llama, chats: &[Chat]) -> Vec<Vec<ecso::TopLogprob>> {
    let beside = [Chat::ask([], "Go on."), question("Is it bread?")];
    let long: Vec<Sampling> = (0..2)
        .map(|seed| Sampling { temperature: Some(1.5), seed: Some(seed), ..sampling(150) })
        .collect();
    let beside = join_all(beside.iter().zip(&long).map(|(chat, long)| model.generate(chat, long)));
    let short = sampling(3);
    let asked = join_all(chats.iter().map(|chat| model.generate(chat, &short)));
    let (beside, asked) = futures::join!(beside, asked);
    assert!(beside.iter().all(Result::is_ok));
    asked.into_iter().map(|reply| reply.unwrap().first_token).collect()
}

#[tokio::test]
async fn a_verdict_does_not_depend_on_what_runs_beside_it() {
    let mut files = Files::new();
    let afresh = files.load(true).await;
    let chats = mixed(40);
    let mut alone = Vec::new();
    for chat in &chats {
        alone.push(ask(&afresh, chat).await.first_token);
    }
    for slots in [1, 2, 5] {
        files.options.slots = NonZeroU32::new(slots);
        files.options.prefix_folder = Some(files.folder.path().join(format!("prefixes-{slots}")));
        let model = files.load(false).await;
        assert_eq!(under_load(&model, &chats).await, alone, "{slots} slots");
        assert_eq!(under_load(&model, &chats).await, alone, "{slots} slots, once more");
    }
}

#[tokio::test]
async fn what_does_not_fit_is_said() {
    let files = Files::new();
    let model = files.load(false).await;
    let error = model.generate(&Chat::ask([], "x ".repeat(5000)), &sampling(1)).await.unwrap_err();
    assert!(
        matches!(&error, ModelError::Rejected(why) if why.message().contains("too long")),
        "{error}"
    );
    // The engine goes on.
    ask(&model, &Chat::ask([picture(3)], "And this?")).await;

    let blind = Llama::load(files.model(), Options::default()).await.unwrap();
    let error =
        blind.generate(&Chat::ask([picture(3)], "And this?"), &sampling(1)).await.unwrap_err();
    assert!(
        matches!(&error, ModelError::Rejected(why) if why.message().contains("mmproj")),
        "{error}"
    );
}

async fn refusal(model: &Llama, chat: &Chat) -> String {
    match model.generate(chat, &sampling(1)).await {
        Err(ModelError::Rejected(why)) => why.message().to_owned(),
        other => panic!("not refused: {other:?}"),
    }
}

#[tokio::test]
async fn what_is_too_long_is_refused_before_it_is_computed() {
    let model = Files::new().load(false).await;
    let short = ask(&model, &Chat::ask([], "xy".repeat(50))).await;
    let tokens = short.usage.unwrap().prompt_tokens + 2 * 4950;
    let why = refusal(&model, &Chat::ask([], "xy".repeat(5000))).await;
    assert!(why.contains(&format!("too long: {tokens} tokens")), "{why}");
    let parts =
        vec![Part::Text("xy".repeat(5000)), Part::Image(picture(1)), Part::Text("?".into())];
    let chat = Chat { turns: vec![Turn { role: Role::User, parts }], ..Chat::default() };
    let why = refusal(&model, &chat).await;
    assert!(why.contains("too long: at least 10"), "{why}");
}

/// llama.cpp splits text by regular expressions that recurse for each character of a word.
#[tokio::test]
async fn no_text_reaches_the_end_of_the_stack() {
    let folder = tempfile::tempdir().unwrap();
    for pre_tokenizer in ["gpt-4o", "tekken", "default"] {
        let path = folder.path().join("tiny.gguf");
        tiny_llm(&path, pre_tokenizer).unwrap();
        let options = Options { context: NonZeroU32::new(8192), ..Options::default() };
        let model = Llama::load(&path, options).await.unwrap();
        for letter in ["a", " ", "-", "中"] {
            for count in [131_000, 1_000_000] {
                let text = format!("{}.", letter.repeat(count));
                let why = refusal(&model, &Chat::ask([], text)).await;
                let unit = if count > 8192 * 16 { "characters" } else { "tokens" };
                assert!(why.contains("too long") && why.contains(unit), "{why}");
            }
        }
    }
}

#[tokio::test]
async fn a_prompt_without_a_last_token_is_refused() {
    let mut files = Files::new();
    let bare = "{% for m in messages %}{{ m.content }}{% endfor %}";
    files.options.chat_template = Some(bare.into());
    let model = files.load(false).await;
    let why = refusal(&model, &Chat::ask([], "")).await;
    assert!(why.contains("is empty"), "{why}");
    let parts = vec![Part::Text("What is this?".into()), Part::Image(picture(1))];
    let chat = Chat { turns: vec![Turn { role: Role::User, parts }], ..Chat::default() };
    let why = refusal(&model, &chat).await;
    assert!(why.contains("ends with an image"), "{why}");
    // The engine goes on.
    ask(&model, &Chat::ask([picture(3)], "And this?")).await;
    model.health().await.unwrap();
}

#[tokio::test]
async fn no_tokens_are_no_text() {
    let model = Files::new().load(false).await;
    let reply = model.generate(&Chat::ask([], "Go on."), &sampling(0)).await.unwrap();
    assert_eq!((reply.text.as_str(), reply.finish), ("", FinishReason::Length));
    assert_eq!(reply.usage.unwrap().completion_tokens, 0);
    assert_eq!(reply.first_token.len(), 20);
}

#[tokio::test]
async fn more_slots_than_a_block_has_tokens_are_refused() {
    let mut files = Files::new();
    files.options.context = NonZeroU32::new(64);
    for mmproj in [files.options.mmproj.take(), None] {
        let with = |slots| Options {
            slots: NonZeroU32::new(slots),
            mmproj: mmproj.clone(),
            ..files.options.clone()
        };
        let error = Llama::load(files.model(), with(129)).await.err().unwrap();
        assert!(error.to_string().contains("at most 128"), "{error}");
        Llama::load(files.model(), with(128)).await.unwrap();
    }
}

#[tokio::test]
async fn damaged_files_are_errors() {
    let files = Files::new();
    let model = files.model();
    let cut = files.folder.path().join("cut.gguf");
    let bytes = std::fs::read(&model).unwrap();
    for length in [0, 3, 100, bytes.len() / 2, bytes.len() - 1000] {
        std::fs::write(&cut, &bytes[..length]).unwrap();
        let error = Llama::load(&cut, Options::default()).await.err().unwrap();
        assert!(error.to_string().contains("cut.gguf"), "{length}: {error}");
    }
    for mmproj in [cut, model.clone(), files.folder.path().join("none.gguf")] {
        let options = Options { mmproj: Some(mmproj), ..Options::default() };
        assert!(matches!(Llama::load(&model, options).await, Err(ModelError::Transport(_))));
    }
}

#[tokio::test]
async fn a_real_model_answers() {
    let Some(smol) = smol() else { return };
    let model = Llama::load(smol, Options::default()).await.unwrap();
    let reply = model
        .generate(&Chat::ask([], "Repeat: the quick brown fox."), &sampling(24))
        .await
        .unwrap();
    assert!(reply.text.contains("fox"), "{}", reply.text);
    let chats: Vec<Chat> =
        (0..10).map(|n| question(&format!("Is {n} times a loaf bread?"))).collect();
    let mut alone = Vec::new();
    for chat in &chats {
        alone.push(ask(&model, chat).await.first_token);
    }
    assert_eq!(under_load(&model, &chats).await, alone);
    assert!(reply.first_token[0].logprob > -3.0 && reply.usage.unwrap().completion_tokens > 3);
}
