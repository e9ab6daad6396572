//! The prompts in the engine's sequences, so that a shared prefix is computed once.

use std::{cmp::Reverse, sync::Arc};

use llama_cpp_2::token::LlamaToken;

use crate::layout::{BLOCK, End, Segment};

/// A prefix is worth copying or waiting for if it saves this many tokens.
const WORTHWHILE: usize = 64;

/// The content of one sequence of the engine's KV cache: segments, each with its end.
#[derive(Debug, Default)]
struct Sequence {
    held: Vec<(Segment, End)>,
    /// [`Cache::clock`] when it was last used.
    used: i64,
    /// The whole prompt of the job that is using it.
    job: Option<Arc<[Segment]>>,
}

impl Sequence {
    /// The value of keeping it, by the rule `GreedyDual`: its tokens, plus the clock when it was
    /// last used.
    fn value(&self) -> i64 {
        self.used + i64::try_from(self.end().cells).unwrap_or(i64::MAX)
    }

    /// The end of what it holds.
    fn end(&self) -> End {
        self.held.last().map_or(End::default(), |(_, end)| *end)
    }

    /// The number of leading segments that it shares with a prompt.
    fn shared(&self, prompt: &[Segment]) -> usize {
        common(self.held.iter().map(|(segment, _)| segment), prompt)
    }

    /// The same, once its job has computed its whole prompt.
    fn will_share(&self, prompt: &[Segment]) -> usize {
        self.job.as_ref().map_or(0, |job| common(job.iter(), prompt))
    }
}

/// The number of leading segments of a prompt that are the same.
fn common<'a>(segments: impl Iterator<Item = &'a Segment>, prompt: &[Segment]) -> usize {
    segments.zip(prompt).take_while(|(segment, wanted)| segment.same_as(wanted)).count()
}

/// All sequences.
#[derive(Debug)]
pub(crate) struct Cache {
    sequences: Vec<Sequence>,
    /// The value of the sequence that was evicted last.
    clock: i64,
}

/// The place for a prompt.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// Index of the sequence.
    pub(crate) sequence: usize,
    /// The sequence in use whose content is to be copied there first.
    pub(crate) copied_from: Option<usize>,
    /// The number of the prompt's segments that are computed already.
    pub(crate) shared: usize,
    /// Where they end.
    pub(crate) end: End,
}

impl Cache {
    pub(crate) fn new(sequences: usize) -> Self {
        Self { sequences: (0..sequences.max(1)).map(|_| Sequence::default()).collect(), clock: 0 }
    }

    /// A free sequence for a prompt, which it uses until [`Cache::release`]: the one that shares
    /// most with it; among equals, the one with the least value, so that a long prefix in frequent
    /// use outlives short conversations. If a sequence in use shares clearly more, that is copied.
    /// `None` if no sequence is free, or if one in use will soon share clearly more.
    ///
    /// The prompt's last segment never counts as shared, because computing it gives the logits for
    /// the first token of the reply. With `no_reuse`, nothing is shared.
    pub(crate) fn place(&mut self, prompt: &Arc<[Segment]>, no_reuse: bool) -> Option<Place> {
        let prefix = if no_reuse { &[] } else { &prompt[..prompt.len().saturating_sub(1)] };
        let size = |shared: usize| prefix[..shared].iter().map(Segment::size).sum::<usize>();
        let all = || self.sequences.iter().enumerate();
        let free = || all().filter(|(_, sequence)| sequence.job.is_none());

        let (best, shared) = free()
            .map(|(index, sequence)| (index, sequence.shared(prefix)))
            .max_by_key(|(index, shared)| {
                (*shared, Reverse(self.sequences[*index].value()), Reverse(*index))
            })?;
        let (longest, held) = all()
            .map(|(index, sequence)| (index, sequence.shared(prefix)))
            .max_by_key(|(_, held)| *held)?;
        let soon = all().map(|(_, sequence)| sequence.will_share(prefix)).max()?;
        if size(soon) >= size(held) + WORTHWHILE {
            return None;
        }
        let is_copied = size(held) >= size(shared) + WORTHWHILE;
        let (sequence, shared) = if is_copied {
            (free().min_by_key(|(_, sequence)| sequence.value())?.0, held)
        } else {
            (best, shared)
        };

        let kept =
            self.sequences[if is_copied { longest } else { sequence }].held[..shared].to_vec();
        let place = &mut self.sequences[sequence];
        if (is_copied || shared == 0) && !place.held.is_empty() {
            self.clock = place.value();
        }
        place.used = self.clock;
        place.job = Some(prompt.clone());
        place.held = kept;
        let end = place.end();
        let copied_from = is_copied.then_some(longest);
        Some(Place { sequence, copied_from, shared, end })
    }

