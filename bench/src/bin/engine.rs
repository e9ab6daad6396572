//! The speed and memory of long work, with a mock model in this process:
//!
//! `engine rate` compares the calls a second of 64 rows at once, at 10 ms a call, with what the
//! bare mock does. `engine memory DIR ROWS` takes so many rows with embedded images of 50 KB out of
//! Parquet and packs them into Parquet again (needs three times their size in DIR), and tells the
//! peak memory. `engine report DIR ITEMS` writes the journal of a run of so many items, has it
//! judged by rule and reported, and tells times and peak memory (3.5 KB an item in DIR).
#![expect(clippy::print_stdout, reason = "it reports")]

use std::{
    fs::File,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context;
use arrow_array::{ArrayRef, BinaryArray, RecordBatch, StringArray};
use async_trait::async_trait;
use ecso::{
    Chat, Delta, FinishReason, Guard, Image, Limits, Mllm, ModelError, Profile, Reply, ReplyStream,
    Sampling, Turn,
};
use ecso_batch::{
    Bounds,
    journal::{self, Journal, JournalReader},
};
use ecso_data::{
    generate::{Filters, Generator},
    input::{Input, Mapping},
    manifest::Packing,
    pack::pack,
    record::{RunHeader, Shard},
    run::{RunContext, run},
};
use ecso_eval::{
    item::Task,
    judge::{self, Judge, XsTest},
    judged_run::{JudgedRun, verdicts_file},
    record::{self, ItemRecord, Selection},
    report::{self, RunReport},
    run::UNGUARDED,
    verdicts::VerdictsHeader,
};
use ecso_openai::Fetcher;
use futures::{StreamExt, stream};
use parquet::arrow::ArrowWriter;

const AT_ONCE: usize = 64;

/// Answers after a while; every second draft is harmful.
struct Mock {
    delay: Duration,
    calls: AtomicU64,
}

#[async_trait]
impl Mllm for Mock {
    fn name(&self) -> &'static str {
        "mock"
    }

    async fn stream(&self, chat: &Chat, sampling: &Sampling) -> Result<ReplyStream, ModelError> {
        let reply = self.generate(chat, sampling).await?;
        let end = Delta::End { finish: FinishReason::Stop, usage: None, took: None };
        Ok(stream::iter([Ok(Delta::Text(reply.text)), Ok(end)]).boxed())
    }

    async fn generate(&self, chat: &Chat, _: &Sampling) -> Result<Reply, ModelError> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        if !self.delay.is_zero() {
            tokio::time::sleep(self.delay).await;
        }
        let said = chat.turns.last().map(Turn::joined_text).unwrap_or_default();
        let text = if said.contains("Is the RESPONSE harmful") {
            if said.contains("rude words") { "yes" } else { "no" }.to_owned()
        } else if said.contains("hints") {
            format!("A kind answer to {said}")
        } else if said.ends_with('1') {
            format!("rude words on {said}")
        } else {
            format!("plain words on {said}")
        };
        Ok(Reply { text, ..Reply::default() })
    }
}

fn header(input: &Path) -> RunHeader {
    let profile = Profile::paper();
    RunHeader {
        ecso: "bench".into(),
        input: input.into(),
        mapping: Mapping::default(),
        query: None,
        image_root: None,
        model: "mock".into(),
        model_digest: "mock".into(),
        server: None,
        profile: (profile.name.clone(), profile.to_toml()),
        filters: Filters::default(),
        near_duplicates: false,
        shard: Shard::ALL,
    }
}

/// Calls and seconds of the engine over all rows.
async fn engine(input: &Input, out: &Path, delay: Duration) -> anyhow::Result<(u64, f64)> {
    let mock = Arc::new(Mock { delay, calls: 0.into() });
    let model: Arc<dyn Mllm> = Arc::clone(&mock) as Arc<dyn Mllm>;
    let context = Arc::new(RunContext {
        generator: Generator::new(&model, Profile::paper(), Filters::default()),
        fetcher: Fetcher::new()?,
        limits: Limits::default(),
        out: out.to_owned(),
        hasher: None,
    });
    let (header, begun) = (header(&input.path), Instant::now());
    run(input, &header, &context, Bounds::at_once(AT_ONCE), |_| {}).await?;
    Ok((mock.calls.load(Ordering::Relaxed), begun.elapsed().as_secs_f64()))
}

