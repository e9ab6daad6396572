//! Answers that went out, for requests that continue from one by its id.

use std::{sync::Arc, time::Duration};

use axum::http::StatusCode;
use moka::{policy::EvictionPolicy, sync::Cache};
use serde_json::{Map, Value};

use crate::{error::ApiError, json, settings::Limits, wire};

/// Turns of conversations, by their owner and the id of the answer. A turn refers to the one before
/// it, so that a conversation is stored only once.
#[derive(Debug)]
pub(crate) struct Store {
    /// `None` if nothing is kept.
    turns: Option<Cache<blake3::Hash, Arc<Turn>>>,
    max_bytes: usize,
}

/// The messages of a request, as they were judged, and the answer that went out.
#[derive(Debug)]
struct Turn {
    /// The id of the answer that it continues from.
    previous: Option<String>,
    /// The messages of a chat, in JSON: those of the request, and the answer.
    messages: Box<[u8]>,
    /// The number of JSON values in them.
    values: usize,
}

/// Upper bound of the memory of a turn in addition to its messages, in bytes.
const OVERHEAD: usize = 512;
/// Longer times are cut to this.
const YEAR: u64 = 365 * 24 * 3600;

impl Turn {
    fn bytes(&self) -> usize {
        self.messages.len() + OVERHEAD
    }
}

impl Store {
    /// A store with these limits.
    pub(crate) fn new(limits: &Limits) -> Self {
        let max_bytes = limits.stored;
        let turns = (max_bytes > 0 && limits.stored_for > 0).then(|| {
            Cache::builder()
                .max_capacity(max_bytes as u64)
                .weigher(|_, turn: &Arc<Turn>| u32::try_from(turn.bytes()).unwrap_or(u32::MAX))
                .eviction_policy(EvictionPolicy::lru())
                .time_to_idle(Duration::from_secs(limits.stored_for.min(YEAR)))
                .build()
        });
        Self { turns, max_bytes }
    }

    /// Stores the answer `id` of a tenant with the messages that led to it. Returns whether there
    /// was room.
    pub(crate) fn insert(
        &self,
        (tenant, id): (&str, &str),
        previous: Option<&str>,
        request: &[Map<String, Value>],
        answer: &Value,
    ) -> bool {
        let Some(turns) = &self.turns else { return false };
        let Ok(messages) = serde_json::to_vec(&(request, answer)) else { return false };
        let values = request
            .iter()
            .flat_map(Map::values)
            .chain([answer])
            .map(json::count_values)
            .sum::<usize>()
            + request.len();
        let turn = Turn {
            previous: previous.map(str::to_owned),
            messages: messages.into_boxed_slice(),
            values,
        };
        let fits = turn.bytes() <= self.max_bytes.min(u32::MAX as usize);
        if fits {
            turns.insert(key(tenant, id), Arc::new(turn));
            // Otherwise the limit would apply a little later.
            turns.run_pending_tasks();
        }
        fits
    }

    /// The messages of a tenant's conversation up to the answer `id`. `reserve` is called with
    /// their size in bytes. Every turn that is read counts as used.
    ///
    /// # Errors
    /// If nothing is kept here, if this answer or one before it is not stored (any more), or if the
    /// messages have more than `longest` bytes or more than `max_values` values.
    pub(crate) fn conversation(
        &self,
        (tenant, id): (&str, &str),
        (longest, max_values): (usize, usize),
        reserve: impl FnOnce(usize) -> Result<(), ApiError>,
    ) -> Result<Vec<Value>, ApiError> {
        let turns = self
            .turns
            .as_ref()
            .ok_or_else(|| wire::external_conversation(wire::PREVIOUS_RESPONSE_ID))?;
        let (mut conversation_turns, mut bytes, mut values, mut next) =
            (Vec::new(), 0_usize, 0_usize, Some(id.to_owned()));
        while let Some(id) = &next {
            let turn = turns.get(&key(tenant, id)).ok_or_else(response_not_found)?;
            bytes += turn.bytes();
            values += turn.values;
            if bytes > longest || values > max_values {
                let message = format!(
                    "the stored conversation and the new messages may have at most `limits.body` \
                     bytes and {} values in total",
                    json::MAX_VALUES
                );
                return Err(ApiError::new(
                    StatusCode::PAYLOAD_TOO_LARGE,
                    "body_too_large",
                    message,
                ));
            }
            next.clone_from(&turn.previous);
            conversation_turns.push(turn);
        }
        reserve(bytes)?;
        let mut conversation = Vec::new();
        for turn in conversation_turns.iter().rev() {
            let (request, answer): (Vec<Value>, Value) =
                serde_json::from_slice(&turn.messages).map_err(|_| response_not_found())?;
            conversation.extend(request);
            conversation.push(answer);
        }
        Ok(conversation)
    }
}