    /// Adds a segment that was computed, with its end.
    pub(crate) fn push(&mut self, sequence: usize, segment: Segment, end: End) {
        self.sequences[sequence].held.push((segment, end));
    }

    /// Adds the reply that was computed after a prompt, in segments as a later prompt has them: the
    /// prompt's last text and the reply are one text there.
    pub(crate) fn push_reply(&mut self, sequence: usize, reply: &[LlamaToken]) {
        let sequence = &mut self.sequences[sequence];
        let is_open =
            |segment: &Segment| matches!(segment, Segment::Text(tokens) if tokens.len() < BLOCK);
        let mut text = Vec::new();
        if let Some((Segment::Text(tokens), _)) =
            sequence.held.pop_if(|(segment, _)| is_open(segment))
        {
            text = tokens;
        }
        text.extend_from_slice(reply);
        for block in text.chunks(BLOCK) {
            let end = sequence.end().after_text(block.len());
            sequence.held.push((Segment::Text(block.to_vec()), end));
        }
    }

    /// The number of sequences.
    pub(crate) fn sequences(&self) -> usize {
        self.sequences.len()
    }

    /// Drops all but the first `keep` segments.
    pub(crate) fn truncate(&mut self, sequence: usize, keep: usize) {
        self.sequences[sequence].held.truncate(keep);
    }

