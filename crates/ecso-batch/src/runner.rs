//! The runner: takes rows in and writes journal entries out, several at once.

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
    cache::bypassing_cache,
    journal::{EncodedEntry, Entry, Journal, JournalError, Key},
};

/// Rows that are read ahead of those being made.
const READ_AHEAD: usize = 8;

/// Limits on what is done at once and in total.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// The number of rows at once.
    pub rows: usize,
    /// Bytes that the rows in progress may hold together ([`Batch::bytes`]), besides the few that
    /// are read ahead. A single row may exceed this.
    pub bytes: usize,
    /// No new row is started after this many tokens.
    pub tokens: Option<u64>,
    /// No new row is started after this time.
    pub time: Option<Duration>,
    /// Whether failed rows are retried.
    pub retry_failed: bool,
}

impl Bounds {
    /// This many rows at once and 1 GiB of memory, without any limit on the total.
    #[must_use]
    pub fn at_once(rows: usize) -> Self {
        Self { rows, bytes: 1 << 30, tokens: None, time: None, retry_failed: false }
    }
}

/// The work that is done on each row.
pub trait Batch: Send + Sync + 'static {
    /// A row as it comes from the input.
    type Row: Send + 'static;
    /// A row with everything it needs, ready for the model.
    type Ready: Send + 'static;
    /// The journal entry of a row.
    type Entry: Entry + Send + 'static;
    /// An error that stops the whole run.
    type Error: From<JournalError> + Send + 'static;

    /// The key of the row's slot in the journal.
    fn slot(&self, row: &Self::Row) -> Key;

    /// The key of the slot with the digest of the row's source. It is only computed if the slot has
    /// an entry, because it may require reading files.
    fn key(&self, row: &Self::Row) -> Key {
        self.slot(row)
    }

    /// Reads what a row needs, such as its images. Several rows are read ahead concurrently.
    fn read(&self, row: Self::Row) -> impl Future<Output = Self::Ready> + Send;

    /// The number of bytes that a row holds until it is done.
    fn bytes(&self, _: &Self::Ready) -> usize {
        0
    }

    /// Makes the entry of a row. A row that fails also gets an entry.
    ///
    /// # Errors
    /// An error that makes it pointless to continue, such as a full disk.
    fn make(
        &self,
        ready: Self::Ready,
    ) -> impl Future<Output = Result<Self::Entry, Self::Error>> + Send;

    /// The number of tokens that an entry took.
    fn tokens(&self, _: &Self::Entry) -> u64 {
        0
    }
}

/// What to do with a row that was read.
pub enum RowDecision<B: Batch> {
    /// Make its entry.
    Make(B::Ready),
    /// Its entry is already known; record it.
    Known(B::Entry),
    /// Skip it.
    Skip,
}

/// Processes all rows that are not yet in `journal`. `decide` sees the rows in input order, however
/// long each takes to read; `on_entry` is called for every entry after it is recorded. Returns
/// whether all rows were processed; otherwise `bounds` stopped the run. Dropping the future loses
/// only the rows in progress.
///
/// # Errors
/// Errors of the journal, and those that [`Batch::make`] returns.
pub async fn run<B: Batch>(
    rows: impl Iterator<Item = B::Row>,
    batch: &Arc<B>,
    journal: &mut Journal,
    bounds: Bounds,
    decide: impl FnMut(B::Ready) -> RowDecision<B>,
    mut on_entry: impl FnMut(B::Entry, &Journal),
) -> Result<bool, B::Error> {
    let (started, tokens, was_stopped) = (Instant::now(), Cell::new(0_u64), Cell::new(false));
    let is_exhausted = || {
        bounds.tokens.is_some_and(|most| tokens.get() >= most)
            || bounds.time.is_some_and(|most| started.elapsed() >= most)
    };
    let journal = RefCell::new(journal);
    let is_done = |row: &B::Row| {
        let journal = journal.borrow();
        journal.has_slot(batch.slot(row)) && journal.has(batch.key(row), bounds.retry_failed)
    };
    let pending = rows.filter(|row| !is_done(row)).take_while(|_| {
        was_stopped.set(is_exhausted());
        !was_stopped.get()
    });
    let pending = pending.map(|row| (journal.borrow().has_failed(batch.slot(&row)), row));
    let mut made = pin!(process(pending, batch, bounds, decide, encode));
    while let Some(made) = made.next().await {
        let (entry, line) = made?;
        journal.borrow_mut().write(&line)?;
        tokens.set(tokens.get() + batch.tokens(&entry));
        on_entry(entry, &journal.borrow());
    }
    Ok(!was_stopped.get())
}

