//! A model that is asked no faster than it can answer.

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

/// The first wait after "too much at once", where the model asks for none; it doubles up to the
/// longest.
const FIRST_WAIT: Duration = Duration::from_millis(500);
/// The longest wait.
const LONGEST_WAIT: Duration = Duration::from_mins(1);

/// Between two looks whether a model that was away is back; less where the patience is short.
const LOOK: Duration = Duration::from_secs(1);
/// Between two warnings of the same kind.
const WARNINGS: Duration = Duration::from_mins(1);

/// How long a model is waited for.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// While it turns every call away.
    pub busy: Duration,
    /// While it answers none.
    pub away: Duration,
}

/// A model whose calls wait for their turn: at most so many at once, fewer after it said that this
/// is too much, more again while it doesn't. A call that was turned away is made again.
///
/// A call that fails is no proof against itself. The model is asked again what it answered before
/// (nothing yet: a greeting). Where it doesn't answer that either it is away, whatever it says, and
/// is waited for. Then the failed call is made again, with no other under way; so is one whose
/// connection broke, which a neighbour may have brought about. Only what fails then has its error.
///
/// Where the model does not come back as long as [`Patience`] goes, the failed call and all others
/// end never: [`Paced::gone`] tells, and the work is dropped with nothing recorded of what could
/// not be asked. The same where another model came back in its place ([`Paced::that_stays`]).
pub struct Paced<M> {
    model: M,
    stays: Option<Stays>,
    /// The most calls at once.
    most: u32,
    patience: Patience,
    pace: Mutex<Pace>,
    changed: Notify,
    /// One for each call under way; a call that must be alone takes all.
    places: Semaphore,
    gone: SetOnce<ModelError>,
}

/// Says whether the model is still the one that was asked at first: an error that tells what it is
/// now.
pub type Stays = Box<dyn Fn() -> BoxFuture<'static, Result<(), ModelError>> + Send + Sync>;

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
    /// What was answered fastest, and how fast.
    answered: Option<(Duration, Chat, Sampling)>,
    /// When the model last came back.
    back: Option<Instant>,
    /// From which models replies say they come, of which somebody has looked whether that is well.
    answering: BTreeSet<String>,
    /// Whether calls were turned away since somebody looked which model is there.
    was_busy: bool,
}

impl<M: Mllm> Paced<M> {
    /// Puts a pace in front of `model`.
    pub fn new(model: M, at_once: usize, patience: Patience) -> Self {
        let most = u32::try_from(at_once.clamp(1, Semaphore::MAX_PERMITS)).unwrap_or(u32::MAX);
        let pace = Pace {
            under_way: 0,
            allowed: f64::from(most),
            not_before: Instant::now(),
            wait: FIRST_WAIT,
            refused_since: None,
            warned: None,
            answered: None,
            back: None,
            answering: BTreeSet::new(),
            was_busy: false,
        };
        Self {
            model,
            stays: None,
            most,
            patience,
            pace: Mutex::new(pace),
            changed: Notify::new(),
            places: Semaphore::new(most as usize),
            gone: SetOnce::new(),
        }
    }

    /// The same model, asked by `stays` whether it is the same where that is in doubt: when a
    /// connection to it was lost, when it turned calls away, and when a reply says that it comes
    /// from another.
    #[must_use]
    pub fn that_stays(self, stays: Stays) -> Self {
        Self { stays: Some(stays), ..self }
    }

    /// Ends when the model went away and did not come back; gives the error that it went with.
    pub async fn gone(&self) -> ModelError {
        self.gone.wait().await.clone()
    }

    async fn give_up<T>(&self, error: ModelError) -> T {
        let _ = self.gone.set(error);
        future::pending().await
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
        pace.was_busy = true;
        let now = Instant::now();
        // Calls that were under way together are turned away together: they count once.
        if begun >= pace.not_before {
            pace.allowed = (pace.allowed / 2.0).max(1.0);
            let wait = asked.unwrap_or(pace.wait).min(LONGEST_WAIT);
            pace.wait = (pace.wait * 2).min(LONGEST_WAIT);
            pace.not_before = now + wait;
            if pace.warned.is_none_or(|warned| now - warned > WARNINGS) {
                pace.warned = Some(now);
                tracing::warn!(
                    "the model turns calls away; it is asked {:.0} at once now",
                    pace.allowed.floor()
                );
            }
        }
        now - *pace.refused_since.get_or_insert(begun) < self.patience.busy
    }

    /// A call went well: one more at once after as many as are allowed.
    fn speed_up(&self) {
        let mut pace = self.pace();
        pace.allowed = (pace.allowed + 1.0 / pace.allowed).min(f64::from(self.most));
        (pace.wait, pace.refused_since) = (FIRST_WAIT, None);
    }

    fn remember(&self, chat: &Chat, sampling: &Sampling, took: Duration) {
        let answered = &mut self.pace().answered;
        if answered.as_ref().is_none_or(|(fastest, ..)| took < *fastest) {
            *answered = Some((took, chat.clone(), sampling.clone()));
        }
    }

