//! Answers as columns of a table.

use std::sync::Arc;

use arrow_array::{
    ArrayRef, Float64Array, Int64Array, RecordBatch, RecordBatchOptions, StringArray,
};
use arrow_schema::{DataType, Field, Schema, SchemaRef};
use ecso::Verdict;

use super::{Answer, AnswersError, Kind};

/// The new columns' names, in order.
pub const NAMES: [&str; 8] =
    ["answer", "verdict", "score", "caption", "tokens", "milliseconds", "error", "error_kind"];

/// The new columns: texts, but `score` is a number in 0..=1, `tokens` and `milliseconds` are whole
/// numbers. What a row doesn't have is null.
#[must_use]
pub fn schema(prefix: &str) -> Vec<Field> {
    let kind = |name: &str| match name {
        "score" => DataType::Float64,
        "tokens" | "milliseconds" => DataType::Int64,
        _ => DataType::Utf8,
    };
    NAMES.map(|name| Field::new(format!("{prefix}{name}"), kind(name), true)).into()
}

/// The columns of a table, and the new ones.
pub(super) fn with_answers(columns: &SchemaRef, prefix: &str) -> Result<SchemaRef, AnswersError> {
    let new = schema(prefix);
    if let Some(taken) = new.iter().find(|field| columns.column_with_name(field.name()).is_some()) {
        return Err(AnswersError::Taken(taken.name().clone()));
    }
    let fields = columns.fields().iter().cloned().chain(new.into_iter().map(Arc::new));
    Ok(Arc::new(Schema::new_with_metadata(fields.collect::<Vec<_>>(), columns.metadata().clone())))
}

/// The tables with the answers to all their rows.
pub(super) fn joined(
    whole: &SchemaRef,
    tables: &[RecordBatch],
    answers: &[Option<Answer>],
) -> Result<Vec<RecordBatch>, AnswersError> {
    let mut rest = answers;
    let mut joined = Vec::with_capacity(tables.len());
    for table in tables {
        let (these, others) = rest.split_at(table.num_rows());
        rest = others;
        let columns = table.columns().iter().cloned().chain(arrays(these)).collect();
        let options = RecordBatchOptions::new().with_row_count(Some(table.num_rows()));
        joined.push(RecordBatch::try_new_with_options(Arc::clone(whole), columns, &options)?);
    }
    Ok(joined)
}

fn arrays(answers: &[Option<Answer>]) -> [ArrayRef; 8] {
    fn texts<'a>(
        answers: &'a [Option<Answer>],
        of: impl Fn(&'a Answer) -> Option<&'a str>,
    ) -> ArrayRef {
        let texts = answers.iter().map(|answer| answer.as_ref().and_then(&of));
        Arc::new(texts.collect::<StringArray>())
    }
    let number = |of: fn(&Answer) -> u64| -> ArrayRef {
        let numbers = answers
            .iter()
            .map(|answer| answer.as_ref().and_then(|answer| i64::try_from(of(answer)).ok()));
        Arc::new(numbers.collect::<Int64Array>())
    };
    let scores: Float64Array =
        answers.iter().map(|answer| answer.as_ref().and_then(|answer| answer.score)).collect();
    [
        texts(answers, |answer| answer.answer.as_deref()),
        texts(answers, |answer| answer.verdict.map(Verdict::as_str)),
        Arc::new(scores),
        texts(answers, |answer| answer.caption.as_deref()),
        number(|answer| answer.tokens),
        number(|answer| answer.ms),
        texts(answers, |answer| answer.error.as_deref()),
        texts(answers, |answer| answer.error_kind.map(Kind::word)),
    ]
}
