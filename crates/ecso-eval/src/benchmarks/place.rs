//! Where a row stands, and what becomes of it: an item, or one that tells what is wrong with it.

use std::{
    fmt::Display,
    path::{Path, PathBuf},
};

use ecso::Cause;

use crate::{
    item::{Item, Picture, Task, Trouble},
    text::told,
};

/// Where a row stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) table: PathBuf,
    /// `line 7`, or how else it is found.
    pub(super) row: String,
}

impl Place {
    pub(super) fn new(table: &Path, row: impl Display) -> Self {
        Self { table: table.to_owned(), row: row.to_string() }
    }

    pub(super) fn line(table: &Path, line: usize) -> Self {
        Self::new(table, format_args!("line {line}"))
    }

    /// An item, or the one that tells why there is none; `task` is what such items are about, where
    /// all are about one kind of thing.
    pub(super) fn settled(
        self,
        scenario: &str,
        task: impl Into<Option<Task>>,
        item: Result<Item, Cause>,
    ) -> (Self, Item) {
        let item = item.unwrap_or_else(|reason| self.unreadable(scenario, task, reason));
        (self, item)
    }

    /// An item with its image, or the trouble with that.
    pub(super) fn shown(&self, mut item: Item, image: Result<Picture, Trouble>) -> Item {
        match image {
            Ok(image) => item.images.push(image),
            Err(trouble) => item.trouble = Some(self.trouble(trouble)),
        }
        item
    }

    /// The same reason, with the place before it.
    pub(super) fn trouble(&self, trouble: Trouble) -> Trouble {
        let said = |reason: Cause| {
            Cause::new(format!("{}: {}: {reason}", self.table.display(), self.row), reason)
        };
        match trouble {
            Trouble::MissingImage(reason) => Trouble::MissingImage(said(reason)),
            Trouble::Unreadable(reason) => Trouble::Unreadable(said(reason)),
            Trouble::UnknownKind(reason) => Trouble::UnknownKind(said(reason)),
        }
    }

    /// The item of a row of which nothing is known but what is wrong.
    pub(super) fn unreadable(
        &self,
        scenario: &str,
        task: impl Into<Option<Task>>,
        reason: impl Into<Cause>,
    ) -> Item {
        let (task, reason) = (task.into(), told(reason.into()));
        let trouble =
            if task.is_some() { Trouble::Unreadable(reason) } else { Trouble::UnknownKind(reason) };
        let file = self.table.file_name().unwrap_or_default().to_string_lossy();
        // Every scenario may have a file of that name.
        let within = if scenario.is_empty() { String::new() } else { format!("{scenario}, ") };
        let id = format!("{within}{file}, {}", self.row);
        Item {
            cluster: id.clone(),
            id,
            scenario: scenario.into(),
            earlier: Vec::new(),
            query: String::new(),
            request: String::new(),
            images: Vec::new(),
            draft: None,
            begun: None,
            task: task.unwrap_or(Task::Harmless),
            trouble: Some(self.trouble(trouble)),
        }
    }
}
