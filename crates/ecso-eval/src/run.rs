//! Running a benchmark: each item unguarded and guarded, the draft made once and used by every
//! profile.

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
    Batch, Bounds, Sifted,
    journal::{Entry, Journal, JournalError, Key, Saved},
};

use crate::{
    benchmarks::Items,
    item::{Item, Picture, Trouble},
    parquet,
    record::{Choice, ItemRecord, RunHeader},
    text::cut,
};

/// What the unguarded arm is called.
pub const UNGUARDED: &str = "unguarded";

/// How a run goes; beside it, a run is what its [`RunHeader`] says.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// How much at once.
    pub bounds: Bounds,
    /// Leave items out whose image is missing. Else they are recorded as failed.
    pub skip_missing: bool,
    /// Bounds of images.
    pub limits: Limits,
}

/// What a caller learns while a run goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Items that are to be run, recorded ones included; where known.
    pub total: Option<usize>,
    /// Items that are recorded.
    pub recorded: usize,
    /// Of these, failed ones.
    pub failed: usize,
}

/// Which items of the data couldn't be run as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Unusable {
    /// How many miss an image, and what is said of the first of them.
    pub missing: usize,
    /// See [`Unusable::missing`].
    pub first_missing: Option<String>,
    /// How many can't be read, and what is said of the first of them.
    pub unreadable: usize,
    /// See [`Unusable::unreadable`].
    pub first_unreadable: Option<String>,
}

impl Unusable {
    fn count(&mut self, trouble: &Trouble) {
        let (count, first) = match trouble {
            Trouble::MissingImage(_) => (&mut self.missing, &mut self.first_missing),
            Trouble::Unreadable(_) | Trouble::UnknownKind(_) => {
                (&mut self.unreadable, &mut self.first_unreadable)
            }
        };
        *count += 1;
        first.get_or_insert_with(|| trouble.to_string());
    }
}

/// The profiles with every answer capped at `max_new_tokens`.
#[must_use]
pub fn capped(mut profiles: Vec<Profile>, max_new_tokens: Option<u32>) -> Vec<Profile> {
    let cap = max_new_tokens.unwrap_or(u32::MAX);
    for profile in &mut profiles {
        for limit in [
            &mut profile.direct.max_tokens,
            &mut profile.caption.max_tokens,
            &mut profile.safe.max_tokens,
        ] {
            *limit = cap.min(*limit);
        }
    }
    profiles
}

