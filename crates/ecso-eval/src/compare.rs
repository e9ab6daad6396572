//! Compares two runs: is B better than A?

use std::{collections::HashMap, fmt::Write as _};

use ecso_batch::journal::Key;

use crate::{
    assessment::Assessment,
    judged_run::JudgedRun,
    record::ItemRecord,
    report::percent,
    run_set::{RunSetError, check_same_judge, item_key},
    stats::{Paired, Rate},
    text::in_markdown,
};

/// Compares two runs, item by item, as Markdown: the share of good answers on the items that both
/// have, and the exact `McNemar` p value of the difference. Arms with the same profile are
/// compared; if each run has only one profile, those two are compared. Two items are the same if
/// their id, request and task are equal. Takes about 80 bytes of memory per item.
///
/// # Errors
/// [`RunSetError`] if the runs have different judges or no item in common.
pub fn compare(a: &JudgedRun, b: &JudgedRun) -> Result<String, RunSetError> {
    check_same_judge(a, b)?;
    let mut out = format!(
        "A: {}\nB: {}\n\n\
         | A | B | items in both | A good | B good | only A | only B | McNemar |\n\
         | --- | --- | --- | --- | --- | --- | --- | --- |\n",
        title(a),
        title(b)
    );
    let mut pairs: Vec<ArmPair<'_>> = arm_pairs(a, b);
    let is_good = |run: &JudgedRun, record: &ItemRecord, arm| {
        Assessment::of(record, arm, &run.verdicts).is_good(&record.task)
    };
    let mut good_in_b: HashMap<Key, Vec<Option<bool>>> = HashMap::new();
    let (mut matched_a, mut matched_b) = (0, 0);
    for record in b.records()? {
        let record = record?;
        matched_b += b.verdicts.count_matching(&record);
        let good = pairs.iter().map(|pair| is_good(b, &record, pair.arms.1)).collect();
        good_in_b.insert(item_key(&record, ""), good);
    }
    let (mut in_both, mut only_in_a) = (0, 0);
    for record in a.records()? {
        let record = record?;
        matched_a += a.verdicts.count_matching(&record);
        let Some(good_in_b) = good_in_b.remove(&item_key(&record, "")) else {
            only_in_a += 1;
            continue;
        };
        in_both += 1;
        for (pair, good_in_b) in pairs.iter_mut().zip(good_in_b) {
            pair.add(is_good(a, &record, pair.arms.0), good_in_b);
        }
    }
    let only_in_b = good_in_b.len();
    if in_both == 0 {
        return Err(RunSetError::NothingInCommon { a: a.path.clone(), b: b.path.clone() });
    }
    for pair in &pairs {
        pair.write_row(&mut out);
    }
    if only_in_a + only_in_b > 0 {
        let _ = writeln!(
            out,
            "\nNot compared: {only_in_a} items that are only in A, {only_in_b} that are only in B."
        );
    }
    let unpaired_a = unpaired(a, |name| pairs.iter().any(|pair| pair.arms.0 == name));
    let unpaired_b = unpaired(b, |name| pairs.iter().any(|pair| pair.arms.1 == name));
    for (run, names) in [("A", unpaired_a), ("B", unpaired_b)] {
        if !names.is_empty() {
            let _ = writeln!(out, "\nNot compared: {names}, which only {run} has.");
        }
    }
    for (name, run, matched) in [("A", a, matched_a), ("B", b, matched_b)] {
        for warning in run.verdicts.warnings(Some(matched)) {
            let _ = writeln!(out, "\n{name}: {}.", in_markdown(&warning));
        }
    }
    Ok(out)
}

/// The benchmark, model and judge of a run.
fn title(run: &JudgedRun) -> String {
    let header = &run.header;
    let variant =
        header.variant.as_ref().map_or_else(String::new, |variant| format!(" ({variant})"));
    in_markdown(&format!(
        "{}{variant} on {}, judged by {}",
        header.benchmark,
        header.model,
        run.verdicts.judge().unwrap_or("an unnamed judge")
    ))
}

/// The names of the arms that are not compared.
fn unpaired(run: &JudgedRun, is_paired: impl Fn(&str) -> bool) -> String {
    let names = run.arm_names().filter(|name| !is_paired(name));
    names.map(|name| format!("`{}`", in_markdown(name))).collect::<Vec<_>>().join(", ")
}

