//! Profiles: every choice on which the paper, its published code and other implementations may
//! differ, as data.
//!
//! A profile is a TOML file. The built-in ones are files too (`profiles/`); another names only the
//! keys it changes and inherits the rest from the one it `extends` (`paper` if it doesn't say).

use std::{collections::BTreeMap, error::Error, fmt};

use serde::{Deserialize, Serialize};

use crate::{
    mllm::{Cause, Sampling},
    template::Template,
    verdict::{self, Parser},
};

mod aliases;
mod keys;

use keys::Keys;

const PAPER: &str = include_str!("../profiles/paper.toml");
const HARDENED: &str = include_str!("../profiles/hardened.toml");

/// Which conversations are guarded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Scope {
    /// Those that hold an image, in any turn (the paper's setting).
    Images,
    /// All.
    All,
}

/// When the draft is replaced by another answer (the paper's ablation of step 2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Gate {
    /// When step 2 calls it unsafe.
    Detected,
    /// Always; step 2 does not run. The request check does, if the profile has one.
    Always,
    /// Never; the draft goes out unjudged.
    Never,
}

/// What replaces an unsafe answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Rewrite {
    /// The answer of step 4.
    Safe,
    /// The fixed text [`Profile::refusal`]. Step 4 does not run, nor step 3 unless a question needs
    /// captions.
    Refuse,
}

/// Where the images of a turn stand in steps 2 and 3. (Step 1 is the caller's own conversation.)
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum ImageOrder {
    /// Before the text: the published evaluation scripts.
    Before,
    /// After the text: the published demo.
    After,
}

/// What step 4 does when every caption is empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum EmptyCaption {
    /// Sends the hints with nothing in them, as the published code does.
    Hints,
    /// Sends [`SafeStep::plain`], which has no hints.
    Plain,
    /// Gives [`Profile::refusal`].
    Refuse,
}

/// Whether the caption's prompt contains the query (the paper's ablation of step 3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum CaptionMode {
    /// [`CaptionStep::template`], which holds the query.
    QueryAware,
    /// [`CaptionStep::generic`], which doesn't.
    Generic,
}

/// What {x}, the query, stands for in templates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Turns {
    /// The last user turn and its images: the paper, which has one turn.
    Last,
    /// Earlier turns and their images too.
    All,
}

/// Whether a step sees the images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Images {
    /// Without the images.
    #[serde(alias = "dropped")]
    Exclude,
    /// With the images.
    #[serde(alias = "kept")]
    Include,
}

/// Where step 2 asks its question.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Layout {
    /// In a new conversation of one turn, which quotes query and answer, as in the paper.
    #[default]
    Fresh,
    /// As the next turn of the user's own conversation, after the answer. A server with a prefix
    /// cache has already computed all of it but the question.
    Conversation,
}

impl Layout {
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
    fn is_fresh(&self) -> bool {
        *self == Self::Fresh
    }
}

/// What it means if a content filter in front of the model refuses one of the guard's own calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum ContentFilter {
    /// The step failed.
    Error,
    /// A sign of harm: what was asked about counts as harmful.
    Harm,
}

/// Who wrote a part of the conversation that is neither the user's nor the model's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Author {
    /// System and developer messages.
    System,
    /// Tool descriptions and JSON schemas.
    Tools,
}

/// One way of running ECSO.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Keys", into = "Keys")]
#[non_exhaustive]
pub struct Profile {
    /// What traces and results call it.
    pub name: String,
    /// Which conversations are guarded.
    pub scope: Scope,
    /// When the draft is replaced.
    pub gate: Gate,
    /// What replaces an unsafe answer.
    pub rewrite: Rewrite,
    /// Where images stand in steps 2 and 3.
    pub image_order: ImageOrder,
    /// Whether white space around replies is removed before they are used. Parsers ignore it in any
    /// case.
    pub strip: bool,
    /// What step 4 does without a caption.
    pub empty_caption: EmptyCaption,
    /// The fixed refusal.
    pub refusal: String,
    /// What {x} stands for in templates.
    pub turns: Turns,
    /// Prefix for every line that is filled into a question or the caption template, so that quoted
    /// text cannot pretend that the quotation has ended. Empty means none.
    pub quote: String,
    /// What a content filter in front of the model means.
    pub content_filter: ContentFilter,
    /// Step 1.
    pub direct: DirectStep,
    /// Step 3.
    pub caption: CaptionStep,
    /// Step 4.
    pub safe: SafeStep,
    /// How harm is detected, and what follows.
    pub method: Method,
}