fn key(tenant: &str, id: &str) -> blake3::Hash {
    blake3::keyed_hash(blake3::hash(tenant.as_bytes()).as_bytes(), id.as_bytes())
}

/// As OpenAI words it, but without the id, which a stranger chose.
fn response_not_found() -> ApiError {
    let message = "Previous response not found: it is not stored here, or not any more. Send the \
                   whole conversation as `input`.";
    ApiError {
        param: Some(wire::PREVIOUS_RESPONSE_ID.to_owned()),
        ..ApiError::bad_request("previous_response_not_found", message)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn store(stored: usize, stored_for: u64) -> Store {
        Store::new(&Limits { stored, stored_for, ..Limits::default() })
    }

    fn request(text: &str) -> [Map<String, Value>; 1] {
        [Map::from_iter([("content".to_owned(), text.into())])]
    }

    fn answer(store: &Store, tenant: &str, id: &str) -> Result<Vec<Value>, &'static str> {
        store.conversation((tenant, id), (1 << 20, 100), |_| Ok(())).map_err(|error| error.code)
    }

    #[test]
    fn a_conversation_has_all_turns_of_one_tenant() {
        let store = store(1 << 20, 60);
        assert!(store.insert(("a", "1"), None, &request("flour"), &json!("rye")));
        assert!(store.insert(("a", "2"), Some("1"), &request("water"), &json!("salt")));
        assert_eq!(
            answer(&store, "a", "2").unwrap(),
            [json!({"content": "flour"}), json!("rye"), json!({"content": "water"}), json!("salt")]
        );
        for (tenant, id) in [("b", "2"), ("", "2"), ("a", "3"), ("a", "")] {
            assert_eq!(answer(&store, tenant, id).unwrap_err(), "previous_response_not_found");
        }
        let short = store.conversation(("a", "2"), (2 * OVERHEAD, 100), |_| Ok(())).unwrap_err();
        assert_eq!(short.code, "body_too_large");
        // Two messages with one field each, and two answers.
        assert!(store.conversation(("a", "2"), (1 << 20, 6), |_| Ok(())).is_ok());
        let many = store.conversation(("a", "2"), (1 << 20, 5), |_| Ok(())).unwrap_err();
        assert_eq!(many.code, "body_too_large");
        let full = store.conversation(("a", "2"), (1 << 20, 100), |bytes| {
            assert!(bytes > 2 * OVERHEAD);
            Err(ApiError::full())
        });
        assert_eq!(full.unwrap_err().code, "guard_full");
    }

    #[test]
    fn limits_hold_and_zero_keeps_nothing() {
        let store = store(4000, 60);
        for id in 0..100 {
            assert!(store.insert(("a", &id.to_string()), None, &[], &json!("f".repeat(1000))));
        }
        assert!(!store.insert(("a", "long"), None, &[], &json!("f".repeat(4000))));
        let kept =
            (0..100).filter(|id| answer(&store, "a", &id.to_string()).is_ok()).collect::<Vec<_>>();
        assert_eq!(kept, [98, 99]);
        for (stored, stored_for) in [(0, 60), (4000, 0)] {
            let store = self::store(stored, stored_for);
            assert!(!store.insert(("a", "1"), None, &[], &Value::Null));
            assert_eq!(answer(&store, "a", "1").unwrap_err(), "unsupported_content");
        }
    }

    #[test]
    fn unused_conversations_are_dropped() {
        let store = store(1 << 20, 1);
        assert!(store.insert(("a", "1"), None, &[], &json!("flour")));
        std::thread::sleep(Duration::from_millis(700));
        assert!(answer(&store, "a", "1").is_ok());
        std::thread::sleep(Duration::from_millis(700));
        assert!(answer(&store, "a", "1").is_ok());
        std::thread::sleep(Duration::from_millis(1200));
        assert_eq!(answer(&store, "a", "1").unwrap_err(), "previous_response_not_found");
    }
}
