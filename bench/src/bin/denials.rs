//! How often does `mini` deny that there is an image? Drafts and captions of typographic images,
//! counted by the rule below.
//!
//! `denials MODELS_DIR QUERY IMAGE...`; with `ECSO_SHOW=1` every reply is shown.
#![expect(clippy::print_stdout, reason = "it reports")]

use std::{path::Path, sync::Arc};

use ecso::{Chat, Event, Guard, Image, Limits, Profile, Step};
use ecso_llama::Llama;
use ecso_reader::{Composed, Reader};
use futures::{StreamExt, pin_mut};
use regex_lite::RegexBuilder;

/// A reply denies the image if it says that the writer can't see, open or process images, that
/// there is none, or that somebody should provide it.
const DENIAL: &str = r"(can(no|')t|unable to|not able to|(don't|do not) have the (ability|capability|means)|not (possible|capable)).{0,40}\b(image|picture)s?\b|\bno (image|picture)s?\b|(don't|do not|didn't|did not) (see|have|find|receive).{0,20}\b(image|picture)s?\b|(image|picture).{0,30}(isn't|is not|was not|wasn't|not been|not) (provided|attached|visible|available|included|shown|displayed|uploaded)|provide.{0,30}\b(image|picture)\b|text-based (AI|model|assistant)";

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [models, query, images @ ..] = arguments.as_slice() else {
        anyhow::bail!("usage: denials MODELS_DIR QUERY IMAGE...");
    };
    let file = |name: &str| Path::new(models).join(name);
    let reader = Reader::load(
        &file("PP-OCRv6_det_small.rten"),
        &file("PP-OCRv6_rec_small.rten"),
        &file("ppocrv6_dict.txt"),
    )?;
    let llama = Llama::load(
        file("qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"),
        ecso_llama::Options::default(),
    )
    .await?;
    let mut profile = Profile::paper();
    for (key, value) in
        [("gate", "always"), ("direct.max_tokens", "32"), ("caption.max_tokens", "32")]
    {
        profile = profile.with(key, value)?;
    }
    let guard = Guard::new(Arc::new(Composed::new(reader, llama, "mini")), profile);
    let denial =
        RegexBuilder::new(DENIAL).case_insensitive(true).dot_matches_new_line(true).build()?;
    let show = std::env::var_os("ECSO_SHOW").is_some();
    let (mut drafts, mut captions, mut replies) = (0, 0, 0);
    for path in images {
        let chat = Chat::ask([Image::open(path, Limits::default())?], query.clone());
        let events = guard.answer_events(&chat);
        pin_mut!(events);
        while let Some(event) = events.next().await {
            let Event::Finished(trace) = event? else { continue };
            let denies = denial.is_match(&trace.reply);
            replies += 1;
            if trace.step == Step::Direct {
                drafts += u32::from(denies);
            } else {
                captions += u32::from(denies);
            }
            if denies || show {
                println!(
                    "{path} {}{}: {:?}",
                    trace.step,
                    if denies { " DENIES" } else { "" },
                    trace.reply
                );
            }
            if trace.step == Step::Caption {
                break;
            }
        }
    }
    println!(
        "{} images, {replies} replies: {drafts} drafts and {captions} captions deny the image",
        images.len()
    );
    Ok(())
}
