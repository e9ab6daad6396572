//! Runs a benchmark: answers each item without the guard and under every profile. The draft is
//! generated once and used by every profile.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeSet, BinaryHeap, HashSet},
    fs::File,
    path::Path,
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use ecso::{
    Cause, Chat, Guard, GuardError, Image, ImageError, ImageText, Limits, Mllm, ModelError,
    Outcome, Part, Profile, Reply, ReplyStream, Sampling, Step, Usage, error_chain, profile::Gate,
};
use ecso_batch::{
    Batch, Bounds, RowDecision,
    journal::{Entry, Journal, JournalError, JournalReader, Key},
};

use crate::{
    benchmarks::Items,
    item::{Item, ItemError, Picture},
    parquet,
    record::{ItemRecord, RunHeader, Selection},
    text::cut,
};

/// The name of the unguarded arm.
pub const UNGUARDED: &str = "unguarded";

/// Options of a run that may change when it is resumed. The fixed settings are in its
/// [`RunHeader`].
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// How much is done at once.
    pub bounds: Bounds,
    /// Whether items with missing images are left out. Otherwise they are recorded as failed.
    pub skip_missing: bool,
    /// Limits on images.
    pub limits: Limits,
}

/// The progress of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// The number of items of the run, including recorded ones, if it is known.
    pub total: Option<usize>,
    /// The number of recorded items.
    pub recorded: usize,
    /// How many of these failed.
    pub failed: usize,
}

/// The items of the data that can't be run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UnusableItems {
    /// How many lack an image, and the error of the first.
    pub missing: usize,
    /// See [`UnusableItems::missing`].
    pub first_missing: Option<String>,
    /// How many can't be read, and the error of the first.
    pub unreadable: usize,
    /// See [`UnusableItems::unreadable`].
    pub first_unreadable: Option<String>,
}

impl UnusableItems {
    fn count(&mut self, error: &ItemError) {
        let (count, first) = match error {
            ItemError::MissingImage(_) => (&mut self.missing, &mut self.first_missing),
            ItemError::Unreadable(_) | ItemError::UnknownKind(_) => {
                (&mut self.unreadable, &mut self.first_unreadable)
            }
        };
        *count += 1;
        first.get_or_insert_with(|| error.to_string());
    }
}

/// The profiles with every answer limited to `max_new_tokens`. What a picture says is read whole, as
/// the guard reads it elsewhere.
#[must_use]
pub fn capped(mut profiles: Vec<Profile>, max_new_tokens: Option<u32>) -> Vec<Profile> {
    let cap = max_new_tokens.unwrap_or(u32::MAX);
    for profile in &mut profiles {
        for limit in [&mut profile.direct.max_tokens, &mut profile.safe.max_tokens] {
            *limit = cap.min(*limit);
        }
    }
    profiles
}

/// Runs `items` and records them in `journal`. Returns the items of the data that can't be run.
/// Dropping the future loses only the items in progress.
///
/// # Errors
/// [`JournalError`]. If the model fails on an item, or the item can't be run, it is recorded as
/// failed and the run continues.
pub async fn run(
    items: Items,
    profiles: &[Profile],
    model: Arc<dyn Mllm>,
    journal: &mut Journal,
    options: Options,
    mut progress: impl FnMut(Progress),
) -> Result<UnusableItems, JournalError> {
    let mut unguarded = profiles.first().cloned().unwrap_or_else(Profile::paper);
    unguarded.name = UNGUARDED.into();
    unguarded.gate = Gate::Never;
    let unguarded = Guard::new(model, unguarded);
    let answering =
        Arc::new(Answering { unguarded, profiles: profiles.to_vec(), limits: options.limits });

    let Items { total, iter } = items;
    let (total, unusable) = (Cell::new(total), RefCell::new(UnusableItems::default()));
    let is_included = |item: &Item| {
        let Some(error) = &item.error else { return true };
        unusable.borrow_mut().count(error);
        let is_left_out = options.skip_missing && matches!(error, ItemError::MissingImage(_));
        total.set(total.get().map(|total| total - usize::from(is_left_out)));
        !is_left_out
    };
    let mut report = |journal: &Journal| {
        progress(Progress {
            total: total.get(),
            recorded: journal.len(),
            failed: journal.failed(),
        });
    };
    report(journal);
    let items = iter.filter(is_included);
    ecso_batch::run(items, &answering, journal, options.bounds, RowDecision::Make, |_, journal| {
        report(journal);
    })
    .await?;
    Ok(unusable.into_inner())
}