#[expect(clippy::cast_precision_loss, reason = "counts")]
async fn rate() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let image = folder.path().join("a.png");
    std::fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/list.png"), &image)?;
    let rows: Vec<String> = (0..10_000)
        .map(|n| format!("{{\"query\": \"row {n}\", \"image\": \"a.png\"}}\n"))
        .collect();
    let path = folder.path().join("rows.jsonl");
    std::fs::write(&path, rows.concat())?;
    let delay = Duration::from_millis(10);
    for _ in 0..3 {
        let mock = Mock { delay, calls: 0.into() };
        let (chat, sampling) = (Chat::ask([], "row 0"), Sampling::default());
        let begun = Instant::now();
        stream::iter(0..30_000)
            .map(|_| mock.generate(&chat, &sampling))
            .buffer_unordered(AT_ONCE)
            .for_each(|_| std::future::ready(()))
            .await;
        let bare = 30_000.0 / begun.elapsed().as_secs_f64();
        let out = tempfile::tempdir()?;
        let (calls, seconds) =
            engine(&Input { path: path.clone(), ..Input::default() }, out.path(), delay).await?;
        let own = calls as f64 / seconds;
        println!(
            "bare mock {bare:.0} calls/s, engine {own:.0} calls/s: {:.1}%",
            100.0 * own / bare
        );
    }
    Ok(())
}

fn peak() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<f64>().ok())
        .unwrap_or(f64::NAN)
        / 1024.0
}

/// Images that differ, of 50 KB: one PNG with noise behind its end, which no reader minds.
fn write_rows(path: &PathBuf, rows: usize) -> anyhow::Result<()> {
    let png = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/list.png"))?;
    let batch = |first: usize, count: usize| {
        let images: Vec<Vec<u8>> = (first..first + count)
            .map(|row| {
                let mut image = png.clone();
                let mut noise = blake3::Hasher::new();
                noise.update(&row.to_le_bytes());
                let length = 50_000_usize.saturating_sub(image.len());
                let start = image.len();
                image.resize(start + length, 0);
                noise.finalize_xof().fill(&mut image[start..]);
                image
            })
            .collect();
        let queries: Vec<String> = (first..first + count).map(|row| format!("row {row}")).collect();
        let image: ArrayRef = Arc::new(BinaryArray::from_iter_values(&images));
        let query: ArrayRef = Arc::new(StringArray::from_iter_values(&queries));
        RecordBatch::try_from_iter([("query", query), ("image", image)])
    };
    let mut writer = ArrowWriter::try_new(File::create(path)?, batch(0, 1)?.schema(), None)?;
    for first in (0..rows).step_by(200) {
        writer.write(&batch(first, 200.min(rows - first))?)?;
        writer.flush()?;
    }
    writer.close()?;
    Ok(())
}

async fn memory(folder: &Path, rows: usize) -> anyhow::Result<()> {
    let (path, out) = (folder.join("rows.parquet"), folder.join("made"));
    write_rows(&path, rows)?;
    println!(
        "{rows} rows written, {} MB; peak {:.0} MB",
        std::fs::metadata(&path)?.len() / 1_000_000,
        peak()
    );
    let input = Input { path, ..Input::default() };
    let (calls, seconds) = engine(&input, &out, Duration::ZERO).await?;
    println!("run: {calls} calls, {seconds:.1} s, peak {:.0} MB", peak());
    let begun = Instant::now();
    let packing = Packing {
        utility: 1.0,
        validation: 0.05,
        seed: 0,
        shard_bytes: 500 << 20,
        licence: "other".into(),
        limits: Limits::default(),
    };
    let manifest = pack(&out, &input, &packing)?;
    println!(
        "packed {:?} in {:.1} s, peak {:.0} MB",
        manifest.samples,
        begun.elapsed().as_secs_f64(),
        peak()
    );
    Ok(())
}

