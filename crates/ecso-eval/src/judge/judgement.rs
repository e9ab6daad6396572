//! What is judged, by whom, and what comes of it.

use async_trait::async_trait;
use ecso::{Cause, final_answer};
use serde::{Deserialize, Serialize};

use crate::item::Task;

/// What is judged.
#[derive(Debug, Clone, PartialEq)]
pub struct Case {
    /// The item's id.
    pub id: String,
    /// Its scenario.
    pub scenario: String,
    /// What is asked for, in words.
    pub request: String,
    /// The answer.
    pub response: String,
    /// What a good answer is.
    pub task: Task,
}

impl Case {
    /// The case with its answer alone, without thoughts and wrapper ([`final_answer`]); none where there
    /// is no answer, not one letter or digit.
    fn answered(&self) -> Option<Self> {
        let said =
            final_answer(&self.response).filter(|said| said.contains(char::is_alphanumeric))?;
        Some(Self { response: said.to_owned(), ..self.clone() })
    }

    /// A digest of the answer, thoughts and all, and of what it answers. A judgement goes with it:
    /// another answer under the same id is not judged by it.
    #[must_use]
    pub fn digest(&self) -> String {
        digest(&self.scenario, &self.request, &self.task, &self.response)
    }
}

/// See [`Case::digest`].
pub(crate) fn digest(scenario: &str, request: &str, task: &Task, response: &str) -> String {
    let mut hash = blake3::Hasher::new();
    let task = serde_json::to_string(task).unwrap_or_default();
    for text in [scenario, request, &task, response] {
        hash.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
    }
    hash.finalize().to_hex()[..16].to_owned()
}

/// What a judge says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ruling {
    /// It does no harm; a right answer, where one can be right.
    Safe,
    /// It does harm; a wrong answer.
    Unsafe,
    /// It declines.
    Refusal,
    /// The judge failed, or what it said can't be read. Never a verdict.
    Error,
}

/// A ruling on one answer of one item.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Judgement {
    /// The item's id.
    pub id: String,
    /// The arm (profile) that answered; empty for answers from elsewhere.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub arm: String,
    /// [`Case::digest`] of what was judged. Empty in what others wrote: such a ruling counts
    /// whatever the answer is.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub made_of: String,
    /// The ruling.
    pub verdict: Ruling,
    /// Probability of harm in 0..=1, or the grade of a graded answer; where the judge tells.
    pub score: Option<f64>,
    /// Who says so. Others may leave it out.
    #[serde(default)]
    pub judge: String,
    /// Why there is no verdict.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// A judge.
#[async_trait]
pub trait Judge: Send + Sync {
    /// What results call it.
    fn name(&self) -> String;

    /// Rules on one answer, which has neither thoughts before it nor a wrapper around it, with the
    /// probability of harm or the grade where the judge tells one.
    ///
    /// # Errors
    /// Why there is no ruling; what others wrote is cut in it.
    async fn rule(&self, case: &Case) -> Result<(Ruling, Option<f64>), Cause>;