/// Two arms that are compared.
struct ArmPair<'a> {
    arms: (&'a str, &'a str),
    both_good: usize,
    paired: Paired,
}

impl ArmPair<'_> {
    fn add(&mut self, in_a: Option<bool>, in_b: Option<bool>) {
        self.both_good += usize::from(in_a == Some(true) && in_b == Some(true));
        self.paired.add(in_a, in_b);
    }

    fn write_row(&self, out: &mut String) {
        let Self { arms, both_good, paired } = self;
        let (name_a, name_b) = (in_markdown(arms.0), in_markdown(arms.1));
        let known = paired.known();
        let good = |only| {
            let rate = Rate::with_unknown(both_good + only, known, paired.unknown);
            percent(rate.with_value_if(known >= paired.unknown))
        };
        let _ = writeln!(
            out,
            "| {name_a} | {name_b} | {} | {} | {} | {} | {} | {} |",
            known + paired.unknown,
            good(paired.only_first),
            good(paired.only_second),
            paired.only_first,
            paired.only_second,
            paired.p_text()
        );
    }
}

fn arm_pairs<'a>(a: &'a JudgedRun, b: &'a JudgedRun) -> Vec<ArmPair<'a>> {
    let names_a: Vec<&str> = a.arm_names().collect();
    let names_b: Vec<&str> = b.arm_names().collect();
    let pairs = match (names_a.as_slice(), names_b.as_slice()) {
        ([unguarded_a, profile_a], [unguarded_b, profile_b]) => {
            vec![(*unguarded_a, *unguarded_b), (*profile_a, *profile_b)]
        }
        _ => {
            names_a.iter().filter_map(|name| Some((*name, counterpart(&names_b, name)?))).collect()
        }
    };
    pairs
        .into_iter()
        .map(|arms| ArmPair { arms, both_good: 0, paired: Paired::default() })
        .collect()
}

/// The arm with this name; otherwise the one with the same profile, but other fields changed. Such
/// names differ only in their trailing `+`.
fn counterpart<'a>(names: &[&'a str], wanted: &str) -> Option<&'a str> {
    let base = |name: &str| name.trim_end_matches('+').to_owned();
    let exact = names.iter().find(|name| **name == wanted);
    exact.or_else(|| names.iter().find(|name| base(name) == base(wanted))).copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        item::Task,
        judge::Ruling::{Refusal, Safe},
        testing::{item, judged_run, run_header},
    };

    #[test]
    fn arms_are_paired_by_name_then_by_profile() {
        for (names, paired_with) in [
            (&["unguarded", "hardened+", "hardened"][..], Some("hardened")),
            (&["unguarded", "hardened+"], Some("hardened+")),
            (&["unguarded", "paper"], None),
        ] {
            assert_eq!(counterpart(names, "hardened"), paired_with);
        }
    }

    #[test]
    fn runs_are_compared_on_the_same_requests_under_the_same_judge() {
        let folder = tempfile::tempdir().unwrap();
        let run = |name: &str, threshold, requests: &[&str]| {
            let items: Vec<_> = (0..)
                .zip(requests)
                .map(|(id, request)| item(id, request, Task::Harmless, [Safe, Refusal]))
                .collect();
            judged_run(&folder.path().join(name), &run_header("m", "x"), threshold, &items)
        };
        let bread = run("bread", 0.5, &["bread", "roll", "cake"]);
        let compared = compare(&bread, &run("some", 0.5, &["bread", "pie"])).unwrap();
        assert!(compared.contains("| paper | paper | 1 |"), "{compared}");
        let not_compared = "Not compared: 2 items that are only in A, 1 that are only in B.";
        assert!(compared.contains(not_compared), "{compared}");
        let error = compare(&bread, &run("none", 0.5, &["tea", "milk"])).unwrap_err().to_string();
        assert!(error.contains("no item in common"), "{error}");
        let error = compare(&bread, &run("judge", 0.6, &["bread"])).unwrap_err().to_string();
        assert!(error.contains("the --threshold of their verdicts"), "{error}");
    }
}
