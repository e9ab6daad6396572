//! The keys of a profile in TOML, and their conversion from and to [`Profile`].

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{
    Author, CaptionStep, ContentFilter, Detector, DirectStep, EmptyCaption, Gate, Hardened,
    ImageOrder, Method, Paper, Profile, ProfileError, Question, Rewrite, SafeStep, Scope, Turns,
};

/// A profile as written: flat keys. Some belong to one method only.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Keys {
    name: String,
    method: MethodName,
    scope: Scope,
    gate: Gate,
    rewrite: Rewrite,
    image_order: ImageOrder,
    strip: bool,
    empty_caption: EmptyCaption,
    refusal: String,
    turns: Turns,
    quote: String,
    content_filter: ContentFilter,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    threshold: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    early_exit: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    trusted: Option<Vec<Author>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    detectors: Option<Vec<Detector>>,
    direct: DirectStep,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    detect: Option<Question>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    questions: Option<BTreeMap<String, Question>>,
    caption: CaptionStep,
    safe: SafeStep,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum MethodName {
    Paper,
    Hardened,
}

impl TryFrom<Keys> for Profile {
    type Error = ProfileError;

    fn try_from(keys: Keys) -> Result<Self, ProfileError> {
        let own = [
            ("detect", keys.detect.is_some(), MethodName::Paper),
            ("questions", keys.questions.is_some(), MethodName::Hardened),
            ("detectors", keys.detectors.is_some(), MethodName::Hardened),
            ("threshold", keys.threshold.is_some(), MethodName::Hardened),
            ("early_exit", keys.early_exit.is_some(), MethodName::Hardened),
            ("trusted", keys.trusted.is_some(), MethodName::Hardened),
        ];
        for (key, is_there, method) in own {
            if is_there && method != keys.method {
                let name = if method == MethodName::Paper { "paper" } else { "hardened" };
                return Err(ProfileError::invalid(format!(
                    "{key} is a key of the method `{name}`; a profile that names no other is based \
                     on paper, so write extends = \"{name}\""
                )));
            }
        }
        let missing = |key: &'static str| ProfileError::invalid(format!("{key} is missing"));
        let method = match keys.method {
            MethodName::Paper => {
                Method::Paper(Paper { detect: keys.detect.ok_or_else(|| missing("detect"))? })
            }
            MethodName::Hardened => Method::Hardened(Hardened {
                questions: named(keys.questions.ok_or_else(|| missing("questions"))?),
                detectors: keys.detectors.ok_or_else(|| missing("detectors"))?,
                threshold: keys.threshold.ok_or_else(|| missing("threshold"))?,
                early_exit: keys.early_exit.ok_or_else(|| missing("early_exit"))?,
                trusted: keys.trusted.unwrap_or_default(),
            }),
        };
        let profile = Self {
            name: keys.name,
            scope: keys.scope,
            gate: keys.gate,
            rewrite: keys.rewrite,
            image_order: keys.image_order,
            strip: keys.strip,
            empty_caption: keys.empty_caption,
            refusal: keys.refusal,
            turns: keys.turns,
            quote: keys.quote,
            content_filter: keys.content_filter,
            direct: keys.direct,
            caption: keys.caption,
            safe: keys.safe,
            method,
        };
        profile.check()?;
        Ok(profile)
    }
}

/// The questions with their names.
fn named(mut questions: BTreeMap<String, Question>) -> BTreeMap<String, Question> {
    for (name, question) in &mut questions {
        question.name.clone_from(name);
    }
    questions
}

impl From<Profile> for Keys {
    fn from(profile: Profile) -> Self {
        let (mut detect, mut questions, mut detectors) = (None, None, None);
        let (mut threshold, mut early_exit, mut trusted) = (None, None, None);
        let method = match profile.method {
            Method::Paper(paper) => {
                detect = Some(paper.detect);
                MethodName::Paper
            }
            Method::Hardened(hardened) => {
                (questions, detectors) = (Some(hardened.questions), Some(hardened.detectors));
                (threshold, early_exit) = (Some(hardened.threshold), Some(hardened.early_exit));
                trusted = Some(hardened.trusted);
                MethodName::Hardened
            }
        };
        Self {
            name: profile.name,
            method,
            scope: profile.scope,
            gate: profile.gate,
            rewrite: profile.rewrite,
            image_order: profile.image_order,
            strip: profile.strip,
            empty_caption: profile.empty_caption,
            refusal: profile.refusal,
            turns: profile.turns,
            quote: profile.quote,
            content_filter: profile.content_filter,
            threshold,
            early_exit,
            trusted,
            detectors,
            direct: profile.direct,
            detect,
            questions,
            caption: profile.caption,
            safe: profile.safe,
        }
    }
}