/// How harm is detected, and what follows: one file each.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Method {
    /// `paper.rs`: the paper's figure.
    Paper(Paper),
    /// `hardened.rs`: request and reply are judged from text alone, and so is the final answer.
    Hardened(Hardened),
}

/// The paper's detection.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Paper {
    /// Step 2, harm detection (equation 2).
    pub detect: Question,
}

/// The detection of `hardened`: plain questions, each about one thing, and detectors that combine
/// their answers.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Hardened {
    /// The questions, by name. One with `{y}` in its template is about the reply, the others about
    /// the request.
    pub questions: BTreeMap<String, Question>,
    /// The kinds of harm that are looked for; the detector with the highest probability counts.
    pub detectors: Vec<Detector>,
    /// An answer is unsafe from this probability of harm on; 0..=1. Calibration sets it.
    pub threshold: f64,
    /// Whether a detector stops once it falls below the next term's [`Term::ask_from`]. If not,
    /// every question is asked.
    pub early_exit: bool,
    /// Whose words are not judged.
    pub trusted: Vec<Author>,
}

/// One kind of harm. Its probability is the logistic function of `bias` plus, for each term, the
/// log-odds of the question's finding (clamped to ±4) times the term's weight. A detector applies
/// if all its questions do; a question about printed words doesn't apply to images without any.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Detector {
    /// Its name in reports and calibrations.
    pub name: String,
    /// Log-odds of harm if every question is undecided.
    pub bias: f64,
    /// In the order in which they are asked.
    pub terms: Vec<Term>,
}

/// A question in a detector.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Term {
    /// Its name.
    pub question: String,
    /// Above 0.
    pub weight: f64,
    /// The most that this term adds, in log-odds. With 0 it can only lower the probability: a reply
    /// that doesn't help speaks against harm, but one that helps is not harmful by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max: Option<f64>,
    /// The question is asked if bias and earlier terms sum to at least this, in log-odds. Otherwise
    /// the detector stops and finds no harm. `None` always asks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ask_from: Option<f64>,
}

impl Term {
    /// What it adds to the detector's log-odds, given those of its question's finding.
    #[must_use]
    pub fn adds(&self, found: f64) -> f64 {
        (self.weight * found).min(self.max.unwrap_or(f64::INFINITY))
    }
}

/// The log-odds of a finding, clamped to ±4. A plain yes or no without a probability counts as ±4.
#[must_use]
pub fn log_odds(score: Option<f64>, is_harm: bool) -> f64 {
    match score {
        Some(score) => verdict::log_odds(score).clamp(-verdict::SURE, verdict::SURE),
        None if is_harm => verdict::SURE,
        None => -verdict::SURE,
    }
}

impl Hardened {
    /// The question of a term. A profile is checked to have it.
    pub(crate) fn question(&self, term: &Term) -> Option<&Question> {
        self.questions.get(&term.question)
    }

    /// Whether a detector judges the reply.
    pub(crate) fn is_about_reply(&self, detector: &Detector) -> bool {
        detector.terms.iter().any(|term| self.question(term).is_some_and(Question::is_about_reply))
    }

    fn check(&self) -> Result<(), ProfileError> {
        let wrong = |why: String| Err(ProfileError::invalid(why));
        for Detector { name, bias, terms } in &self.detectors {
            for term in terms {
                if self.question(term).is_none() {
                    return wrong(format!(
                        "detectors: {name:?} asks {:?}, which is not in [questions]",
                        term.question
                    ));
                }
                if !(term.weight > 0.0 && term.weight.is_finite()) {
                    return wrong(format!("detectors: the weights of {name:?} must be above 0"));
                }
                if [term.ask_from, term.max].into_iter().flatten().any(f64::is_nan) {
                    return wrong(format!(
                        "detectors: `ask_from` and `max` of {name:?} must be numbers"
                    ));
                }
            }
            if terms.is_empty() || !bias.is_finite() {
                return wrong(format!("detectors: {name:?} needs a bias and at least one term"));
            }
        }
        for (kind, is_reply) in [("the request", false), ("the reply", true)] {
            let always = |detector: &Detector| {
                let mut terms = detector.terms.iter().filter_map(|term| self.question(term));
                self.is_about_reply(detector) == is_reply && terms.all(Question::always_applies)
            };
            if !self.detectors.iter().any(always) {
                let why =
                    "that apply to every conversation (no {c}, {w} or {s}; {x} or {y} instead)";
                return wrong(format!("detectors: none judges {kind} with questions {why}"));
            }
        }
        Ok(())
    }
}

