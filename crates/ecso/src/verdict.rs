//! Verdicts: how the reply to a yes-or-no question is read.

use crate::{
    mllm::{Reply, TopLogprob},
    profile::{Answer, Question},
    reasoning::{first_word, without_reasoning},
    yes_or_no::{Subject, yes_or_no},
};

/// The judgement of an answer. Exhaustive: these three are all there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// The answer may be shown.
    Safe,
    /// The answer is harmful, or the request for it.
    Unsafe,
    /// Not judged: the chat is out of scope, or the profile's gate asks no question.
    Unchecked,
}

impl Verdict {
    /// Its name in files, headers and metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Safe => "safe",
            Self::Unsafe => "unsafe",
            Self::Unchecked => "unchecked",
        }
    }
}

/// How the reply to a question such as "Is the RESPONSE harmful, unsafe and unethical? Answer yes
/// or no:" becomes a verdict.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Parser {
    /// The published code: unsafe only if the stripped, lower-cased reply is `yes` or `yes.`; it
    /// fails open.
    Paper,
    /// Unsafe if "yes" occurs anywhere, lower-cased; it fails open.
    Substring,
    /// Safe only if the reply starts with a clear "no"; everything else is unsafe.
    FailClosed,
    /// By probability: unsafe if P(yes) / (P(yes) + P(no)) of the first token reaches the threshold
    /// ([`yes_probability`]). If the model reports no probabilities, by [`yes_or_no`]; a reply that is
    /// neither is not a verdict.
    Score,
}

/// If yes and no together have less of the first token's probability, the model answers something
/// else.
const MIN_MASS: f64 = 0.03;
/// How much a word that is not listed may have, against the other one, so that there is a score.
const MAX_UNLISTED: f64 = 1.0 / 3.0;

/// P(yes) / (P(yes) + P(no)) among the likeliest first tokens of the reply, in 0..=1. All forms of
/// the two words count (case, white space, punctuation). `None` if the model reports no tokens; if
/// a log-probability is impossible (above 0); if both words together have less than 3%, so that the
/// reply is about something else; or if one word is not listed and could have more than a quarter
/// of what both have, because the server lists only few tokens.
///
/// ```
/// use ecso::{Reply, TopLogprob, yes_probability};
///
/// let token = |token: &str, p: f32| TopLogprob { token: token.into(), logprob: p.ln() };
/// let first_token = vec![token("No", 0.6), token(" yes", 0.2)];
/// let score = yes_probability(&Reply { first_token, ..Reply::default() }).unwrap();
/// assert!((score - 0.25).abs() < 1e-6);
/// ```
#[must_use]
pub fn yes_probability(reply: &Reply) -> Option<f64> {
    let mass = |word: &str| -> f64 {
        let forms = reply
            .first_token
            .iter()
            .filter(|TopLogprob { token, .. }| first_word(&token.to_lowercase()) == word);
        // An empty sum is -0.
        0.0 + forms.map(|token| f64::from(token.logprob).exp()).sum::<f64>()
    };
    let is_possible = reply.first_token.iter().all(|token| token.logprob < 1e-3);
    let (yes, no) = (mass("yes"), mass("no"));
    let is_known = yes.min(no) > 0.0 || unlisted(reply) <= MAX_UNLISTED * (yes + no);
    (is_possible && yes + no >= MIN_MASS && is_known).then(|| yes / (yes + no))
}

/// The most that the first token has for a word that is not among the likeliest ones.
fn unlisted(reply: &Reply) -> f64 {
    let listed = reply.first_token.iter().map(|token| f64::from(token.logprob).exp());
    let (sum, least) = listed.fold((0.0, 1.0), |(sum, least), p| (sum + p, f64::min(least, p)));
    f64::min(1.0 - sum, least)
}

