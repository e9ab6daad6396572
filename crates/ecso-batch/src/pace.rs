//! A model that is asked no faster than it can answer.

use std::{
    future,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use ecso::{Chat, Image, Mllm, ModelError, Reply, ReplyStream, Sampling, Seen};
use tokio::{
    sync::{Mutex as AsyncMutex, Notify, SetOnce},
    time::Instant,
};

/// The first wait after "too much at once", where the model asks for none; it doubles up to the longest.
const FIRST_WAIT: Duration = Duration::from_millis(500);
/// The longest wait.
const LONGEST_WAIT: Duration = Duration::from_mins(1);

/// Between two looks whether a model that was away is back.
const LOOK: Duration = Duration::from_secs(1);
/// Between two warnings of the same kind.
const WARNINGS: Duration = Duration::from_mins(1);
/// How often a call may find the model away. One that finds it so each time may be what brings it down.
const OUTAGES: usize = 2;

/// How long a model is waited for.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// While it turns every call away.
    pub busy: Duration,
    /// While it can't be reached.
    pub away: Duration,
}

/// A model whose calls wait for their turn: at most so many at once, fewer after it said that this is too much, more again
/// while it doesn't. A call that was turned away is made again, until the model has turned everything away for as long as
/// [`Patience`] goes; so is one that found the model away. Where it does not come back, that call and all others end never:
/// [`Paced::gone`] tells, and the work is dropped with nothing recorded of what could not be asked.
pub struct Paced<M> {
    model: M,
    /// The most calls at once.
    most: f64,
    patience: Patience,
    pace: Mutex<Pace>,
    changed: Notify,
    /// When the last outage ended; locked while one goes on.
    back_since: AsyncMutex<Option<Instant>>,
    gone: SetOnce<ModelError>,
}

struct Pace {
    under_way: u32,
    /// Calls at once, now.
    allowed: f64,
    /// No call before.
    not_before: Instant,
    wait: Duration,
    /// Since when every call has been turned away.
    refused_since: Option<Instant>,
    warned: Option<Instant>,
}

impl<M: Mllm> Paced<M> {
    /// Puts a pace in front of `model`.
    pub fn new(model: M, at_once: usize, patience: Patience) -> Self {
        let most = f64::from(u32::try_from(at_once.max(1)).unwrap_or(u32::MAX));
        let pace = Pace {
            under_way: 0,
            allowed: most,
            not_before: Instant::now(),
            wait: FIRST_WAIT,
            refused_since: None,
            warned: None,
        };
        Self {
            model,
            most,
            patience,
            pace: Mutex::new(pace),
            changed: Notify::new(),
            back_since: AsyncMutex::default(),
            gone: SetOnce::new(),
        }
    }

    /// Ends when the model went away and did not come back; gives the error that it went with.
    pub async fn gone(&self) -> ModelError {
        self.gone.wait().await.clone()
    }

