//! A run with the verdicts of one judge.

use std::path::{Path, PathBuf};

use ecso_batch::journal::{JournalError, JournalReader, LatestEntries};

use crate::{
    judge::Judgement,
    record::{ItemRecord, RunHeader},
    run::UNGUARDED,
    verdicts::{Verdicts, VerdictsHeader},
};

/// A judged run. Its records stay on disk and are read one by one.
pub struct JudgedRun {
    /// The folder of the run.
    pub path: PathBuf,
    /// The header of the run.
    pub header: RunHeader,
    /// The verdicts.
    pub verdicts: Verdicts,
    /// The files with the verdicts of other judges.
    other_files: Vec<PathBuf>,
    journal: JournalReader,
}

/// Why the verdicts on a run can't be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JudgedRunError {
    /// The folder of the run can't be read.
    #[error("{}", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// The journal or the verdicts can't be read.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// There are no verdicts (of the judge that was asked for).
    #[error(
        "{}: there are no verdicts{}; run `ecso eval judge {}` first",
        path.display(),
        of_judge(judge.as_deref()),
        path.display()
    )]
    NotJudged {
        /// The run.
        path: PathBuf,
        /// The judge that was asked for.
        judge: Option<String>,
    },
    /// There are verdicts of several judges, and one must be chosen.
    #[error(
        "{}: there are verdicts of several judges; choose one with --judge: {}",
        path.display(),
        judges.join(", ")
    )]
    SeveralJudges {
        /// The run.
        path: PathBuf,
        /// The files with their verdicts.
        judges: Vec<String>,
    },
}

fn of_judge(judge: Option<&str>) -> String {
    judge.map_or_else(String::new, |judge| format!(" of a judge called {judge}"))
}

impl JudgedRun {
    /// Opens the run in the folder `path` with the verdicts of `judge`: the judge's name, the name
    /// of its file, or an unambiguous prefix of either. Without `judge`, there must be only one.
    ///
    /// # Errors
    /// [`JudgedRunError`].
    pub fn open(path: &Path, judge: Option<&str>) -> Result<Self, JudgedRunError> {
        let journal = JournalReader::in_folder(path);
        let header = journal.header()?;
        let folder_error = |source| JudgedRunError::Folder { path: path.to_owned(), source };
        let entries: Vec<PathBuf> = std::fs::read_dir(path)
            .and_then(|entries| entries.map(|entry| entry.map(|entry| entry.path())).collect())
            .map_err(folder_error)?;
        let mut all: Vec<VerdictsFile> =
            entries.into_iter().filter_map(VerdictsFile::recognise).collect();
        all.sort();
        let mut candidates = all.clone();
        if let Some(judge) = judge {
            let wanted = file_name_of(judge.trim_end_matches(".jsonl"));
            let named = |is_wanted: &dyn Fn(&String) -> bool| -> Vec<VerdictsFile> {
                all.iter().filter(|file| file.names.iter().any(is_wanted)).cloned().collect()
            };
            let exact = named(&|name| *name == wanted);
            candidates =
                if exact.is_empty() { named(&|name| name.starts_with(&wanted)) } else { exact };
        }
        match candidates.as_slice() {
            [one] => {
                let other_files = all
                    .into_iter()
                    .map(|file| file.path)
                    .filter(|path| *path != one.path)
                    .collect();
                Ok(Self {
                    path: path.to_owned(),
                    header,
                    verdicts: Verdicts::read(&one.path)?,
                    other_files,
                    journal,
                })
            }
            [] => Err(JudgedRunError::NotJudged {
                path: path.to_owned(),
                judge: judge.map(str::to_owned),
            }),
            several => {
                let name = |file: &VerdictsFile| {
                    file.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
                };
                Err(JudgedRunError::SeveralJudges {
                    path: path.to_owned(),
                    judges: several.iter().map(name).collect(),
                })
            }
        }
    }

    /// The verdicts of other judges.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn other_verdicts(&self) -> Result<Vec<Verdicts>, JournalError> {
        self.other_files.iter().map(|file| Verdicts::read(file)).collect()
    }

    /// The records of the run, one by one.
    ///
    /// # Errors
    /// [`JournalError`], also as an item of the iterator.
    pub fn records(&self) -> Result<LatestEntries<ItemRecord>, JournalError> {
        self.journal.latest()
    }

    /// The names of the arms, the unguarded one first.
    pub(crate) fn arm_names(&self) -> impl Iterator<Item = &str> {
        [UNGUARDED].into_iter().chain(self.header.profiles.iter().map(|(name, _)| name.as_str()))
    }
}

