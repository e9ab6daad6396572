//! TrueFoundry's custom guardrail: one hook before the model is asked, and one with request and
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
    request,
    server::Gateway,
};

/// A call from TrueFoundry. With an answer it is the output hook.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct TrueFoundryCall {
    #[schema(value_type = crate::openapi::ChatRequest)]
    request_body: Value,
    /// Null if the gateway has not read it because it is a stream.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<crate::openapi::ChatAnswer>)]
    response_body: Option<Value>,
    #[serde(default)]
    config: Option<TrueFoundryConfig>,
}

/// A value that is present, even if it is null.
fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(deserializer).map(Some)
}

/// What the operator configured in TrueFoundry.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct TrueFoundryConfig {
    /// Whether a harmful answer is replaced; otherwise it is denied. Only for the operation
    /// `mutate`: with `validate`, the harmful answer would go out.
    #[serde(default)]
    rewrite: bool,
}

/// What TrueFoundry is to do.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct TrueFoundryVerdict {
    /// Whether it may continue.
    verdict: bool,
    /// Whether `result` replaces the request or the answer.
    transformed: bool,
    /// The request or answer to continue with; otherwise the verdict again.
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

/// Judges an answer that TrueFoundry's gateway received, or reads the request before it is sent.
/// Errors are verdicts too.
#[utoipa::path(post, path = "/hooks/truefoundry", request_body = TrueFoundryCall, responses(
    (status = 200, body = TrueFoundryVerdict), ApiErrors
))]
pub(crate) async fn truefoundry(
    State(gateway): State<Arc<Gateway>>,
    request: axum::extract::Request,
) -> Response {
    // TrueFoundry may let the request pass on any status but 2xx.
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
            decide(&mut context, request::model(&request_body), Ok(request_body.clone())).await?;
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
        return match decide(&mut context, request::model(&request_body), Ok(request_body.clone()))
            .await?
        {
            Decision::Guard(_) => Err(stream_refused()),
            Decision::Pass | Decision::Observe => {
                Ok(TrueFoundryVerdict::of(true, HookFinding::default()))
            }
        };
    }
    // The whole answer is here.
    request_body["stream"] = json!(false);
    let own: Bytes = answer.to_string().into();
    let provided = ProvidedAnswer { door: "truefoundry", chat: Bytes::clone(&own), own };
    let judged = judge_answer(gateway, context, None, &request_body, provided).await?;
    let rewrites = config.unwrap_or_default().rewrite;
    // Unjudged content is removed, or the answer is denied.
    let is_replaced =
        judged.is_unsafe() || (judged.is_safe() && says_more(&answer, &judged.answer));
    Ok(match (is_replaced, rewrites) {
        (true, true) => TrueFoundryVerdict::transformed(judged.answer, judged.finding),
        (true, false) => TrueFoundryVerdict::of(false, judged.finding),
        (false, _) => TrueFoundryVerdict::of(true, judged.finding),
    })
}