/// Returns how many recorded items are no longer among `items`, not counting those that failed:
/// their rows were probably fixed. If there are none, the records of the failed ones are removed
/// from the journal.
///
/// # Errors
/// [`JournalError`].
pub fn count_removed(
    items: Items,
    out: &Path,
    journal: &mut Journal,
) -> Result<usize, JournalError> {
    let current: HashSet<u64> = items.iter.map(|item| Key::new(&item.id, "").slot()).collect();
    let (mut removed, mut fixed) = (0, Vec::new());
    for record in JournalReader::in_folder(out).latest::<ItemRecord>()? {
        let record = record?;
        match record.failed() {
            _ if current.contains(&Key::new(&record.id, "").slot()) => {}
            true => fixed.push(record.id),
            false => removed += 1,
        }
    }
    if removed == 0 {
        fixed.iter().try_for_each(|id| journal.remove(id))?;
    }
    Ok(removed)
}

/// Returns how many of `items` are not recorded as they are now, because the data changed while it
/// was read. Items that `skip_missing` leaves out are not counted.
#[must_use]
pub fn count_changed(items: Items, journal: &Journal, skip_missing: bool) -> usize {
    let is_run =
        |item: &Item| !(skip_missing && matches!(item.error, Some(ItemError::MissingImage(_))));
    let is_recorded =
        |item: &Item| journal.has(Key::new(&item.id, "").with_source(&source_digest(item)), false);
    items.iter.filter(is_run).filter(|item| !is_recorded(item)).count()
}

/// A notice that items of a run were not guarded because they have no image; `None` if all were.
///
/// # Errors
/// [`JournalError`] if the run can't be read.
pub fn unguarded_notice(out: &Path) -> Result<Option<String>, JournalError> {
    let journal = JournalReader::in_folder(out);
    let (mut without_image, mut answered) = (0, 0);
    for record in journal.latest::<ItemRecord>()? {
        let record = record?;
        without_image += usize::from(record.is_text_only());
        answered += usize::from(record.error.is_none());
    }
    Ok(journal.header::<RunHeader>()?.unguarded_notice(without_image, answered))
}

/// A digest of the request, including the bytes of its images, and of the task. Reads the image
/// files.
fn source_digest(item: &Item) -> String {
    let Item {
        id: _,
        scenario,
        cluster,
        earlier,
        query,
        request,
        images,
        draft,
        prefill,
        task,
        error: _,
    } = item;
    let pictures = |images: &[Picture]| images.iter().map(picture_identity).collect::<Vec<_>>();
    let earlier: Vec<_> =
        earlier.iter().map(|(role, text, images)| (role, text, pictures(images))).collect();
    let whole =
        (scenario, cluster, earlier, query, request, pictures(images), draft, prefill, task);
    blake3::hash(&serde_json::to_vec(&whole).unwrap_or_default()).to_hex()[..16].to_owned()
}

/// Identifies a picture by its bytes, or by its location if it can't be read.
fn picture_identity(picture: &Picture) -> (&'static str, String) {
    let bytes = match picture {
        Picture::Bytes(bytes) => Ok(blake3::hash(bytes)),
        Picture::File(path) => hash_file(path).map_err(|_| path.display().to_string()),
        Picture::InParquet(table, row) => parquet::image(table, *row)
            .map(|bytes| blake3::hash(&bytes))
            .map_err(|_| format!("{row} of {}", table.display())),
        Picture::Described(text) => return ("text", text.clone()),
    };
    bytes.map_or_else(|place| ("missing", place), |digest| ("bytes", digest.to_string()))
}

fn hash_file(path: &Path) -> std::io::Result<blake3::Hash> {
    Ok(blake3::Hasher::new().update_reader(File::open(path)?)?.finalize())
}

/// Answers items without the guard and under every profile.
struct Answering {
    unguarded: Guard<Arc<dyn Mllm>>,
    profiles: Vec<Profile>,
    limits: Limits,
}

