//! For tests: a scripted [`Mllm`], which replies by rule and records its requests, and a PDF.

use std::sync::{Mutex, PoisonError};

use async_trait::async_trait;
use futures::{StreamExt, stream};

use crate::{
    chat::Chat,
    mllm::{Delta, Mllm, ModelError, Reply, ReplyStream, Sampling},
};

type Script = dyn Fn(&Chat) -> Result<Reply, ModelError> + Send + Sync;

/// A model that replies as its script says, and records every request.
///
/// ```
/// use ecso::{Chat, Mllm, Reply, Sampling, testing::Scripted};
///
/// # futures::executor::block_on(async {
/// let model = Scripted::new(|chat| {
///     let text = format!("{} images", chat.image_count());
///     Ok(Reply { text, ..Reply::default() })
/// });
/// let reply = model.generate(&Chat::ask([], "What is this?"), &Sampling::default()).await?;
/// assert_eq!(reply.text, "0 images");
/// assert_eq!(model.requests().len(), 1);
/// # Ok::<(), ecso::ModelError>(())
/// # }).unwrap();
/// ```
pub struct Scripted {
    script: Box<Script>,
    requests: Mutex<Vec<(Chat, Sampling)>>,
}

impl Scripted {
    /// A model whose reply `script` computes from the conversation.
    pub fn new(
        script: impl Fn(&Chat) -> Result<Reply, ModelError> + Send + Sync + 'static,
    ) -> Self {
        Self { script: Box::new(script), requests: Mutex::default() }
    }

    /// A model that replies with these texts in order, and then fails.
    pub fn texts<T: Into<String>>(texts: impl IntoIterator<Item = T>) -> Self {
        let texts: Vec<String> = texts.into_iter().map(Into::into).collect();
        let texts = Mutex::new(texts.into_iter());
        Self::new(move |_| {
            let mut texts = texts.lock().unwrap_or_else(PoisonError::into_inner);
            let text = texts
                .next()
                .ok_or_else(|| ModelError::Rejected("the script is at its end".into()))?;
            Ok(Reply { text, ..Reply::default() })
        })
    }

    /// The requests so far.
    pub fn requests(&self) -> Vec<(Chat, Sampling)> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[async_trait]
impl Mllm for Scripted {
    fn name(&self) -> &'static str {
        "scripted"
    }

    async fn stream(&self, chat: &Chat, sampling: &Sampling) -> Result<ReplyStream, ModelError> {
        self.requests
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push((chat.clone(), sampling.clone()));
        let reply = (self.script)(chat)?;
        // One delta for each character, so that readers of the stream must join them.
        let text: Vec<Delta> = reply.text.chars().map(|c| Delta::Text(c.to_string())).collect();
        let end = Delta::End { finish: reply.finish, usage: reply.usage, took: reply.took };
        let first = Delta::FirstToken(reply.first_token);
        Ok(stream::iter([first].into_iter().chain(text).chain([end])).map(Ok).boxed())
    }
}

/// A PDF with a small page for each content stream. `BT /F 12 Tf 10 20 Td (Bread) Tj ET` writes a
/// word.
#[must_use]
pub fn pdf(pages: &[&str]) -> Vec<u8> {
    let numbers: Vec<String> =
        (0..pages.len()).map(|page| format!("{} 0 R", 4 + 2 * page)).collect();
    let (count, kids) = (pages.len(), numbers.join(" "));
    let mut objects = vec![
        "<</Type/Catalog/Pages 2 0 R>>".to_owned(),
        format!(
            "<</Type/Pages/Count {count}/Kids[{kids}]/MediaBox[0 0 72 36]/Resources<</Font<</F 3 0 R>>>>>>"
        ),
        "<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>".to_owned(),
    ];
    for content in pages {
        objects.push(format!("<</Type/Page/Parent 2 0 R/Contents {} 0 R>>", objects.len() + 2));
        objects.push(format!("<</Length {}>>stream\n{content}\nendstream", content.len()));
    }
    let mut parts = vec!["%PDF-1.4\n".to_owned()];
    let mut places = vec!["0000000000 65535 f \n".to_owned()];
    let mut length = parts[0].len();
    for (number, object) in (1..).zip(&objects) {
        places.push(format!("{length:010} 00000 n \n"));
        let part = format!("{number} 0 obj\n{object}\nendobj\n");
        length += part.len();
        parts.push(part);
    }
    let (count, table) = (places.len(), places.concat());
    parts.push(format!("xref\n0 {count}\n{table}trailer\n<</Size {count}/Root 1 0 R>>\nstartxref\n{length}\n%%EOF\n"));
    parts.concat().into_bytes()
}
