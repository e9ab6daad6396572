//! Prompt templates: text with the holes `{x}`, `{y}` and `{c}`, filled in one pass.

use serde::{Deserialize, Serialize};

/// A prompt template. A hole is a name in braces; what is filled in is never looked at again, so
/// braces inside a query or an answer stay as they are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Template(String);

impl Template {
    /// A template of this text.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text, holes and all.
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

    /// Whether the hole `{name}` is there.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.0.contains(&format!("{{{name}}}"))
    }

    /// Fills the holes, left to right, in one pass. Braces that are no hole stay.
    #[must_use]
    pub fn fill(&self, holes: &[(&str, &str)]) -> String {
        let mut filled = String::with_capacity(self.0.len());
        let mut rest = self.0.as_str();
        while let Some(start) = rest.find('{') {
            let (before, at) = rest.split_at(start);
            filled.push_str(before);
            let hole = holes.iter().find_map(|(name, value)| {
                let after = at[1..].strip_prefix(name)?.strip_prefix('}')?;
                Some((*value, after))
            });
            let (text, after) = hole.unwrap_or_else(|| at.split_at(1));
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
    fn holes_are_filled_in_one_pass() {
        let template = Template::new("{x} {y} {z} {{x} {");
        assert_eq!(template.fill(&[("x", "{y}"), ("y", "{x}")]), "{y} {x} {z} {{y} {");
    }

    proptest::proptest! {
        #[test]
        fn what_is_filled_in_stays_as_it_is(x in ".*", y in ".*") {
            let filled = Template::new("<{x}|{y}>").fill(&[("x", &x), ("y", &y)]);
            proptest::prop_assert_eq!(filled, format!("<{x}|{y}>"));
        }
    }
}
