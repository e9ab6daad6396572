//! Waiting for one future while another makes progress.

use std::{
    future::{Future, poll_fn},
    pin::{Pin, pin},
};

use futures::future::MaybeDone;

/// Waits for `main`, and polls `background` meanwhile. The output of `background` stays in the
/// [`MaybeDone`]; if it is not finished yet, it can be awaited or dropped afterwards.
pub async fn with_background<T, B: Future>(
    main: impl Future<Output = T>,
    mut background: Option<Pin<&mut MaybeDone<B>>>,
) -> T {
    let mut main = pin!(main);
    poll_fn(|task| {
        if let Some(background) = &mut background {
            let _ = background.as_mut().poll(task);
        }
        main.as_mut().poll(task)
    })
    .await
}
