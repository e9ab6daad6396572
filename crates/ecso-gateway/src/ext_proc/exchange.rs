//! One exchange: a request that reached a gateway, how it continues, its answer, and what the
//! client gets.

use std::{
    convert::Infallible,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use axum::{
    Router,
    body::{Body, to_bytes},
    http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri, header},
    response::IntoResponse,
};
use bytes::{Bytes, BytesMut};
use futures::{FutureExt, StreamExt, TryStreamExt, future::BoxFuture, stream};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Body as _, Frame};
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinSet,
};
use tonic::Streaming;
use tower::ServiceExt;

use super::{
    body::{BodyEnd, BodyProgress, BodyReceiver, BodySender, body_channel},
    headers::{self, ReceivedHeaders},
    messages::{
        BodyMutation, BodyResponse, CommonResponse, FULL_DUPLEX_STREAMED, HeaderMutation,
        HeadersResponse, HttpHeaders, HttpStatus, ImmediateResponse, Part, ProcessingRequest,
        Reply, StreamedBodyResponse, TrailersResponse,
    },
};
use crate::{
    error::ApiError,
    upstream::{Carrier, attach_carrier},
};

/// Maximum bytes of a body chunk, as Envoy's documentation recommends.
const MAX_CHUNK: usize = 64 << 10;
/// Maximum bytes of an immediate answer: errors and findings.
const MAX_IMMEDIATE: usize = 4 << 20;

/// A message to the gateway.
pub(super) enum Outgoing {
    Reply(Reply),
    /// The exchange is complete.
    Done,
    /// The gateway must fail the request.
    Aborted,
}

/// The exchange ended early: the gateway left, or it must fail the request.
#[derive(Debug)]
struct Aborted(&'static str);

/// Runs an exchange. If it can't be completed, the gateway is told to fail the request.
pub(super) async fn run(
    router: Router,
    patience: Duration,
    mut gateway: Streaming<ProcessingRequest>,
    sender: mpsc::Sender<Outgoing>,
) {
    let out = Replies(sender);
    let result = async {
        let first = tokio::time::timeout(patience, gateway.message()).await;
        let Ok(Ok(Some(first))) = first else { return Err(Aborted("no request arrived")) };
        if let Some(wrong) = setup_error(&first) {
            tracing::error!(wrong, "the gateway's settings make guarding impossible");
            return reply_at_once(
                ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "gateway_setup", wrong)
                    .into_response(),
                &out,
            )
            .await;
        }
        let head = match first.part {
            Some(Part::RequestHeaders(head)) => head,
            // The gateway refused the request before this filter, and shows us its answer.
            Some(Part::ResponseHeaders(head)) => return reply_at_once(refusal(head), &out).await,
            _ => {
                tracing::error!(
                    "the gateway does not send request headers: set request_header_mode to SEND"
                );
                return Err(Aborted("the first message is not a request"));
            }
        };
        guard_request(router, head, gateway, &out).await
    };
    let result = tokio::select! {
        result = result => result,
        () = out.0.closed() => Err(Aborted("the gateway left")),
    };
    match result {
        Ok(()) => drop(out.0.send(Outgoing::Done).await),
        Err(Aborted(why)) => {
            tracing::debug!(why, "an exchange was aborted");
            let _ = out.0.send(Outgoing::Aborted).await;
        }
    }
}

/// The answer to a request that the gateway refused itself.
fn refusal(head: HttpHeaders) -> axum::response::Response {
    let received = ReceivedHeaders::read(head.headers);
    let status = received
        .and_then(|received| StatusCode::from_bytes(received.pseudo_header(":status")?).ok());
    let status = status.filter(|status| status.as_u16() >= 400).unwrap_or(StatusCode::BAD_GATEWAY);
    ApiError::new(status, "gateway_refused", "the gateway refused this request").into_response()
}

/// An error in the gateway's settings that makes guarding impossible.
fn setup_error(first: &ProcessingRequest) -> Option<&'static str> {
    let modes =
        first.protocol_config.map(|modes| [modes.request_body_mode, modes.response_body_mode]);
    if first.observability_mode {
        return Some(
            "external processing: turn off observability_mode, with it the gateway does not wait \
             for the guard",
        );
    }
    (modes != Some([FULL_DUPLEX_STREAMED; 2])).then_some(
        "external processing: set request_body_mode and response_body_mode to \
         FULL_DUPLEX_STREAMED in the gateway's processing_mode",
    )
}

