//! Exact matching for answers that are right or wrong: MME's yes and no, and the letters of
//! `MMBench`.

use async_trait::async_trait;
use ecso::Cause;

use super::judgement::{Case, Judge, Ruling};
use crate::item::Task;

/// Compares an answer with the right one. `Safe` means right, `Unsafe` wrong, and `Refusal` that no
/// answer could be extracted.
#[derive(Debug, Clone, Copy)]
pub struct Exact;

#[async_trait]
impl Judge for Exact {
    fn name(&self) -> String {
        "exact".into()
    }

    async fn rule(&self, case: &Case) -> Result<(Ruling, Option<f64>), Cause> {
        let right = match &case.task {
            Task::YesNo { yes } => yes_or_no(&case.response).map(|answer| answer == *yes),
            Task::Choice { answer, options } => {
                extract_choice(&case.response, options).map(|letter| letter == *answer)
            }
            _ => {
                return Err(
                    "this item has no right answer to compare with; use another judge".into()
                );
            }
        };
        Ok(match right {
            Some(true) => (Ruling::Safe, Some(1.0)),
            Some(false) => (Ruling::Unsafe, Some(0.0)),
            None => (Ruling::Refusal, Some(0.0)),
        })
    }
}

/// MME's rule: "yes" or "no" occurs in the first four characters, in any case; "yes" takes
/// precedence.
pub(crate) fn yes_or_no(response: &str) -> Option<bool> {
    let start: String = response.trim().to_lowercase().chars().take(4).collect();
    if start.contains("yes") {
        return Some(true);
    }
    start.contains("no").then_some(false)
}

/// The extraction rule of `MMBench`: a single option letter among the last four words; otherwise
/// "answer is X"; otherwise the only option whose text occurs.
pub(crate) fn extract_choice(response: &str, options: &[(char, String)]) -> Option<char> {
    let spaced: String =
        response.chars().map(|c| if c.is_ascii_punctuation() { ' ' } else { c }).collect();
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let last_words = &words[words.len().saturating_sub(4)..];
    let letter = |word: &str| {
        options.iter().map(|(letter, _)| *letter).find(|letter| word == letter.to_string())
    };
    let letters_at_end: Vec<char> = last_words.iter().filter_map(|word| letter(word)).collect();
    if let [only] = letters_at_end.as_slice() {
        return Some(*only);
    }
    let after = words.windows(3).find(|three| {
        three[0].eq_ignore_ascii_case("answer") && three[1].eq_ignore_ascii_case("is")
    });
    if let Some(found) = after.and_then(|three| letter(three[2])) {
        return Some(found);
    }
    let lower = response.to_lowercase();
    let named: Vec<char> = options
        .iter()
        .filter(|(_, text)| !text.is_empty() && lower.contains(&text.to_lowercase()))
        .map(|(letter, _)| *letter)
        .collect();
    if let [only] = named.as_slice() { Some(*only) } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn option_letters_are_extracted() {
        let options: Vec<(char, String)> = [('A', "a red ball"), ('B', "a cat"), ('C', "two cars")]
            .map(|(letter, text)| (letter, text.into()))
            .into();
        for (response, expected) in [
            ("B", Some('B')),
            ("(B).", Some('B')),
            ("The correct answer is C, since there are plenty of them to see", Some('C')),
            ("It shows a cat on a sofa.", Some('B')),
            ("A cat and a red ball, or two cars", None),
            ("I can't tell", None),
            ("A or B", None),
            ("", None),
        ] {
            assert_eq!(extract_choice(response, &options), expected, "{response}");
        }
    }

    #[test]
    fn yes_and_no_are_read_at_the_beginning() {
        for (response, expected) in [
            ("Yes.", Some(true)),
            (" no, it isn't", Some(false)),
            ("It does.", None),
            ("", None),
            ("YES", Some(true)),
        ] {
            assert_eq!(yes_or_no(response), expected, "{response}");
        }
    }
}
