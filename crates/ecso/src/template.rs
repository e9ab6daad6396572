//! Prompt templates: text with placeholders such as `{x}`, `{y}` and `{c}`, filled in one pass.

use serde::{Deserialize, Serialize};

/// A prompt template. A placeholder is a name in braces. Values are never searched for
/// placeholders, so braces inside a query or an answer stay as they are.
///
/// ```
/// let template = ecso::Template::new("QUERY: {x}");
/// assert_eq!(template.fill(&[("x", "What is {y}?")]), "QUERY: What is {y}?");
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Template(String);

impl Template {
    /// A template of this text.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text with its placeholders.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.0
    }

    /// The template's name in traces and results: the first 16 hexadecimal digits of the BLAKE3 of
    /// its text.
    #[must_use]
    pub fn hash(&self) -> String {
        blake3::hash(self.0.as_bytes()).to_hex()[..16].to_owned()
    }

    /// Whether it has the placeholder `{name}`.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.0.contains(&format!("{{{name}}}"))
    }

    /// Replaces each placeholder by its value, left to right, in one pass. Other braces stay.
    #[must_use]
    pub fn fill(&self, values: &[(&str, &str)]) -> String {
        let mut filled = String::with_capacity(self.0.len());
        let mut rest = self.0.as_str();
        while let Some(start) = rest.find('{') {
            let (before, at) = rest.split_at(start);
            filled.push_str(before);
            let found = values.iter().find_map(|(name, value)| {
                let after = at[1..].strip_prefix(name)?.strip_prefix('}')?;
                Some((*value, after))
            });
            let (text, after) = found.unwrap_or_else(|| at.split_at(1));
            filled.push_str(text);
            rest = after;
        }
        filled.push_str(rest);
        filled
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn placeholders_are_filled_in_one_pass() {
        let template = Template::new("{x} {y} {z} {{x} {");
        assert_eq!(template.fill(&[("x", "{y}"), ("y", "{x}")]), "{y} {x} {z} {{y} {");
    }

    proptest::proptest! {
        #[test]
        fn values_stay_as_they_are(x in ".*", y in ".*") {
            let filled = Template::new("<{x}|{y}>").fill(&[("x", &x), ("y", &y)]);
            proptest::prop_assert_eq!(filled, format!("<{x}|{y}>"));
        }
    }
}