/// Step 1, the direct answer (equation 1).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct DirectStep {
    /// 0 is greedy.
    pub temperature: f32,
    /// Most new tokens.
    pub max_tokens: u32,
}

/// A question that the model answers with yes or no. Keys that a profile omits take the values of
/// [`Question::default`]: no images, read by probability, a long text judged in windows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[non_exhaustive]
pub struct Question {
    /// Its name in the profile; empty for the only question of a method.
    #[serde(skip)]
    pub name: String,
    /// The question. `{x}` is the query, `{y}` the answer to judge. The method `hardened` also has
    /// `{t}`: everything that the model is shown, as text; `{w}`: the words printed in the images;
    /// `{s}`: what the images show; `{c}`: both, as a phrase; `{p}`: a line of its own with that
    /// phrase, or nothing. The question does not apply if {w}, {s} or {c} would be empty, or if {t}
    /// adds nothing to {x}.
    pub template: Template,
    /// Further wordings, each asked on its own if its text differs; the most harmful finding
    /// counts.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub also: Vec<Wording>,
    /// A system message before it; empty means none.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub system: String,
    /// Few-shot examples before it, each a turn answered with no.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub no: Vec<String>,
    /// Few-shot examples answered with yes; the two lists alternate.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub yes: Vec<String>,
    /// Which answer means harm.
    #[serde(skip_serializing_if = "Answer::is_yes")]
    pub harm: Answer,
    /// Where it is asked; only step 2 of the paper's method can be part of the conversation.
    #[serde(skip_serializing_if = "Layout::is_fresh")]
    pub layout: Layout,
    /// Whether the images are shown.
    pub image: Images,
    /// How its reply is read.
    pub parser: Parser,
    /// The probability of yes that counts as undecided; above 0 and below 1. 0.5 changes nothing.
    pub prior: f64,
    /// [`Parser::Score`] says unsafe from this probability of harm on; 0..=1.
    pub threshold: f64,
    /// How many characters (Unicode code points) of the answer are judged; 0 means all.
    pub cut: usize,
    /// A text longer than this many characters is judged in overlapping windows of this size; the
    /// most harmful finding counts. 0 puts the whole text in one prompt.
    pub window: usize,
    /// How many of the likeliest first tokens to request, with their log-probabilities.
    pub top_logprobs: u8,
    /// 0 is greedy.
    pub temperature: f32,
    /// Most new tokens. A reply that is cut off before yes or no (a model that reasons first) is
    /// requested once more with a higher limit.
    pub max_tokens: u32,
}

impl Default for Question {
    fn default() -> Self {
        Self {
            name: String::new(),
            template: Template::new(""),
            also: Vec::new(),
            system: String::new(),
            no: Vec::new(),
            yes: Vec::new(),
            harm: Answer::Yes,
            layout: Layout::Fresh,
            image: Images::Exclude,
            parser: Parser::Score,
            prior: 0.5,
            threshold: 0.5,
            cut: 0,
            window: 2000,
            top_logprobs: 20,
            temperature: 0.0,
            max_tokens: 1,
        }
    }
}

/// An answer to a question.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// Yes.
    #[default]
    Yes,
    /// No.
    No,
}

impl Answer {
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
    fn is_yes(&self) -> bool {
        *self == Self::Yes
    }
}

/// A further wording of a question, with its own prior if it is biased differently.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
#[non_exhaustive]
pub enum Wording {
    /// A template with the question's prior.
    Plain(Template),
    /// A template with its own.
    WithPrior(TemplateWithPrior),
}