/// Processes rows without a journal and returns their entries as they are made. Of `bounds`, only
/// those on what is done at once apply. Dropping the stream stops the rows in progress.
pub fn entries<B: Batch>(
    rows: impl Iterator<Item = B::Row>,
    batch: &Arc<B>,
    bounds: Bounds,
    decide: impl FnMut(B::Ready) -> RowDecision<B>,
) -> impl Stream<Item = Result<B::Entry, B::Error>> {
    process(rows.map(|row| (false, row)), batch, bounds, decide, Ok)
}

/// Processes rows, each with a flag that tells whether it is a retry. `finish` is applied to each
/// entry on the thread that made it.
fn process<B: Batch, T: Send + 'static>(
    rows: impl Iterator<Item = (bool, B::Row)>,
    batch: &Arc<B>,
    bounds: Bounds,
    mut decide: impl FnMut(B::Ready) -> RowDecision<B>,
    finish: fn(B::Entry) -> Result<T, B::Error>,
) -> impl Stream<Item = Result<T, B::Error>> {
    let (budget, rows_at_once) = (MemoryBudget::new(bounds.bytes), bounds.rows.max(1));
    stream::iter(rows)
        .map(|(is_retry, row)| {
            spawned(read(Arc::clone(batch), row)).map(move |ready| (is_retry, ready))
        })
        .buffered(rows_at_once.min(READ_AHEAD))
        .filter_map(move |(is_retry, ready)| {
            future::ready(match decide(ready) {
                RowDecision::Make(ready) => Some(Ok((is_retry, ready))),
                RowDecision::Known(entry) => Some(Err(entry)),
                RowDecision::Skip => None,
            })
        })
        .then(move |decided| {
            let bytes = decided.as_ref().map_or(0, |(_, ready)| batch.bytes(ready));
            budget.reserve(bytes).map(|reservation| (decided, reservation))
        })
        .map(move |(decided, reservation)| match decided {
            Ok((is_retry, ready)) => future::Either::Left(spawned(make(
                Arc::clone(batch),
                ready,
                is_retry,
                reservation,
                finish,
            ))),
            Err(entry) => future::Either::Right(future::ready(finish(entry))),
        })
        .buffer_unordered(rows_at_once)
}

async fn read<B: Batch>(batch: Arc<B>, row: B::Row) -> B::Ready {
    batch.read(row).await
}

/// An entry and its serialized form.
type Encoded<E> = (E, EncodedEntry);

async fn make<B: Batch, T>(
    batch: Arc<B>,
    ready: B::Ready,
    is_retry: bool,
    reservation: Reservation,
    finish: fn(B::Entry) -> Result<T, B::Error>,
) -> Result<T, B::Error> {
    let made = batch.make(ready);
    let entry = if is_retry { bypassing_cache(made).await } else { made.await }?;
    drop(reservation);
    finish(entry)
}

fn encode<E: Entry, X: From<JournalError>>(entry: E) -> Result<Encoded<E>, X> {
    let line = EncodedEntry::of(&entry)?;
    Ok((entry, line))
}

/// Runs a future as a task of its own. The task is cancelled when this future is dropped, and a
/// panic in it is propagated.
async fn spawned<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> T {
    match AbortOnDropHandle::new(tokio::spawn(work)).await {
        Ok(done) => done,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is shutting down, and this future with it.
            Err(_) => future::pending().await,
        },
    }
}

/// The memory budget of the rows in progress, in KiB.
struct MemoryBudget {
    free: Arc<Semaphore>,
    total: u32,
}

/// The share of the budget that a row holds.
type Reservation = Option<OwnedSemaphorePermit>;

impl MemoryBudget {
    fn new(bytes: usize) -> Self {
        let total = kibibytes(bytes);
        Self { free: Arc::new(Semaphore::new(total as usize)), total }
    }

    /// Waits until this many bytes are free. A row that exceeds the whole budget waits until all of
    /// it is free.
    fn reserve(&self, bytes: usize) -> impl Future<Output = Reservation> + use<> {
        Arc::clone(&self.free).acquire_many_owned(kibibytes(bytes).min(self.total)).map(Result::ok)
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
    use crate::journal::{JournalHeader, JournalReader};

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
    struct EmptyHeader {}

    impl JournalHeader for EmptyHeader {
        fn difference(&self, _: &Self) -> Option<&'static str> {
            None
        }
    }

