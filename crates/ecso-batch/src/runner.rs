//! The runner: rows in, entries of a journal out, several at once.

use std::{
    cell::{Cell, RefCell},
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::{FutureExt, Stream, StreamExt, future, stream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::task::AbortOnDropHandle;

use crate::{
    cache::afresh,
    journal::{Entry, Journal, JournalError, Key, Line},
};

/// Rows that are read before there is room for them.
const READ_AHEAD: usize = 8;

/// How much at once, and how much in all.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Rows at once.
    pub rows: usize,
    /// Bytes that the rows at once may hold together ([`Batch::bytes`]), beside the few that are
    /// read ahead. One row alone may have more.
    pub bytes: usize,
    /// No new row from so many tokens on.
    pub tokens: Option<u64>,
    /// No new row after so long.
    pub time: Option<Duration>,
    /// Rows again that failed.
    pub retry_failed: bool,
}

impl Bounds {
    /// So many rows at once with 1 GiB, and no end.
    #[must_use]
    pub fn at_once(rows: usize) -> Self {
        Self { rows, bytes: 1 << 30, tokens: None, time: None, retry_failed: false }
    }
}

/// What is done with rows.
pub trait Batch: Send + Sync + 'static {
    /// A row as the input gives it.
    type Row: Send + 'static;
    /// A row with all that it needs, ready for the model.
    type Ready: Send + 'static;
    /// What the journal keeps of it.
    type Entry: Entry + Send + 'static;
    /// Why the whole work can't go on.
    type Error: From<JournalError> + Send + 'static;

    /// The row's place in the journal.
    fn place(&self, row: &Self::Row) -> Key;

    /// The place, with the digest of what the row's entry is made of. Asked for only where there is
    /// an entry at the place: it may take reading files.
    fn key(&self, row: &Self::Row) -> Key {
        self.place(row)
    }

    /// Reads what a row needs, such as its images. Rows are read ahead, side by side.
    fn read(&self, row: Self::Row) -> impl Future<Output = Self::Ready> + Send;

    /// Bytes that a row holds until it is done.
    fn bytes(&self, _: &Self::Ready) -> usize {
        0
    }

    /// Makes an entry of a row; one that fails is an entry too.
    ///
    /// # Errors
    /// What makes it useless to go on, such as a full disk.
    fn make(
        &self,
        ready: Self::Ready,
    ) -> impl Future<Output = Result<Self::Entry, Self::Error>> + Send;

    /// Tokens that an entry took.
    fn tokens(&self, _: &Self::Entry) -> u64 {
        0
    }
}

/// What is to be done with a row that was read.
pub enum Sifted<B: Batch> {
    /// It is made.
    Make(B::Ready),
    /// What becomes of it is known.
    Known(B::Entry),
    /// It isn't ours.
    Skip,
}

/// Takes all rows that `journal` doesn't have through `batch`. `sift` sees them in their order,
/// however fast others are; `told` hears of every entry when it is recorded. Gives whether the rows
/// came to their end: if not, `bounds` did. Dropping the future loses the rows under way and no
/// other.
///
/// # Errors
/// Of the journal, and what [`Batch::make`] gives.
pub async fn run<B: Batch>(
    rows: impl Iterator<Item = B::Row>,
    batch: &Arc<B>,
    journal: &mut Journal,
    bounds: Bounds,
    sift: impl FnMut(B::Ready) -> Sifted<B>,
    mut told: impl FnMut(B::Entry, &Journal),
) -> Result<bool, B::Error> {
    let (begun, tokens, unread) = (Instant::now(), Cell::new(0_u64), Cell::new(false));
    let spent = || {
        bounds.tokens.is_some_and(|most| tokens.get() >= most)
            || bounds.time.is_some_and(|most| begun.elapsed() >= most)
    };
    let journal = RefCell::new(journal);
    let is_done = |row: &B::Row| {
        let journal = journal.borrow();
        journal.has_place(batch.place(row)) && journal.has(batch.key(row), bounds.retry_failed)
    };
    let open = rows.filter(|row| !is_done(row)).take_while(|_| {
        unread.set(spent());
        !unread.get()
    });
    let open = open.map(|row| (journal.borrow().has_failed(batch.place(&row)), row));
    let mut made = pin!(through(open, batch, bounds, sift, written));
    while let Some(made) = made.next().await {
        let (entry, line) = made?;
        journal.borrow_mut().write(&line)?;
        tokens.set(tokens.get() + batch.tokens(&entry));
        told(entry, &journal.borrow());
    }
    Ok(!unread.get())
}

