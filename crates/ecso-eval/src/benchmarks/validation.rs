//! Validates the items of a benchmark before the first one is run.

use std::{collections::HashSet, path::Path};

use ecso_batch::journal::Key;

use super::{
    benchmark::{DataError, Items},
    location::RowLocation,
};
use crate::{
    item::{Item, ItemError},
    text::cut,
};

/// Validates items: an item with a duplicate id, or with neither query nor image, gets an error.
#[derive(Default)]
pub(super) struct Validator {
    ids: HashSet<Key>,
    items: usize,
    missing: usize,
    unreadable: usize,
    first: Option<String>,
}

impl Validator {
    pub(super) fn item(&mut self, (location, mut item): (RowLocation, Item)) -> Item {
        if !self.ids.insert(Key::new(&item.id, "")) {
            let new_id = format!("{} ({})", item.id, location.row);
            let reason = format!("the id {} occurs twice", cut(&item.id));
            let task =
                Some(item.task).filter(|_| !matches!(item.error, Some(ItemError::UnknownKind(_))));
            item = Item { id: new_id, ..location.unreadable(&item.scenario, task, reason) };
            while !self.ids.insert(Key::new(&item.id, "")) {
                item.id.push_str(" again");
            }
        } else if item.error.is_none() && item.images.is_empty() && item.query.trim().is_empty() {
            item.error = Some(
                location
                    .error(ItemError::Unreadable("there is neither a query nor an image".into())),
            );
        }
        self.items += 1;
        match &item.error {
            None => {}
            Some(ItemError::MissingImage(_)) => self.missing += 1,
            Some(ItemError::Unreadable(_) | ItemError::UnknownKind(_)) => self.unreadable += 1,
        }
        if self.first.is_none() {
            self.first = item.error.as_ref().map(ToString::to_string);
        }
        item
    }

    /// Logs how many items can't be run, and why the first of them can't.
    ///
    /// # Errors
    /// [`DataError`] if there is no item that can be run.
    pub(super) fn finish(self, data: &Path) -> Result<(), DataError> {
        let Self { items, missing, unreadable, first, .. } = self;
        let first = first.unwrap_or_else(|| "there are no rows".into());
        if missing + unreadable == items {
            return Err(DataError::new(
                data,
                format!("none of {items} items can be run; the first: {first}"),
            ));
        }
        if missing + unreadable > 0 {
            tracing::warn!(
                "{}: of {items} items, {missing} lack an image and {unreadable} can't be read; the \
                 first: {first}",
                data.display()
            );
        }
        Ok(())
    }
}

/// Items that are all in memory, validated.
///
/// # Errors
/// [`DataError`] if there is no item that can be run.
pub(super) fn validated(
    data: &Path,
    items: impl IntoIterator<Item = (RowLocation, Item)>,
) -> Result<Items, DataError> {
    let mut validator = Validator::default();
    let items = items.into_iter().map(|item| validator.item(item)).collect();
    validator.finish(data)?;
    Ok(Items::all(items))
}