/// Runs `items`, and records them in `journal`. Dropping the future at any point loses
/// the items under way, no other. Gives what of the data couldn't be used.
///
/// # Errors
/// [`JournalError`]. A model that fails, or an item with trouble, is recorded as failed, and the
/// run goes on.
pub async fn run(
    items: Items,
    profiles: &[Profile],
    model: Arc<dyn Mllm>,
    journal: &mut Journal,
    options: Options,
    mut progress: impl FnMut(Progress),
) -> Result<Unusable, JournalError> {
    let mut unguarded = profiles.first().cloned().unwrap_or_else(Profile::paper);
    unguarded.name = UNGUARDED.into();
    unguarded.gate = Gate::Never;
    let direct = Guard::new(model, unguarded);
    let answering =
        Arc::new(Answering { direct, profiles: profiles.to_vec(), limits: options.limits });

    let Items { total, iter } = items;
    let (total, unusable) = (Cell::new(total), RefCell::new(Unusable::default()));
    let usable = |item: &Item| {
        let Some(trouble) = &item.trouble else { return true };
        unusable.borrow_mut().count(trouble);
        let is_left_out = options.skip_missing && matches!(trouble, Trouble::MissingImage(_));
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
    let items = iter.filter(usable);
    ecso_batch::run(items, &answering, journal, options.bounds, Sifted::Make, |_, journal| {
        report(journal)
    })
    .await?;
    Ok(unusable.into_inner())
}

/// How many items the `journal` of `out` has that are not among `items`. Those that failed are no
/// loss: their rows were mended, and where nothing else is missing, they are taken out of it.
///
/// # Errors
/// [`JournalError`].
pub fn missing(items: Items, out: &Path, journal: &mut Journal) -> Result<usize, JournalError> {
    let there: HashSet<u64> = items.iter.map(|item| Key::of(&item.id, "").place()).collect();
    let (mut missing, mut mended) = (0, Vec::new());
    for record in Saved::folder(out).latest::<ItemRecord>()? {
        let record = record?;
        match record.failed() {
            _ if there.contains(&Key::of(&record.id, "").place()) => {}
            true => mended.push(record.id),
            false => missing += 1,
        }
    }
    if missing == 0 {
        mended.iter().try_for_each(|id| journal.forget(id))?;
    }
    Ok(missing)
}

/// How many of `items` the `journal` doesn't have as they are now: the data changed while it was
/// read. What `skip_missing` leaves out is not counted.
#[must_use]
pub fn changed(items: Items, journal: &Journal, skip_missing: bool) -> usize {
    let is_run =
        |item: &Item| !(skip_missing && matches!(item.trouble, Some(Trouble::MissingImage(_))));
    let items = items.iter.filter(is_run);
    items.filter(|item| !journal.has(Key::of(&item.id, "").made_of(&made_of(item)), false)).count()
}

/// Says that items of a run were not guarded, as they have no image; none where all were.
///
/// # Errors
/// [`JournalError`]: the run can't be read.
pub fn unguarded(out: &Path) -> Result<Option<String>, JournalError> {
    let saved = Saved::folder(out);
    let (mut without_image, mut answered) = (0, 0);
    for record in saved.latest::<ItemRecord>()? {
        let record = record?;
        without_image += usize::from(record.is_text());
        answered += usize::from(record.error.is_none());
    }
    Ok(saved.header::<RunHeader>()?.unguarded(without_image, answered))
}

/// A digest of what is asked, images to the byte, and of what a good answer is. It reads files.
fn made_of(item: &Item) -> String {
    let Item {
        id: _,
        scenario,
        cluster,
        earlier,
        query,
        request,
        images,
        draft,
        begun,
        task,
        trouble: _,
    } = item;
    let pictures = |images: &[Picture]| images.iter().map(picture).collect::<Vec<_>>();
    let earlier: Vec<_> =
        earlier.iter().map(|(role, text, images)| (role, text, pictures(images))).collect();
    let whole = (scenario, cluster, earlier, query, request, pictures(images), draft, begun, task);
    blake3::hash(&serde_json::to_vec(&whole).unwrap_or_default()).to_hex()[..16].to_owned()
}

/// What tells a picture from others: its bytes, or where they should be.
fn picture(picture: &Picture) -> (&'static str, String) {
    let bytes = match picture {
        Picture::Bytes(bytes) => Ok(blake3::hash(bytes)),
        Picture::File(path) => file(path).map_err(|_| path.display().to_string()),
        Picture::InParquet(table, row) => parquet::image(table, *row)
            .map(|bytes| blake3::hash(&bytes))
            .map_err(|_| format!("{row} of {}", table.display())),
        Picture::Described(text) => return ("text", text.clone()),
    };
    bytes.map_or_else(|place| ("missing", place), |digest| ("bytes", digest.to_string()))
}

fn file(path: &Path) -> std::io::Result<blake3::Hash> {
    Ok(blake3::Hasher::new().update_reader(File::open(path)?)?.finalize())
}

/// Answers items: unguarded, and under every profile.
struct Answering {
    direct: Guard<Arc<dyn Mllm>>,
    profiles: Vec<Profile>,
    limits: Limits,
}

impl Batch for Answering {
    type Row = Item;
    /// The item, the digest of what it is, and what is asked.
    type Ready = (Item, String, Result<Chat, ImageError>);
    type Entry = ItemRecord;
    type Error = JournalError;

    fn place(&self, item: &Item) -> Key {
        Key::of(&item.id, "")
    }

    fn key(&self, item: &Item) -> Key {
        self.place(item).made_of(&made_of(item))
    }

    async fn read(&self, item: Item) -> Self::Ready {
        let (made_of, chat) = (made_of(&item), item.chat(self.limits));
        (item, made_of, chat)
    }

    fn bytes(&self, (_, _, chat): &Self::Ready) -> usize {
        let parts = chat.iter().flat_map(|chat| &chat.turns).flat_map(|turn| &turn.parts);
        let image = |part: &Part| match part {
            Part::Image(image) => image.encoded().map(|(bytes, _)| bytes.len()),
            Part::Text(_) => None,
        };
        parts.filter_map(image).sum()
    }

    async fn make(&self, (item, made_of, chat): Self::Ready) -> Result<ItemRecord, JournalError> {
        let answered = match (&item.trouble, chat) {
            (Some(trouble), _) => Err(Unanswered::because(trouble)),
            (None, Err(error)) => Err(Unanswered::because(&error)),
            (None, Ok(chat)) => self.answer(&chat, item.draft.as_deref()).await,
        };
        let (arms, error, filtered) = match answered {
            Ok(arms) => (arms, None, false),
            Err(Unanswered { why, is_filter }) => (Vec::new(), Some(why), is_filter),
        };
        let of_unknown_kind = matches!(item.trouble, Some(Trouble::UnknownKind(_)));
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
            begun: _,
            trouble: _,
        } = item;
        let images =
            images.len() + earlier.iter().map(|(_, _, images)| images.len()).sum::<usize>();
        Ok(ItemRecord {
            id,
            made_of,
            scenario,
            cluster,
            query,
            request,
            task,
            images,
            arms,
            error,
            filtered,
            of_unknown_kind,
        })
    }
}