/// Sends a request through the guard, with the gateway as its carrier.
async fn guard_request(
    router: Router,
    head: HttpHeaders,
    gateway: Streaming<ProcessingRequest>,
    out: &Replies,
) -> Result<(), Aborted> {
    let is_empty = head.end_of_stream;
    let Some((request, path)) = ReceivedHeaders::read(head.headers).and_then(request) else {
        return reply_at_once(
            ApiError::bad_request("invalid_request", "the request headers can't be read")
                .into_response(),
            out,
        )
        .await;
    };
    let (mut body, body_receiver) = body_channel();
    let (answer, answer_receiver) = body_channel();
    let (head_sender, head_receiver) = oneshot::channel();
    if is_empty {
        body.end(BodyEnd::Whole);
    }
    let progress = body_receiver.progress.clone();
    let envoy = Arc::new(EnvoyCarrier {
        out: out.clone(),
        path,
        headers: request.headers().clone(),
        is_empty,
        progress,
        response: Mutex::new(Some((head_receiver, answer_receiver))),
        upstream_head: Mutex::default(),
        body_task: Mutex::default(),
    });
    let request = match attach_carrier(
        envoy.clone(),
        request.map(|()| Body::from_stream(body_receiver.chunks())),
    ) {
        Ok(request) => request,
        Err(error) => return reply_at_once(error.into_response(), out).await,
    };
    let mut incoming = Incoming { body, head: Some(head_sender), answer };
    let response = async {
        let Ok(response) = router.oneshot(request).await;
        envoy.answer(response).await
    };
    tokio::select! {
        response = response => response,
        never = incoming.all(gateway) => match never {},
    }
}

/// The request of these headers, and its path as the gateway wrote it.
fn request(received: ReceivedHeaders) -> Option<(Request<()>, String)> {
    let mut request = Request::new(());
    *request.method_mut() = Method::from_bytes(received.pseudo_header(":method")?).ok()?;
    let path = std::str::from_utf8(received.pseudo_header(":path")?).ok()?.to_owned();
    *request.uri_mut() = Uri::try_from(&path).ok().filter(|uri| uri.authority().is_none())?;
    let host =
        received.pseudo_header(":authority").and_then(|host| HeaderValue::from_bytes(host).ok());
    *request.headers_mut() = received.headers;
    if let Some(host) = host {
        request.headers_mut().insert(header::HOST, host);
    }
    Some((request, path))
}

/// Distributes the messages of the gateway.
struct Incoming {
    body: BodySender,
    head: Option<oneshot::Sender<HttpHeaders>>,
    answer: BodySender,
}

impl Incoming {
    /// Reads all messages. Never returns, even if the gateway breaks off.
    async fn all(&mut self, mut gateway: Streaming<ProcessingRequest>) -> Infallible {
        while let Ok(Some(message)) = gateway.message().await {
            let is_of_an_answer =
                matches!(message.part, Some(Part::ResponseBody(_) | Part::ResponseTrailers(_)));
            if is_of_an_answer && self.head.is_some() {
                tracing::error!(
                    "the gateway does not send response headers: set response_header_mode to SEND"
                );
                break;
            }
            match message.part {
                Some(Part::RequestBody(chunk)) => self.body.chunk(chunk).await,
                Some(Part::RequestTrailers(trailers)) => self.body.end(BodyEnd::with(trailers)),
                Some(Part::ResponseHeaders(head)) => {
                    if head.end_of_stream {
                        self.answer.end(BodyEnd::Whole);
                    }
                    if let Some(sender) = self.head.take() {
                        let _ = sender.send(head);
                    }
                }
                Some(Part::ResponseBody(chunk)) => self.answer.chunk(chunk).await,
                Some(Part::ResponseTrailers(trailers)) => self.answer.end(BodyEnd::with(trailers)),
                Some(Part::RequestHeaders(_)) | None => {}
            }
        }
        // Bodies that have not ended are broken now.
        (self.body.chunks, self.head, self.answer.chunks) = (None, None, None);
        std::future::pending().await
    }
}