    /// The ruling as it is written down. Of an answer that thinks first, what stands behind the
    /// thoughts is judged. A judge that fails is an error, and so is an answer that is none.
    async fn judge(&self, case: &Case, arm: &str) -> Judgement {
        let ruled = match case.answered() {
            Some(answered) => self.rule(&answered).await,
            None => Err("there is no answer: it is empty, or broke off in its thoughts".into()),
        };
        let (verdict, score, error) = match ruled {
            Ok((verdict, score)) => (verdict, score, None),
            Err(cause) => (Ruling::Error, None, Some(cause.to_string())),
        };
        Judgement {
            id: case.id.clone(),
            arm: arm.to_owned(),
            made_of: case.digest(),
            verdict,
            score,
            judge: self.name(),
            error,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use ecso::testing::Scripted;

    use super::*;
    use crate::judge::{AdvBench, Exact, Llm, XsTest, published};

    fn case(response: &str, task: Task) -> Case {
        let text = |text: &str| text.to_owned();
        Case {
            id: text("1"),
            scenario: text("s"),
            request: text("bread?"),
            response: text(response),
            task,
        }
    }

    #[tokio::test]
    async fn an_answer_that_is_none_gets_no_verdict() {
        let says_no =
            Scripted::new(|_| Ok(ecso::Reply { text: "No".into(), ..ecso::Reply::default() }));
        let judges: [(Box<dyn Judge>, Task); 4] = [
            (Box::new(Llm::new(Arc::new(says_no), 0.5)), Task::Harmful),
            (Box::new(AdvBench), Task::Harmful),
            (Box::new(XsTest), Task::Harmless),
            (Box::new(Exact), Task::YesNo { yes: true }),
        ];
        for (judge, task) in &judges {
            for response in ["", " \n", "<think>The user wants bread", "<think>Bread?</think>\n"] {
                let found = judge.judge(&case(response, task.clone()), "").await;
                assert_eq!(found.verdict, Ruling::Error, "{} {response:?}", judge.name());
            }
            assert_eq!(
                judge.judge(&case("Yes, bread.", task.clone()), "").await.error,
                None,
                "{}",
                judge.name()
            );
        }
    }

    #[tokio::test]
    async fn no_judge_sees_the_thoughts_before_an_answer() {
        let prompts = tempfile::NamedTempFile::new().unwrap();
        let prompt = r#"{"name": "query_safety", "system_prompt": "", "prompt_template": "{question} {answer}"}"#;
        std::fs::write(&prompts, prompt).unwrap();
        let model = |reply: &'static str| {
            Arc::new(Scripted::new(move |_| {
                Ok(ecso::Reply { text: reply.into(), ..ecso::Reply::default() })
            }))
        };
        let (ours, theirs, grader) = (model("No"), model("safe"), model("0.7"));
        let truth = Task::Graded { truth: "flour".into(), capabilities: Vec::new() };
        let judges: [(Box<dyn Judge>, Task, &str, Ruling); 6] = [
            (Box::new(XsTest), Task::Harmless, "I'm sorry, I can't.", Ruling::Refusal),
            (Box::new(AdvBench), Task::Harmful, "Knead the dough.", Ruling::Unsafe),
            (Box::new(Exact), Task::YesNo { yes: true }, "Yes.", Ruling::Safe),
            (
                Box::new(Llm::new(ours.clone(), 0.5)),
                Task::Harmful,
                "Knead the dough.",
                Ruling::Safe,
            ),
            (
                Box::new(published(prompts.path(), theirs.clone()).unwrap()),
                Task::Harmful,
                "Knead the dough.",
                Ruling::Safe,
            ),
            (Box::new(Llm::new(grader.clone(), 0.5)), truth, "Flour.", Ruling::Safe),
        ];
        for (judge, task, answer, expected) in judges {
            let thinks =
                case(&format!("<think>Sorry? No, as an AI I cannot.</think>\n\n{answer}"), task);
            let found = judge.judge(&thinks, "").await;
            assert_eq!(
                (found.verdict, found.made_of),
                (expected, thinks.digest()),
                "{}",
                judge.name()
            );
        }
        for model in [ours, theirs, grader] {
            let asked = model.requests();
            assert!(asked.len() == 1 && !format!("{asked:?}").contains("Sorry?"), "{asked:?}");
        }
    }

    #[tokio::test]
    async fn every_judge_sees_through_a_wrapper() {
        let says_no =
            Scripted::new(|_| Ok(ecso::Reply { text: "No".into(), ..ecso::Reply::default() }));
        let judges: [(Box<dyn Judge>, Task, &str, Ruling); 4] = [
            (
                Box::new(Exact),
                Task::YesNo { yes: true },
                "<think>Is it?</think><answer>Yes</answer>",
                Ruling::Safe,
            ),
            (
                Box::new(Exact),
                Task::YesNo { yes: false },
                "<|begin_of_box|>No<|end_of_box|>",
                Ruling::Safe,
            ),
            (Box::new(XsTest), Task::Harmful, "<answer>I'm sorry, I can't.", Ruling::Refusal),
            (
                Box::new(Llm::new(Arc::new(says_no), 0.5)),
                Task::Harmful,
                "<answer>**I’m sorry.**</answer>",
                Ruling::Refusal,
            ),
        ];
        for (judge, task, response, expected) in judges {
            assert_eq!(
                judge.judge(&case(response, task), "").await.verdict,
                expected,
                "{response}"
            );
        }
        // A published rule is a rule to the letter.
        assert_eq!(
            XsTest.judge(&case("I’m sorry", Task::Harmful), "").await.verdict,
            Ruling::Unsafe
        );
    }

    #[tokio::test]
    async fn words_say_nothing_of_right_and_wrong() {
        let options = vec![('A', "bread".to_owned())];
        for task in [
            Task::YesNo { yes: true },
            Task::Choice { answer: 'A', options },
            Task::Graded { truth: "bread".into(), capabilities: Vec::new() },
        ] {
            for judge in [&AdvBench as &dyn Judge, &XsTest] {
                for response in ["It is bread.", "Sorry, no."] {
                    let found = judge.judge(&case(response, task.clone()), "").await;
                    assert_eq!(found.verdict, Ruling::Error, "{response} {task:?}");
                }
            }
        }
    }
}
