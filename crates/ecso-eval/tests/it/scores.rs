//! MME, `MMBench` and MM-Vet: from their layouts to their own figures, which are counted by hand.

use std::{fs, path::Path, sync::Arc};

use ecso::{Limits, ModelError, Profile, Reply, testing::Scripted};
use ecso_batch::{Bounds, journal::Journal};
use ecso_eval::{
    benchmarks::named,
    judge::{Case, Exact, Judge, Judgement, Llm},
    record::RunHeader,
    run::{self, Options},
    summary::{Summary, summarise},
};

use crate::{header, records};

/// Runs a benchmark on a model that answers with `reply`, and judges it.
async fn scored(
    benchmark: &str,
    data: &Path,
    judge: &dyn Judge,
    reply: impl Fn(&str) -> String + Send + Sync + 'static,
) -> Summary {
    let model = Arc::new(Scripted::new(move |chat| {
        let text = chat.turns[0].joined_text();
        let judged = text.contains("unsafe and unethical");
        Ok(Reply { text: if judged { "No".into() } else { reply(&text) }, ..Reply::default() })
    }));
    let profiles = [Profile::paper()];
    let header =
        RunHeader { profiles: vec![("paper".into(), String::new())], ..header(benchmark, data) };
    let out = data.join("run");
    let mut journal = Journal::open(&out, &header).unwrap();
    let options =
        Options { bounds: Bounds::at_once(2), skip_missing: false, limits: Limits::default() };
    let items = named(benchmark).unwrap().items(data, None).unwrap();
    run::run(run::select(items, &header.choice), &profiles, model, &mut journal, options, |_| {})
        .await
        .unwrap();
    let records = records(&out);
    let mut judgements: Vec<Judgement> = Vec::new();
    for record in &records {
        assert_eq!(record.error, None);
        for arm in &record.arms {
            let case = Case {
                id: record.id.clone(),
                scenario: record.scenario.clone(),
                request: record.request.clone(),
                response: arm.answer.clone(),
                task: record.task.clone(),
            };
            judgements.push(judge.judge(&case, &arm.profile).await);
        }
    }
    summarise(&header, records.into_iter().map(Ok), &judgements.into_iter().collect()).unwrap()
}

fn picture(path: &Path) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    image::RgbImage::from_pixel(8, 8, image::Rgb([200; 3])).save(path).unwrap();
}

fn points(summary: &Summary, name: &str) -> f64 {
    let found = summary.arms[1].published.iter().find(|(called, _)| called == name);
    found.unwrap_or_else(|| panic!("{name} is not among {:?}", summary.arms[1].published)).1.value
}

fn is_close(value: f64, expected: f64) -> bool {
    (value - expected).abs() < 1e-9
}

#[tokio::test]
async fn mme_counts_questions_and_pairs() {
    let data = tempfile::tempdir().unwrap();
    // Two forms of the layout. existence: 3 of 4 right, one pair; OCR: 1 of 2, no pair.
    for (table, picture_path, lines) in [
        ("existence/a.txt", "existence/a.png", "Is it day?\tYes\nIs it night?\tNo\n"),
        ("existence/b.txt", "existence/b.png", "Is it day now?\tYes\nIs it night now?\tYes\n"),
        (
            "OCR/questions_answers_YN/c.txt",
            "OCR/images/c.png",
            "Is it day there?\tNo\nIs it night there?\tNo\n",
        ),
    ] {
        picture(&data.path().join(picture_path));
        fs::create_dir_all(data.path().join(table).parent().unwrap()).unwrap();
        fs::write(data.path().join(table), lines).unwrap();
    }
    let summary = scored("mme", data.path(), &Exact, |query| {
        if query.contains("day") { "Yes, it is.".into() } else { "No.".into() }
    })
    .await;
    assert!(is_close(points(&summary, "existence"), 75.0 + 50.0));
    assert!(is_close(points(&summary, "OCR"), 50.0));
    assert!(is_close(points(&summary, "perception, 2 of 10 subtasks"), 175.0));
    let mean = summary.arms[1].all.utility.unwrap();
    assert_eq!((mean.total, is_close(mean.value, 4.0 / 6.0)), (6, true));
}

#[tokio::test]
async fn mmbench_counts_a_question_whose_rotations_are_all_right() {
    let data = tempfile::tempdir().unwrap();
    picture(&data.path().join("p.png"));
    let image = base64::Engine::encode(
        &base64::prelude::BASE64_STANDARD,
        fs::read(data.path().join("p.png")).unwrap(),
    );
    let table = format!(
        "index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage\n\
         1\tWhich?\t\tred\tblue\t\t\tA\tcolour\t{image}\n1000001\tWhich?\t\tblue\tred\t\t\tB\tcolour\t1\n\
         2\tWhat?\tLook.\tcat\tdog\t\t\tA\tanimal\t{image}\n1000002\tWhat?\tLook.\tdog\tcat\t\t\tB\tanimal\t2\n"
    );
    fs::write(data.path().join("MMBench_DEV_EN.tsv"), table).unwrap();
    // The model is always right about the colour, and always answers A about the animal.
    let summary = scored("mmbench", data.path(), &Exact, |query| {
        if query.contains("What") { "A".into() } else { "The answer is red.".into() }
    })
    .await;
    assert!(is_close(points(&summary, "circular accuracy"), 50.0));
    assert!(is_close(summary.arms[1].all.utility.unwrap().value, 0.75));
}

#[tokio::test]
async fn mm_vet_is_the_mean_grade_by_capability_and_missing_grades_widen_intervals() {
    let data = tempfile::tempdir().unwrap();
    picture(&data.path().join("images/p.png"));
    let rows = "{\"v1_0\": {\"imagename\": \"p.png\", \"question\": \"one?\", \"answer\": \"1\", \"capability\": [\"ocr\", \"math\"]},
        \"v1_1\": {\"imagename\": \"p.png\", \"question\": \"two?\", \"answer\": \"2\", \"capability\": [\"ocr\"]},
        \"v1_2\": {\"imagename\": \"p.png\", \"question\": \"three?\", \"answer\": \"3\", \"capability\": [\"rec\"]}}";
    fs::write(data.path().join("mm-vet.json"), rows).unwrap();
    let grader = Scripted::new(|chat| {
        let text = chat.turns[0].joined_text();
        let grade = if text.contains("three?") {
            "no grade"
        } else if text.contains("one?") {
            "1.0"
        } else {
            "0.4"
        };
        Ok::<_, ModelError>(Reply { text: grade.into(), ..Reply::default() })
    });
    let judge = Llm::new(Arc::new(grader), 0.5);
    let summary = scored("mm-vet", data.path(), &judge, |_| "an answer".into()).await;
    for (name, expected) in [("total", 70.0), ("ocr", 70.0), ("math", 100.0)] {
        assert!(is_close(points(&summary, name), expected), "{name}: {}", points(&summary, name));
    }
    assert!(points(&summary, "rec").is_nan(), "its one grade is not known");
    let figures = &summary.arms[1].all;
    let mean = figures.utility.unwrap();
    assert_eq!((figures.unjudged, is_close(mean.value, 0.7)), (1, true));
    // The third grade may be anything from 0 to 1.
    assert!(is_close(mean.low, 0.4 * 2.0 / 3.0) && is_close(mean.high, 1.0), "{mean:?}");
}