impl Batch for Answering {
    type Row = Item;
    /// The item, its digest, and the conversation to send.
    type Ready = (Item, String, Result<Chat, ImageError>);
    type Entry = ItemRecord;
    type Error = JournalError;

    fn slot(&self, item: &Item) -> Key {
        Key::new(&item.id, "")
    }

    fn key(&self, item: &Item) -> Key {
        self.slot(item).with_source(&source_digest(item))
    }

    async fn read(&self, item: Item) -> Self::Ready {
        let (source_digest, chat) = (source_digest(&item), item.chat(self.limits));
        (item, source_digest, chat)
    }

    fn bytes(&self, (_, _, chat): &Self::Ready) -> usize {
        let parts = chat.iter().flat_map(|chat| &chat.turns).flat_map(|turn| &turn.parts);
        let image = |part: &Part| match part {
            Part::Image(image) => image.encoded().map(|(bytes, _)| bytes.len()),
            Part::Text(_) => None,
        };
        parts.filter_map(image).sum()
    }

    async fn make(
        &self,
        (item, source_digest, chat): Self::Ready,
    ) -> Result<ItemRecord, JournalError> {
        let answers = match (&item.error, chat) {
            (Some(error), _) => Err(AnswerError::new(error)),
            (None, Err(error)) => Err(AnswerError::new(&error)),
            (None, Ok(chat)) => self.answer(&chat, item.draft.as_deref()).await,
        };
        let (arms, error, filtered) = match answers {
            Ok(arms) => (arms, None, false),
            Err(AnswerError { message, filtered }) => (Vec::new(), Some(message), filtered),
        };
        let of_unknown_kind = matches!(item.error, Some(ItemError::UnknownKind(_)));
        let Item {
            id,
            scenario,
            cluster,
            query,
            request,
            images,
            earlier,
            task,
            draft: _,
            prefill: _,
            error: _,
        } = item;
        let pictures = earlier.iter().flat_map(|(_, _, images)| images).chain(&images);
        let image_sources: Vec<String> = pictures.map(Picture::to_string).collect();
        Ok(ItemRecord {
            id,
            source_digest,
            scenario,
            cluster,
            query,
            request,
            task,
            images: image_sources.len(),
            image_sources,
            arms,
            error,
            filtered,
            of_unknown_kind,
        })
    }
}

impl Answering {
    async fn answer(&self, chat: &Chat, draft: Option<&str>) -> Result<Vec<Outcome>, AnswerError> {
        let unguarded = match draft {
            Some(draft) => self.unguarded.review(chat, draft).await,
            None => self.unguarded.answer(chat).await,
        };
        let mut arms = vec![unguarded?];
        for profile in &self.profiles {
            let model = ReusedDraft::new(Arc::clone(self.unguarded.model()), chat, &arms[0]);
            let guard = Guard::new(model, profile.clone());
            let outcome = match draft {
                Some(draft) => guard.review(chat, draft).await,
                None => guard.answer(chat).await,
            };
            arms.push(outcome?);
        }
        Ok(arms)
    }
}

/// Why an item has no answers.
struct AnswerError {
    message: String,
    /// Whether a content filter refused the item.
    filtered: bool,
}

impl AnswerError {
    fn new(error: &(dyn std::error::Error + 'static)) -> Self {
        Self { message: error_chain(error), filtered: false }
    }
}

impl From<GuardError> for AnswerError {
    fn from(error: GuardError) -> Self {
        let filtered = matches!(&error, GuardError::Model { source: ModelError::Filtered(_), .. });
        // The message of the model may quote the item, so it is shortened.
        Self { message: cut(error_chain(&error)), filtered }
    }
}

/// A model that returns its earlier answer to a conversation, at the same cost, when it is asked
/// again.
struct ReusedDraft<'a> {
    model: Arc<dyn Mllm>,
    chat: &'a Chat,
    draft: Reply,
}

impl<'a> ReusedDraft<'a> {
    fn new(model: Arc<dyn Mllm>, chat: &'a Chat, unguarded: &Outcome) -> Self {
        let draft = unguarded.steps.iter().find(|step| step.step == Step::Direct).map_or_else(
            Reply::default,
            |step| {
                let usage = step.prompt_tokens.zip(step.completion_tokens);
                Reply {
                    text: step.reply.clone(),
                    usage: usage.map(|(prompt_tokens, completion_tokens)| Usage {
                        prompt_tokens,
                        completion_tokens,
                    }),
                    finish: step.finish,
                    took: Some(Duration::from_millis(step.ms)),
                    ..Reply::default()
                }
            },
        );
        Self { model, chat, draft }
    }
}

