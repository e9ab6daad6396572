//! Calls a model no faster than it can answer.

use std::{
    collections::BTreeSet,
    future,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use ecso::{Chat, Image, ImageText, Mllm, ModelError, Reply, ReplyStream, Sampling};
use futures::future::BoxFuture;
use tokio::{
    sync::{Notify, Semaphore, SetOnce},
    time::Instant,
};

/// The first wait after an overload error that names no time; each wait doubles, up to the longest.
const FIRST_WAIT: Duration = Duration::from_millis(500);
/// The longest of these waits.
const LONGEST_WAIT: Duration = Duration::from_mins(1);

/// The interval between probes of an unreachable model; shorter if the patience is short.
const PROBE_INTERVAL: Duration = Duration::from_secs(1);
/// The interval between two warnings of the same kind.
const WARNING_INTERVAL: Duration = Duration::from_mins(1);

/// How long to wait for a model.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// While it rejects every call as overloaded.
    pub busy: Duration,
    /// While it is unreachable.
    pub away: Duration,
}

/// A model with adaptive concurrency. The number of concurrent calls is limited. The limit falls
/// after the model reports an overload, and gradually rises again while it does not. A call that
/// was rejected as overloaded is repeated.
///
/// A call that fails is not by itself evidence against that call. The model is first asked
/// something that it has answered before (if nothing yet, a greeting). If it can't answer that
/// either, the model counts as unreachable, whatever the error is, and is waited for. Then the
/// failed call is repeated with no other call in progress; so is a call whose connection broke,
/// since another call may have caused that. Only if it fails again is the error returned.
///
/// If the model does not come back within the time that [`Patience`] allows, the failed call and
/// all others never complete. [`Paced::unavailable`] then completes, and the caller drops the work,
/// so that nothing is recorded for rows that could not be asked. The same happens if another model
/// came back in its place ([`Paced::with_identity_check`]).
pub struct Paced<M> {
    model: M,
    identity_check: Option<IdentityCheck>,
    /// The maximum number of concurrent calls.
    max_calls: u32,
    patience: Patience,
    pace: Mutex<PaceState>,
    changed: Notify,
    /// One permit for each call in progress; a call that must run alone takes all.
    permits: Semaphore,
    unavailable: SetOnce<ModelError>,
}

/// Checks that the model is still the one that was first asked; otherwise the error describes the
/// model that is there now.
pub type IdentityCheck = Box<dyn Fn() -> BoxFuture<'static, Result<(), ModelError>> + Send + Sync>;

struct PaceState {
    calls_in_progress: u32,
    /// The number of concurrent calls that is currently allowed.
    allowed: f64,
    /// No call may start before this time.
    not_before: Instant,
    wait: Duration,
    /// The time since which every call has been rejected as overloaded.
    overloaded_since: Option<Instant>,
    last_warning: Option<Instant>,
    /// The call that was answered fastest, and the time it took.
    fastest_call: Option<(Duration, Chat, Sampling)>,
    /// When the model last became reachable again.
    recovered_at: Option<Instant>,
    /// The models that replies name, for which the identity was checked.
    known_models: BTreeSet<String>,
    /// Whether calls were rejected since the identity was last checked.
    had_overload: bool,
}

impl<M: Mllm> Paced<M> {
    /// Wraps `model`; at most `at_once` calls run concurrently.
    pub fn new(model: M, at_once: usize, patience: Patience) -> Self {
        let max_calls = u32::try_from(at_once.clamp(1, Semaphore::MAX_PERMITS)).unwrap_or(u32::MAX);
        let pace = PaceState {
            calls_in_progress: 0,
            allowed: f64::from(max_calls),
            not_before: Instant::now(),
            wait: FIRST_WAIT,
            overloaded_since: None,
            last_warning: None,
            fastest_call: None,
            recovered_at: None,
            known_models: BTreeSet::new(),
            had_overload: false,
        };
        Self {
            model,
            identity_check: None,
            max_calls,
            patience,
            pace: Mutex::new(pace),
            changed: Notify::new(),
            permits: Semaphore::new(max_calls as usize),
            unavailable: SetOnce::new(),
        }
    }