    /// Frees a sequence. What it holds can be shared.
    pub(crate) fn release(&mut self, sequence: usize) {
        self.sequences[sequence].job = None;
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::*;

    /// Tokens of each segment.
    const SIZE: usize = 50;

    /// The end after so many tokens of text.
    fn end(tokens: usize) -> End {
        End::default().after_text(tokens)
    }

    fn prompt(blocks: &[i32]) -> Arc<[Segment]> {
        let tokens = |block: i32| vec![LlamaToken(block); SIZE];
        blocks.iter().map(|block| Segment::Text(tokens(*block))).collect()
    }

    /// Places a prompt, and computes all of it.
    fn start(cache: &mut Cache, blocks: &[i32]) -> Place {
        let prompt = prompt(blocks);
        let place = cache.place(&prompt, false).unwrap();
        let mut end = place.end;
        for segment in &prompt[place.shared..] {
            end = end.after_text(SIZE);
            cache.push(place.sequence, segment.clone(), end);
        }
        place
    }

    fn compute(cache: &mut Cache, blocks: &[i32]) -> (usize, usize) {
        let place = start(cache, blocks);
        assert_eq!(place.copied_from, None);
        assert_eq!(place.end, end(SIZE * place.shared));
        cache.release(place.sequence);
        (place.sequence, place.shared)
    }

    #[test]
    fn a_prompt_goes_to_the_sequence_that_shares_most() {
        let mut cache = Cache::new(2);
        assert_eq!(compute(&mut cache, &[1, 2, 3]), (0, 0));
        assert_eq!(compute(&mut cache, &[1, 2, 4]), (0, 2));
        assert_eq!(compute(&mut cache, &[7, 8]), (1, 0));
        assert_eq!(compute(&mut cache, &[1, 2, 4, 5]), (0, 3));
        assert_eq!(compute(&mut cache, &[9]), (1, 0));
    }

    #[test]
    fn a_long_prefix_outlives_short_prompts() {
        let mut cache = Cache::new(2);
        let long: Vec<i32> = (0..20).collect();
        assert_eq!(compute(&mut cache, &long).1, 0);
        for round in 0..30 {
            for other in 0..3 {
                compute(&mut cache, &[100 + round * 3 + other, 1, 2]);
            }
            assert_eq!(compute(&mut cache, &long).1, 19, "round {round}");
        }
        // A prefix that is no longer used is evicted in the end.
        for other in 0..30 {
            compute(&mut cache, &[1000 + other, 1, 2]);
        }
        assert_eq!(compute(&mut cache, &long).1, 0);
    }

    #[test]
    fn a_reply_is_a_part_of_the_conversation_that_goes_on() {
        let written = |from: usize, to: usize| -> Vec<LlamaToken> {
            (from..to).map(|token| LlamaToken(i32::try_from(token).unwrap())).collect()
        };
        let text = |tokens: Range<usize>| Segment::Text(written(tokens.start, tokens.end));
        for last in [50, BLOCK] {
            let mut cache = Cache::new(1);
            let asked: Arc<[Segment]> = [text(900..950), text(0..last)].into();
            let place = cache.place(&asked, false).unwrap();
            cache.push(place.sequence, asked[0].clone(), end(50));
            cache.push(place.sequence, asked[1].clone(), end(50 + last));
            cache.push_reply(place.sequence, &written(last, BLOCK + 40));
            cache.release(place.sequence);
            // The next turn, and another answer to the same question.
            let turn = [text(900..950), text(0..BLOCK), text(BLOCK..BLOCK + 40), text(0..9)];
            let next = cache.place(&Arc::from(turn), false).unwrap();
            assert_eq!((next.shared, next.end), (3, end(50 + BLOCK + 40)));
            cache.release(next.sequence);
            let other = [text(900..950), text(0..BLOCK), text(7..9)];
            let other = cache.place(&Arc::from(other), false).unwrap();
            assert_eq!((other.shared, other.end), (2, end(50 + BLOCK)));
        }
    }

    #[test]
    fn the_last_segment_is_always_computed() {
        let mut cache = Cache::new(1);
        compute(&mut cache, &[1, 2]);
        assert_eq!(compute(&mut cache, &[1, 2]), (0, 1));
        assert_eq!(compute(&mut cache, &[1]), (0, 0));
    }

    #[test]
    fn a_sequence_in_use_is_copied_and_never_given_away() {
        let mut cache = Cache::new(3);
        assert_eq!(start(&mut cache, &[1, 2, 3, 4]).sequence, 0);
        let copy = start(&mut cache, &[1, 2, 3, 5]);
        assert_eq!(
            copy,
            Place { sequence: 1, copied_from: Some(0), shared: 3, end: end(3 * SIZE) }
        );
        // One segment is not worth a copy.
        let other = start(&mut cache, &[1, 9]);
        assert_eq!(other, Place { sequence: 2, copied_from: None, shared: 0, end: end(0) });
        assert_eq!(cache.place(&prompt(&[7]), false), None, "no sequence is free");
        cache.release(1);
        assert_eq!(compute(&mut cache, &[1, 2, 3, 5, 6]), (1, 4));
    }

    #[test]
    fn a_prompt_waits_for_one_that_begins_the_same() {
        let mut cache = Cache::new(2);
        let first = prompt(&[1, 2, 3, 4]);
        let place = cache.place(&first, false).unwrap();
        let second = prompt(&[1, 2, 3, 5]);
        assert_eq!(cache.place(&second, false), None);
        assert_eq!(cache.place(&second, true).map(|place| place.shared), Some(0), "no reuse");
        cache.release(1);
        cache.push(place.sequence, first[0].clone(), end(SIZE));
        assert_eq!(cache.place(&second, false), None);
        cache.push(place.sequence, first[1].clone(), end(2 * SIZE));
        let found = cache.place(&second, false).unwrap();
        assert_eq!((found.copied_from, found.shared), (Some(0), 2));
        // Its job has ended before its prompt was computed: nothing waits for the rest.
        cache.release(found.sequence);
        cache.release(place.sequence);
        assert_eq!(cache.place(&second, false).map(|place| place.shared), Some(2));
    }
}
