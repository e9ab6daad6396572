//! The draft of a guarded chat.

use std::{collections::BTreeMap, mem};

use axum::http::HeaderMap;
use ecso::RequestCheck;
use serde_json::Value;

use crate::{completion::Completion, error::ApiError, report::Early, windowed};

/// The upstream's answer, and what was found about the request before it is judged.
pub(crate) struct Draft {
    /// Has no text if it was not waited for.
    pub(crate) answer: Completion,
    pub(crate) head: HeaderMap,
    /// An error holds for every choice; the settings say whether anything goes out unjudged.
    pub(crate) request_check: Result<RequestCheck, ApiError>,
    /// Whether the answer was not waited for.
    pub(crate) is_skipped: bool,
    /// If it was judged while it was written: what went out then, and the chunks that did not.
    pub(crate) early: Option<(Early, Vec<Value>)>,
}

impl Draft {
    /// An answer with no headers and no findings about the request.
    pub(crate) fn of(answer: Completion) -> Self {
        let request_check = Ok(RequestCheck::default());
        Self { answer, head: HeaderMap::new(), request_check, is_skipped: false, early: None }
    }

    /// What went out before it was whole.
    pub(crate) fn early(&self) -> Option<Early> {
        self.early.as_ref().map(|(early, _)| *early)
    }

    /// The chunks of a choice that have not gone out.
    pub(crate) fn unsent_chunks(&self, choice: u64) -> Vec<Value> {
        match &self.early {
            Some((_, rest)) if choice == windowed::CHOICE => rest.clone(),
            _ => self.answer.chunks(choice).collect(),
        }
    }

    /// Whether text of this choice went out before the last verdict.
    pub(crate) fn is_partly_sent(&self, choice: u64) -> bool {
        choice == windowed::CHOICE && self.early().is_some_and(|early| early.characters > 0)
    }

    /// The texts, by choice. Empty if the answer was not waited for.
    pub(crate) fn texts(&self) -> BTreeMap<u64, String> {
        if self.is_skipped { BTreeMap::new() } else { self.answer.texts() }
    }

    /// What is to be judged: the text of each choice with the findings about the request. The first
    /// choice carries the steps that led to these findings, so that they are counted once.
    pub(crate) fn choices(&self) -> Vec<(Result<RequestCheck, ApiError>, u64, String)> {
        let mut request_check = self.request_check.clone();
        let choices = self.answer.texts().into_iter().map(|(choice, text)| {
            let without_steps =
                request_check.as_ref().map(RequestCheck::without_steps).map_err(ApiError::clone);
            (mem::replace(&mut request_check, without_steps), choice, text)
        });
        choices.collect()
    }
}
