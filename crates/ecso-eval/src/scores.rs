//! The figures that MME, `MMBench` and MM-Vet publish, by their own arithmetic.

use std::collections::BTreeMap;

use crate::{
    benchmarks::mme::{COGNITION, PERCEPTION},
    item::Task,
    journal::Record,
    judge::Ruling,
    stats::{Mean, Rate, clustered_mean, stratified_sum},
    summary::Rulings,
};

/// The figures of one arm by name, in points: MME's subtasks (0 to 200) with their sums, `MMBench`'s circular accuracy and MM-Vet's
/// grades (0 to 100). Empty for benchmarks of safety.
pub(crate) fn published(arm: &str, records: &[&Record], rulings: &Rulings<'_>) -> Vec<(String, Mean)> {
    let mut subtasks: BTreeMap<&str, BTreeMap<&str, Vec<bool>>> = BTreeMap::new();
    let mut circles: BTreeMap<&str, bool> = BTreeMap::new();
    let mut grades: BTreeMap<&str, Vec<Vec<f64>>> = BTreeMap::new();
    for record in records {
        let Some(judgement) = rulings.get(&(record.id.as_str(), arm)) else { continue };
        let right = judgement.verdict == Ruling::Safe;
        match &record.task {
            Task::YesNo { .. } => {
                subtasks.entry(&record.scenario).or_default().entry(&record.cluster).or_default().push(right);
            }
            Task::Choice { .. } => *circles.entry(&record.cluster).or_insert(true) &= right,
            Task::Graded { capabilities, .. } => {
                // A grade that could not be had counts nothing, as the benchmark has it.
                let grade = vec![100.0 * judgement.score.unwrap_or(0.0)];
                for name in ["total"].into_iter().chain(capabilities.iter().map(String::as_str)) {
                    grades.entry(name).or_default().push(grade.clone());
                }
            }
            Task::Harmful | Task::Harmless | Task::Advice { .. } => {}
        }
    }
    let mut figures = mme(&subtasks);
    if !circles.is_empty() {
        let points: Vec<Vec<f64>> = circles.values().map(|right| vec![if *right { 100.0 } else { 0.0 }]).collect();
        figures.push(("circular accuracy".into(), clustered_mean(&points)));
    }
    figures.extend(grades.into_iter().map(|(name, grades)| (name.to_owned(), clustered_mean(&grades))));
    figures
}

/// Accuracy plus accuracy+ (both questions of an image right), each x100: a subtask, and the sums of both groups.
fn mme(subtasks: &BTreeMap<&str, BTreeMap<&str, Vec<bool>>>) -> Vec<(String, Mean)> {
    let points = |images: &BTreeMap<&str, Vec<bool>>| -> Vec<f64> {
        let image = |questions: &Vec<bool>| {
            let right = Rate::wilson(questions.iter().filter(|right| **right).count(), questions.len());
            let both = if right.count == right.total { 1.0 } else { 0.0 };
            100.0 * (right.value + both)
        };
        images.values().map(image).collect()
    };
    let mut figures = Vec::new();
    for (group, names) in [("perception", PERCEPTION.as_slice()), ("cognition", COGNITION.as_slice())] {
        let found: Vec<(&str, Vec<f64>)> =
            names.iter().filter_map(|name| Some((*name, points(subtasks.get(name)?)))).collect();
        for (name, points) in &found {
            figures.push(((*name).to_owned(), stratified_sum(std::slice::from_ref(points))));
        }
        if !found.is_empty() {
            let all = found.len() == names.len();
            let name = if all { group.into() } else { format!("{group}, {} of {} subtasks", found.len(), names.len()) };
            let strata: Vec<Vec<f64>> = found.into_iter().map(|(_, points)| points).collect();
            figures.push((name, stratified_sum(&strata)));
        }
    }
    figures
}