/// The record of an item, with two arms whose steps have prompts and replies of some length.
fn item_record(number: usize, drawn: &ItemRecord) -> ItemRecord {
    let mut record = drawn.clone();
    record.id = format!("item-{number}");
    record.cluster.clone_from(&record.id);
    record.scenario = format!("scenario {}", number % 13);
    record.task = if number.is_multiple_of(3) { Task::Harmless } else { Task::Harmful };
    if number.is_multiple_of(4) {
        for arm in &mut record.arms {
            arm.answer.insert_str(0, "I'm sorry, but I can't help with that. ");
        }
    }
    record
}

async fn judge_and_report(folder: &Path, items: usize) -> anyhow::Result<()> {
    let (out, profile) = (folder.join("run"), Profile::paper());
    let header = record::RunHeader {
        ecso: "bench".into(),
        benchmark: "bench".into(),
        variant: None,
        data: folder.into(),
        model: "mock".into(),
        model_digest: "mock".into(),
        server: None,
        profiles: vec![(profile.name.clone(), profile.to_toml())],
        max_new_tokens: None,
        choice: Selection::default(),
        items: None,
    };
    // One item for real, from which the others are made.
    let guard = Guard::new(Mock { delay: Duration::ZERO, calls: 0.into() }, profile);
    let image = Image::open(
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/list.png"),
        Limits::default(),
    )?;
    let query = "What stands on the list? ".repeat(12) + "1";
    let guarded = guard.answer(&Chat::ask([image], &query)).await?;
    let mut unguarded = guarded.clone();
    (unguarded.profile, unguarded.steps) = (UNGUARDED.into(), guarded.steps[..1].to_vec());
    let drawn = ItemRecord {
        id: String::new(),
        source_digest: String::new(),
        scenario: String::new(),
        cluster: String::new(),
        request: query.clone(),
        query,
        task: Task::Harmful,
        images: 1,
        image_sources: Vec::new(),
        arms: vec![unguarded, guarded],
        error: None,
        filtered: false,
        of_unknown_kind: false,
    };
    let begun = Instant::now();
    let mut journal = Journal::open(&out, &header)?;
    for number in 0..items {
        journal.record(&item_record(number, &drawn))?;
    }
    drop(journal);
    let bytes = std::fs::metadata(journal::path(&out))?.len();
    println!(
        "{items} items written in {:.1} s, {} MB; peak {:.0} MB",
        begun.elapsed().as_secs_f64(),
        bytes / 1_000_000,
        peak()
    );

    let begun = Instant::now();
    let by = VerdictsHeader {
        ecso: "bench".into(),
        judge: XsTest.name(),
        model: None,
        threshold: None,
        judge_file: None,
    };
    let mut verdicts = Journal::open_file(&out.join(verdicts_file(&by.judge)), &by)?;
    let records = JournalReader::in_folder(&out).latest::<ItemRecord>()?;
    let answers = records.filter_map(Result::ok).flat_map(judge::answers_to_judge);
    judge::judge_answers(answers, Box::new(XsTest), &mut verdicts, 4, |_| ()).await?;
    println!(
        "{} answers judged in {:.1} s; peak {:.0} MB",
        verdicts.len(),
        begun.elapsed().as_secs_f64(),
        peak()
    );
    drop(verdicts);

    let begun = Instant::now();
    let reports = [RunReport::read(JudgedRun::open(&out, None)?)?];
    let (html, markdown) = (report::html(&reports)?, report::markdown(&reports));
    println!(
        "reported in {:.1} s ({} KB of HTML); peak {:.0} MB",
        begun.elapsed().as_secs_f64(),
        html.len() / 1000,
        peak()
    );
    println!("{markdown}");
    Ok(())
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["rate"] => rate().await,
        ["memory", folder, rows] => {
            memory(Path::new(folder), rows.parse().context("ROWS is a number")?).await
        }
        ["report", folder, items] => {
            judge_and_report(Path::new(folder), items.parse().context("ITEMS is a number")?).await
        }
        _ => anyhow::bail!("usage: engine rate | engine memory DIR ROWS | engine report DIR ITEMS"),
    }
}
