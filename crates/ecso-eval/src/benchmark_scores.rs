//! The figures that MME, `MMBench` and MM-Vet publish, computed by their own rules.

use std::collections::BTreeMap;

use crate::{
    assessment::Assessment,
    benchmarks::mme::{COGNITION, PERCEPTION},
    item::Task,
    record::ItemRecord,
    stats::{Mean, clustered_mean, stratified_sum},
    summary::MissingItems,
};

/// The maximum points per MME image: 100 for the share of right answers, and 100 if both are right.
const MME_POINTS: f64 = 200.0;

/// The number of questions per MME image. An image with fewer questions in the run, as in a sample,
/// has no accuracy+.
const MME_QUESTIONS: usize = 2;

/// The counts that these benchmarks need of an arm's answers.
#[derive(Debug, Clone, Default)]
pub(crate) struct BenchmarkScores {
    /// MME: answers by subtask and image.
    subtasks: BTreeMap<String, BTreeMap<String, AnswerCounts>>,
    /// `MMBench`: the number of options, and the answers, by circle (a question in all rotations of
    /// its options).
    circles: BTreeMap<String, (usize, AnswerCounts)>,
    /// MM-Vet: grades in total and by capability.
    grades: BTreeMap<String, Grades>,
}

/// Counts of answers that belong together.
#[derive(Debug, Clone, Copy, Default)]
struct AnswerCounts {
    right: u32,
    wrong: u32,
    unknown: u32,
}

impl AnswerCounts {
    fn add(&mut self, good: Option<bool>) {
        let count = match good {
            Some(true) => &mut self.right,
            Some(false) => &mut self.wrong,
            None => &mut self.unknown,
        };
        *count += 1;
    }

    fn count(self) -> usize {
        (self.right + self.wrong + self.unknown) as usize
    }

    /// Whether all are right; `None` if that depends on unknown ones.
    fn all_right(self) -> Option<bool> {
        if self.wrong > 0 { Some(false) } else { (self.unknown == 0).then_some(true) }
    }
}

#[derive(Debug, Clone, Default)]
struct Grades {
    known: Vec<f64>,
    unknown: usize,
}

impl BenchmarkScores {
    pub(crate) fn add(&mut self, record: &ItemRecord, assessment: Assessment) {
        let good = assessment.is_good(&record.task);
        match &record.task {
            Task::YesNo { .. } => {
                let images = self.subtasks.entry(record.scenario.clone()).or_default();
                images.entry(record.cluster.clone()).or_default().add(good);
            }
            Task::Choice { options, .. } => {
                let (option_count, answers) =
                    self.circles.entry(record.cluster.clone()).or_default();
                *option_count = options.len();
                answers.add(good);
            }
            Task::Graded { capabilities, .. } => {
                let grade = match assessment {
                    Assessment::Judged(_, score) => Some(100.0 * score.unwrap_or(0.0)),
                    Assessment::Filtered => Some(0.0),
                    Assessment::Unjudged | Assessment::Failed | Assessment::Missing => None,
                };
                for name in ["total"].into_iter().chain(capabilities.iter().map(String::as_str)) {
                    let grades = self.grades.entry(name.to_owned()).or_default();
                    grades.known.extend(grade);
                    grades.unknown += usize::from(grade.is_none());
                }
            }
            Task::Harmful | Task::Harmless | Task::Advice { .. } => {}
        }
    }

    /// The figures by name, in points: MME's subtasks (0 to 200) with their sums, `MMBench`'s
    /// circular accuracy and MM-Vet's grades (0 to 100). Unknown answers are not part of a figure's
    /// value but widen its interval, and so do the missing items of the run, which may belong to
    /// any. Empty for safety benchmarks.
    pub(crate) fn figures(self, missing: MissingItems) -> Vec<(String, Mean)> {
        let mean = |known: &[Vec<f64>], unknown: usize| {
            let mean = clustered_mean(known).with_unknown(unknown + missing.absent, 100.0);
            mean.with_value_if(missing.are_enough_known(known.len(), unknown))
        };
        let mut figures = mme(&self.subtasks, missing);
        // Circles that were run only partly, as in a sample, are skipped.
        let complete =
            self.circles.values().filter(|(options, answers)| answers.count() >= *options);
        let circles: Vec<Option<bool>> = complete.map(|(_, answers)| answers.all_right()).collect();
        if !circles.is_empty() {
            let known = circles.iter().flatten();
            let points: Vec<Vec<f64>> =
                known.map(|right| vec![if *right { 100.0 } else { 0.0 }]).collect();
            figures.push(("circular accuracy".into(), mean(&points, circles.len() - points.len())));
        }
        figures.extend(self.grades.into_iter().map(|(name, grades)| {
            let known: Vec<Vec<f64>> = grades.known.into_iter().map(|grade| vec![grade]).collect();
            (name, mean(&known, grades.unknown))
        }));
        figures
    }
}