impl Answering {
    async fn answer(&self, chat: &Chat, draft: Option<&str>) -> Result<Vec<Outcome>, Unanswered> {
        let unguarded = match draft {
            Some(draft) => self.direct.review(chat, draft).await,
            None => self.direct.answer(chat).await,
        };
        let mut arms = vec![unguarded?];
        for profile in &self.profiles {
            let drafted = Drafted::new(Arc::clone(self.direct.model()), chat, &arms[0]);
            let guard = Guard::new(drafted, profile.clone());
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
struct Unanswered {
    why: String,
    /// Whether a content filter refused it.
    is_filter: bool,
}

impl Unanswered {
    fn because(error: &(dyn std::error::Error + 'static)) -> Self {
        Self { why: error_chain(error), is_filter: false }
    }
}

impl From<GuardError> for Unanswered {
    fn from(error: GuardError) -> Self {
        let is_filter = matches!(&error, GuardError::Model { source: ModelError::Filtered(_), .. });
        // The model's words may quote the item.
        Self { is_filter, why: cut(error_chain(&error)) }
    }
}

/// A model that has answered a conversation, and gives the same answer, at the same cost, when it
/// is asked again.
struct Drafted<'a> {
    model: Arc<dyn Mllm>,
    chat: &'a Chat,
    draft: Reply,
}

impl<'a> Drafted<'a> {
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
impl Mllm for Drafted<'_> {
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

/// Whether an item's scenario is this, or begins so, in any case.
fn is_of(item: &Item, scenario: &str) -> bool {
    item.scenario.to_lowercase().starts_with(&scenario.to_lowercase())
}

/// Holds that each of `scenarios` is there.
///
/// # Errors
/// A [`Cause`] that names one which isn't, and those that are.
pub fn fits(items: Items, scenarios: &[String]) -> Result<(), Cause> {
    let (mut open, mut there): (Vec<&String>, _) = (scenarios.iter().collect(), BTreeSet::new());
    for item in items.iter {
        open.retain(|scenario| !is_of(&item, scenario));
        if open.is_empty() {
            return Ok(());
        }
        there.insert(item.scenario);
    }
    let Some(unknown) = open.first() else { return Ok(()) };
    let there =
        there.into_iter().filter(|scenario| !scenario.is_empty()).collect::<Vec<_>>().join(", ");
    Err(format!("no scenario begins with `{unknown}`; there are {}", cut(there)).into())
}

/// Those of `items` that `choice` takes. A sample is drawn by a hash of seed and id: the same
/// whatever else is in the data.
#[must_use]
pub fn chosen(items: Items, choice: &Choice) -> Items {
    let scenarios = choice.scenarios.clone();
    let wanted = move |item: &Item| {
        // What can't be read has no scenario, and is told whichever are wanted.
        let is_unknown = item.scenario.is_empty() && item.trouble.is_some();
        is_unknown || scenarios.is_empty() || scenarios.iter().any(|scenario| is_of(item, scenario))
    };
    let known = items.total.is_some();
    let mut total = items.total;
    let mut iter: Box<dyn Iterator<Item = Item> + Send> = items.iter;
    if !choice.scenarios.is_empty() {
        iter = Box::new(iter.filter(wanted));
        // What is all in memory can be counted.
        if known {
            let some: Vec<_> = iter.collect();
            total = Some(some.len());
            iter = Box::new(some.into_iter());
        }
    }
    let limit = choice.limit.unwrap_or(usize::MAX);
    let Some(size) = choice.sample else {
        return Items {
            total: total.map(|total| total.min(limit)),
            iter: Box::new(iter.take(limit)),
        };
    };
    let mut drawn: BinaryHeap<Drawn> = BinaryHeap::new();
    for (place, item) in iter.enumerate() {
        let draw = *blake3::hash(format!("{}:{}", choice.seed, item.id).as_bytes()).as_bytes();
        drawn.push(Drawn { draw, place, item });
        if drawn.len() > size {
            drawn.pop();
        }
    }
    let mut drawn = drawn.into_vec();
    drawn.sort_by_key(|drawn| drawn.place);
    drawn.truncate(limit);
    Items::all(drawn.into_iter().map(|drawn| drawn.item).collect())
}

struct Drawn {
    draw: [u8; 32],
    place: usize,
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