    fn pace(&self) -> std::sync::MutexGuard<'_, Pace> {
        self.pace.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a turn.
    async fn turn(&self) -> Turn<'_, M> {
        loop {
            let changed = self.changed.notified();
            let open_at = {
                let mut pace = self.pace();
                if f64::from(pace.under_way) < pace.allowed.max(1.0).floor() {
                    if pace.not_before <= Instant::now() {
                        pace.under_way += 1;
                        return Turn(self);
                    }
                    Some(pace.not_before)
                } else {
                    None
                }
            };
            match open_at {
                Some(at) => tokio::time::sleep_until(at).await,
                None => changed.await,
            }
        }
    }

    /// Half as many calls at once, and none for a while. Gives whether trying again is worth it.
    fn slow_down(&self, asked: Option<Duration>, begun: Instant) -> bool {
        let mut pace = self.pace();
        let now = Instant::now();
        // Calls that were under way together are turned away together: they count once.
        if begun >= pace.not_before {
            pace.allowed = (pace.allowed / 2.0).max(1.0);
            let wait = asked.unwrap_or(pace.wait).min(LONGEST_WAIT);
            pace.wait = (pace.wait * 2).min(LONGEST_WAIT);
            pace.not_before = now + wait;
            if pace.warned.is_none_or(|warned| now - warned > WARNINGS) {
                pace.warned = Some(now);
                tracing::warn!("the model turns calls away; it is asked {:.0} at once now", pace.allowed.floor());
            }
        }
        now - *pace.refused_since.get_or_insert(begun) < self.patience.busy
    }

    /// Waits until a model that a call lost is back. Where it was not away, the call is at fault, and has its error.
    async fn return_of(&self, lost: ModelError, begun: Instant) -> Result<(), ModelError> {
        let mut back_since = self.back_since.lock().await;
        if back_since.is_some_and(|back| begun < back) {
            return Ok(());
        }
        if self.model.health().await.is_ok() {
            return Err(lost);
        }
        let away = Instant::now();
        tracing::warn!("{lost}; waiting up to {:?} for it", self.patience.away);
        while away.elapsed() < self.patience.away {
            tokio::time::sleep(LOOK.min(self.patience.away)).await;
            if self.model.health().await.is_ok() {
                tracing::warn!("the model is back");
                *back_since = Some(Instant::now());
                return Ok(());
            }
        }
        // Still locked: no other call begins to wait anew.
        let _ = self.gone.set(lost);
        future::pending().await
    }

    /// A call went well: one more at once after as many as are allowed.
    fn speed_up(&self) {
        let mut pace = self.pace();
        pace.allowed = (pace.allowed + 1.0 / pace.allowed).min(self.most);
        (pace.wait, pace.refused_since) = (FIRST_WAIT, None);
    }

    async fn ask<T, F>(&self, call: impl Fn() -> F) -> Result<T, ModelError>
    where
        F: Future<Output = Result<T, ModelError>>,
    {
        let mut outages = 0;
        loop {
            let turn = self.turn().await;
            let begun = Instant::now();
            let answer = call().await;
            drop(turn);
            match answer {
                Err(ModelError::Overloaded { retry_after }) if self.slow_down(retry_after, begun) => {}
                Err(lost @ ModelError::Transport(_)) if outages < OUTAGES => {
                    self.return_of(lost, begun).await?;
                    outages += 1;
                }
                Err(error) => return Err(error),
                Ok(answer) => {
                    self.speed_up();
                    return Ok(answer);
                }
            }
        }
    }
}

/// The turn of a call.
struct Turn<'a, M: Mllm>(&'a Paced<M>);

impl<M: Mllm> Drop for Turn<'_, M> {
    fn drop(&mut self) {
        self.0.pace().under_way -= 1;
        self.0.changed.notify_waiters();
    }
}

#[async_trait]
impl<M: Mllm> Mllm for Paced<M> {
    fn name(&self) -> &str {
        self.model.name()
    }

    async fn health(&self) -> Result<(), ModelError> {
        self.model.health().await
    }

    async fn reads(&self, image: &Image) -> Result<Option<Seen>, ModelError> {
        self.model.reads(image).await
    }

    async fn stream(&self, chat: &Chat, sampling: &Sampling) -> Result<ReplyStream, ModelError> {
        self.ask(|| self.model.stream(chat, sampling)).await
    }

    async fn generate(&self, chat: &Chat, sampling: &Sampling) -> Result<Reply, ModelError> {
        let call = async || {
            let begun = Instant::now();
            let mut reply = self.model.generate(chat, sampling).await?;
            // What a call took is its own time, without the wait for its turn.
            reply.took.get_or_insert(begun.elapsed());
            Ok(reply)
        };
        self.ask(call).await
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    use futures::future::join_all;

    use super::*;

    /// A server that answers so many calls at once, and turns the others away.
    struct Busy {
        room: usize,
        inside: AtomicUsize,
        turned_away: AtomicUsize,
    }

    impl Busy {
        fn with(room: usize) -> Arc<Self> {
            Arc::new(Self { room, inside: 0.into(), turned_away: 0.into() })
        }
    }

    #[async_trait]
    impl Mllm for Busy {
        fn name(&self) -> &'static str {
            "busy"
        }

        async fn stream(&self, _: &Chat, _: &Sampling) -> Result<ReplyStream, ModelError> {
            Err(ModelError::Rejected("not asked here".into()))
        }

        async fn generate(&self, _: &Chat, _: &Sampling) -> Result<Reply, ModelError> {
            let inside = self.inside.fetch_add(1, Ordering::SeqCst);
            tokio::time::sleep(Duration::from_millis(2)).await;
            self.inside.fetch_sub(1, Ordering::SeqCst);
            if inside < self.room {
                return Ok(Reply::default());
            }
            self.turned_away.fetch_add(1, Ordering::SeqCst);
            Err(ModelError::Overloaded { retry_after: Some(Duration::from_millis(20)) })
        }
    }