impl Parser {
    /// The verdict in a reply to a question about `subject`. `score` is its [`yes_probability`], and
    /// `threshold` is for [`Parser::Score`]. `None` if the reply is neither yes nor no; only
    /// [`Parser::Score`] returns that.
    #[must_use]
    pub fn parse(
        self,
        text: &str,
        subject: Subject,
        score: Option<f64>,
        threshold: f64,
    ) -> Option<Verdict> {
        let read = || without_reasoning(text).unwrap_or_default().trim().to_lowercase();
        let is_unsafe = match (self, score) {
            (Self::Paper, _) => matches!(read().as_str(), "yes" | "yes."),
            (Self::Substring, _) => read().contains("yes"),
            (Self::FailClosed, _) => first_word(&read()) != "no",
            (Self::Score, Some(score)) => reaches(score, threshold),
            (Self::Score, None) => yes_or_no(text, subject)?,
        };
        Some(if is_unsafe { Verdict::Unsafe } else { Verdict::Safe })
    }
}

/// Whether a probability reaches a threshold. Each reaches one that is no probability, which only
/// a profile can have whose fields were set in code.
fn reaches(probability: f64, threshold: f64) -> bool {
    let is_below = (0.0..=1.0).contains(&threshold) && probability < threshold;
    !is_below
}

/// Log-odds are clamped to this size.
pub(crate) const SURE: f64 = 4.0;
/// The probability that these log-odds are, rounded.
pub(crate) const CERTAIN: f64 = 0.982;

/// The probability of harm of a detector that stopped early.
const STOPPED_EARLY: f64 = 0.05;

/// The log-odds of a probability.
pub(crate) fn log_odds(probability: f64) -> f64 {
    (probability / (1.0 - probability)).ln()
}

/// The finding of a [`Question`] or a detector.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Detection {
    pub(crate) verdict: Verdict,
    /// Probability of harm in 0..=1, corrected for the wording's prior; `None` if the model reports
    /// no probabilities.
    pub(crate) score: Option<f64>,
    /// What findings are compared by, in 0..=1: the score, if the parser uses it; otherwise 1 for
    /// harm and 0 for none.
    pub(crate) weight: f64,
    /// Whether a content filter refused the question and the profile counts that as harm.
    pub(crate) is_filtered: bool,
}

impl Detection {
    /// A content filter refused the question.
    pub(crate) const FILTERED: Self = Self { is_filtered: true, ..Self::HARM };
    /// No question was asked.
    pub(crate) const UNCHECKED: Self =
        Self { verdict: Verdict::Unchecked, score: None, weight: 0.0, is_filtered: false };
    /// There is nothing that could do harm.
    pub(crate) const SAFE: Self =
        Self { verdict: Verdict::Safe, score: Some(0.0), ..Self::UNCHECKED };
    /// Harm, without a probability.
    pub(crate) const HARM: Self = Self { verdict: Verdict::Unsafe, weight: 1.0, ..Self::UNCHECKED };

    /// Reads the reply to a wording with this prior; `None` if it is neither yes nor no.
    pub(crate) fn read(question: &Question, prior: f64, reply: &Reply) -> Option<Self> {
        let score = yes_probability(reply).map(|score| {
            let odds = prior / (1.0 - prior);
            let yes = score / (score + odds * (1.0 - score));
            if question.harm == Answer::Yes { yes } else { 1.0 - yes }
        });
        let subject = if question.harm == Answer::Yes { Subject::Harm } else { Subject::Other };
        let said = question.parser.parse(&reply.text, subject, score, question.threshold)?;
        let verdict = match (question.harm, score, said) {
            // The parser has read yes as unsafe; to this question, no means harm.
            (Answer::No, None, Verdict::Unsafe) => Verdict::Safe,
            (Answer::No, None, Verdict::Safe) => Verdict::Unsafe,
            (_, _, said) => said,
        };
        let by_word = if verdict == Verdict::Unsafe { 1.0 } else { 0.0 };
        let weight = score.filter(|_| question.parser == Parser::Score).unwrap_or(by_word);
        Some(Self { verdict, score, weight, is_filtered: false })
    }

    /// The finding of a detector whose log-odds sum to `sum`. It has a score if all its questions
    /// have.
    pub(crate) fn from_log_odds(sum: f64, threshold: f64, has_scores: bool) -> Self {
        let weight = crate::calibration::probability(sum);
        let verdict = if reaches(weight, threshold) { Verdict::Unsafe } else { Verdict::Safe };
        Self { verdict, score: has_scores.then_some(weight), weight, is_filtered: false }
    }

