//! Whether the upstream responds. It is probed at most once in a while, however often it is asked
//! for.

use std::time::{Duration, Instant};

use tokio::sync::Mutex;

use crate::{context::PROBE_TIMEOUT, upstream::Upstream};

/// How long a result holds.
const MAX_AGE: Duration = Duration::from_secs(5);

/// The last result, and when it was found.
#[derive(Debug, Default)]
pub(crate) struct Readiness(Mutex<Option<(Instant, bool)>>);

impl Readiness {
    /// Whether the upstream responds.
    pub(crate) async fn check(&self, upstream: &Upstream) -> bool {
        let mut last = self.0.lock().await;
        if let Some((at, is_ready)) = *last
            && at.elapsed() < MAX_AGE
        {
            return is_ready;
        }
        let is_ready =
            matches!(tokio::time::timeout(PROBE_TIMEOUT, upstream.health()).await, Ok(Ok(())));
        *last = Some((Instant::now(), is_ready));
        is_ready
    }
}