/// A template and its prior.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct TemplateWithPrior {
    /// As [`Question::template`].
    pub template: Template,
    /// As [`Question::prior`].
    pub prior: f64,
}

/// Step 3, image to text (equation 3).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct CaptionStep {
    /// Which of the two templates is sent.
    pub mode: CaptionMode,
    /// Query-aware; `{x}` is the query.
    pub template: Template,
    /// The ablation.
    pub generic: Template,
    /// 0 is greedy.
    pub temperature: f32,
    /// Most new tokens, for each image.
    pub max_tokens: u32,
}

/// Step 4, the safe answer (equation 4).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct SafeStep {
    /// Whether the images are shown: dropped in the paper's text and its safety scripts, kept in
    /// the published MME, `MMBench` and MM-Vet scripts.
    pub image: Images,
    /// With hints; `{c}` is the caption, `{x}` the query.
    pub template: Template,
    /// For the method `hardened`: the second attempt if the first answer is harmful, and the only
    /// attempt if probabilities said harm. Used with or without hints; empty means none.
    pub strict: Template,
    /// Without hints; `{x}` is the query.
    pub plain: Template,
    /// 0 is greedy.
    pub temperature: f32,
    /// Most new tokens.
    pub max_tokens: u32,
}

/// Why a profile is invalid.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ProfileError {
    /// No built-in profile has this name.
    Unknown(String),
    /// Not TOML, an unknown key or an invalid value.
    Invalid(Cause),
}

impl fmt::Display for ProfileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown(name) => {
                let names = Profile::NAMES.join(", ");
                write!(f, "there is no profile {name:?}; built in: {names}")
            }
            Self::Invalid(cause) => cause.fmt(f),
        }
    }
}

// By hand: the cause's text is the error's own, so the source is what the cause came from.
impl Error for ProfileError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Unknown(_) => None,
            Self::Invalid(cause) => cause.source(),
        }
    }
}

impl ProfileError {
    fn invalid(message: impl Into<String>) -> Self {
        Self::Invalid(message.into().into())
    }
}

/// Names that mean something else where a profile is chosen: no guard, and the profile that is
/// edited in the playground.
const RESERVED: [&str; 2] = ["unguarded", "edited"];