    /// The finding of a detector that stopped early: a low probability of harm.
    pub(crate) fn stopped_early(threshold: f64) -> Self {
        let weight = STOPPED_EARLY.min(threshold / 2.0);
        Self { score: Some(weight), weight, ..Self::SAFE }
    }

    pub(crate) fn is_harmful(self) -> bool {
        self.verdict == Verdict::Unsafe
    }

    /// The more harmful finding of the two.
    pub(crate) fn or(self, other: Self) -> Self {
        if other.weight > self.weight { other } else { self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parsers_differ_where_they_should() {
        let (safe, harm) = (Some(Verdict::Safe), Some(Verdict::Unsafe));
        for (text, paper, substring, fail_closed, score) in [
            ("Yes", harm, harm, harm, harm),
            (" yes.\n", harm, harm, harm, harm),
            ("Yes, it is.", safe, harm, harm, harm),
            ("no", safe, safe, safe, safe),
            ("No.", safe, safe, safe, safe),
            ("No, yes would be wrong", safe, harm, safe, None),
            ("", safe, safe, harm, None),
            ("I can't tell", safe, safe, harm, None),
            ("nothing harmful", safe, safe, harm, None),
            ("<think>Is it? Yes.</think>\nNo", safe, safe, safe, safe),
            ("<think>no, wait", safe, safe, harm, None),
            ("<think>It says '</think>No.' That harms.</think>Yes", harm, harm, harm, harm),
            ("[THINK]No? It harms.[/THINK]\nYes", harm, harm, harm, harm),
            ("Yes, it says '</think>No.'", safe, safe, harm, None),
        ] {
            let parse = |parser: Parser| parser.parse(text, Subject::Harm, None, 0.5);
            let found =
                [Parser::Paper, Parser::Substring, Parser::FailClosed, Parser::Score].map(parse);
            assert_eq!(found, [paper, substring, fail_closed, score], "{text:?}");
        }
    }

    fn told(tokens: &[(&str, f32)]) -> Reply {
        let first_token =
            tokens.iter().map(|(token, p)| TopLogprob { token: (*token).into(), logprob: p.ln() });
        Reply { first_token: first_token.collect(), ..Reply::default() }
    }

    #[test]
    fn the_score_sums_the_forms_of_both_words() {
        let reply =
            told(&[("No", 0.5), (" yes", 0.25), ("YES", 0.125), ("no.", 0.125), ("Noble", 0.1)]);
        let score = yes_probability(&reply).unwrap();
        assert!((score - 0.375).abs() < 1e-6);
        assert_eq!(
            Parser::Score.parse("no", Subject::Harm, Some(score), 0.3),
            Some(Verdict::Unsafe)
        );
        assert_eq!(
            Parser::Score.parse("yes", Subject::Harm, Some(score), 0.4),
            Some(Verdict::Safe)
        );
        assert_eq!(yes_probability(&Reply::default()), None);
        // Two words that are both unlikely mean nothing.
        let e = std::f32::consts::E;
        assert_eq!(
            yes_probability(&told(&[("I", 0.9), ("yes", e.powi(-19)), ("no", e.powi(-20))])),
            None
        );
        assert_eq!(yes_probability(&told(&[("I", 0.98), ("yes", 0.02)])), None);
        // A word that is not listed may have what is left.
        assert_eq!(yes_probability(&told(&[("no", 0.51)])), None);
        assert_eq!(yes_probability(&told(&[("no", 0.51), ("maybe", 0.3)])), None);
        assert!(yes_probability(&told(&[("no", 0.51), ("maybe", 0.3), ("so", 0.05)])).is_some());
        // An impossible log-probability makes the others worthless too.
        for logprob in [709.5, 5_f32.ln(), f32::NAN, f32::INFINITY] {
            let mut reply = told(&[("no", 0.1), ("so", 0.2)]);
            reply.first_token.push(TopLogprob { token: "yes".into(), logprob });
            assert_eq!(yes_probability(&reply), None, "{logprob}");
        }
        assert!(
            yes_probability(&told(&[("no", 0.9)]))
                .is_some_and(|score| score == 0.0 && score.is_sign_positive())
        );
    }
}
