//! Answers as columns of a table.

use std::sync::Arc;

use arrow_array::{
    ArrayRef, Float64Array, Int64Array, RecordBatch, RecordBatchOptions, StringArray,
};
use arrow_schema::{DataType, Field, Schema, SchemaRef};
use ecso::Verdict;

use super::{Answer, AnswersError, ErrorKind};

/// The names of the new columns, in order.
pub const NAMES: [&str; 8] =
    ["answer", "verdict", "score", "caption", "tokens", "milliseconds", "error", "error_kind"];

/// The new columns: `score` is a number in 0..=1, `tokens` and `milliseconds` are integers, the
/// others are strings. Missing values are null.
#[must_use]
pub fn schema(prefix: &str) -> Vec<Field> {
    let data_type = |name: &str| match name {
        "score" => DataType::Float64,
        "tokens" | "milliseconds" => DataType::Int64,
        _ => DataType::Utf8,
    };
    NAMES.map(|name| Field::new(format!("{prefix}{name}"), data_type(name), true)).into()
}

/// The columns of a table and the new ones.
pub(super) fn with_answers(
    schema_of_table: &SchemaRef,
    prefix: &str,
) -> Result<SchemaRef, AnswersError> {
    let new = schema(prefix);
    let is_taken = |field: &&Field| schema_of_table.column_with_name(field.name()).is_some();
    if let Some(taken) = new.iter().find(is_taken) {
        return Err(AnswersError::NameConflict(taken.name().clone()));
    }
    let fields = schema_of_table.fields().iter().cloned().chain(new.into_iter().map(Arc::new));
    let metadata = schema_of_table.metadata().clone();
    Ok(Arc::new(Schema::new_with_metadata(fields.collect::<Vec<_>>(), metadata)))
}

/// Most bytes in a column of texts: offsets have 31 bits.
const MAX_BYTES: usize = i32::MAX as usize;

/// How many of the answers fit one table, whose columns of texts have at most `most` bytes each.
fn fitting(answers: &[Option<Answer>], most: usize) -> usize {
    let length = |text: &Option<String>| text.as_ref().map_or(0, String::len);
    let mut lengths = [0_usize; 3];
    let fits = |answer: &&Option<Answer>| {
        let Some(answer) = answer else { return true };
        let texts = [&answer.answer, &answer.caption, &answer.error];
        lengths.iter_mut().zip(texts).all(|(sum, text)| {
            *sum += length(text);
            *sum <= most
        })
    };
    answers.iter().take_while(fits).count().max(1)
}

/// Appends the answers to the tables. A table whose answers don't fit is split.
pub(super) fn append(
    new_schema: &SchemaRef,
    tables: &[RecordBatch],
    answers: &[Option<Answer>],
) -> Result<Vec<RecordBatch>, AnswersError> {
    let mut rest = answers;
    let mut appended = Vec::with_capacity(tables.len());
    for table in tables {
        let (mut these, others) = rest.split_at(table.num_rows());
        rest = others;
        loop {
            let (now, later) = these.split_at(fitting(these, MAX_BYTES).min(these.len()));
            let table = table.slice(table.num_rows() - these.len(), now.len());
            let columns = table.columns().iter().cloned().chain(arrays(now)).collect();
            let options = RecordBatchOptions::new().with_row_count(Some(now.len()));
            appended.push(RecordBatch::try_new_with_options(
                Arc::clone(new_schema),
                columns,
                &options,
            )?);
            these = later;
            if these.is_empty() {
                break;
            }
        }
    }
    Ok(appended)
}

fn arrays(answers: &[Option<Answer>]) -> [ArrayRef; 8] {
    fn texts<'a>(
        answers: &'a [Option<Answer>],
        text: impl Fn(&'a Answer) -> Option<&'a str>,
    ) -> ArrayRef {
        let texts = answers.iter().map(|answer| answer.as_ref().and_then(&text));
        Arc::new(texts.collect::<StringArray>())
    }
    let numbers = |number: fn(&Answer) -> u64| -> ArrayRef {
        let numbers = answers
            .iter()
            .map(|answer| answer.as_ref().and_then(|answer| i64::try_from(number(answer)).ok()));
        Arc::new(numbers.collect::<Int64Array>())
    };
    let scores: Float64Array =
        answers.iter().map(|answer| answer.as_ref().and_then(|answer| answer.score)).collect();
    [
        texts(answers, |answer| answer.answer.as_deref()),
        texts(answers, |answer| answer.verdict.map(Verdict::as_str)),
        Arc::new(scores),
        texts(answers, |answer| answer.caption.as_deref()),
        numbers(|answer| answer.tokens),
        numbers(|answer| answer.ms),
        texts(answers, |answer| answer.error.as_deref()),
        texts(answers, |answer| answer.error_kind.map(ErrorKind::word)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_that_fit_no_column_are_split() {
        let answer = |text: &str| Some(Answer::failure(String::new(), ErrorKind::Input, text, 0));
        let answers = [answer("four"), None, answer("four"), answer("much longer")];
        assert_eq!([3, 4, 8, 11, 19].map(|most| fitting(&answers, most)), [1, 2, 3, 3, 4]);
        assert_eq!(fitting(&answers[3..], 2), 1, "one row is always taken");
    }
}
