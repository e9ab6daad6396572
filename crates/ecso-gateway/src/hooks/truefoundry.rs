//! TrueFoundry's custom guardrail: one hook before the model is asked, one with question and
//! answer.

use std::sync::Arc;

use axum::{extract::State, response::Response};
use bytes::Bytes;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::{
    Found, Given, Outlook, asks_for_stream, has_more, hooked, judged, object, outlook, shown,
    streamed,
};
use crate::{
    context::RequestContext,
    error::{ApiError, ApiErrors},
    server::Gateway,
};

/// What TrueFoundry shows; with an answer it is its output hook.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct TrueFoundryCall {
    #[schema(value_type = crate::openapi::ChatRequest)]
    request_body: Value,
    /// Null is one that the gateway has not read: a stream.
    #[serde(default, deserialize_with = "there")]
    #[schema(value_type = Option<crate::openapi::ChatAnswer>)]
    response_body: Option<Value>,
    #[serde(default)]
    config: Option<TrueFoundryConfig>,
}

/// A value that is there, be it null.
fn there<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(deserializer).map(Some)
}

/// What the operator set there.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct TrueFoundryConfig {
    /// Whether an answer is put in the place of a harmful one. Only where the operation is
    /// `mutate`: `validate` would let the harmful one out. Else it is denied.
    #[serde(default)]
    rewrite: bool,
}

/// What it is to do.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct TrueFoundryVerdict {
    /// Whether it may go on.
    verdict: bool,
    /// Whether `result` takes the place of request or answer.
    transformed: bool,
    /// The request or the answer that is to go on; else whether it may.
    result: Value,
    ecso: Found,
}

impl TrueFoundryVerdict {
    fn of(verdict: bool, ecso: Found) -> Self {
        Self { verdict, transformed: false, result: verdict.into(), ecso }
    }

    fn another(result: Value, ecso: Found) -> Self {
        Self { verdict: true, transformed: true, result, ecso }
    }
}

/// Judges an answer that TrueFoundry's gateway has got, or reads the request before it asks.
/// Whatever goes wrong is a verdict too.
#[utoipa::path(post, path = "/hooks/truefoundry", request_body = TrueFoundryCall, responses(
    (status = 200, body = TrueFoundryVerdict), ApiErrors
))]
pub(crate) async fn truefoundry(
    State(gateway): State<Arc<Gateway>>,
    request: axum::extract::Request,
) -> Response {
    // What is no 2xx may pass there.
    let failed = |error| Ok(TrueFoundryVerdict::of(false, Found::failed(error)));
    hooked(&gateway, "truefoundry", request, failed, async |context, call| {
        Box::pin(found(&gateway, context, call)).await
    })
    .await
}

async fn found(
    gateway: &Gateway,
    mut context: RequestContext,
    call: TrueFoundryCall,
) -> Result<TrueFoundryVerdict, ApiError> {
    let TrueFoundryCall { mut request_body, response_body, config } = call;
    object(&request_body)?;
    let Some(answer) = response_body else {
        let outlook =
            outlook(&mut context, request_body["model"].as_str(), Ok(request_body.clone())).await?;
        let Outlook::Guarded(read) = outlook else {
            return Ok(TrueFoundryVerdict::of(true, Found::default()));
        };
        if asks_for_stream(&request_body) {
            return Err(streamed());
        }
        let messages =
            request_body["messages"].as_array().and_then(|messages| shown(messages, &read));
        let Some(messages) = messages else {
            return Ok(TrueFoundryVerdict::of(true, Found::default()));
        };
        request_body["messages"] = messages.into();
        return Ok(TrueFoundryVerdict::another(request_body, Found::default()));
    };
    if !answer.is_object() {
        return match outlook(&mut context, request_body["model"].as_str(), Ok(request_body.clone()))
            .await?
        {
            Outlook::Guarded(_) => Err(streamed()),
            Outlook::Free | Outlook::Observed => Ok(TrueFoundryVerdict::of(true, Found::default())),
        };
    }
    // The answer is here, in one piece.
    request_body["stream"] = json!(false);
    let own: Bytes = answer.to_string().into();
    let given = Given { door: "truefoundry", chat: Bytes::clone(&own), own };
    let judged = judged(gateway, context, None, &request_body, given).await?;
    let rewrites = config.unwrap_or_default().rewrite;
    // What nobody judged is left out, or nothing goes out.
    let is_another = judged.is_unsafe() || (judged.is_safe() && has_more(&answer, &judged.answer));
    Ok(match (is_another, rewrites) {
        (true, true) => TrueFoundryVerdict::another(judged.answer, judged.found),
        (true, false) => TrueFoundryVerdict::of(false, judged.found),
        (false, _) => TrueFoundryVerdict::of(true, judged.found),
    })
}