/// Sends replies to the gateway.
#[derive(Clone)]
struct Replies(mpsc::Sender<Outgoing>);

impl Replies {
    async fn send(&self, reply: Reply) -> Result<(), Aborted> {
        self.0.send(Outgoing::Reply(reply)).await.map_err(|_| Aborted("the gateway left"))
    }

    /// Sends a body, chunk by chunk. `ended` says how the original body ended, once this one is
    /// complete.
    async fn body<B: hyper::body::Body<Data = Bytes> + Unpin>(
        &self,
        mut body: B,
        reply: fn(BodyResponse) -> Reply,
        trailers: fn(TrailersResponse) -> Reply,
        ended: impl Future<Output = BodyEnd>,
    ) -> Result<(), Aborted> {
        let chunk = |body: Bytes, end_of_stream| {
            let streamed_response = Some(StreamedBodyResponse { body, end_of_stream });
            let body_mutation = Some(BodyMutation { streamed_response });
            reply(BodyResponse {
                response: Some(CommonResponse { header_mutation: None, body_mutation }),
            })
        };
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|_| Aborted("a body broke off"))?;
            let Ok(mut whole) = frame.into_data() else { continue };
            while !whole.is_empty() {
                let next = whole.split_to(whole.len().min(MAX_CHUNK));
                self.send(chunk(next, false)).await?;
            }
        }
        match ended.await {
            BodyEnd::Whole => self.send(chunk(Bytes::new(), true)).await,
            // Trailers are dropped: they are not judged.
            BodyEnd::Trailers(names) => {
                let change = HeaderMutation { set_headers: Vec::new(), remove_headers: names };
                self.send(trailers(TrailersResponse { header_mutation: Some(change) })).await
            }
        }
    }
}

/// The gateway as the carrier of one request.
struct EnvoyCarrier {
    out: Replies,
    /// The original request.
    path: String,
    headers: HeaderMap,
    is_empty: bool,
    progress: BodyProgress,
    /// Where its answer will arrive.
    response: Mutex<Option<(oneshot::Receiver<HttpHeaders>, BodyReceiver)>>,
    upstream_head: Mutex<Option<UpstreamHead>>,
    /// The task that sends the request's body.
    body_task: Mutex<JoinSet<()>>,
}

/// The head of the original answer.
struct UpstreamHead {
    status: StatusCode,
    headers: HeaderMap,
    is_empty: bool,
    progress: BodyProgress,
}

impl Carrier for EnvoyCarrier {
    fn door(&self) -> &'static str {
        "ext_proc"
    }

    fn carry(
        &self,
        request: Request<reqwest::Body>,
    ) -> BoxFuture<'_, Result<reqwest::Response, ApiError>> {
        let broken = |Aborted(why)| ApiError::upstream(why);
        let guard_request = async move {
            let Some((head, answer)) = lock(&self.response).take() else {
                return Err(ApiError::upstream("the gateway can carry a request only once"));
            };
            self.send_request(request).await.map_err(broken)?;
            let received = head.await.map_err(|_| broken(Aborted("the gateway broke off")))?;
            let is_empty = received.end_of_stream;
            let unread = || ApiError::upstream("the gateway sent an answer that can't be read");
            let received = ReceivedHeaders::read(received.headers).ok_or_else(unread)?;
            let status = received
                .pseudo_header(":status")
                .and_then(|status| StatusCode::from_bytes(status).ok());
            let status = status.ok_or_else(unread)?;
            let (headers, progress) = (received.headers.clone(), answer.progress.clone());
            *lock(&self.upstream_head) = Some(UpstreamHead { status, headers, is_empty, progress });
            let mut response = Response::new(reqwest::Body::wrap_stream(answer.chunks()));
            (*response.status_mut(), *response.headers_mut()) = (status, received.headers);
            Ok(response.into())
        };
        guard_request.boxed()
    }
}

