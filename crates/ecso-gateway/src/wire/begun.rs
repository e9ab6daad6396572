//! The stream of an answer that begins before the answer is whole.

use serde_json::Value;

use super::{Answer, Wire};
use crate::error::ApiError;

/// What has gone out of an answer's stream: the events up to its text, and text.
#[derive(Default)]
pub(crate) struct Begun {
    /// Number of all events.
    events: usize,
    /// Number of the events before the first text.
    head: usize,
    /// An event that adds text.
    delta: Value,
    text: String,
}

impl Begun {
    /// The text that is out.
    pub(crate) fn text(&self) -> &str {
        &self.text
    }

    /// The events that add a piece of text. `answer` is an answer of this text alone.
    pub(crate) fn add(&mut self, wire: &dyn Wire, answer: &Answer<'_>, piece: &str) -> Vec<Value> {
        let events = if self.text.is_empty() {
            let mut events = wire.events(answer);
            self.head = first_text(wire, &mut events).unwrap_or(events.len());
            events.truncate(self.head + 1);
            self.delta = events.get(self.head).cloned().unwrap_or_default();
            events
        } else {
            vec![self.delta_of(wire, piece)]
        };
        self.text.push_str(piece);
        self.numbered(events)
    }

    /// The events that are still missing of the whole answer, which begins with the text that is
    /// out.
    ///
    /// # Errors
    /// If it does not begin with that text.
    pub(crate) fn finish(
        &mut self,
        wire: &dyn Wire,
        answer: &Answer<'_>,
    ) -> Result<Vec<Value>, ApiError> {
        let mut events = wire.events(answer);
        if self.text.is_empty() {
            return Ok(events);
        }
        let changed = || ApiError::upstream("the answer has changed while it was written");
        let at = first_text(wire, &mut events).filter(|at| *at == self.head);
        let mut whole = events.split_off(at.ok_or_else(changed)?);
        let text = wire.added_text(&mut whole[0]).and_then(|text| text.as_str());
        let rest = text.and_then(|text| text.strip_prefix(&self.text)).ok_or_else(changed)?;
        let rest = Some(rest.to_owned()).filter(|rest| !rest.is_empty());
        let added = rest.map(|rest| self.delta_of(wire, &rest));
        let events = added.into_iter().chain(whole.into_iter().skip(1)).collect();
        Ok(self.numbered(events))
    }

    /// The events with which the stream ends if it fails.
    pub(crate) fn fail(
        &mut self,
        wire: &dyn Wire,
        request: (&str, &str),
        error: &ApiError,
    ) -> Vec<Value> {
        let mut events = wire.failure_events(request, error);
        if !self.text.is_empty() {
            // What comes before the failure begins a stream.
            events.drain(..events.len().saturating_sub(1));
        }
        self.numbered(events)
    }

    fn delta_of(&self, wire: &dyn Wire, piece: &str) -> Value {
        let mut event = self.delta.clone();
        if let Some(text) = wire.added_text(&mut event) {
            *text = piece.into();
        }
        event
    }

    /// Gives the events of formats that number them the next numbers.
    fn numbered(&mut self, mut events: Vec<Value>) -> Vec<Value> {
        for event in &mut events {
            if let Some(number) = event.get_mut("sequence_number") {
                *number = self.events.into();
            }
            self.events += 1;
        }
        events
    }
}

/// The index of the first event that adds text.
fn first_text(wire: &dyn Wire, events: &mut [Value]) -> Option<usize> {
    events.iter_mut().position(|event| wire.added_text(event).is_some())
}