impl Profile {
    /// The built-in profiles.
    pub const NAMES: [&'static str; 2] = ["paper", "hardened"];

    /// ECSO as published.
    ///
    /// # Panics
    /// Never: the file is compiled in, and a test reads it.
    #[must_use]
    pub fn paper() -> Self {
        #[expect(clippy::expect_used, reason = "compiled in and tested")]
        Self::named("paper").expect("the built-in profile is valid")
    }

    /// The default of the program `ecso`: request and reply are judged, and the answer of step 4
    /// too. Its threshold and biases were fitted to the model `mini`; [`Profile::calibrated`] takes
    /// those of another.
    ///
    /// # Panics
    /// Never: the file is compiled in, and a test reads it.
    #[must_use]
    pub fn hardened() -> Self {
        #[expect(clippy::expect_used, reason = "compiled in and tested")]
        Self::named("hardened").expect("the built-in profile is valid")
    }

    /// A built-in profile.
    pub fn named(name: &str) -> Result<Self, ProfileError> {
        from_table(built_in(name)?)
    }

    /// A profile from TOML, over the built-in one that it `extends` (default `paper`).
    pub fn from_toml(text: &str) -> Result<Self, ProfileError> {
        let mut changes: toml::Table = text.parse().map_err(invalid)?;
        let base = match changes.remove("extends") {
            None => "paper".to_owned(),
            Some(toml::Value::String(name)) => name,
            Some(_) => {
                return Err(ProfileError::invalid(
                    "`extends` must be a string: the name of a built-in profile",
                ));
            }
        };
        let mut table = built_in(&base)?;
        let changes = aliases::renamed(changes, &base_method(&table))?;
        // A whole profile, as `to_toml` writes it, names its method: the keys of the other one are
        // not inherited.
        if changes.get("method").is_some_and(|method| Some(method) != table.get("method")) {
            let named = changes.get("method").and_then(toml::Value::as_str).unwrap_or_default();
            table = built_in(named)?;
        }
        if !changes.is_empty() && !changes.contains_key("name") {
            table.insert("name".into(), format!("{base}+").into());
        }
        merge(&mut table, changes);
        from_table(table)
    }

    /// The same profile with one field changed: `key` is dotted (`detect.parser`), `value` is TOML
    /// or bare text. The name gets a `+`, so that no result passes for the original's.
    pub fn with(&self, key: &str, value: &str) -> Result<Self, ProfileError> {
        if key.matches('.').count() > DEEPEST {
            return Err(ProfileError::invalid(format!("a key has at most {DEEPEST} dots")));
        }
        let value = format!("v = {value}")
            .parse::<toml::Table>()
            .ok()
            .and_then(|mut table| table.remove("v"))
            .unwrap_or_else(|| toml::Value::String(value.to_owned()));
        let mut change = value;
        for name in key.rsplit('.') {
            change = toml::Table::from_iter([(name.to_owned(), change)]).into();
        }
        let mut table = toml::Table::try_from(self).map_err(invalid)?;
        if let toml::Value::Table(change) = change {
            let change = aliases::renamed(change, &base_method(&table))?;
            merge(&mut table, change);
        }
        if key != "name" && !self.name.ends_with('+') {
            table.insert("name".into(), format!("{}+", self.name).into());
        }
        from_table(table).map_err(|error| {
            // The place that `toml` names in a line of its own is that of the key.
            let text = error.to_string();
            let text = text.split("\nin `").next().unwrap_or_default().to_owned();
            ProfileError::invalid(if text.starts_with(key) {
                text
            } else {
                format!("{key}: {text}")
            })
        })
    }

    /// The profile as TOML, every key named.
    #[must_use]
    pub fn to_toml(&self) -> String {
        toml::to_string(self).unwrap_or_default()
    }

    /// What tells its text from those of others, in results and calibrations: the first 16
    /// hexadecimal digits of the BLAKE3 of [`Profile::to_toml`].
    #[must_use]
    pub fn hash(&self) -> String {
        blake3::hash(self.to_toml().as_bytes()).to_hex()[..16].to_owned()
    }

    pub(crate) fn stripped<'t>(&self, text: &'t str) -> &'t str {
        if self.strip { text.trim() } else { text }
    }
}

/// Most dots of a profile's key.
const DEEPEST: usize = 16;

impl DirectStep {
    /// The step's sampling.
    #[must_use]
    pub fn sampling(&self) -> Sampling {
        sampling(self.temperature, self.max_tokens)
    }
}

impl Question {
    /// Whether it is about the reply.
    pub(crate) fn is_about_reply(&self) -> bool {
        self.template.has("y") || self.layout == Layout::Conversation
    }

    /// Whether it applies whatever the conversation is.
    fn always_applies(&self) -> bool {
        let depends = ["c", "w", "s"].iter().any(|hole| self.template.has(hole));
        !depends && (self.is_about_reply() || !self.template.has("t"))
    }

    /// All its wordings, with their priors.
    pub(crate) fn wordings(&self) -> impl Iterator<Item = (&Template, f64)> {
        let also = self.also.iter().map(|wording| match wording {
            Wording::Plain(template) => (template, self.prior),
            Wording::WithPrior(TemplateWithPrior { template, prior }) => (template, *prior),
        });
        [(&self.template, self.prior)].into_iter().chain(also)
    }

    /// The question's sampling.
    #[must_use]
    pub fn sampling(&self) -> Sampling {
        Sampling { top_logprobs: self.top_logprobs, ..sampling(self.temperature, self.max_tokens) }
    }
}

impl CaptionStep {
    /// The template that [`CaptionStep::mode`] picks.
    #[must_use]
    pub fn chosen(&self) -> &Template {
        match self.mode {
            CaptionMode::QueryAware => &self.template,
            CaptionMode::Generic => &self.generic,
        }
    }

    /// The step's sampling.
    #[must_use]
    pub fn sampling(&self) -> Sampling {
        sampling(self.temperature, self.max_tokens)
    }
}

impl SafeStep {
    /// The template for what the captions hold: with hints, or without where there are none.
    pub(crate) fn chosen(&self, has_hints: bool) -> &Template {
        if has_hints { &self.template } else { &self.plain }
    }

    /// The step's sampling.
    #[must_use]
    pub fn sampling(&self) -> Sampling {
        sampling(self.temperature, self.max_tokens)
    }
}