impl EnvoyCarrier {
    /// Sends the request's headers, and then its body.
    async fn send_request(&self, request: Request<reqwest::Body>) -> Result<(), Aborted> {
        let (mut head, body) = request.into_parts();
        match body.size_hint().exact() {
            Some(1..) if self.is_empty => {
                return Err(Aborted("a request without a body can't get one"));
            }
            Some(length) if !self.is_empty => {
                drop(head.headers.insert(header::CONTENT_LENGTH, length.into()));
            }
            _ => {}
        }
        let mut change = headers::change(&self.headers, &head.headers);
        let path = head.uri.path_and_query().map_or("/", |path| path.as_str());
        if path != self.path {
            change.set_headers.extend(headers::path(path));
        }
        self.out.send(Reply::RequestHeaders(headed(change))).await?;
        if !self.is_empty {
            let (out, mut progress) = (self.out.clone(), self.progress.clone());
            lock(&self.body_task).spawn(async move {
                progress.has_begun().await;
                let ended = progress.wait_for_end();
                if let Err(Aborted(why)) =
                    out.body(body, Reply::RequestBody, Reply::RequestTrailers, ended).await
                {
                    tracing::debug!(why, "a request's body broke off");
                }
            });
        }
        Ok(())
    }

    /// Sends the client's answer.
    async fn answer(&self, response: Response<Body>) -> Result<(), Aborted> {
        let Some(UpstreamHead { status, headers, is_empty, mut progress }) =
            lock(&self.upstream_head).take()
        else {
            return reply_at_once(response, &self.out).await;
        };
        let (mut head, mut body) = response.into_parts();
        // What our answer has before the gateway accepts it: keep-alive comments, or a complete
        // error.
        let mut early = BytesMut::new();
        let has_begun = loop {
            let frame = tokio::select! {
                biased;
                has_begun = progress.has_begun(), if !is_empty => break has_begun,
                frame = body.frame() => frame,
            };
            match frame
                .transpose()
                .map_err(|_| Aborted("an answer broke off"))?
                .map(Frame::into_data)
            {
                Some(Ok(chunk)) if early.len() + chunk.len() <= MAX_IMMEDIATE => {
                    early.extend_from_slice(&chunk);
                }
                Some(Ok(_)) => {
                    return Err(Aborted("an answer is too long for an immediate response"));
                }
                Some(Err(_)) => {}
                None => break false,
            }
        };
        if !has_begun && (!is_empty || !early.is_empty()) {
            let rest =
                to_bytes(body, MAX_IMMEDIATE).await.map_err(|_| Aborted("an answer broke off"))?;
            early.extend_from_slice(&rest);
            return reply_at_once(Response::from_parts(head, early.freeze().into()), &self.out)
                .await;
        }
        if let Some(rest) = body.size_hint().exact().filter(|_| !is_empty) {
            head.headers.insert(header::CONTENT_LENGTH, (early.len() as u64 + rest).into());
        }
        let mut change = headers::change_answer(&headers, &head.headers);
        if head.status != status {
            change.set_headers.push(headers::status(head.status));
        }
        self.out.send(Reply::ResponseHeaders(headed(change))).await?;
        if is_empty {
            return Ok(());
        }
        let early = stream::iter([Ok(Frame::data(early.freeze()))]);
        let whole = StreamBody::new(early.chain(body.into_data_stream().map_ok(Frame::data)));
        // If our answer is complete before the original, it ends the original.
        let ended = async { progress.end().unwrap_or(BodyEnd::Whole) };
        self.out.body(whole, Reply::ResponseBody, Reply::ResponseTrailers, ended).await
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn headed(change: HeaderMutation) -> HeadersResponse {
    HeadersResponse {
        response: Some(CommonResponse { header_mutation: Some(change), body_mutation: None }),
    }
}

/// Replies with an immediate answer.
async fn reply_at_once(response: Response<Body>, out: &Replies) -> Result<(), Aborted> {
    let (head, body) = response.into_parts();
    let body = to_bytes(body, MAX_IMMEDIATE).await.map_err(|_| Aborted("an answer broke off"))?;
    let reply = ImmediateResponse {
        status: Some(HttpStatus { code: head.status.as_u16().into() }),
        headers: Some(headers::change_answer(&HeaderMap::new(), &head.headers)),
        body,
        details: "ecso".into(),
    };
    out.send(Reply::Immediate(reply)).await
}
