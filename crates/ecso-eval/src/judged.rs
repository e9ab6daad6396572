//! A run with what one judge says of it.

use std::path::{Path, PathBuf};

use ecso_batch::journal::{JournalError, Latest, Saved};

use crate::{
    judge::Judgement,
    record::{ItemRecord, RunHeader},
    verdicts::{Verdicts, VerdictsHeader},
};

/// A judged run. Its records stay on disk, and are read one by one.
pub struct JudgedRun {
    /// Its folder.
    pub path: PathBuf,
    /// What the run is.
    pub header: RunHeader,
    /// The verdicts.
    pub verdicts: Verdicts,
    /// Files of other judges' verdicts.
    others: Vec<PathBuf>,
    saved: Saved,
}

/// Why a run's verdicts can't be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JudgedError {
    /// Its folder can't be read.
    #[error("{}", path.display())]
    Folder {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Its journal, or its verdicts.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// There are no verdicts (of the judge that was asked for).
    #[error("{}: nobody{} has judged it; ecso eval judge {}", path.display(), called(judge.as_deref()), path.display())]
    NotJudged {
        /// The run.
        path: PathBuf,
        /// The judge that was asked for.
        judge: Option<String>,
    },
    /// Several judges have, and one must be named.
    #[error("{}: name one judge with --judge: {}", path.display(), judges.join(", "))]
    SeveralJudges {
        /// The run.
        path: PathBuf,
        /// Their files.
        judges: Vec<String>,
    },
}

fn called(judge: Option<&str>) -> String {
    judge.map_or_else(String::new, |judge| format!(" called {judge}"))
}

impl JudgedRun {
    /// The run in the folder `path`, with the verdicts of `judge`: the judge's name, that of its
    /// file, or the beginning of one that tells it from others. None is the only one.
    ///
    /// # Errors
    /// [`JudgedError`].
    pub fn open(path: &Path, judge: Option<&str>) -> Result<Self, JudgedError> {
        let saved = Saved::folder(path);
        let header = saved.header()?;
        let folder = |source| JudgedError::Folder { path: path.to_owned(), source };
        let entries: Vec<PathBuf> = std::fs::read_dir(path)
            .and_then(|entries| entries.map(|entry| entry.map(|entry| entry.path())).collect())
            .map_err(folder)?;
        let mut files: Vec<Names> = entries.into_iter().filter_map(Names::of).collect();
        files.sort();
        let all = files.clone();
        if let Some(judge) = judge {
            let wanted = plain(judge.trim_end_matches(".jsonl"));
            let are_named = |is: &dyn Fn(&String) -> bool| -> Vec<Names> {
                files.iter().filter(|file| file.names.iter().any(is)).cloned().collect()
            };
            let exact = are_named(&|name| *name == wanted);
            files =
                if exact.is_empty() { are_named(&|name| name.starts_with(&wanted)) } else { exact };
        }
        match files.as_slice() {
            [one] => {
                let others = all
                    .into_iter()
                    .map(|names| names.file)
                    .filter(|file| *file != one.file)
                    .collect();
                Ok(Self {
                    path: path.to_owned(),
                    header,
                    verdicts: Verdicts::read(&one.file)?,
                    others,
                    saved,
                })
            }
            [] => Err(JudgedError::NotJudged {
                path: path.to_owned(),
                judge: judge.map(str::to_owned),
            }),
            several => {
                let name = |names: &Names| {
                    names.file.file_name().unwrap_or_default().to_string_lossy().into_owned()
                };
                Err(JudgedError::SeveralJudges {
                    path: path.to_owned(),
                    judges: several.iter().map(name).collect(),
                })
            }
        }
    }

    /// What other judges say of the run.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn others(&self) -> Result<Vec<Verdicts>, JournalError> {
        self.others.iter().map(|file| Verdicts::read(file)).collect()
    }

    /// The run's records, one by one.
    ///
    /// # Errors
    /// [`JournalError`], also of every record.
    pub fn records(&self) -> Result<Latest<ItemRecord>, JournalError> {
        self.saved.latest()
    }
}

/// The file of a judge's verdicts in the folder of a run.
#[must_use]
pub fn verdicts_file(judge: &str) -> String {
    format!("verdicts-{}.jsonl", plain(judge))
}

/// A name as files have it.
fn plain(name: &str) -> String {
    name.replace(|c: char| !c.is_alphanumeric(), "-")
}

/// A file of verdicts, and what it can be called.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Names {
    file: PathBuf,
    names: Vec<String>,
}

impl Names {
    /// None of a file that neither begins as verdicts do, with a header or without, nor is called
    /// so; none of one that is empty, or no regular file.
    fn of(file: PathBuf) -> Option<Self> {
        let is_filled = std::fs::metadata(&file).is_ok_and(|file| file.is_file() && file.len() > 0);
        if !is_filled || file.extension().is_none_or(|extension| extension != "jsonl") {
            return None;
        }
        let saved = Saved::file(&file);
        let first = || {
            saved.entries::<Judgement>().ok()?.next()?.ok().map(|(_, judgement)| judgement.judge)
        };
        let judge = saved.header::<VerdictsHeader>().ok().map(|header| header.judge).or_else(first);
        let stem = plain(&file.file_stem().unwrap_or_default().to_string_lossy());
        let called = stem.strip_prefix("verdicts-").map(str::to_owned);
        if judge.is_none() && called.is_none() {
            return None;
        }
        let names = [judge.map(|judge| plain(&judge)), called, Some(stem)].into_iter().flatten();
        Some(Self { names: names.filter(|name| !name.is_empty()).collect(), file })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts_are_known_by_how_they_begin_and_found_by_judge_or_file() {
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
        let called = |judge: Option<&str>| {
            JudgedRun::open(folder.path(), judge)
                .map(|run| run.verdicts.judge().unwrap().to_owned())
        };
        assert_eq!(called(None).unwrap(), "llm:m");
        // What a full disk left, and a device.
        write("verdicts-advbench.jsonl", String::new());
        #[cfg(unix)]
        std::os::unix::fs::symlink("/dev/null", folder.path().join("verdicts-zero.jsonl")).unwrap();
        assert_eq!(called(None).unwrap(), "llm:m");
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
            assert_eq!(called(Some(wanted)).unwrap(), judge, "{wanted}");
        }
        let run = JudgedRun::open(folder.path(), Some("mine")).unwrap();
        let others: Vec<String> =
            run.others().unwrap().iter().filter_map(Verdicts::judge).map(str::to_owned).collect();
        assert_eq!(others, ["people", "xstest"]);
        assert!(
            matches!(called(None), Err(JudgedError::SeveralJudges { judges, .. }) if judges.len() == 3)
        );
        assert!(matches!(called(Some("items")), Err(JudgedError::NotJudged { .. })));
    }
}