    /// Adds a check that the model is still the same. It runs when a connection was lost, after
    /// calls were rejected as overloaded, and when a reply names another model.
    #[must_use]
    pub fn with_identity_check(self, identity_check: IdentityCheck) -> Self {
        Self { identity_check: Some(identity_check), ..self }
    }

    /// Completes when the model has become unavailable for good, and returns the error of the last
    /// call.
    pub async fn unavailable(&self) -> ModelError {
        self.unavailable.wait().await.clone()
    }

    async fn give_up<T>(&self, error: ModelError) -> T {
        let _ = self.unavailable.set(error);
        future::pending().await
    }

    fn pace(&self) -> std::sync::MutexGuard<'_, PaceState> {
        self.pace.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until another call may start.
    async fn wait_for_turn(&self) -> Turn<'_, M> {
        loop {
            let changed = self.changed.notified();
            let open_at = {
                let mut pace = self.pace();
                if f64::from(pace.calls_in_progress) < pace.allowed.max(1.0).floor() {
                    if pace.not_before <= Instant::now() {
                        pace.calls_in_progress += 1;
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

    /// Halves the number of concurrent calls, and waits before the next one. Returns whether it is
    /// worth trying again.
    fn slow_down(&self, retry_after: Option<Duration>, started: Instant) -> bool {
        let mut pace = self.pace();
        pace.had_overload = true;
        let now = Instant::now();
        // Calls that ran together are rejected together, so they count once.
        if started >= pace.not_before {
            pace.allowed = (pace.allowed / 2.0).max(1.0);
            let wait = retry_after.map_or(pace.wait, |wait| wait.min(self.patience.busy));
            pace.wait = (pace.wait * 2).min(LONGEST_WAIT);
            pace.not_before = now + wait;
            if pace.last_warning.is_none_or(|last_warning| now - last_warning > WARNING_INTERVAL) {
                pace.last_warning = Some(now);
                tracing::warn!(
                    "the model is overloaded; reducing concurrent calls to {:.0}",
                    pace.allowed.floor()
                );
            }
        }
        now - *pace.overloaded_since.get_or_insert(started) < self.patience.busy
    }

    /// After a successful call: allows one more call at once per round of calls.
    fn speed_up(&self) {
        let mut pace = self.pace();
        pace.allowed = (pace.allowed + 1.0 / pace.allowed).min(f64::from(self.max_calls));
        (pace.wait, pace.overloaded_since) = (FIRST_WAIT, None);
    }

    fn remember_fastest(&self, chat: &Chat, sampling: &Sampling, took: Duration) {
        let fastest_call = &mut self.pace().fastest_call;
        if fastest_call.as_ref().is_none_or(|(fastest, ..)| took < *fastest) {
            *fastest_call = Some((took, chat.clone(), sampling.clone()));
        }
    }

    /// Repeats a call that was answered before. A model that is overloaded, or filters content,
    /// counts as reachable.
    async fn probe(&self) -> Result<(), ModelError> {
        let greeting = || {
            let brief = Sampling { max_tokens: Some(256), ..Sampling::default() };
            (Duration::ZERO, Chat::ask([], "Hello"), brief)
        };
        let (_, chat, sampling) = self.pace().fastest_call.clone().unwrap_or_else(greeting);
        match self.model.generate(&chat, &sampling).await {
            Ok(_) | Err(ModelError::Overloaded { .. } | ModelError::Filtered(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Waits until the model is reachable. Returns whether, as far as is known, it was reachable
    /// all the time since `started`.
    async fn wait_until_reachable(&self, started: Instant, error: &ModelError) -> bool {
        let Err(probe_error) = self.probe().await else {
            if matches!(error, ModelError::Transport(_)) {
                self.ensure_same_model().await;
            }
            return self.pace().recovered_at.is_none_or(|recovered_at| recovered_at < started);
        };
        let refuses_all = self.pace().fastest_call.is_none()
            && matches!(probe_error, ModelError::Rejected(_) | ModelError::Protocol(_));
        if refuses_all {
            return self.give_up(error.clone()).await;
        }
        tracing::warn!("{error}; waiting up to {:?} for the model", self.patience.away);
        let reachable_again = async {
            loop {
                tokio::time::sleep(PROBE_INTERVAL.min(self.patience.away / 10)).await;
                if self.probe().await.is_ok() {
                    break;
                }
            }
        };
        if tokio::time::timeout(self.patience.away, reachable_again).await.is_err() {
            return self.give_up(error.clone()).await;
        }
        self.ensure_same_model().await;
        tracing::warn!("the model is reachable again");
        self.pace().recovered_at = Some(Instant::now());
        false
    }

    /// Checks that the model is the one that was first asked. Without an identity check, this
    /// always succeeds.
    ///
    /// # Errors
    /// The error describes the model that is there now.
    pub async fn check_identity(&self) -> Result<(), ModelError> {
        match &self.identity_check {
            Some(check) => check().await,
            None => Ok(()),
        }
    }

    /// Returns only if the model is the one that was first asked; otherwise never.
    async fn ensure_same_model(&self) {
        if let Err(error) = self.check_identity().await {
            self.give_up::<()>(error).await;
        }
    }

    /// Makes a call when it is its turn, and repeats it while the model reports an overload.
    async fn call_until_accepted<T, F>(
        &self,
        call: &impl Fn() -> F,
    ) -> Result<(T, Duration), ModelError>
    where
        F: Future<Output = Result<T, ModelError>>,
    {
        loop {
            let turn = self.wait_for_turn().await;
            let started = Instant::now();
            let answer = call().await;
            drop(turn);
            match answer {
                Ok(answer) => {
                    self.speed_up();
                    return Ok((answer, started.elapsed()));
                }
                Err(ModelError::Overloaded { retry_after }) => {
                    if !self.slow_down(retry_after, started) {
                        return self.give_up(ModelError::Overloaded { retry_after }).await;
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn ask<T, F>(
        &self,
        chat: &Chat,
        sampling: &Sampling,
        call: impl Fn() -> F,
    ) -> Result<T, ModelError>
    where
        F: Future<Output = Result<T, ModelError>>,
    {
        let started = Instant::now();
        let permit = self.permits.acquire().await;
        let mut answer = self.call_until_accepted(&call).await;
        drop(permit);
        if let Err(error) = &answer
            && !matches!(error, ModelError::Filtered(_))
        {
            let _all_permits = self.permits.acquire_many(self.max_calls).await;
            if !self.wait_until_reachable(started, error).await
                || matches!(error, ModelError::Transport(_))
            {
                answer = self.call_until_accepted(&call).await;
                if let Err(error) = &answer {
                    // Wait again, so that the next call is not affected by what this one caused.
                    self.wait_until_reachable(started, error).await;
                }
            }
        }
        let (answer, took) = answer?;
        self.remember_fastest(chat, sampling, took);
        if std::mem::take(&mut self.pace().had_overload) {
            self.ensure_same_model().await;
        }
        Ok(answer)
    }

    /// Checks the identity of the model if the reply names another model than those before.
    async fn check_reply_model(&self, reply: &Reply) {
        let Some(model) = &reply.model else { return };
        let is_first = {
            let known_models = &mut self.pace().known_models;
            if known_models.contains(model) {
                return;
            }
            known_models.is_empty()
        };
        if !is_first {
            self.ensure_same_model().await;
        }
        self.pace().known_models.insert(model.clone());
    }
}

/// The permission for one call to run.
struct Turn<'a, M: Mllm>(&'a Paced<M>);

impl<M: Mllm> Drop for Turn<'_, M> {
    fn drop(&mut self) {
        self.0.pace().calls_in_progress -= 1;
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

    async fn image_text(&self, image: &Image) -> Result<Option<ImageText>, ModelError> {
        self.model.image_text(image).await
    }

    async fn stream(&self, chat: &Chat, sampling: &Sampling) -> Result<ReplyStream, ModelError> {
        self.ask(chat, sampling, || self.model.stream(chat, sampling)).await
    }

    async fn generate(&self, chat: &Chat, sampling: &Sampling) -> Result<Reply, ModelError> {
        let call = async || {
            let started = Instant::now();
            let mut reply = self.model.generate(chat, sampling).await?;
            // The time of a call does not include the wait for its turn.
            reply.took.get_or_insert(started.elapsed());
            Ok(reply)
        };
        let reply = self.ask(chat, sampling, call).await?;
        self.check_reply_model(&reply).await;
        Ok(reply)
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

    /// A server that answers so many calls at once, and rejects the others.
    struct LimitedServer {
        capacity: usize,
        in_progress: AtomicUsize,
        rejected: AtomicUsize,
    }

    impl LimitedServer {
        fn with(capacity: usize) -> Arc<Self> {
            Arc::new(Self { capacity, in_progress: 0.into(), rejected: 0.into() })
        }
    }

    #[async_trait]
    impl Mllm for LimitedServer {
        fn name(&self) -> &'static str {
            "busy"
        }

        async fn stream(&self, _: &Chat, _: &Sampling) -> Result<ReplyStream, ModelError> {
            Err(ModelError::Rejected("not asked here".into()))
        }

        async fn generate(&self, _: &Chat, _: &Sampling) -> Result<Reply, ModelError> {
            let in_progress = self.in_progress.fetch_add(1, Ordering::SeqCst);
            tokio::time::sleep(Duration::from_millis(2)).await;
            self.in_progress.fetch_sub(1, Ordering::SeqCst);
            if in_progress < self.capacity {
                return Ok(Reply::default());
            }
            self.rejected.fetch_add(1, Ordering::SeqCst);
            Err(ModelError::Overloaded { retry_after: Some(Duration::from_millis(20)) })
        }
    }

    const SHORT: Patience =
        Patience { busy: Duration::from_mins(1), away: Duration::from_millis(300) };

    /// A server that answers after a while, depending on the question and on when it began.
    struct ScriptedServer<F>(F);

    #[async_trait]
    impl<F: Fn(&str, Instant) -> Result<(), ModelError> + Send + Sync> Mllm for ScriptedServer<F> {
        fn name(&self) -> &'static str {
            "played"
        }

        async fn stream(&self, _: &Chat, _: &Sampling) -> Result<ReplyStream, ModelError> {
            Err(ModelError::Rejected("not asked here".into()))
        }

        async fn generate(&self, chat: &Chat, _: &Sampling) -> Result<Reply, ModelError> {
            let (text, started) = (chat.turns[0].joined_text(), Instant::now());
            tokio::time::sleep(Duration::from_millis(if text == "poison" { 5 } else { 10 })).await;
            (self.0)(&text, started).map(|()| Reply::default())
        }
    }

    fn connection_broken() -> ModelError {
        ModelError::Transport("broken pipe".into())
    }

    async fn ask_each(model: &impl Mllm, texts: &[&str]) -> Vec<Result<Reply, ModelError>> {
        let sampling = Sampling::default();
        join_all(
            texts.iter().map(async |text| model.generate(&Chat::ask([], *text), &sampling).await),
        )
        .await
    }

    async fn ask(model: &impl Mllm, calls: usize) -> Vec<Result<Reply, ModelError>> {
        ask_each(model, &vec!["q"; calls]).await
    }

    #[tokio::test]
    async fn calls_wait_for_a_server_that_comes_back() {
        for error in [connection_broken(), ModelError::Timeout(Duration::ZERO)] {
            let until = Instant::now() + Duration::from_millis(200);
            let server = ScriptedServer(
                move |_: &str, started| if started > until { Ok(()) } else { Err(error.clone()) },
            );
            assert!(ask(&Paced::new(server, 4, SHORT), 12).await.iter().all(Result::is_ok));
        }
    }

    #[tokio::test]
    async fn no_call_goes_to_a_server_that_came_back_with_another_model() {
        let until = Instant::now() + Duration::from_millis(200);
        let asked = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&asked);
        let server = ScriptedServer(move |text: &str, started| {
            if started <= until {
                return Err(connection_broken());
            }
            counted.fetch_add(usize::from(text == "q"), Ordering::SeqCst);
            Ok(())
        });
        let other = || ModelError::Rejected("it came back as another".into());
        let model = Paced::new(server, 4, SHORT)
            .with_identity_check(Box::new(move || Box::pin(async move { Err(other()) })));
        let last_error = tokio::select! {
            _ = ask(&model, 12) => panic!("another model answered"),
            error = model.unavailable() => error,
        };
        assert_eq!((last_error, asked.load(Ordering::SeqCst)), (other(), 0));
    }

    #[tokio::test]
    async fn no_call_fails_when_a_server_stops_answering() {
        let refused = || ModelError::Rejected("401: the key has expired".into());
        for (error, answers) in [
            (connection_broken(), 0),
            (connection_broken(), 5),
            (ModelError::Timeout(Duration::ZERO), 5),
            (refused(), 5),
            (refused(), 0),
            (ModelError::Protocol("<html>".into()), 5),
        ] {
            let (calls, with) = (AtomicUsize::new(0), error.clone());
            let server = ScriptedServer(move |_: &str, _| {
                if calls.fetch_add(1, Ordering::SeqCst) < answers {
                    Ok(())
                } else {
                    Err(with.clone())
                }
            });
            let model = Paced::new(server, 2, SHORT);
            let asked = async {
                for answer in 0..20 {
                    assert!(ask(&model, 1).await[0].is_ok(), "call {answer}");
                }
            };
            let last_error = tokio::select! {
                () = asked => panic!("{error} was not missed"),
                error = model.unavailable() => error,
            };
            assert_eq!(last_error, error);
        }
    }

    #[tokio::test]
    async fn a_call_that_fails_while_others_succeed_fails_alone() {
        for error in [
            connection_broken(),
            ModelError::Rejected("too long".into()),
            ModelError::Timeout(Duration::ZERO),
        ] {
            let with = error.clone();
            let server = ScriptedServer(
                move |text: &str, _| if text == "bad" { Err(with.clone()) } else { Ok(()) },
            );
            let texts = ["bad", "q", "q", "bad", "q"];
            for (text, answer) in
                texts.iter().zip(ask_each(&Paced::new(server, 4, SHORT), &texts).await)
            {
                assert_eq!(answer.err(), (*text == "bad").then(|| error.clone()));
            }
        }
    }

    #[tokio::test]
    async fn a_call_that_crashes_the_server_fails_no_other_call() {
        let down_until = std::sync::Mutex::new(None::<Instant>);
        let server = ScriptedServer(move |text: &str, started| {
            let mut down_until = down_until.lock().unwrap();
            if text == "poison" {
                *down_until = Some(Instant::now() + Duration::from_millis(50));
            }
            if down_until.is_some_and(|until| started < until) {
                Err(connection_broken())
            } else {
                Ok(())
            }
        });
        let texts = ["poison", "q", "q", "q", "poison", "q", "q", "q"];
        let model = Paced::new(server, 8, Patience { away: Duration::from_millis(200), ..SHORT });
        for (text, answer) in texts.iter().zip(ask_each(&model, &texts).await) {
            assert_eq!(answer.is_err(), *text == "poison", "{text}: {answer:?}");
        }
    }

    #[tokio::test]
    async fn all_calls_are_answered_by_a_server_with_little_capacity() {
        let server = LimitedServer::with(4);
        let model = Paced::new(Arc::clone(&server), 64, SHORT);
        let answers = ask(&model, 400).await;
        assert!(answers.iter().all(Result::is_ok));
        let rejected = server.rejected.load(Ordering::SeqCst);
        assert!((1..200).contains(&rejected), "{rejected} calls were rejected");
    }

    #[tokio::test]
    async fn no_call_fails_on_a_server_that_rejects_everything() {
        let model = Paced::new(
            LimitedServer::with(0),
            8,
            Patience { busy: Duration::from_millis(200), ..SHORT },
        );
        let started = Instant::now();
        let last_error = tokio::select! {
            answers = ask(&model, 16) => panic!("{answers:?}"),
            error = model.unavailable() => error,
        };
        assert!(matches!(last_error, ModelError::Overloaded { .. }));
        assert!(
            started.elapsed() >= Duration::from_millis(200)
                && started.elapsed() < Duration::from_secs(20)
        );
    }
}
