//! The search for a form of a request that a server accepts.

use serde_json::{Map, Value};

use crate::{
    complaint::Complaint,
    options::MaxTokensField,
    quirks::{Memory, Quirk, Quirks},
};

/// The search for one request. It begins with the known quirks of the model; each complaint of the
/// server leads to the next form.
#[derive(Debug)]
pub(crate) struct Search {
    /// The quirks to apply now.
    pub(crate) quirks: Quirks,
    /// The quirks that the server named, with its messages.
    found: Vec<(Quirk, String)>,
    /// The quirks that were guessed; `None` before the guess.
    guessed: Option<Vec<(Quirk, String)>>,
    /// The quirks before a guess at why the server failed.
    before: Option<Quirks>,
}

impl Search {
    pub(crate) fn new(known: Quirks) -> Self {
        Self { quirks: known, found: Vec::new(), guessed: None, before: None }
    }

    /// Whether there is another form to try after this complaint about `request`. A quirk that the
    /// server names is applied. If it names none, optional fields are left out, once.
    pub(crate) fn has_next(
        &mut self,
        complaint: &Complaint,
        request: &Map<String, Value>,
        limit: MaxTokensField,
    ) -> bool {
        if let Some(quirk) = complaint.quirk(request, limit) {
            self.quirks.insert(quirk);
            self.found.push((quirk, complaint.summary()));
            // The guess did not help, so it is not learned. This request still leaves its fields
            // out.
            self.guessed.iter_mut().for_each(Vec::clear);
            return true;
        }
        let suspects = complaint.suspects(request);
        if self.guessed.is_some() || suspects.is_empty() {
            return false;
        }
        self.before = complaint.is_breakdown().then(|| self.quirks.clone());
        self.quirks.extend(&suspects);
        self.guessed =
            Some(suspects.into_iter().map(|quirk| (quirk, complaint.summary())).collect());
        true
    }

    /// The quirks for one more try with the fields that were left out by a guess: the server may
    /// have failed for another reason.
    pub(crate) fn without_guess(&self) -> Option<&Quirks> {
        self.before
            .as_ref()
            .filter(|_| self.guessed.as_ref().is_some_and(|guessed| !guessed.is_empty()))
    }

    /// Ends the search with an answer of `model`, and learns from it.
    pub(crate) fn succeeded(self, model: &str, memory: &Memory) {
        for (quirk, reason) in self.found.into_iter().chain(self.guessed.unwrap_or_default()) {
            memory.learn(model, quirk, &reason);
        }
    }
}
