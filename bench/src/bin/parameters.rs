//! How fast a model reads and writes, by the engine's parameters: `parameters MODEL.gguf`
//!
//! For each variant of block, attention, type of the KV memory, and threads: the time to load,
//! tokens a second of prompts of 48 and 512 tokens behind a beginning that is kept, and milliseconds
//! a token of one reply and of four that are written together. Each figure is the median of three,
//! in turn with the other variants.
#![expect(clippy::print_stdout, reason = "it reports")]

use std::{num::NonZeroU32, path::Path, time::Instant};

use anyhow::Context;
use llama_cpp_2::{
    LogOptions,
    context::{
        LlamaContext,
        params::{KvCacheType, LlamaContextParams},
    },
    llama_backend::LlamaBackend,
    llama_batch::LlamaBatch,
    model::{LlamaModel, params::LlamaModelParams},
    token::LlamaToken,
};

const ROUNDS: usize = 3;
/// Tokens before what is measured.
const HEAD: usize = 128;
/// Tokens of a reply.
const TOKENS: u32 = 16;

#[derive(Clone, Copy)]
struct Variant {
    name: &'static str,
    /// Tokens of a prompt that are computed together.
    block: usize,
    /// Flash attention: -1 is llama.cpp's own choice, 0 off, 1 on.
    attention: i32,
    /// The type of keys and values.
    memory: KvCacheType,
    threads: i32,
}

fn variants(threads: i32) -> Vec<Variant> {
    let engine = Variant {
        name: "as the engine has it",
        block: 128,
        attention: -1,
        memory: KvCacheType::F16,
        threads,
    };
    vec![
        engine,
        Variant { name: "blocks of 256", block: 256, ..engine },
        Variant { name: "blocks of 512", block: 512, ..engine },
        Variant { name: "no flash attention", attention: 0, ..engine },
        Variant { name: "KV in BF16", memory: KvCacheType::BF16, ..engine },
        Variant { name: "KV in Q8_0", memory: KvCacheType::Q8_0, attention: 1, ..engine },
        Variant { name: "one thread", threads: 1, ..engine },
    ]
}

#[derive(Default)]
struct Figures {
    load: Vec<f64>,
    short: Vec<f64>,
    long: Vec<f64>,
    one: Vec<f64>,
    four: Vec<f64>,
}

fn main() -> anyhow::Result<()> {
    let file = std::env::args().nth(1).context("usage: parameters MODEL.gguf")?;
    llama_cpp_2::send_logs_to_tracing(LogOptions::default().with_logs_enabled(false));
    let backend = LlamaBackend::init()?;
    let cores = std::thread::available_parallelism()?.get();
    let variants = variants(i32::try_from(cores)?);
    let mut figures: Vec<Figures> = variants.iter().map(|_| Figures::default()).collect();
    for _ in 0..ROUNDS {
        for (variant, figures) in variants.iter().zip(&mut figures) {
            measure(&backend, file.as_ref(), *variant, figures)
                .with_context(|| format!("{file}, {}", variant.name))?;
        }
    }
    println!("{:20} load s  48: tok/s  512: tok/s  1: ms/tok  4: ms/tok", "");
    for (Variant { name, .. }, figures) in variants.iter().zip(figures) {
        let Figures { load, short, long, one, four } = figures;
        let [load, short, long] = [load, short, long].map(median);
        let [one, four] = [one, four].map(|times| 1e3 * median(times));
        let [short, long] = [48.0 / short, 512.0 / long];
        println!("{name:20} {load:6.2} {short:10.0} {long:11.0} {one:10.1} {four:10.1}");
    }
    Ok(())
}

fn measure(
    backend: &LlamaBackend,
    file: &Path,
    variant: Variant,
    figures: &mut Figures,
) -> anyhow::Result<()> {
    let begun = Instant::now();
    let model = LlamaModel::load_from_file(backend, file, &LlamaModelParams::default())?;
    figures.load.push(begun.elapsed().as_secs_f64());
    let block = u32::try_from(variant.block)?;
    let params = LlamaContextParams::default()
        .with_n_ctx(NonZeroU32::new(4096))
        .with_n_seq_max(4)
        .with_n_batch(block)
        .with_n_ubatch(block)
        .with_flash_attention_policy(variant.attention)
        .with_type_k(variant.memory)
        .with_type_v(variant.memory)
        .with_n_threads(variant.threads)
        .with_n_threads_batch(variant.threads);
    let mut context = model.new_context(backend, params)?;
    read(&mut context, variant.block, 0, HEAD, 0)?;
    for (tokens, times) in [(48, &mut figures.short), (512, &mut figures.long)] {
        context.clear_kv_cache_seq(Some(0), u32::try_from(HEAD).ok(), None)?;
        let begun = Instant::now();
        read(&mut context, variant.block, HEAD, tokens, 0)?;
        times.push(begun.elapsed().as_secs_f64());
    }
    for (sequences, times) in [(1, &mut figures.one), (4, &mut figures.four)] {
        context.clear_kv_cache();
        for sequence in 0..sequences {
            read(&mut context, variant.block, 0, HEAD, sequence)?;
        }
        let begun = Instant::now();
        for position in HEAD..HEAD + TOKENS as usize {
            let mut batch = LlamaBatch::new(4, 1);
            for sequence in 0..sequences {
                batch.add(token(position), i32::try_from(position)?, &[sequence], true)?;
            }
            context.decode(&mut batch)?;
        }
        let tokens = f64::from(sequences) * f64::from(TOKENS);
        times.push(begun.elapsed().as_secs_f64() / tokens);
    }
    Ok(())
}

/// Reads a prompt in blocks.
fn read(
    context: &mut LlamaContext<'_>,
    block: usize,
    from: usize,
    tokens: usize,
    sequence: i32,
) -> anyhow::Result<()> {
    let positions: Vec<usize> = (from..from + tokens).collect();
    for block in positions.chunks(block) {
        let mut batch = LlamaBatch::new(block.len(), 1);
        for position in block {
            let is_last = position + 1 == from + tokens;
            batch.add(token(*position), i32::try_from(*position)?, &[sequence], is_last)?;
        }
        context.decode(&mut batch)?;
    }
    Ok(())
}

/// Some token: what it says makes no difference to the time.
fn token(position: usize) -> LlamaToken {
    LlamaToken(i32::try_from(1000 + position * 37 % 20_000).unwrap_or(1000))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