/// Takes rows through `batch` and gives their entries as they come, with no journal: only the
/// bounds on what is done at once count. Dropping the stream ends the rows under way.
pub fn entries<B: Batch>(
    rows: impl Iterator<Item = B::Row>,
    batch: &Arc<B>,
    bounds: Bounds,
    sift: impl FnMut(B::Ready) -> Sifted<B>,
) -> impl Stream<Item = Result<B::Entry, B::Error>> {
    through(rows.map(|row| (false, row)), batch, bounds, sift, Ok)
}

/// Rows, each with whether it is tried again, to what `finish` makes of their entries on the thread
/// that made them.
fn through<B: Batch, T: Send + 'static>(
    rows: impl Iterator<Item = (bool, B::Row)>,
    batch: &Arc<B>,
    bounds: Bounds,
    mut sift: impl FnMut(B::Ready) -> Sifted<B>,
    finish: fn(B::Entry) -> Result<T, B::Error>,
) -> impl Stream<Item = Result<T, B::Error>> {
    let (room, rows_at_once) = (Room::of(bounds.bytes), bounds.rows.max(1));
    stream::iter(rows)
        .map(|(again, row)| {
            on_its_own(read(Arc::clone(batch), row)).map(move |ready| (again, ready))
        })
        .buffered(rows_at_once.min(READ_AHEAD))
        .filter_map(move |(again, ready)| {
            future::ready(match sift(ready) {
                Sifted::Make(ready) => Some(Ok((again, ready))),
                Sifted::Known(entry) => Some(Err(entry)),
                Sifted::Skip => None,
            })
        })
        .then(move |sifted| {
            let bytes = sifted.as_ref().map_or(0, |(_, ready)| batch.bytes(ready));
            room.enter(bytes).map(|place| (sifted, place))
        })
        .map(move |(sifted, place)| match sifted {
            Ok((again, ready)) => future::Either::Left(on_its_own(make(
                Arc::clone(batch),
                ready,
                again,
                place,
                finish,
            ))),
            Err(entry) => future::Either::Right(future::ready(finish(entry))),
        })
        .buffer_unordered(rows_at_once)
}

async fn read<B: Batch>(batch: Arc<B>, row: B::Row) -> B::Ready {
    batch.read(row).await
}

/// An entry, and how it is written.
type Written<E> = (E, Line);

async fn make<B: Batch, T>(
    batch: Arc<B>,
    ready: B::Ready,
    again: bool,
    place: Place,
    finish: fn(B::Entry) -> Result<T, B::Error>,
) -> Result<T, B::Error> {
    let made = batch.make(ready);
    let entry = if again { afresh(made).await } else { made.await }?;
    drop(place);
    finish(entry)
}

fn written<E: Entry, X: From<JournalError>>(entry: E) -> Result<Written<E>, X> {
    let line = Line::of(&entry)?;
    Ok((entry, line))
}

/// Runs a future on any thread. It ends with the one that waits for it, and what it panics with
/// goes on there.
async fn on_its_own<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> T {
    match AbortOnDropHandle::new(tokio::spawn(work)).await {
        Ok(done) => done,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is going down, and this future with it.
            Err(_) => future::pending().await,
        },
    }
}

/// Room for the bytes of rows, in KiB.
struct Room {
    free: Arc<Semaphore>,
    all: u32,
}

/// The room that a row has.
type Place = Option<OwnedSemaphorePermit>;

impl Room {
    fn of(bytes: usize) -> Self {
        let all = kibibytes(bytes);
        Self { free: Arc::new(Semaphore::new(all as usize)), all }
    }

    /// Waits until there is room for so many bytes; for more than all of it, until all is free.
    fn enter(&self, bytes: usize) -> impl Future<Output = Place> + use<> {
        Arc::clone(&self.free).acquire_many_owned(kibibytes(bytes).min(self.all)).map(Result::ok)
    }
}