#[async_trait]
impl Mllm for ReusedDraft<'_> {
    fn name(&self) -> &str {
        self.model.name()
    }

    async fn image_text(&self, image: &Image) -> Result<Option<ImageText>, ModelError> {
        self.model.image_text(image).await
    }

    async fn stream(&self, chat: &Chat, sampling: &Sampling) -> Result<ReplyStream, ModelError> {
        self.model.stream(chat, sampling).await
    }

    async fn generate(&self, chat: &Chat, sampling: &Sampling) -> Result<Reply, ModelError> {
        if chat == self.chat {
            Ok(self.draft.clone())
        } else {
            self.model.generate(chat, sampling).await
        }
    }
}

/// Whether the item's scenario begins with `scenario`, in any case.
fn is_in_scenario(item: &Item, scenario: &str) -> bool {
    item.scenario.to_lowercase().starts_with(&scenario.to_lowercase())
}

/// Checks that each of `scenarios` exists.
///
/// # Errors
/// A [`Cause`] that names one that does not exist, and those that do.
pub fn check_scenarios(items: Items, scenarios: &[String]) -> Result<(), Cause> {
    let mut unseen: Vec<&String> = scenarios.iter().collect();
    let mut existing = BTreeSet::new();
    for item in items.iter {
        unseen.retain(|scenario| !is_in_scenario(&item, scenario));
        if unseen.is_empty() {
            return Ok(());
        }
        existing.insert(item.scenario);
    }
    let Some(unknown) = unseen.first() else { return Ok(()) };
    existing.remove("");
    let existing = existing.into_iter().collect::<Vec<_>>().join(", ");
    Err(format!("no scenario begins with `{unknown}`; there are {}", cut(existing)).into())
}

/// The items that `selection` takes. A sample is drawn by a hash of seed and id, so it does not
/// depend on the other items of the data.
#[must_use]
pub fn select(items: Items, selection: &Selection) -> Items {
    let scenarios = selection.scenarios.clone();
    let wanted = move |item: &Item| {
        // Items that can't be read have no scenario, and are always included so that they are
        // reported.
        let is_unknown = item.scenario.is_empty() && item.error.is_some();
        is_unknown
            || scenarios.is_empty()
            || scenarios.iter().any(|scenario| is_in_scenario(item, scenario))
    };
    let known = items.total.is_some();
    let mut total = items.total;
    let mut iter: Box<dyn Iterator<Item = Item> + Send> = items.iter;
    if !selection.scenarios.is_empty() {
        iter = Box::new(iter.filter(wanted));
        // Items that are all in memory can be counted.
        if known {
            let wanted: Vec<_> = iter.collect();
            total = Some(wanted.len());
            iter = Box::new(wanted.into_iter());
        }
    }
    let limit = selection.limit.unwrap_or(usize::MAX);
    let Some(size) = selection.sample else {
        return Items {
            total: total.map(|total| total.min(limit)),
            iter: Box::new(iter.take(limit)),
        };
    };
    let mut drawn: BinaryHeap<Drawn> = BinaryHeap::new();
    for (position, item) in iter.enumerate() {
        let draw = *blake3::hash(format!("{}:{}", selection.seed, item.id).as_bytes()).as_bytes();
        drawn.push(Drawn { draw, position, item });
        if drawn.len() > size {
            drawn.pop();
        }
    }
    let mut drawn = drawn.into_vec();
    drawn.sort_by_key(|drawn| drawn.position);
    drawn.truncate(limit);
    Items::all(drawn.into_iter().map(|drawn| drawn.item).collect())
}

/// An item of a sample. Items are ordered by their draw: a sample has those with the lowest.
struct Drawn {
    draw: [u8; 32],
    position: usize,
    item: Item,
}

impl PartialEq for Drawn {
    fn eq(&self, other: &Self) -> bool {
        self.draw == other.draw
    }
}

impl Eq for Drawn {}

impl PartialOrd for Drawn {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Drawn {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.draw.cmp(&other.draw)
    }
}
