//! The search for a way in which a model takes a request.

use serde_json::{Map, Value};

use crate::{
    complaint::Complaint,
    options::MaxTokensField,
    quirks::{Memory, Quirk, Quirks},
};

/// One request's search: it begins with what is known of the model, and each complaint leads on.
#[derive(Debug)]
pub(crate) struct Search {
    /// How the request is to be made now.
    pub(crate) quirks: Quirks,
    /// What the server named, with its words.
    found: Vec<(Quirk, String)>,
    /// What was given up on a guess; `None` before there was one.
    guessed: Option<Vec<(Quirk, String)>>,
    /// How the request was made before a guess at why the server broke down.
    before: Option<Quirks>,
}

impl Search {
    pub(crate) fn new(known: Quirks) -> Self {
        Self { quirks: known, found: Vec::new(), guessed: None, before: None }
    }

    /// Whether there is another way after this complaint about `request`. What the server names is
    /// done otherwise; where it names nothing, wishes are given up, once.
    pub(crate) fn goes_on(
        &mut self,
        complaint: &Complaint,
        request: &Map<String, Value>,
        limit: MaxTokensField,
    ) -> bool {
        if let Some(quirk) = complaint.quirk(request, limit) {
            self.quirks.insert(quirk);
            self.found.push((quirk, complaint.told()));
            // A guess brought no answer: it is not to be learned, though its wishes stay out of
            // this one request.
            self.guessed.iter_mut().for_each(Vec::clear);
            return true;
        }
        let suspects = complaint.suspects(request);
        if self.guessed.is_some() || suspects.is_empty() {
            return false;
        }
        self.before = complaint.is_breakdown().then(|| self.quirks.clone());
        self.quirks.extend(&suspects);
        self.guessed = Some(suspects.into_iter().map(|quirk| (quirk, complaint.told())).collect());
        true
    }

    /// How to ask once more with what was given up on a guess: a server that broke down may only
    /// have been unwell.
    pub(crate) fn doubted(&self) -> Option<&Quirks> {
        self.before
            .as_ref()
            .filter(|_| self.guessed.as_ref().is_some_and(|guessed| !guessed.is_empty()))
    }

    /// The end: an answer of `model`.
    pub(crate) fn succeeded(self, model: &str, memory: &Memory) {
        for (quirk, reason) in self.found.into_iter().chain(self.guessed.unwrap_or_default()) {
            memory.learn(model, quirk, &reason);
        }
    }
}