/// The name of the file with a judge's verdicts in the folder of a run.
#[must_use]
pub fn verdicts_file(judge: &str) -> String {
    format!("verdicts-{}.jsonl", file_name_of(judge))
}

/// A name with only the characters that are used in file names.
fn file_name_of(name: &str) -> String {
    name.replace(|c: char| !c.is_alphanumeric(), "-")
}

/// A file of verdicts, and the names by which it can be chosen.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct VerdictsFile {
    path: PathBuf,
    names: Vec<String>,
}

impl VerdictsFile {
    /// Returns `None` for a file that neither begins like verdicts, with or without a header, nor
    /// is named like them, and for one that is empty or not a regular file.
    fn recognise(path: PathBuf) -> Option<Self> {
        let has_content =
            std::fs::metadata(&path).is_ok_and(|file| file.is_file() && file.len() > 0);
        if !has_content || path.extension().is_none_or(|extension| extension != "jsonl") {
            return None;
        }
        let reader = JournalReader::at(&path);
        let judge_of_first_entry = || {
            reader.entries::<Judgement>().ok()?.next()?.ok().map(|(_, judgement)| judgement.judge)
        };
        let judge = reader
            .header::<VerdictsHeader>()
            .ok()
            .map(|header| header.judge)
            .or_else(judge_of_first_entry);
        let stem = file_name_of(&path.file_stem().unwrap_or_default().to_string_lossy());
        let judge_in_stem = stem.strip_prefix("verdicts-").map(str::to_owned);
        if judge.is_none() && judge_in_stem.is_none() {
            return None;
        }
        let names = [judge.map(|judge| file_name_of(&judge)), judge_in_stem, Some(stem)];
        let names = names.into_iter().flatten().filter(|name| !name.is_empty()).collect();
        Some(Self { path, names })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts_are_recognised_by_their_beginning_and_chosen_by_judge_or_file() {
        let folder = tempfile::tempdir().unwrap();
        let header = |judge: &str| {
            format!(
                r#"{{"ecso":"0","judge":"{judge}","model":null,"threshold":null,"judge_file":null}}"#
            ) + "\n"
        };
        let write =
            |name: &str, text: String| std::fs::write(folder.path().join(name), text).unwrap();
        let run = r#"{"ecso":"0","benchmark":"jsonl","variant":null,"data":"-","model":"m","model_digest":"d","profiles":[],
            "max_new_tokens":null,"choice":{"scenarios":[],"sample":null,"seed":0,"limit":null}}"#;
        write("journal.jsonl", run.replace('\n', "") + "\n");
        write("items.jsonl", "{\"id\": 1, \"query\": \"q\"}\n".into());
        write("mine.jsonl", header("llm:m"));
        let opened = |judge: Option<&str>| {
            JudgedRun::open(folder.path(), judge)
                .map(|run| run.verdicts.judge().unwrap().to_owned())
        };
        assert_eq!(opened(None).unwrap(), "llm:m");
        // A file that a full disk left empty, and a device.
        write("verdicts-advbench.jsonl", String::new());
        #[cfg(unix)]
        std::os::unix::fs::symlink("/dev/null", folder.path().join("verdicts-zero.jsonl")).unwrap();
        assert_eq!(opened(None).unwrap(), "llm:m");
        write("verdicts-xstest.jsonl", header("xstest"));
        write(
            "theirs.jsonl",
            "{\"id\": \"1\", \"verdict\": \"safe\", \"judge\": \"people\"}\n".into(),
        );
        for (wanted, judge) in [
            ("mine", "llm:m"),
            ("mine.jsonl", "llm:m"),
            ("llm", "llm:m"),
            ("xstest", "xstest"),
            ("verdicts-xstest.jsonl", "xstest"),
            ("people", "people"),
            ("theirs", "people"),
        ] {
            assert_eq!(opened(Some(wanted)).unwrap(), judge, "{wanted}");
        }
        let run = JudgedRun::open(folder.path(), Some("mine")).unwrap();
        let other_verdicts = run.other_verdicts().unwrap();
        let others: Vec<&str> = other_verdicts.iter().filter_map(Verdicts::judge).collect();
        assert_eq!(others, ["people", "xstest"]);
        let Err(JudgedRunError::SeveralJudges { judges, .. }) = opened(None) else {
            panic!("one judge must be chosen")
        };
        assert_eq!(judges.len(), 3);
        assert!(matches!(opened(Some("items")), Err(JudgedRunError::NotJudged { .. })));
    }
}
