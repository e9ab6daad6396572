//! Requests of gateways that wait for their answers.

use std::{sync::Arc, time::Duration};

use moka::{ops::compute::Op, policy::EvictionPolicy, sync::Cache};

use crate::settings::Limits;

/// Calls, by their owner and the gateway's id for the call.
#[derive(Debug)]
pub(crate) struct Pending {
    /// `None` if nothing is kept.
    calls: Option<Cache<blake3::Hash, PendingCall>>,
    max_bytes: usize,
}

/// What is known about a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum PendingCall {
    /// Its answer goes out unjudged.
    Unguarded,
    /// The chat in JSON, whose answer is to be judged.
    Waiting(Arc<[u8]>),
    /// Its answer was already taken.
    Answered,
    /// Two requests have this id, so it is unclear which one an answer belongs to.
    Ambiguous,
}

/// Upper bound of the memory of a call in addition to its chat, in bytes.
const OVERHEAD: usize = 256;
/// Longer times are cut to this.
const YEAR: u64 = 365 * 24 * 3600;

impl PendingCall {
    fn bytes(&self) -> usize {
        if let Self::Waiting(chat) = self { chat.len() + OVERHEAD } else { OVERHEAD }
    }
}

impl Pending {
    /// A store with these limits.
    pub(crate) fn new(limits: &Limits) -> Self {
        let max_bytes = limits.pending;
        let calls = (max_bytes > 0 && limits.pending_for > 0).then(|| {
            Cache::builder()
                .max_capacity(max_bytes as u64)
                .weigher(|_, known: &PendingCall| u32::try_from(known.bytes()).unwrap_or(u32::MAX))
                .eviction_policy(EvictionPolicy::lru())
                .time_to_live(Duration::from_secs(limits.pending_for.min(YEAR)))
                .build()
        });
        Self { calls, max_bytes }
    }

    /// Keeps what is known about a tenant's call; the same may be inserted again. Returns false if
    /// there is no room.
    pub(crate) fn insert(&self, (tenant, call): (&str, &str), known: &PendingCall) -> bool {
        let Some(calls) =
            self.calls.as_ref().filter(|_| known.bytes() <= self.max_bytes.min(u32::MAX as usize))
        else {
            return false;
        };
        calls.entry(key(tenant, call)).and_compute_with(|kept| match kept {
            None => Op::Put(known.clone()),
            Some(kept) if kept.value() == known => Op::Nop,
            Some(_) => Op::Put(PendingCall::Ambiguous),
        });
        // Otherwise the limit would apply a little later.
        calls.run_pending_tasks();
        true
    }

    /// What is known about the call that an answer belongs to. A waiting call is returned once.
    pub(crate) fn take(&self, (tenant, call): (&str, &str)) -> Option<PendingCall> {
        let mut known = None;
        self.calls.as_ref()?.entry(key(tenant, call)).and_compute_with(|kept| {
            known = kept.map(moka::Entry::into_value);
            if matches!(known, Some(PendingCall::Waiting(_))) {
                Op::Put(PendingCall::Answered)
            } else {
                Op::Nop
            }
        });
        known
    }
}

fn key(tenant: &str, call: &str) -> blake3::Hash {
    blake3::keyed_hash(blake3::hash(tenant.as_bytes()).as_bytes(), call.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pending(pending: usize, pending_for: u64) -> Pending {
        Pending::new(&Limits { pending, pending_for, ..Limits::default() })
    }

    fn waits(text: &str) -> PendingCall {
        PendingCall::Waiting(text.as_bytes().into())
    }

    #[test]
    fn a_call_is_taken_once_and_by_its_own_tenant() {
        let pending = pending(1 << 20, 60);
        assert!(
            pending.insert(("a", "1"), &waits("rye")) && pending.insert(("a", "1"), &waits("rye"))
        );
        assert_eq!(pending.take(("b", "1")), None);
        assert_eq!(pending.take(("a", "2")), None);
        assert_eq!(pending.take(("a", "1")), Some(waits("rye")));
        assert_eq!(pending.take(("a", "1")), Some(PendingCall::Answered));
        // Another request with this id is a second one.
        assert!(pending.insert(("a", "1"), &waits("rye")));
        assert_eq!(pending.take(("a", "1")), Some(PendingCall::Ambiguous));
    }

    #[test]
    fn two_requests_with_one_id_are_ambiguous() {
        let pending = pending(1 << 20, 60);
        for (first, second) in [
            (waits("rye"), waits("flour")),
            (waits("rye"), PendingCall::Unguarded),
            (PendingCall::Unguarded, waits("rye")),
        ] {
            let call = format!("{first:?}{second:?}");
            pending.insert(("a", &call), &first);
            pending.insert(("a", &call), &second);
            assert_eq!(pending.take(("a", &call)), Some(PendingCall::Ambiguous));
            assert_eq!(pending.take(("a", &call)), Some(PendingCall::Ambiguous));
        }
    }

    #[test]
    fn limits_hold() {
        let pending = pending(4000, 1);
        for call in 0..100 {
            assert!(pending.insert(("a", &call.to_string()), &waits(&"f".repeat(1000))));
        }
        assert!(!pending.insert(("a", "long"), &waits(&"f".repeat(4000))));
        let kept = (0..100)
            .filter(|call| pending.take(("a", &call.to_string())).is_some())
            .collect::<Vec<_>>();
        assert_eq!(kept, [97, 98, 99]);
        assert!(pending.insert(("a", "late"), &waits("rye")));
        std::thread::sleep(Duration::from_millis(1200));
        assert_eq!(pending.take(("a", "late")), None);
        for (most, seconds) in [(0, 60), (4000, 0)] {
            let pending = self::pending(most, seconds);
            assert!(!pending.insert(("a", "1"), &PendingCall::Unguarded));
            assert_eq!(pending.take(("a", "1")), None);
        }
    }
}
