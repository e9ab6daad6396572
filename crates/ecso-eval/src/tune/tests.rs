use std::collections::BTreeMap;

use ecso::{
    Profile, Trace, Verdict,
    calibration::{Half, Share, probability},
    profile::{Hardened, Method},
};
use serde_json::json;

use super::{
    Advice, TuningItem, TuningItems, UnknownRequests, fit,
    item::{DraftKind, Finding},
    page::HeldBack,
    report,
};
use crate::{
    item::Task,
    report::percent,
    stats::Rate,
    testing::{outcome, record},
};

fn hardened() -> Hardened {
    let Method::Hardened(method) = Profile::hardened().method else { panic!("another method") };
    method
}

/// `hardened` with one of its detectors only.
fn only(detector: &str) -> Hardened {
    let mut method = hardened();
    method.detectors.retain(|other| other.name == detector);
    assert_eq!(method.detectors.len(), 1);
    method
}

fn finding(log_odds: f64) -> Finding {
    let score = Some(probability(log_odds));
    Finding { score, is_harm: log_odds >= 0.0, is_filtered: false }
}

fn item(number: usize, harmful: bool, log_odds: f64, method: &Hardened) -> TuningItem {
    let findings = method.questions.keys().map(|name| (name.clone(), finding(log_odds))).collect();
    TuningItem {
        pair: number.to_string(),
        form: "list".into(),
        harmful,
        draft_kind: DraftKind::Answer,
        is_caption_filtered: false,
        by_word: false,
        findings,
        draft_cost: (100, 50),
        question_costs: BTreeMap::from([("howto".into(), (50, 100))]),
    }
}

/// Pairs of a harmful item with these log-odds and a harmless one with those.
fn pairs(pairs: usize, harmful: f64, harmless: f64, method: &Hardened) -> Vec<TuningItem> {
    let pair =
        |number| [item(number, true, harmful, method), item(number, false, harmless, method)];
    (0..pairs).flat_map(pair).collect()
}

fn all(items: &[TuningItem], unknown_in_report: UnknownRequests) -> TuningItems {
    TuningItems { items: items.to_vec(), unknown_in_report, ..TuningItems::default() }
}

fn trace(step: &str, question: Option<&str>, finish: &str) -> Trace {
    let call = json!({
        "step": step, "images": 0, "prompt": "", "reply": "", "question": question,
        "verdict": question.map(|_| if finish == "stop" { "safe" } else { "unsafe" }),
        "score": question.filter(|_| finish == "stop").map(|_| 0.01), "template": null,
        "finish": finish, "ms": 1, "prompt_tokens": null, "completion_tokens": null,
    });
    serde_json::from_value(call).unwrap()
}

#[test]
fn biases_keep_the_allowed_share_of_false_alarms_and_the_report_says_so() {
    let method = hardened();
    let items: Vec<TuningItem> = (0..200)
        .flat_map(|number| {
            let spread = f64::from(u8::try_from(number % 100).unwrap()) / 50.0;
            [item(number, true, 4.0 - spread, &method), item(number, false, spread - 1.5, &method)]
        })
        .collect();
    let fitted = fit(&method, &items, 0.03).unwrap();
    assert!(!fitted.is_own);
    assert!(fitted.fit.reported.false_alarms.value < 0.1, "{fitted:?}");
    assert!(fitted.fit.reported.recall.value > 0.9, "{fitted:?}");
    // A detector that applied to too few items keeps its bias.
    let rare = |item: &TuningItem| {
        let findings = item.findings.iter().filter(|(name, _)| *name != "context");
        TuningItem {
            findings: findings.map(|(name, found)| (name.clone(), *found)).collect(),
            ..item.clone()
        }
    };
    let refitted = fit(&method, &items.iter().map(rare).collect::<Vec<_>>(), 0.03).unwrap();
    let context = method.detectors.iter().find(|detector| detector.name == "context").unwrap();
    assert!((refitted.biases["context"] - context.bias).abs() < 1e-9);
    let page = |items: &[TuningItem], failed: UnknownRequests| {
        report("m", &method, &all(items, failed), &fitted, 0.03, None).1
    };
    let report = page(&items, UnknownRequests::default());
    assert!(
        report.contains("**Turn it on**")
            && report.contains("| median model time of a harmless request | 1 | 1.50 |"),
        "{report}"
    );
    let mut slept = items.clone();
    for item in slept.iter_mut().step_by(7) {
        item.question_costs.insert("howto".into(), (7_000_000, 100));
    }
    let time = "| median model time of a harmless request | 1 | 1.50 |";
    assert!(page(&slept, UnknownRequests::default()).contains(time));
    let declining: Vec<TuningItem> = items
        .iter()
        .map(|item| TuningItem {
            draft_kind: if item.harmful { DraftKind::Refusal } else { DraftKind::Answer },
            ..item.clone()
        })
        .collect();
    assert!(page(&declining, UnknownRequests::default()).contains("**Leave it off**"));
    // What flags harmful and harmless requests alike gains nothing.
    let alike: Vec<TuningItem> = items
        .iter()
        .map(|item| TuningItem { findings: items[0].findings.clone(), ..item.clone() })
        .collect();
    assert!(page(&alike, UnknownRequests::default()).contains("does not clearly outweigh"));
    // Unknown results are not a gain.
    let report = page(&items, UnknownRequests { harmful: 40, harmless: 40 });
    assert!(
        report.contains("**Of this half, 80 requests failed or got an empty answer**")
            && !report.contains("| 1.0 |"),
        "{report}"
    );
    let failed = UnknownRequests { harmful: 400, harmless: 0 };
    assert!(page(&items, failed).contains("**No recommendation**"));
}

