//! Answers that went out, for requests that go on from one by its id.

use std::{sync::Arc, time::Duration};

use axum::http::StatusCode;
use moka::{policy::EvictionPolicy, sync::Cache};
use serde_json::{Map, Value};

use crate::{error::ApiError, json, settings::Limits, wire};

/// Turns of conversations, by whose they are and the answer's id. A turn points to the one before
/// it, so that a conversation takes its own length and no more.
#[derive(Debug)]
pub(crate) struct Store {
    /// None where nothing is kept.
    turns: Option<Cache<blake3::Hash, Arc<Turn>>>,
    max_bytes: usize,
}

/// What a request brought, as it was judged, and the answer that went out.
#[derive(Debug)]
struct Turn {
    /// The id of the answer that it goes on from.
    previous: Option<String>,
    /// Messages of a chat: those that were brought, and the answer; in JSON.
    messages: Box<[u8]>,
    /// How many values these have.
    values: usize,
}

/// What a turn takes beside its messages, at most.
const OVERHEAD: usize = 512;
/// Longer is for ever.
const YEAR: u64 = 365 * 24 * 3600;

impl Turn {
    fn bytes(&self) -> usize {
        self.messages.len() + OVERHEAD
    }
}

impl Store {
    /// A store as large as the limits say.
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

    /// Keeps the answer `id` of a tenant with what led to it: messages of a chat. Whether it could.
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
            // Else the bound would hold a little later.
            turns.run_pending_tasks();
        }
        fits
    }

    /// The messages of a tenant's conversation up to the answer `id`; `hold` takes room for so many
    /// bytes. Every turn of it is as if it were new.
    ///
    /// # Errors
    /// When nothing is kept here, when this answer or one before it is not (any more), and when
    /// they have more than `longest` bytes or more than `most` values.
    pub(crate) fn conversation(
        &self,
        (tenant, id): (&str, &str),
        (longest, max_bytes): (usize, usize),
        hold: impl FnOnce(usize) -> Result<(), ApiError>,
    ) -> Result<Vec<Value>, ApiError> {
        let turns = self
            .turns
            .as_ref()
            .ok_or_else(|| wire::external_conversation(wire::PREVIOUS_RESPONSE_ID))?;
        let (mut found, mut bytes, mut values, mut next) =
            (Vec::new(), 0_usize, 0_usize, Some(id.to_owned()));
        while let Some(id) = &next {
            let turn = turns.get(&key(tenant, id)).ok_or_else(response_not_found)?;
            bytes += turn.bytes();
            values += turn.values;
            if bytes > longest || values > max_bytes {
                let message = format!(
                    "a conversation and what goes on from it have at most `limits.body` bytes and {} values together",
                    json::MAX_VALUES
                );
                return Err(ApiError::new(
                    StatusCode::PAYLOAD_TOO_LARGE,
                    "body_too_large",
                    message,
                ));
            }
            next.clone_from(&turn.previous);
            found.push(turn);
        }
        hold(bytes)?;
        let mut conversation = Vec::new();
        for turn in found.iter().rev() {
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

/// As OpenAI says it, without the id: that is a stranger's word.
fn response_not_found() -> ApiError {
    let message = "Previous response not found: it is not (any more) kept here. Send the whole conversation as `input`.";
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
    fn a_conversation_is_all_its_turns_of_one_tenant() {
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
        // Two messages of one field each, and two answers.
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
    fn it_holds_its_bounds_and_keeps_nothing_where_they_are_0() {
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
    fn what_nobody_goes_on_from_is_forgotten() {
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