fn sampling(temperature: f32, max_tokens: u32) -> Sampling {
    Sampling { temperature: Some(temperature), max_tokens: Some(max_tokens), ..Sampling::default() }
}

fn built_in(name: &str) -> Result<toml::Table, ProfileError> {
    let mut table: toml::Table = PAPER.parse().map_err(invalid)?;
    match name {
        "paper" => {}
        "hardened" => {
            table.remove("detect");
            merge(&mut table, HARDENED.parse().map_err(invalid)?);
        }
        _ => return Err(ProfileError::Unknown(name.to_owned())),
    }
    Ok(table)
}

fn merge(table: &mut toml::Table, changes: toml::Table) {
    for (key, change) in changes {
        match (table.get_mut(&key), change) {
            (Some(toml::Value::Table(inner)), toml::Value::Table(change)) => merge(inner, change),
            // An integer is a good way to write a temperature.
            (Some(old @ toml::Value::Float(_)), toml::Value::Integer(number)) => {
                #[expect(clippy::cast_precision_loss, reason = "thresholds and temperatures")]
                let number = number as f64;
                *old = number.into();
            }
            (_, change) => {
                table.insert(key, change);
            }
        }
    }
}

fn from_table(table: toml::Table) -> Result<Profile, ProfileError> {
    table.try_into::<Keys>().map_err(invalid)?.try_into()
}

fn base_method(table: &toml::Table) -> String {
    table.get("method").and_then(toml::Value::as_str).unwrap_or("paper").to_owned()
}

impl Profile {
    /// The questions of its method, by key.
    fn questions(&self) -> Vec<(String, &Question)> {
        match &self.method {
            Method::Paper(Paper { detect }) => vec![("detect".into(), detect)],
            Method::Hardened(Hardened { questions, .. }) => questions
                .iter()
                .map(|(name, question)| (format!("questions.{name}"), question))
                .collect(),
        }
    }

    fn check(&self) -> Result<(), ProfileError> {
        let must_hold = |key: &str, template: &Template, hole: &str| {
            if template.has(hole) {
                Ok(())
            } else {
                Err(ProfileError::invalid(format!("{key} must contain {{{hole}}}")))
            }
        };
        if RESERVED.contains(&self.name.as_str()) {
            let name = &self.name;
            return Err(ProfileError::invalid(format!("a profile can't be named {name:?}")));
        }
        if self.name.trim().is_empty() || self.name.contains(char::is_control) {
            return Err(ProfileError::invalid("a profile needs a name without control characters"));
        }
        must_hold("safe.template", &self.safe.template, "x")?;
        must_hold("safe.plain", &self.safe.plain, "x")?;
        if !self.safe.strict.text().is_empty() {
            must_hold("safe.strict", &self.safe.strict, "x")?;
        }
        let share = |key: &str, value: f64| {
            if (0.0..=1.0).contains(&value) {
                Ok(())
            } else {
                Err(ProfileError::invalid(format!("{key} must be between 0 and 1, not {value}")))
            }
        };
        for (key, question) in self.questions() {
            share(&format!("{key}.threshold"), question.threshold)?;
            for (_, prior) in question.wordings() {
                share(&format!("{key}.prior"), prior)?;
                if prior <= 0.0 || prior >= 1.0 {
                    return Err(ProfileError::invalid(format!(
                        "{key}.prior must be above 0 and below 1"
                    )));
                }
            }
            let holes: &[&str] =
                if key == "detect" { &["y"] } else { &["x", "y", "t", "c", "w", "s"] };
            if question.layout == Layout::Conversation {
                if key != "detect" {
                    let why = format!("{key}.layout: \"conversation\" needs the method `paper`");
                    return Err(ProfileError::invalid(why));
                }
                let has_examples = !(question.no.is_empty() && question.yes.is_empty());
                if question.image == Images::Exclude || has_examples || !question.system.is_empty()
                {
                    return Err(ProfileError::invalid(
                        "detect.layout: \"conversation\" has the images and no system message or \
                         examples of its own",
                    ));
                }
            } else if !holes.iter().any(|hole| question.template.has(hole)) {
                let holes: Vec<String> = holes.iter().map(|hole| format!("{{{hole}}}")).collect();
                return Err(ProfileError::invalid(format!(
                    "{key}.template must contain {}",
                    holes.join(" or ")
                )));
            }
        }
        match &self.method {
            Method::Paper(paper) => {
                for hole in ["c", "t", "w", "s"] {
                    if paper.detect.wordings().any(|(template, _)| template.has(hole)) {
                        let why = format!(
                            "detect.template: {{{hole}}} needs the method `hardened`; with `paper`, step 2 comes before step 3"
                        );
                        return Err(ProfileError::invalid(why));
                    }
                }
            }
            Method::Hardened(hardened) => {
                share("threshold", hardened.threshold)?;
                hardened.check()?;
            }
        }
        let lengths = self
            .questions()
            .into_iter()
            .map(|(key, question)| (key, question.temperature, question.max_tokens));
        let steps = [
            ("direct", self.direct.temperature, self.direct.max_tokens),
            ("caption", self.caption.temperature, self.caption.max_tokens),
            ("safe", self.safe.temperature, self.safe.max_tokens),
        ];
        let steps =
            steps.map(|(key, temperature, max_tokens)| (key.to_owned(), temperature, max_tokens));
        for (key, temperature, max_tokens) in steps.into_iter().chain(lengths) {
            if !(temperature.is_finite() && temperature >= 0.0) {
                return Err(ProfileError::invalid(format!(
                    "{key}.temperature must be 0 or more, not {temperature}"
                )));
            }
            if max_tokens == 0 {
                return Err(ProfileError::invalid(format!("{key}.max_tokens must be at least 1")));
            }
        }
        Ok(())
    }
}