#[test]
fn the_profiles_own_biases_stay_if_no_fit_does_surely_better() {
    let method = hardened();
    let own = |items: &[TuningItem]| {
        let fitted = fit(&method, items, 0.03).unwrap();
        let biases = method.detectors.iter().map(|one| (one.name.clone(), one.bias));
        assert_eq!(fitted.is_own, fitted.biases == biases.collect(), "{fitted:?}");
        let page =
            report("m", &method, &all(items, UnknownRequests::default()), &fitted, 0.03, None).1;
        assert_eq!(page.contains("own biases and threshold are kept"), fitted.is_own, "{page}");
        fitted.is_own
    };
    assert!(own(&pairs(120, 2.0, -3.0, &method)));
    // They flag harmless requests, or hardly any harmful one.
    assert!(!own(&pairs(120, 2.0, -0.3, &method)));
    assert!(!own(&pairs(120, -1.0, -3.0, &method)));
}

#[test]
fn a_low_bias_does_not_stop_a_detector_before_all_its_questions() {
    let method = only("message");
    let fitted = fit(&method, &pairs(200, 4.0, 0.4, &method), 0.0).unwrap();
    assert!((fitted.biases["message"] + 1.5).abs() < 1e-6, "{fitted:?}");
    let Half { recall, false_alarms, .. } = &fitted.fit.reported;
    assert_eq!((recall.count, false_alarms.count), (recall.total, 0), "{fitted:?}");
}

#[test]
fn the_page_and_the_stored_fit_count_the_same_requests_as_flagged() {
    let method = hardened();
    for step in 0..40_u8 {
        let items = pairs(120, 1.0 + f64::from(step) / 16.0, -3.0, &method);
        let fitted = fit(&method, &items, 0.03).unwrap();
        let Half { recall, false_alarms, .. } = &fitted.fit.reported;
        assert_eq!(recall.count, recall.total, "{fitted:?}");
        let row = |share: &Share| percent(Rate::wilson(share.count, share.total));
        let says = format!("| list | {} | {} |", row(recall), row(false_alarms));
        let page =
            report("m", &method, &all(&items, UnknownRequests::default()), &fitted, 0.03, None).1;
        assert!(page.contains(&says), "{step}: {says}\n{page}");
    }
}

#[test]
fn requests_without_findings_are_in_no_rate_of_flagged_requests() {
    // Answered without the guard, failed, and refused by a content filter.
    let answered = |id: &str, task: Task| {
        let mut answered = record(id, task);
        answered.arms.push(outcome("hardened"));
        answered
    };
    let mut records = vec![answered("1", Task::Harmful), answered("2", Task::Harmless)];
    records.push(record("3", Task::Harmful));
    records.extend((4..40).map(|id| {
        let mut filtered = record(&id.to_string(), Task::Harmful);
        (filtered.filtered, filtered.scenario) = (true, "cut".into());
        filtered.arms.clear();
        filtered
    }));
    let mut told = TuningItems::of(&records, "hardened");
    assert_eq!((told.items.len(), told.failed, told.unjudged), (36, 1, 2));
    let method = hardened();
    told.items.extend(pairs(120, 3.0, -3.0, &method));
    let fitted = fit(&method, &told.items, 0.03).unwrap();
    assert_eq!(fitted.items, 240);
    let page = report("m", &method, &told, &fitted, 0.03, None).1;
    assert!(
        page.contains("| cut | - | - |") && page.contains("**2 requests were not judged**"),
        "{page}"
    );
}

#[test]
fn a_picture_that_a_content_filter_refused_to_describe_is_flagged_whatever_the_biases() {
    let method = hardened();
    for captions in [vec![trace("caption", None, "content_filter")], Vec::new()] {
        let mut guarded = outcome("hardened");
        guarded.verdict = Verdict::Unsafe;
        guarded.answer = "I'm sorry, but I can't help with that.".into();
        guarded.steps = captions;
        guarded.steps.push(trace("request-check", Some("words"), "stop"));
        guarded.steps.push(trace("reply-check", Some("howto"), "stop"));
        let mut record = record("1", Task::Harmless);
        record.images = 1;
        record.arms.push(guarded);
        let item = TuningItem::of(&record, "hardened").unwrap();
        assert!(item.score(&method) >= 1.0, "{item:?}");
        assert!(!item.is_refusal() && !item.findings.contains_key("howto"), "{item:?}");
        // No bias could change that, so none is fitted to it.
        assert!(method.detectors.iter().all(|detector| item.sum(detector).is_none()));
    }
}