    /// Asks for what was answered before. A model that is busy, or filters, is there.
    async fn look(&self) -> Result<(), ModelError> {
        let greeting = || {
            let brief = Sampling { max_tokens: Some(256), ..Sampling::default() };
            (Duration::ZERO, Chat::ask([], "Hello"), brief)
        };
        let (_, chat, sampling) = self.pace().answered.clone().unwrap_or_else(greeting);
        match self.model.generate(&chat, &sampling).await {
            Ok(_) | Err(ModelError::Overloaded { .. } | ModelError::Filtered(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Waits until the model answers. Gives whether it did so all the time since `begun`, as far as
    /// is known.
    async fn was_there(&self, begun: Instant, lost: &ModelError) -> bool {
        let Err(error) = self.look().await else {
            if matches!(lost, ModelError::Transport(_)) {
                self.is_the_same().await;
            }
            return self.pace().back.is_none_or(|back| back < begun);
        };
        let refuses_all = self.pace().answered.is_none()
            && matches!(error, ModelError::Rejected(_) | ModelError::Protocol(_));
        if refuses_all {
            return self.give_up(lost.clone()).await;
        }
        tracing::warn!("{lost}; waiting up to {:?} for the model", self.patience.away);
        let return_of = async {
            loop {
                tokio::time::sleep(LOOK.min(self.patience.away / 10)).await;
                if self.look().await.is_ok() {
                    break;
                }
            }
        };
        if tokio::time::timeout(self.patience.away, return_of).await.is_err() {
            return self.give_up(lost.clone()).await;
        }
        self.is_the_same().await;
        tracing::warn!("the model is back");
        self.pace().back = Some(Instant::now());
        false
    }

    /// Whether the model is the one that was asked at first; where nobody can say, it is.
    ///
    /// # Errors
    /// Says what it is now.
    pub async fn stays(&self) -> Result<(), ModelError> {
        match &self.stays {
            Some(stays) => stays().await,
            None => Ok(()),
        }
    }

    /// Goes on only while the model is the one that was asked at first.
    async fn is_the_same(&self) {
        if let Err(error) = self.stays().await {
            self.give_up::<()>(error).await;
        }
    }

    /// A call, made when its turn comes, and again while the model turns it away.
    async fn once<T, F>(&self, call: &impl Fn() -> F) -> Result<(T, Duration), ModelError>
    where
        F: Future<Output = Result<T, ModelError>>,
    {
        loop {
            let turn = self.turn().await;
            let begun = Instant::now();
            let answer = call().await;
            drop(turn);
            match answer {
                Ok(answer) => {
                    self.speed_up();
                    return Ok((answer, begun.elapsed()));
                }
                Err(ModelError::Overloaded { retry_after }) => {
                    if !self.slow_down(retry_after, begun) {
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
        let begun = Instant::now();
        let place = self.places.acquire().await;
        let mut answer = self.once(&call).await;
        drop(place);
        if let Err(lost) = &answer
            && !matches!(lost, ModelError::Filtered(_))
        {
            let _all_places = self.places.acquire_many(self.most).await;
            if !self.was_there(begun, lost).await || matches!(lost, ModelError::Transport(_)) {
                answer = self.once(&call).await;
                if let Err(lost) = &answer {
                    // The next call is not to suffer from what this one did.
                    self.was_there(begun, lost).await;
                }
            }
        }
        let (answer, took) = answer?;
        self.remember(chat, sampling, took);
        if std::mem::take(&mut self.pace().was_busy) {
            self.is_the_same().await;
        }
        Ok(answer)
    }

    /// Looks which model is there where a reply says that it comes from another than those before.
    async fn is_from_the_same(&self, reply: &Reply) {
        let Some(model) = &reply.model else { return };
        let is_first = {
            let answering = &mut self.pace().answering;
            if answering.contains(model) {
                return;
            }
            answering.is_empty()
        };
        if !is_first {
            self.is_the_same().await;
        }
        self.pace().answering.insert(model.clone());
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

    async fn image_text(&self, image: &Image) -> Result<Option<ImageText>, ModelError> {
        self.model.image_text(image).await
    }

    async fn stream(&self, chat: &Chat, sampling: &Sampling) -> Result<ReplyStream, ModelError> {
        self.ask(chat, sampling, || self.model.stream(chat, sampling)).await
    }

    async fn generate(&self, chat: &Chat, sampling: &Sampling) -> Result<Reply, ModelError> {
        let call = async || {
            let begun = Instant::now();
            let mut reply = self.model.generate(chat, sampling).await?;
            // What a call took is its own time, without the wait for its turn.
            reply.took.get_or_insert(begun.elapsed());
            Ok(reply)
        };
        let reply = self.ask(chat, sampling, call).await?;
        self.is_from_the_same(&reply).await;
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

    const SHORT: Patience =
        Patience { busy: Duration::from_mins(1), away: Duration::from_millis(300) };

    /// A server that answers a call after a while, by what is asked and when that began.
    struct Played<F>(F);

    #[async_trait]
    impl<F: Fn(&str, Instant) -> Result<(), ModelError> + Send + Sync> Mllm for Played<F> {
        fn name(&self) -> &'static str {
            "played"
        }

        async fn stream(&self, _: &Chat, _: &Sampling) -> Result<ReplyStream, ModelError> {
            Err(ModelError::Rejected("not asked here".into()))
        }

        async fn generate(&self, chat: &Chat, _: &Sampling) -> Result<Reply, ModelError> {
            let (text, begun) = (chat.turns[0].query(), Instant::now());
            tokio::time::sleep(Duration::from_millis(if text == "poison" { 5 } else { 10 })).await;
            (self.0)(&text, begun).map(|()| Reply::default())
        }
    }

    fn broken() -> ModelError {
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
    async fn a_server_that_comes_back_is_waited_for() {
        for error in [broken(), ModelError::Timeout(Duration::ZERO)] {
            let until = Instant::now() + Duration::from_millis(200);
            let server = Played(
                move |_: &str, begun| if begun > until { Ok(()) } else { Err(error.clone()) },
            );
            assert!(ask(&Paced::new(server, 4, SHORT), 12).await.iter().all(Result::is_ok));
        }
    }

    #[tokio::test]
    async fn a_server_that_comes_back_as_another_model_is_asked_nothing_more() {
        let until = Instant::now() + Duration::from_millis(200);
        let asked = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&asked);
        let server = Played(move |text: &str, begun| {
            if begun <= until {
                return Err(broken());
            }
            counted.fetch_add(usize::from(text == "q"), Ordering::SeqCst);
            Ok(())
        });
        let other = || ModelError::Rejected("it came back as another".into());
        let model = Paced::new(server, 4, SHORT)
            .that_stays(Box::new(move || Box::pin(async move { Err(other()) })));
        let gone = tokio::select! {
            _ = ask(&model, 12) => panic!("another model answered"),
            gone = model.gone() => gone,
        };
        assert_eq!((gone, asked.load(Ordering::SeqCst)), (other(), 0));
    }

    #[tokio::test]
    async fn of_a_server_that_answers_no_more_no_call_fails() {
        let refused = || ModelError::Rejected("401: the key has expired".into());
        for (error, answers) in [
            (broken(), 0),
            (broken(), 5),
            (ModelError::Timeout(Duration::ZERO), 5),
            (refused(), 5),
            (refused(), 0),
            (ModelError::Protocol("<html>".into()), 5),
        ] {
            let (calls, with) = (AtomicUsize::new(0), error.clone());
            let server = Played(move |_: &str, _| {
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
            let gone = tokio::select! {
                () = asked => panic!("{error} was not missed"),
                gone = model.gone() => gone,
            };
            assert_eq!(gone, error);
        }
    }

    #[tokio::test]
    async fn a_call_that_fails_while_others_are_answered_fails_alone() {
        for error in
            [broken(), ModelError::Rejected("too long".into()), ModelError::Timeout(Duration::ZERO)]
        {
            let with = error.clone();
            let server =
                Played(move |text: &str, _| if text == "bad" { Err(with.clone()) } else { Ok(()) });
            let texts = ["bad", "q", "q", "bad", "q"];
            for (text, answer) in
                texts.iter().zip(ask_each(&Paced::new(server, 4, SHORT), &texts).await)
            {
                assert_eq!(answer.err(), (*text == "bad").then(|| error.clone()));
            }
        }
    }

    #[tokio::test]
    async fn a_call_that_brings_the_server_down_takes_no_other_with_it() {
        let down_until = std::sync::Mutex::new(None::<Instant>);
        let server = Played(move |text: &str, begun| {
            let mut down_until = down_until.lock().unwrap();
            if text == "poison" {
                *down_until = Some(Instant::now() + Duration::from_millis(50));
            }
            if down_until.is_some_and(|until| begun < until) { Err(broken()) } else { Ok(()) }
        });
        let texts = ["poison", "q", "q", "q", "poison", "q", "q", "q"];
        let model = Paced::new(server, 8, Patience { away: Duration::from_millis(200), ..SHORT });
        for (text, answer) in texts.iter().zip(ask_each(&model, &texts).await) {
            assert_eq!(answer.is_err(), *text == "poison", "{text}: {answer:?}");
        }
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
    async fn of_a_server_that_turns_everything_away_no_call_fails() {
        let model =
            Paced::new(Busy::with(0), 8, Patience { busy: Duration::from_millis(200), ..SHORT });
        let begun = Instant::now();
        let gone = tokio::select! {
            answers = ask(&model, 16) => panic!("{answers:?}"),
            gone = model.gone() => gone,
        };
        assert!(matches!(gone, ModelError::Overloaded { .. }));
        assert!(
            begun.elapsed() >= Duration::from_millis(200)
                && begun.elapsed() < Duration::from_secs(20)
        );
    }
}