    const SHORT: Patience = Patience { busy: Duration::from_mins(1), away: Duration::from_millis(300) };

    /// A server that breaks every connection for a while, or for good, or only those of one kind of call.
    struct Breaking {
        until: Option<Instant>,
        is_up: bool,
    }

    #[async_trait]
    impl Mllm for Breaking {
        fn name(&self) -> &'static str {
            "breaking"
        }

        async fn health(&self) -> Result<(), ModelError> {
            let is_back = self.is_up || self.until.is_some_and(|until| Instant::now() > until);
            if is_back { Ok(()) } else { Err(ModelError::Transport("refused".into())) }
        }

        async fn stream(&self, _: &Chat, _: &Sampling) -> Result<ReplyStream, ModelError> {
            Err(ModelError::Rejected("not asked here".into()))
        }

        async fn generate(&self, _: &Chat, _: &Sampling) -> Result<Reply, ModelError> {
            if self.until.is_some_and(|until| Instant::now() > until) {
                return Ok(Reply::default());
            }
            Err(ModelError::Transport("broken pipe".into()))
        }
    }

    #[tokio::test]
    async fn a_server_that_comes_back_is_waited_for() {
        let until = Some(Instant::now() + Duration::from_millis(200));
        let model = Paced::new(Breaking { until, is_up: false }, 4, SHORT);
        assert!(ask(&model, 12).await.iter().all(Result::is_ok));
    }

    #[tokio::test]
    async fn of_a_server_that_is_gone_no_call_fails() {
        let model = Paced::new(Breaking { until: None, is_up: false }, 4, SHORT);
        let gone = tokio::select! {
            answers = ask(&model, 12) => panic!("{answers:?}"),
            gone = model.gone() => gone,
        };
        assert_eq!(gone, ModelError::Transport("broken pipe".into()));
    }

    #[tokio::test]
    async fn a_call_that_breaks_while_the_server_is_up_fails_alone() {
        let model = Paced::new(Breaking { until: None, is_up: true }, 4, SHORT);
        assert!(ask(&model, 3).await.iter().all(|answer| matches!(answer, Err(ModelError::Transport(_)))));
    }

    async fn ask(model: &impl Mllm, calls: usize) -> Vec<Result<Reply, ModelError>> {
        let (chat, sampling) = (Chat::ask([], "q"), Sampling::default());
        join_all((0..calls).map(|_| model.generate(&chat, &sampling))).await
    }

    #[tokio::test]
    async fn a_server_with_room_for_few_answers_all() {
        let server = Busy::with(4);
        let model = Paced::new(Arc::clone(&server), 64, SHORT);
        let answers = ask(&model, 400).await;
        assert!(answers.iter().all(Result::is_ok));
        let turned_away = server.turned_away.load(Ordering::SeqCst);
        assert!((1..200).contains(&turned_away), "{turned_away} calls were turned away");
    }

    #[tokio::test]
    async fn a_server_that_turns_everything_away_is_given_up() {
        let model = Paced::new(Busy::with(0), 8, Patience { busy: Duration::from_millis(200), ..SHORT });
        let begun = Instant::now();
        let answers = ask(&model, 16).await;
        assert!(answers.iter().all(|answer| matches!(answer, Err(ModelError::Overloaded { .. }))));
        assert!(begun.elapsed() >= Duration::from_millis(200) && begun.elapsed() < Duration::from_secs(20));
    }
}