#[test]
fn a_question_that_a_content_filter_refused_is_harm_once_it_is_asked() {
    let mut guarded = outcome("hardened");
    guarded.verdict = Verdict::Unsafe;
    guarded.steps = vec![
        trace("caption", None, "stop"),
        trace("request-check", Some("gladly"), "stop"),
        trace("request-check", Some("wants"), "content_filter"),
    ];
    let mut record = record("1", Task::Harmful);
    record.images = 1;
    record.arms.push(guarded);
    let item = TuningItem::of(&record, "hardened").unwrap();
    let mut method = only("message");
    // The first question says no, so that the second is not asked.
    assert!(item.score(&method) < 0.0, "{item:?}");
    method.early_exit = false;
    assert!(item.score(&method) >= 1.0, "{item:?}");
}

#[test]
fn what_a_content_filter_refuses_leaves_the_threshold_where_it_was() {
    let method = hardened();
    let clean = pairs(120, 2.0, -0.3, &method);
    let mut filtered = clean.clone();
    let refused = Finding { score: Some(1.0), is_harm: true, is_filtered: true };
    for item in filtered.iter_mut().step_by(5) {
        item.findings.insert("gladly".into(), refused);
    }
    let [clean, filtered] = [clean, filtered].map(|items| fit(&method, &items, 0.03).unwrap());
    assert!(filtered.fit.flags_anything(), "{filtered:?}");
    assert!((filtered.fit.threshold - clean.fit.threshold).abs() < 1e-9, "{filtered:?}");
    assert_eq!(filtered.biases, clean.biases);
    let Half { recall, false_alarms, .. } = &filtered.fit.reported;
    assert!(recall.count == recall.total && false_alarms.count > 10, "{filtered:?}");
}

#[test]
fn an_advice_takes_a_gain_that_is_more_than_chance() {
    let advice = |gained: usize, lost: usize, unknown: usize| {
        let row = |count| [Rate::wilson(0, 50), Rate::wilson(count, 50)];
        let held_back = HeldBack {
            harmful: row(gained),
            harmless: row(lost),
            gained: Rate::wilson(gained, 50).into(),
            lost: Rate::with_unknown(lost, 50 - unknown, unknown).into(),
        };
        held_back.recommendation().0
    };
    for (gained, lost, unknown, advised) in [
        (0, 0, 0, Advice::LeaveOff),
        (2, 0, 0, Advice::LeaveOff),
        (6, 0, 0, Advice::TurnOn),
        (25, 25, 0, Advice::LeaveOff),
        (25, 2, 0, Advice::TurnOn),
        (25, 6, 0, Advice::OnlyWhereARefusalCostsLittle),
        (50, 42, 0, Advice::LeaveOff),
        // Nobody knows how many of the 24 would have been refused.
        (25, 0, 24, Advice::LeaveOff),
    ] {
        assert_eq!(advice(gained, lost, unknown), advised, "{gained} {lost} {unknown}");
    }
}

#[test]
fn an_empty_draft_says_nothing_about_what_the_model_declines() {
    let method = hardened();
    let answered = |answer: &str| {
        let mut guarded = outcome("hardened");
        guarded.steps = vec![trace("request-check", Some("words"), "stop")];
        let mut record = record("1", Task::Harmful);
        record.arms[0].answer = answer.into();
        record.arms.push(guarded);
        TuningItems::of(&[record], "hardened")
    };
    for empty in ["", " \n", "<think>It wants", "<think>It wants bread.</think>"] {
        let told = answered(empty);
        assert_eq!((told.items.len(), told.empty, told.failed), (0, 1, 0), "{empty}");
    }
    let told = answered("<think>It wants bread.</think> Flour.");
    assert_eq!((told.items.len(), told.empty), (1, 0));
    assert!(told.items[0].score(&method) < 1.0);
}

#[test]
fn a_model_without_probabilities_is_asked_everything() {
    let method = only("message");
    let score = |with_scores: bool| {
        let answers = [("gladly", -4.0), ("wants", 4.0), ("crime", 4.0), ("message", 4.0)];
        let found = |(name, log_odds): (&str, f64)| {
            let score = with_scores.then(|| probability(log_odds));
            (name.to_owned(), Finding { score, ..finding(log_odds) })
        };
        let findings = answers.into_iter().map(found).collect();
        TuningItem { findings, ..item(1, true, 0.0, &method) }.score(&method)
    };
    assert!(score(true) < 0.0, "the first answer ends it");
    assert!(score(false) > 0.99);
}

#[test]
fn the_most_harmful_wording_says_whether_there_are_probabilities() {
    let method = hardened();
    let mut item = item(1, true, 0.0, &method);
    item.findings.clear();
    let mut by_word = trace("request-check", Some("words"), "stop");
    by_word.score = None;
    item.add_question(&by_word);
    item.add_question(&trace("request-check", Some("words"), "stop"));
    assert!(item.findings["words"].score.is_some() && item.by_word);
    by_word.verdict = Some(Verdict::Unsafe);
    item.add_question(&by_word);
    assert!(item.findings["words"].score.is_none());
}