fn kibibytes(bytes: usize) -> u32 {
    u32::try_from(bytes / 1024).unwrap_or(u32::MAX).max(1)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use ecso::{Chat, Mllm, Sampling};
    use serde::{Deserialize, Serialize};

    use super::*;
    use crate::journal::{Head, Saved};

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Double {
        id: String,
        of: usize,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        error: Option<String>,
    }

    impl Entry for Double {
        fn id(&self) -> &str {
            &self.id
        }

        fn failed(&self) -> bool {
            self.error.is_some()
        }
    }

    #[derive(Serialize, Deserialize)]
    struct Plain {}

    impl Head for Plain {
        fn differs(&self, _: &Self) -> Option<&'static str> {
            None
        }
    }

    /// Doubles numbers; what it holds meanwhile is counted.
    #[derive(Default)]
    struct Doubling {
        held: AtomicUsize,
        most_held: AtomicUsize,
        broken: bool,
    }

    const SIZE: usize = 100 << 10;

    impl Batch for Doubling {
        type Row = usize;
        type Ready = usize;
        type Entry = Double;
        type Error = JournalError;

        fn place(&self, row: &usize) -> Key {
            Key::of(&row.to_string(), "")
        }

        async fn read(&self, row: usize) -> usize {
            let held = self.held.fetch_add(SIZE, Ordering::SeqCst) + SIZE;
            self.most_held.fetch_max(held, Ordering::SeqCst);
            tokio::task::yield_now().await;
            row
        }

        fn bytes(&self, _: &usize) -> usize {
            SIZE
        }

        async fn make(&self, row: usize) -> Result<Double, JournalError> {
            // Later rows are faster.
            tokio::time::sleep(Duration::from_millis(7 - row as u64 % 7)).await;
            self.held.fetch_sub(SIZE, Ordering::SeqCst);
            let error = (self.broken && row.is_multiple_of(3)).then(|| "broken".to_owned());
            Ok(Double { id: row.to_string(), of: 2 * row, error })
        }

        fn tokens(&self, _: &Double) -> u64 {
            10
        }
    }

    async fn go(batch: Doubling, out: &std::path::Path, bounds: Bounds) -> (bool, Arc<Doubling>) {
        let (batch, mut journal) = (Arc::new(batch), Journal::open(out, &Plain {}).unwrap());
        let mut next = 0;
        let sift = |row| {
            assert!(row >= next, "rows come in their order");
            next = row + 1;
            if row == 13 { Sifted::Skip } else { Sifted::Make(row) }
        };
        let whole = run(0..200, &batch, &mut journal, bounds, sift, |_, _| {}).await.unwrap();
        (whole, batch)
    }

    fn recorded(out: &std::path::Path) -> Vec<Double> {
        let mut found: Vec<Double> =
            Saved::folder(out).latest().unwrap().map(Result::unwrap).collect();
        found.sort_by_key(|double| double.of);
        found
    }

    #[tokio::test]
    async fn rows_are_made_once_and_failed_ones_again_when_asked() {
        let out = tempfile::tempdir().unwrap();
        let bounds = Bounds::at_once(16);
        assert!(go(Doubling { broken: true, ..Doubling::default() }, out.path(), bounds).await.0);
        assert_eq!(recorded(out.path()).iter().filter(|double| double.failed()).count(), 67);
        let broken = || Doubling { broken: true, ..Doubling::default() };
        let again = go(broken(), out.path(), bounds).await.1;
        assert_eq!(
            again.most_held.load(Ordering::SeqCst),
            SIZE,
            "only what was left out is read again"
        );
        go(Doubling::default(), out.path(), Bounds { retry_failed: true, ..bounds }).await;
        let found = recorded(out.path());
        assert!(found.len() == 199 && found.iter().all(|double| !double.failed()));
    }

    #[test]
    fn only_its_own_header_is_cut_off() {
        #[derive(Serialize, Deserialize)]
        struct Work {
            work: String,
        }

        impl Head for Work {
            fn differs(&self, _: &Self) -> Option<&'static str> {
                None
            }
        }

        let out = tempfile::tempdir().unwrap();
        let path = out.path().join("journal.jsonl");
        let header = Work { work: "bread".into() };
        for theirs in [
            r#"{"id": 1, "query": "q"}"#,
            r#"{"work":"cake"#,
            "Knead it well.",
            r#"{"work":"bread"} more"#,
        ] {
            std::fs::write(&path, theirs).unwrap();
            assert!(
                matches!(Journal::open(out.path(), &header), Err(JournalError::NoHeader { .. })),
                "{theirs}"
            );
            assert_eq!(std::fs::read_to_string(&path).unwrap(), theirs);
        }
        for cut in ["", "{", r#"{"work":"br"#, r#"{"work":"bread"}"#] {
            std::fs::write(&path, cut).unwrap();
            assert!(Journal::open(out.path(), &header).is_ok(), "{cut}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), "{\"work\":\"bread\"}\n");
        }
    }

    #[tokio::test]
    async fn a_whole_last_line_counts_without_its_end() {
        let out = tempfile::tempdir().unwrap();
        go(Doubling::default(), out.path(), Bounds::at_once(4)).await;
        let path = crate::journal::path(out.path());
        let (whole, before) = (std::fs::read_to_string(&path).unwrap(), recorded(out.path()));
        std::fs::write(&path, whole.trim_end()).unwrap();
        let latest = Saved::folder(out.path()).latest::<Double>().unwrap();
        assert!(!latest.was_cut());
        assert_eq!(recorded(out.path()), before);
        let journal = Journal::open(out.path(), &Plain {}).unwrap();
        assert_eq!((journal.len(), journal.was_cut()), (before.len(), false));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), whole);
        std::fs::write(&path, &whole[..whole.len() - 2]).unwrap();
        let latest = Saved::folder(out.path()).latest::<Double>().unwrap();
        assert_eq!((latest.total(), latest.was_cut()), (before.len() - 1, true));
    }

    #[test]
    fn what_is_forgotten_counts_no_more() {
        let out = tempfile::tempdir().unwrap();
        let double = |id: &str, error: Option<&str>| Double {
            id: id.into(),
            of: 0,
            error: error.map(str::to_owned),
        };
        let mut journal = Journal::open(out.path(), &Plain {}).unwrap();
        for entry in [double("0", None), double("1", Some("no row")), double("2", Some("no row"))] {
            journal.record(&entry).unwrap();
        }
        journal.forget("1").unwrap();
        journal.forget("2").unwrap();
        journal.record(&double("2", None)).unwrap();
        assert_eq!((journal.len(), journal.failed()), (2, 0));
        drop(journal);
        let journal = Journal::open(out.path(), &Plain {}).unwrap();
        assert_eq!((journal.len(), journal.failed()), (2, 0));
        assert_eq!(recorded(out.path()), [double("0", None), double("2", None)]);
    }

    #[cfg(unix)]
    #[test]
    fn a_journal_is_a_regular_file() {
        let out = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/dev/null", out.path().join("journal.jsonl")).unwrap();
        assert!(matches!(Journal::open(out.path(), &Plain {}), Err(JournalError::NoFile { .. })));
        assert!(matches!(
            Saved::folder(out.path()).latest::<Double>(),
            Err(JournalError::NoFile { .. })
        ));
    }

    /// Asks a model, and takes no answer for good.
    struct Unhappy(crate::Cached<ecso::testing::Scripted>);

    impl Batch for Unhappy {
        type Row = ();
        type Ready = ();
        type Entry = Double;
        type Error = JournalError;

        fn place(&self, (): &()) -> Key {
            Key::of("0", "")
        }

        async fn read(&self, (): ()) {}

        async fn make(&self, (): ()) -> Result<Double, JournalError> {
            let reply = self.0.generate(&Chat::ask([], "q"), &Sampling::default()).await.unwrap();
            Ok(Double { id: "0".into(), of: 0, error: Some(reply.text) })
        }
    }

    #[tokio::test]
    async fn what_failed_is_not_tried_again_with_the_replies_it_failed_by() {
        let out = tempfile::tempdir().unwrap();
        let (model, folder) =
            (ecso::testing::Scripted::texts(["first", "second"]), out.path().join("cache"));
        let batch = Arc::new(Unhappy(crate::Cached::new(model, "m", Some(folder))));
        let mut journal = Journal::open(out.path(), &Plain {}).unwrap();
        let bounds = Bounds { retry_failed: true, ..Bounds::at_once(1) };
        for said in ["first", "second"] {
            run([()].into_iter(), &batch, &mut journal, bounds, Sifted::Make, |_, _| {})
                .await
                .unwrap();
            assert_eq!(recorded(out.path())[0].error.as_deref(), Some(said));
        }
    }

    #[test]
    fn two_processes_do_not_write_one_journal() {
        let out = tempfile::tempdir().unwrap();
        let journal = Journal::open(out.path(), &Plain {}).unwrap();
        assert!(matches!(Journal::open(out.path(), &Plain {}), Err(JournalError::InUse { .. })));
        drop(journal);
        assert!(Journal::open(out.path(), &Plain {}).is_ok());
    }

    #[tokio::test]
    async fn bytes_and_tokens_are_bounded() {
        let out = tempfile::tempdir().unwrap();
        let (whole, batch) =
            go(Doubling::default(), out.path(), Bounds { bytes: 10 * SIZE, ..Bounds::at_once(64) })
                .await;
        let most = batch.most_held.load(Ordering::SeqCst) / SIZE;
        assert!(whole && (10..=10 + READ_AHEAD + 1).contains(&most), "{most} rows at once");
        let out = tempfile::tempdir().unwrap();
        let (whole, _) =
            go(Doubling::default(), out.path(), Bounds { tokens: Some(100), ..Bounds::at_once(4) })
                .await;
        assert!(!whole && (10..30).contains(&recorded(out.path()).len()));
    }
}