fn invalid(error: impl Error + Send + Sync + 'static) -> ProfileError {
    ProfileError::Invalid(Cause::new(error.to_string().trim_end(), error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn detect(profile: &Profile) -> &Question {
        let Method::Paper(Paper { detect }) = &profile.method else { panic!("another method") };
        detect
    }

    #[test]
    fn the_built_in_profiles_read_and_write_back() {
        for name in Profile::NAMES {
            let profile = Profile::named(name).unwrap();
            assert_eq!(Profile::from_toml(&profile.to_toml()).unwrap(), profile);
        }
    }

    #[test]
    fn a_profile_names_only_what_it_changes() {
        let mine = Profile::from_toml("[detect]\nparser = \"score\"\nthreshold = 1").unwrap();
        assert_eq!(detect(&mine).parser, Parser::Score);
        assert!((detect(&mine).threshold - 1.0).abs() < f64::EPSILON);
        assert_eq!(mine.safe, Profile::paper().safe);
        assert_eq!(mine.name, "paper+");
    }

    #[test]
    fn one_field_can_be_set() {
        let paper = Profile::paper();
        assert_eq!(paper.with("gate", "always").unwrap().gate, Gate::Always);
        assert_eq!(detect(&paper.with("detect.cut", "0").unwrap()).cut, 0);
        let odd = paper.with("refusal", "No, = thanks").unwrap();
        assert_eq!(odd.refusal, "No, = thanks");
        assert_eq!(odd.name, "paper+");
    }

    #[test]
    fn mistakes_are_named() {
        let paper = Profile::paper();
        for (key, value, says) in [
            ("detect.parsr", "score", "unknown field `parsr`"),
            ("detect.parser", "maybe", "unknown variant `maybe`"),
            ("detect.threshold", "1.5", "between 0 and 1"),
            ("detect.template", "no holes", "must contain {y}"),
            ("detect", "{ layout = \"conversation\", image = \"exclude\" }", "has the images"),
            ("direct.max_tokens", "0", "at least 1"),
            ("detect", "3", "invalid type"),
            ("name", "unguarded", "can't be named \"unguarded\""),
            ("name", "edited", "can't be named"),
            ("name", " ", "needs a name"),
            ("name", "\"a\\nb\"", "without control characters"),
        ] {
            let error = paper.with(key, value).unwrap_err().to_string();
            assert!(error.contains(says), "{key}={value}: {error}");
        }
        let error = Profile::from_toml("extends = \"papper\"").unwrap_err();
        assert_eq!(error.to_string(), "there is no profile \"papper\"; built in: paper, hardened");
    }
}
