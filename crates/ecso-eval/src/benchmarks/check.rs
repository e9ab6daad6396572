//! Looking over the items of a benchmark before one of them is run.

use std::{collections::HashSet, path::Path};

use ecso_batch::journal::Key;

use super::{
    benchmark::{DataError, Items},
    place::Place,
};
use crate::{
    item::{Item, Trouble},
    text::cut,
};

/// Looks over items: an id that was there before makes an item one that failed, as a missing query
/// does.
#[derive(Default)]
pub(super) struct Check {
    ids: HashSet<Key>,
    items: usize,
    missing: usize,
    unreadable: usize,
    first: Option<String>,
}

impl Check {
    pub(super) fn item(&mut self, (place, mut item): (Place, Item)) -> Item {
        if !self.ids.insert(Key::of(&item.id, "")) {
            let again = format!("{} ({})", item.id, place.row);
            let reason = format!("the id {} occurs twice", cut(&item.id));
            let task =
                Some(item.task).filter(|_| !matches!(item.trouble, Some(Trouble::UnknownKind(_))));
            item = Item { id: again, ..place.unreadable(&item.scenario, task, reason) };
            while !self.ids.insert(Key::of(&item.id, "")) {
                item.id.push_str(" again");
            }
        } else if item.trouble.is_none() && item.images.is_empty() && item.query.trim().is_empty() {
            item.trouble = Some(
                place.trouble(Trouble::Unreadable("there is neither a query nor an image".into())),
            );
        }
        self.items += 1;
        match &item.trouble {
            None => {}
            Some(Trouble::MissingImage(_)) => self.missing += 1,
            Some(Trouble::Unreadable(_) | Trouble::UnknownKind(_)) => self.unreadable += 1,
        }
        if self.first.is_none() {
            self.first = item.trouble.as_ref().map(ToString::to_string);
        }
        item
    }

    /// Tells what is wrong with items, with counts.
    ///
    /// # Errors
    /// [`DataError`] if there is no item that can be run.
    pub(super) fn done(self, data: &Path) -> Result<(), DataError> {
        let Self { items, missing, unreadable, first, .. } = self;
        let first = first.unwrap_or_else(|| "there is nothing in it".into());
        if missing + unreadable == items {
            return Err(DataError::new(
                data,
                format!("none of {items} items can be run; the first: {first}"),
            ));
        }
        if missing + unreadable > 0 {
            tracing::warn!(
                "{}: of {items} items {missing} miss an image, {unreadable} can't be read; the first: {first}",
                data.display()
            );
        }
        Ok(())
    }
}

/// Items that are all here, looked over.
///
/// # Errors
/// [`DataError`] if there is no item that can be run.
pub(super) fn checked(
    data: &Path,
    items: impl IntoIterator<Item = (Place, Item)>,
) -> Result<Items, DataError> {
    let mut check = Check::default();
    let items = items.into_iter().map(|item| check.item(item)).collect();
    check.done(data)?;
    Ok(Items::all(items))
}
