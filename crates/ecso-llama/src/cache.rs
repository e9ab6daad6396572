//! The prompts in the engine's sequences, so that a shared prefix is computed once.

use crate::layout::Segment;

/// The content of one sequence of the engine's KV cache: segments, each with its end position.
#[derive(Debug, Default)]
pub(crate) struct Sequence {
    held: Vec<(Segment, i32)>,
    /// [`Cache::clock`] when it was last used.
    used: i64,
}

impl Sequence {
    /// Drops all but the first `keep` segments.
    pub(crate) fn truncate(&mut self, keep: usize) {
        self.held.truncate(keep);
    }

    /// Adds a segment that was computed, with its end position.
    pub(crate) fn push(&mut self, segment: Segment, end: i32) {
        self.held.push((segment, end));
    }

    /// The value of keeping it, by the rule `GreedyDual`: its tokens, plus the clock when it was
    /// last used.
    fn value(&self) -> i64 {
        self.used + self.held.last().map_or(0, |(_, end)| i64::from(*end))
    }

    /// The number of leading segments that it shares with a prompt.
    fn shared(&self, prompt: &[Segment]) -> usize {
        self.held
            .iter()
            .zip(prompt)
            .take_while(|((held, _), segment)| held.same_as(segment))
            .count()
    }
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
    /// The number of the prompt's segments that it has already.
    pub(crate) shared: usize,
    /// The position where they end.
    pub(crate) position: i32,
}

impl Cache {
    pub(crate) fn new(sequences: usize) -> Self {
        Self { sequences: (0..sequences.max(1)).map(|_| Sequence::default()).collect(), clock: 0 }
    }

    /// The sequence that shares most with the prompt; among equals, the one with the least value,
    /// so that a long prefix in frequent use outlives short conversations. The prompt's last
    /// segment never counts as shared, because computing it gives the logits for the first token of
    /// the reply. With `no_reuse`, nothing is shared.
    pub(crate) fn place(&mut self, prompt: &[Segment], no_reuse: bool) -> Place {
        let prefix = if no_reuse { &[] } else { &prompt[..prompt.len().saturating_sub(1)] };
        let mut best = (0, 0);
        for (index, sequence) in self.sequences.iter().enumerate() {
            let shared = sequence.shared(prefix);
            let is_longer = shared > best.1;
            let is_less_valuable =
                shared == best.1 && sequence.value() < self.sequences[best.0].value();
            if index == 0 || is_longer || is_less_valuable {
                best = (index, shared);
            }
        }
        let (index, shared) = best;
        let sequence = &mut self.sequences[index];
        if shared == 0 && !sequence.held.is_empty() {
            self.clock = sequence.value();
        }
        sequence.used = self.clock;
        sequence.truncate(shared);
        let position = sequence.held.last().map_or(0, |(_, end)| *end);
        Place { sequence: index, shared, position }
    }

    pub(crate) fn sequence(&mut self, index: usize) -> &mut Sequence {
        &mut self.sequences[index]
    }
}

#[cfg(test)]
mod tests {
    use llama_cpp_2::token::LlamaToken;

    use super::*;

    fn prompt(blocks: &[i32]) -> Vec<Segment> {
        blocks.iter().map(|block| Segment::Text(vec![LlamaToken(*block)])).collect()
    }

    fn compute(cache: &mut Cache, blocks: &[i32]) -> Place {
        let prompt = prompt(blocks);
        let place = cache.place(&prompt, false);
        let mut end = place.position;
        for segment in &prompt[place.shared..] {
            end += 10;
            cache.sequence(place.sequence).push(segment.clone(), end);
        }
        place
    }

    #[test]
    fn a_prompt_goes_to_the_sequence_that_shares_most() {
        let mut cache = Cache::new(2);
        assert_eq!(compute(&mut cache, &[1, 2, 3]), Place { sequence: 0, shared: 0, position: 0 });
        assert_eq!(compute(&mut cache, &[1, 2, 4]), Place { sequence: 0, shared: 2, position: 20 });
        assert_eq!(compute(&mut cache, &[7, 8]), Place { sequence: 1, shared: 0, position: 0 });
        assert_eq!(
            compute(&mut cache, &[1, 2, 4, 5]),
            Place { sequence: 0, shared: 3, position: 30 }
        );
        assert_eq!(compute(&mut cache, &[9]), Place { sequence: 1, shared: 0, position: 0 });
    }

    #[test]
    fn a_long_prefix_outlives_short_prompts() {
        let mut cache = Cache::new(2);
        let long: Vec<i32> = (0..20).collect();
        assert_eq!(compute(&mut cache, &long).shared, 0);
        for round in 0..30 {
            for other in 0..3 {
                compute(&mut cache, &[100 + round * 3 + other, 1, 2]);
            }
            assert_eq!(compute(&mut cache, &long).shared, 19, "round {round}");
        }
        // A prefix that is no longer used is evicted in the end.
        for other in 0..30 {
            compute(&mut cache, &[1000 + other, 1, 2]);
        }
        assert_eq!(compute(&mut cache, &long).shared, 0);
    }

    #[test]
    fn the_last_segment_is_always_computed() {
        let mut cache = Cache::new(1);
        compute(&mut cache, &[1, 2]);
        assert_eq!(compute(&mut cache, &[1, 2]), Place { sequence: 0, shared: 1, position: 10 });
        assert_eq!(compute(&mut cache, &[1]), Place { sequence: 0, shared: 0, position: 0 });
    }
}
