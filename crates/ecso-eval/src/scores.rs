//! The figures that MME, `MMBench` and MM-Vet publish, by their own arithmetic.

use std::collections::BTreeMap;

use crate::{
    benchmarks::mme::{COGNITION, PERCEPTION},
    item::Task,
    record::ItemRecord,
    standing::Standing,
    stats::{Mean, clustered_mean, stratified_sum},
    summary::Lack,
};

/// Most points of an image of MME: for the share of right answers, and for both being right.
const MME_POINTS: f64 = 200.0;

/// Questions about an image of MME; an image of which fewer were run, as in a sample, says nothing
/// of accuracy+.
const MME_QUESTIONS: usize = 2;

/// What these benchmarks count of an arm's answers, record by record.
#[derive(Debug, Clone, Default)]
pub(crate) struct Points {
    /// MME: answers by subtask and image.
    subtasks: BTreeMap<String, BTreeMap<String, Answers>>,
    /// `MMBench`: options and answers by circle, a question with its options turned round.
    circles: BTreeMap<String, (usize, Answers)>,
    /// MM-Vet: grades, in all and by capability.
    grades: BTreeMap<String, Grades>,
}

/// Answers that count together.
#[derive(Debug, Clone, Copy, Default)]
struct Answers {
    right: u32,
    wrong: u32,
    unknown: u32,
}

impl Answers {
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

    /// Whether all are right; none where that hangs on what nobody knows.
    fn all_right(self) -> Option<bool> {
        if self.wrong > 0 { Some(false) } else { (self.unknown == 0).then_some(true) }
    }
}

#[derive(Debug, Clone, Default)]
struct Grades {
    known: Vec<f64>,
    unknown: usize,
}

impl Points {
    pub(crate) fn add(&mut self, record: &ItemRecord, standing: Standing) {
        let good = standing.is_good(&record.task);
        match &record.task {
            Task::YesNo { .. } => {
                let images = self.subtasks.entry(record.scenario.clone()).or_default();
                images.entry(record.cluster.clone()).or_default().add(good);
            }
            Task::Choice { options, .. } => {
                let (wanted, answers) = self.circles.entry(record.cluster.clone()).or_default();
                *wanted = options.len();
                answers.add(good);
            }
            Task::Graded { capabilities, .. } => {
                let grade = match standing {
                    Standing::Judged(_, score) => Some(100.0 * score.unwrap_or(0.0)),
                    Standing::Filtered => Some(0.0),
                    Standing::Unjudged | Standing::Failed | Standing::Missing => None,
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
    /// circular accuracy and MM-Vet's grades (0 to 100). What nobody knows is in no figure and
    /// widens its interval, as do the items that the run lacks, which may belong to any. Empty for
    /// benchmarks of safety.
    pub(crate) fn figures(self, lack: Lack) -> Vec<(String, Mean)> {
        let mean = |known: &[Vec<f64>], unknown: usize| {
            let mean = clustered_mean(known).with_unknown(unknown + lack.absent, 100.0);
            mean.with_value_if(lack.leaves_enough(known.len(), unknown))
        };
        let mut figures = mme(&self.subtasks, lack);
        // Of a circle that was run in part, as a sample has it, nobody can say.
        let whole = self.circles.values().filter(|(wanted, answers)| answers.count() >= *wanted);
        let circles: Vec<Option<bool>> = whole.map(|(_, answers)| answers.all_right()).collect();
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

/// Accuracy plus accuracy+ (both questions of an image right), each x100: a subtask, and the sums
/// of both groups.
fn mme(subtasks: &BTreeMap<String, BTreeMap<String, Answers>>, lack: Lack) -> Vec<(String, Mean)> {
    // Points of the images of which all is known, and how many others there are.
    let points = |images: &BTreeMap<String, Answers>| -> (Vec<f64>, usize) {
        let whole: Vec<&Answers> =
            images.values().filter(|answers| answers.count() >= MME_QUESTIONS).collect();
        let known = whole.iter().filter(|answers| answers.unknown == 0);
        let points: Vec<f64> = known
            .map(|answers| {
                let share = f64::from(answers.right) / f64::from(answers.right + answers.wrong);
                100.0 * (share + if answers.wrong == 0 { 1.0 } else { 0.0 })
            })
            .collect();
        let unknown = whole.len() - points.len();
        (points, unknown)
    };
    let sum = |strata: &[(Vec<f64>, usize)]| {
        let (known, unknown) = strata
            .iter()
            .fold((0, 0), |sum, (points, unknown)| (sum.0 + points.len(), sum.1 + unknown));
        let widened: Vec<_> = strata
            .iter()
            .map(|(points, unknown)| (points.clone(), unknown + lack.absent))
            .collect();
        stratified_sum(&widened, MME_POINTS).with_value_if(lack.leaves_enough(known, unknown))
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
            arms: Vec::new(),
            error: None,
            filtered: false,
            of_unknown_kind: false,
            made_of: String::new(),
        }
    }

    #[test]
    fn what_nobody_knows_is_in_no_figure_and_widens_each() {
        let right = Standing::Judged(true, Some(1.0));
        let options = vec![('A', "bread".to_owned())];
        for task in [
            Task::YesNo { yes: true },
            Task::Choice { answer: 'A', options },
            Task::Graded { truth: "bread".into(), capabilities: Vec::new() },
        ] {
            let figures = |unknown: Option<Standing>, absent| {
                let mut points = Points::default();
                for (cluster, standing) in [("a", Some(right)), ("b", Some(right)), ("c", unknown)]
                {
                    let record = record(cluster, task.clone());
                    for standing in standing.into_iter().flat_map(|standing| [standing; 2]) {
                        points.add(&record, standing);
                    }
                }
                points.figures(Lack { recorded: 4, absent })
            };
            let known = figures(None, 0);
            let ranges = [
                figures(Some(Standing::Unjudged), 0),
                figures(Some(Standing::Missing), 0),
                figures(Some(Standing::Failed), 0),
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
