//! TrueFoundry's custom guardrail: one hook before the model is asked, one with question and
//! answer.

use std::sync::Arc;

use axum::{extract::State, response::Response};
use bytes::Bytes;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::{
    Decision, HookFinding, ProvidedAnswer, asks_for_stream, decide, handle_call, judge_answer,
    require_object, says_more, stream_refused, with_fetched_images,
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
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<crate::openapi::ChatAnswer>)]
    response_body: Option<Value>,
    #[serde(default)]
    config: Option<TrueFoundryConfig>,
}

/// A value that is there, be it null.
fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Value>, D::Error> {
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
    ecso: HookFinding,
}

impl TrueFoundryVerdict {
    fn of(verdict: bool, ecso: HookFinding) -> Self {
        Self { verdict, transformed: false, result: verdict.into(), ecso }
    }

    fn transformed(result: Value, ecso: HookFinding) -> Self {
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
    let failed = |error| Ok(TrueFoundryVerdict::of(false, HookFinding::failed(error)));
    handle_call(&gateway, "truefoundry", request, failed, async |context, call| {
        Box::pin(handle(&gateway, context, call)).await
    })
    .await
}

async fn handle(
    gateway: &Gateway,
    mut context: RequestContext,
    call: TrueFoundryCall,
) -> Result<TrueFoundryVerdict, ApiError> {
    let TrueFoundryCall { mut request_body, response_body, config } = call;
    require_object(&request_body)?;
    let Some(answer) = response_body else {
        let decision =
            decide(&mut context, request_body["model"].as_str(), Ok(request_body.clone())).await?;
        let Decision::Guard(read) = decision else {
            return Ok(TrueFoundryVerdict::of(true, HookFinding::default()));
        };
        if asks_for_stream(&request_body) {
            return Err(stream_refused());
        }
        let messages = request_body["messages"]
            .as_array()
            .and_then(|messages| with_fetched_images(messages, &read));
        let Some(messages) = messages else {
            return Ok(TrueFoundryVerdict::of(true, HookFinding::default()));
        };
        request_body["messages"] = messages.into();
        return Ok(TrueFoundryVerdict::transformed(request_body, HookFinding::default()));
    };
    if !answer.is_object() {
        return match decide(&mut context, request_body["model"].as_str(), Ok(request_body.clone()))
            .await?
        {
            Decision::Guard(_) => Err(stream_refused()),
            Decision::Pass | Decision::Observe => {
                Ok(TrueFoundryVerdict::of(true, HookFinding::default()))
            }
        };
    }
    // The answer is here, in one piece.
    request_body["stream"] = json!(false);
    let own: Bytes = answer.to_string().into();
    let provided = ProvidedAnswer { door: "truefoundry", chat: Bytes::clone(&own), own };
    let judged = judge_answer(gateway, context, None, &request_body, provided).await?;
    let rewrites = config.unwrap_or_default().rewrite;
    // What nobody judged is left out, or nothing goes out.
    let is_replaced =
        judged.is_unsafe() || (judged.is_safe() && says_more(&answer, &judged.answer));
    Ok(match (is_replaced, rewrites) {
        (true, true) => TrueFoundryVerdict::transformed(judged.answer, judged.found),
        (true, false) => TrueFoundryVerdict::of(false, judged.found),
        (false, _) => TrueFoundryVerdict::of(true, judged.found),
    })
}