    /// Doubles numbers, and counts the bytes that it holds meanwhile.
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

        fn slot(&self, row: &usize) -> Key {
            Key::new(&row.to_string(), "")
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
            // Later rows finish faster.
            tokio::time::sleep(Duration::from_millis(7 - row as u64 % 7)).await;
            self.held.fetch_sub(SIZE, Ordering::SeqCst);
            let error = (self.broken && row.is_multiple_of(3)).then(|| "broken".to_owned());
            Ok(Double { id: row.to_string(), of: 2 * row, error })
        }

        fn tokens(&self, _: &Double) -> u64 {
            10
        }
    }

    async fn run_doubling(
        batch: Doubling,
        out: &std::path::Path,
        bounds: Bounds,
    ) -> (bool, Arc<Doubling>) {
        let (batch, mut journal) = (Arc::new(batch), Journal::open(out, &EmptyHeader {}).unwrap());
        let mut next = 0;
        let decide = |row| {
            assert!(row >= next, "rows come in their order");
            next = row + 1;
            if row == 13 { RowDecision::Skip } else { RowDecision::Make(row) }
        };
        let is_complete =
            run(0..200, &batch, &mut journal, bounds, decide, |_, _| {}).await.unwrap();
        (is_complete, batch)
    }

    fn recorded(out: &std::path::Path) -> Vec<Double> {
        let mut found: Vec<Double> =
            JournalReader::in_folder(out).latest().unwrap().map(Result::unwrap).collect();
        found.sort_by_key(|double| double.of);
        found
    }

    #[tokio::test]
    async fn rows_are_made_once_and_failed_ones_are_retried_on_request() {
        let out = tempfile::tempdir().unwrap();
        let bounds = Bounds::at_once(16);
        assert!(
            run_doubling(Doubling { broken: true, ..Doubling::default() }, out.path(), bounds)
                .await
                .0
        );
        assert_eq!(recorded(out.path()).iter().filter(|double| double.failed()).count(), 67);
        let broken = || Doubling { broken: true, ..Doubling::default() };
        let again = run_doubling(broken(), out.path(), bounds).await.1;
        assert_eq!(
            again.most_held.load(Ordering::SeqCst),
            SIZE,
            "only what was left out is read again"
        );
        run_doubling(Doubling::default(), out.path(), Bounds { retry_failed: true, ..bounds })
            .await;
        let found = recorded(out.path());
        assert!(found.len() == 199 && found.iter().all(|double| !double.failed()));
    }

    #[test]
    fn only_a_cut_off_header_of_its_own_is_replaced() {
        #[derive(Serialize, Deserialize)]
        struct WorkHeader {
            work: String,
        }

        impl JournalHeader for WorkHeader {
            fn difference(&self, _: &Self) -> Option<&'static str> {
                None
            }
        }

        let out = tempfile::tempdir().unwrap();
        let path = out.path().join("journal.jsonl");
        let header = WorkHeader { work: "bread".into() };
        for foreign in [
            r#"{"id": 1, "query": "q"}"#,
            r#"{"work":"cake"#,
            "Knead it well.",
            r#"{"work":"bread"} more"#,
        ] {
            std::fs::write(&path, foreign).unwrap();
            assert!(
                matches!(Journal::open(out.path(), &header), Err(JournalError::NoHeader { .. })),
                "{foreign}"
            );
            assert_eq!(std::fs::read_to_string(&path).unwrap(), foreign);
        }
        for cut in ["", "{", r#"{"work":"br"#, r#"{"work":"bread"}"#] {
            std::fs::write(&path, cut).unwrap();
            assert!(Journal::open(out.path(), &header).is_ok(), "{cut}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), "{\"work\":\"bread\"}\n");
        }
    }

    #[tokio::test]
    async fn a_complete_last_line_counts_without_its_line_break() {
        let out = tempfile::tempdir().unwrap();
        run_doubling(Doubling::default(), out.path(), Bounds::at_once(4)).await;
        let path = crate::journal::path(out.path());
        let (is_complete, before) = (std::fs::read_to_string(&path).unwrap(), recorded(out.path()));
        std::fs::write(&path, is_complete.trim_end()).unwrap();
        let latest = JournalReader::in_folder(out.path()).latest::<Double>().unwrap();
        assert!(!latest.was_truncated());
        assert_eq!(recorded(out.path()), before);
        let journal = Journal::open(out.path(), &EmptyHeader {}).unwrap();
        assert_eq!((journal.len(), journal.was_truncated()), (before.len(), false));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), is_complete);
        std::fs::write(&path, &is_complete[..is_complete.len() - 2]).unwrap();
        let latest = JournalReader::in_folder(out.path()).latest::<Double>().unwrap();
        assert_eq!((latest.total(), latest.was_truncated()), (before.len() - 1, true));
    }

    #[test]
    fn deleted_entries_no_longer_count() {
        let out = tempfile::tempdir().unwrap();
        let double = |id: &str, error: Option<&str>| Double {
            id: id.into(),
            of: 0,
            error: error.map(str::to_owned),
        };
        let mut journal = Journal::open(out.path(), &EmptyHeader {}).unwrap();
        for entry in [double("0", None), double("1", Some("no row")), double("2", Some("no row"))] {
            journal.record(&entry).unwrap();
        }
        journal.remove("1").unwrap();
        journal.remove("2").unwrap();
        journal.record(&double("2", None)).unwrap();
        assert_eq!((journal.len(), journal.failed()), (2, 0));
        drop(journal);
        let journal = Journal::open(out.path(), &EmptyHeader {}).unwrap();
        assert_eq!((journal.len(), journal.failed()), (2, 0));
        assert_eq!(recorded(out.path()), [double("0", None), double("2", None)]);
    }

    #[cfg(unix)]
    #[test]
    fn a_journal_must_be_a_regular_file() {
        let out = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/dev/null", out.path().join("journal.jsonl")).unwrap();
        assert!(matches!(
            Journal::open(out.path(), &EmptyHeader {}),
            Err(JournalError::NotAFile { .. })
        ));
        assert!(matches!(
            JournalReader::in_folder(out.path()).latest::<Double>(),
            Err(JournalError::NotAFile { .. })
        ));
    }

    /// Subject a model and records every reply as an error.
    struct AlwaysFailing(crate::Cached<ecso::testing::Scripted>);

    impl Batch for AlwaysFailing {
        type Row = ();
        type Ready = ();
        type Entry = Double;
        type Error = JournalError;

        fn slot(&self, (): &()) -> Key {
            Key::new("0", "")
        }

        async fn read(&self, (): ()) {}

        async fn make(&self, (): ()) -> Result<Double, JournalError> {
            let reply = self.0.generate(&Chat::ask([], "q"), &Sampling::default()).await.unwrap();
            Ok(Double { id: "0".into(), of: 0, error: Some(reply.text) })
        }
    }

    #[tokio::test]
    async fn a_failed_row_is_not_retried_with_its_cached_replies() {
        let out = tempfile::tempdir().unwrap();
        let (model, folder) =
            (ecso::testing::Scripted::texts(["first", "second"]), out.path().join("cache"));
        let batch = Arc::new(AlwaysFailing(crate::Cached::new(model, "m", Some(folder))));
        let mut journal = Journal::open(out.path(), &EmptyHeader {}).unwrap();
        let bounds = Bounds { retry_failed: true, ..Bounds::at_once(1) };
        for expected in ["first", "second"] {
            run([()].into_iter(), &batch, &mut journal, bounds, RowDecision::Make, |_, _| {})
                .await
                .unwrap();
            assert_eq!(recorded(out.path())[0].error.as_deref(), Some(expected));
        }
    }

    #[test]
    fn two_processes_cannot_write_the_same_journal() {
        let out = tempfile::tempdir().unwrap();
        let journal = Journal::open(out.path(), &EmptyHeader {}).unwrap();
        assert!(matches!(
            Journal::open(out.path(), &EmptyHeader {}),
            Err(JournalError::InUse { .. })
        ));
        drop(journal);
        assert!(Journal::open(out.path(), &EmptyHeader {}).is_ok());
    }

    #[tokio::test]
    async fn bytes_and_tokens_are_limited() {
        let out = tempfile::tempdir().unwrap();
        let (is_complete, batch) = run_doubling(
            Doubling::default(),
            out.path(),
            Bounds { bytes: 10 * SIZE, ..Bounds::at_once(64) },
        )
        .await;
        let most = batch.most_held.load(Ordering::SeqCst) / SIZE;
        assert!(is_complete && (10..=10 + READ_AHEAD + 1).contains(&most), "{most} rows at once");
        let out = tempfile::tempdir().unwrap();
        let (is_complete, _) = run_doubling(
            Doubling::default(),
            out.path(),
            Bounds { tokens: Some(100), ..Bounds::at_once(4) },
        )
        .await;
        assert!(!is_complete && (10..30).contains(&recorded(out.path()).len()));
    }
}
