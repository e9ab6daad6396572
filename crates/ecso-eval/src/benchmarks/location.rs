//! The location of a row, and how a row becomes an item: the item itself, or one that reports what
//! is wrong with the row.

use std::{
    fmt::Display,
    path::{Path, PathBuf},
};

use ecso::Cause;

use crate::{
    item::{Item, ItemError, Picture, Task},
    text::shortened,
};

/// The location of a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RowLocation {
    pub(super) table: PathBuf,
    /// For example `line 7`.
    pub(super) row: String,
}

impl RowLocation {
    pub(super) fn new(table: &Path, row: impl Display) -> Self {
        Self { table: table.to_owned(), row: row.to_string() }
    }

    pub(super) fn line(table: &Path, line: usize) -> Self {
        Self::new(table, format_args!("line {line}"))
    }

    /// The item, or one that reports why there is none. `task` is the task of such items, if all
    /// items of the table have the same kind of task.
    pub(super) fn item_or_error(
        self,
        scenario: &str,
        task: impl Into<Option<Task>>,
        item: Result<Item, Cause>,
    ) -> (Self, Item) {
        let item = item.unwrap_or_else(|reason| self.unreadable(scenario, task, reason));
        (self, item)
    }

    /// The item with its image, or with the error about the image.
    pub(super) fn with_image(&self, mut item: Item, image: Result<Picture, ItemError>) -> Item {
        match image {
            Ok(image) => item.images.push(image),
            Err(error) => item.error = Some(self.error(error)),
        }
        item
    }

    /// The error with the location before its reason.
    pub(super) fn error(&self, error: ItemError) -> ItemError {
        let located = |reason: Cause| {
            Cause::new(format!("{}: {}: {reason}", self.table.display(), self.row), reason)
        };
        match error {
            ItemError::MissingImage(reason) => ItemError::MissingImage(located(reason)),
            ItemError::Unreadable(reason) => ItemError::Unreadable(located(reason)),
            ItemError::UnknownKind(reason) => ItemError::UnknownKind(located(reason)),
        }
    }

    /// The item of a row that can't be read.
    pub(super) fn unreadable(
        &self,
        scenario: &str,
        task: impl Into<Option<Task>>,
        reason: impl Into<Cause>,
    ) -> Item {
        let (task, reason) = (task.into(), shortened(reason.into()));
        let error = if task.is_some() {
            ItemError::Unreadable(reason)
        } else {
            ItemError::UnknownKind(reason)
        };
        let file = self.table.file_name().unwrap_or_default().to_string_lossy();
        // Every scenario may have a file with this name.
        let prefix = if scenario.is_empty() { String::new() } else { format!("{scenario}, ") };
        let id = format!("{prefix}{file}, {}", self.row);
        Item {
            scenario: scenario.into(),
            error: Some(self.error(error)),
            ..Item::new(id, String::new(), task.unwrap_or(Task::Harmless))
        }
    }
}