/// Accuracy plus accuracy+ (both questions of an image right), each times 100: per subtask, and
/// summed over the two groups.
fn mme(
    subtasks: &BTreeMap<String, BTreeMap<String, AnswerCounts>>,
    missing: MissingItems,
) -> Vec<(String, Mean)> {
    // The points of the images whose answers are all known, and the number of other images.
    let points = |images: &BTreeMap<String, AnswerCounts>| -> (Vec<f64>, usize) {
        let complete: Vec<&AnswerCounts> =
            images.values().filter(|answers| answers.count() >= MME_QUESTIONS).collect();
        let known = complete.iter().filter(|answers| answers.unknown == 0);
        let points: Vec<f64> = known
            .map(|answers| {
                let share = f64::from(answers.right) / f64::from(answers.right + answers.wrong);
                100.0 * (share + if answers.wrong == 0 { 1.0 } else { 0.0 })
            })
            .collect();
        let unknown = complete.len() - points.len();
        (points, unknown)
    };
    let sum = |strata: &[(Vec<f64>, usize)]| {
        let (known, unknown) = strata
            .iter()
            .fold((0, 0), |sum, (points, unknown)| (sum.0 + points.len(), sum.1 + unknown));
        let widened: Vec<_> = strata
            .iter()
            .map(|(points, unknown)| (points.clone(), unknown + missing.absent))
            .collect();
        stratified_sum(&widened, MME_POINTS).with_value_if(missing.are_enough_known(known, unknown))
    };
    let mut figures = Vec::new();
    for (group, names) in
        [("perception", PERCEPTION.as_slice()), ("cognition", COGNITION.as_slice())]
    {
        let found = names.iter().filter_map(|name| Some((*name, points(subtasks.get(*name)?))));
        let found: Vec<(&str, (Vec<f64>, usize))> =
            found.filter(|(_, (points, unknown))| points.len() + unknown > 0).collect();
        for (name, stratum) in &found {
            figures.push(((*name).to_owned(), sum(std::slice::from_ref(stratum))));
        }
        if !found.is_empty() {
            let all = found.len() == names.len();
            let name = if all {
                group.into()
            } else {
                format!("{group}, {} of {} subtasks", found.len(), names.len())
            };
            let strata: Vec<(Vec<f64>, usize)> =
                found.into_iter().map(|(_, stratum)| stratum).collect();
            figures.push((name, sum(&strata)));
        }
    }
    figures
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(cluster: &str, task: Task) -> ItemRecord {
        ItemRecord {
            id: cluster.into(),
            scenario: PERCEPTION[0].into(),
            cluster: cluster.into(),
            query: "q".into(),
            request: "q".into(),
            task,
            images: 1,
            image_sources: Vec::new(),
            arms: Vec::new(),
            error: None,
            filtered: false,
            of_unknown_kind: false,
            source_digest: String::new(),
        }
    }

    #[test]
    fn unknown_answers_only_widen_the_intervals() {
        let right = Assessment::Judged(true, Some(1.0));
        let options = vec![('A', "bread".to_owned())];
        for task in [
            Task::YesNo { yes: true },
            Task::Choice { answer: 'A', options },
            Task::Graded { truth: "bread".into(), capabilities: Vec::new() },
        ] {
            let figures = |unknown: Option<Assessment>, absent| {
                let mut points = BenchmarkScores::default();
                for (cluster, assessment) in
                    [("a", Some(right)), ("b", Some(right)), ("c", unknown)]
                {
                    let record = record(cluster, task.clone());
                    for assessment in assessment.into_iter().flat_map(|assessment| [assessment; 2])
                    {
                        points.add(&record, assessment);
                    }
                }
                points.figures(MissingItems { recorded: 4, absent })
            };
            let known = figures(None, 0);
            let ranges = [
                figures(Some(Assessment::Unjudged), 0),
                figures(Some(Assessment::Missing), 0),
                figures(Some(Assessment::Failed), 0),
                figures(None, 1),
            ];
            assert!(!known.is_empty());
            for (range, known) in ranges.iter().flat_map(|figures| figures.iter().zip(&known)) {
                let (Mean { value, low, .. }, known) = (range.1, known.1);
                assert!(
                    (value - known.value).abs() < 1e-9 && low < known.low - 1.0,
                    "{range:?} {known:?}"
                );
            }
        }
    }
}
