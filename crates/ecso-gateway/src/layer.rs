//! The guard in front of a service of your own, as a `tower` layer. The service answers as the
//! model would; its answers to chats are judged before they go out.

use std::{
    convert::Infallible,
    sync::Arc,
    task::{Context, Poll},
};

use axum::{
    BoxError, Router,
    body::Body,
    http::{Extensions, HeaderValue, Request, Response, header},
    response::IntoResponse,
};
use bytes::Bytes;
use futures::{FutureExt, future::BoxFuture};
use hyper::body::Body as HttpBody;
use tower::{Layer, Service, ServiceExt};

use crate::{
    error::ApiError,
    server::Gateway,
    upstream::{Carrier, attach_carrier},
};

/// Puts the guard of a [`Gateway`] in front of a service that speaks one of its formats: `POST
/// /v1/chat/completions`, `/v1/responses`, `/v1/messages`. See [`Gateway::layer`].
#[derive(Clone)]
pub struct GuardLayer {
    router: Router,
}

/// A service behind the guard.
#[derive(Clone)]
pub struct Guarded<S> {
    router: Router,
    inner: S,
}

impl Gateway {
    /// The guard as a layer around any service. It does for that service what `ecso serve` does for
    /// a server.
    ///
    /// The guard's own questions go to the [`Upstream`](crate::Upstream) of this gateway. That must
    /// not be the guarded service itself: such requests are refused. Responses and Messages reach
    /// the service as chats. In enforce mode, the only other requests that reach it are those
    /// without a body, such as `GET /v1/models`, and those that `gateway.allow_routes` lists. So
    /// put the layer around the routes of the model only. Paths begin with `/v1`, as `Router::nest`
    /// leaves them. Without client keys, everyone is admitted whom the application admits. Errors
    /// of the service become a 502.
    ///
    /// ```no_run
    /// # use std::sync::Arc;
    /// # use axum::{Router, routing::post};
    /// # fn example(gateway: ecso_gateway::Gateway) -> Router {
    /// let model = Router::new().route("/v1/chat/completions", post(|| async { "your answer" }));
    /// Router::new().nest("/guarded", model.layer(Arc::new(gateway).layer()))
    /// # }
    /// ```
    #[must_use]
    pub fn layer(self: Arc<Self>) -> GuardLayer {
        GuardLayer { router: self.carrier_router() }
    }
}

impl<S> Layer<S> for GuardLayer {
    type Service = Guarded<S>;

    fn layer(&self, inner: S) -> Guarded<S> {
        Guarded { router: self.router.clone(), inner }
    }
}

impl<S, RequestBody, ResponseBody> Service<Request<RequestBody>> for Guarded<S>
where
    S: Service<Request<Body>, Response = Response<ResponseBody>> + Clone + Send + Sync + 'static,
    S::Error: Into<BoxError>,
    S::Future: Send,
    RequestBody: HttpBody<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
    ResponseBody: HttpBody<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        // Readiness is checked when the service is called: by then it may have changed.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<RequestBody>) -> Self::Future {
        let (router, request) = (self.router.clone(), request.map(Body::new));
        let host = request.headers().get(header::HOST).cloned();
        let carrier = ServiceCarrier {
            inner: self.inner.clone(),
            host,
            extensions: request.extensions().clone(),
        };
        async move {
            match attach_carrier(Arc::new(carrier), request) {
                Ok(request) => router.oneshot(request).await,
                Err(error) => Ok(error.into_response()),
            }
        }
        .boxed()
    }
}

/// The service, and the parts of a request that only concern it.
struct ServiceCarrier<S> {
    inner: S,
    host: Option<HeaderValue>,
    extensions: Extensions,
}

impl<S, ResponseBody> Carrier for ServiceCarrier<S>
where
    S: Service<Request<Body>, Response = Response<ResponseBody>> + Clone + Send + Sync + 'static,
    S::Error: Into<BoxError>,
    S::Future: Send,
    ResponseBody: HttpBody<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
{
    fn door(&self) -> &'static str {
        "layer"
    }

    /// The service may answer every path as it answers chats.
    fn knows_routes(&self) -> bool {
        false
    }

    fn carry(
        &self,
        request: Request<reqwest::Body>,
    ) -> BoxFuture<'_, Result<reqwest::Response, ApiError>> {
        let mut request = request.map(Body::new);
        *request.extensions_mut() = self.extensions.clone();
        if let Some(host) = &self.host {
            request.headers_mut().insert(header::HOST, host.clone());
        }
        let response = self.inner.clone().oneshot(request);
        async move {
            let answer = response.await.map_err(|error| {
                let why = error.into();
                ApiError::upstream("the service behind the guard failed")
                    .because(ecso::error_chain(why.as_ref()))
            })?;
            Ok(answer
                .map(|body| reqwest::Body::wrap_stream(Body::new(body).into_data_stream()))
                .into())
        }
        .boxed()
    }
}
