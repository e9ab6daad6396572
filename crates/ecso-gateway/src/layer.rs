//! The guard in front of a service of your own: a `tower` layer. The service answers as the model
//! would; what it says to chats is judged before it goes out.

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

/// Puts a [`Gateway`]'s guard in front of a service that speaks one of the formats it reads: `POST
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
    /// The guard as a layer over any service: what `ecso serve` does to a server, it does to that.
    ///
    /// The guard's own questions go to the [`Upstream`](crate::Upstream) of this gateway, which
    /// must not be the guarded service itself: such requests are refused. Responses and Messages
    /// reach the service as chats. In enforce mode nothing else reaches it but requests without a
    /// body, as for `GET /v1/models`, and what `gateway.allow_routes` lists: so the layer belongs
    /// around the model's routes alone; paths begin with `/v1`, as `Router::nest` leaves them.
    /// Without client keys everybody is let in that the application lets in. Errors of the service
    /// become a 502.
    ///
    /// ```no_run
    /// # use std::sync::Arc;
    /// # use axum::{Router, routing::post};
    /// # fn example(gateway: ecso_gateway::Gateway) -> Router {
    /// let model = Router::new().route("/v1/chat/completions", post(|| async { "an answer of yours" }));
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

impl<S, Asked, Answered> Service<Request<Asked>> for Guarded<S>
where
    S: Service<Request<Body>, Response = Response<Answered>> + Clone + Send + Sync + 'static,
    S::Error: Into<BoxError>,
    S::Future: Send,
    Asked: HttpBody<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
    Answered: HttpBody<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        // The service is waited for when it is asked: by then it may not be.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Asked>) -> Self::Future {
        let (router, request) = (self.router.clone(), request.map(Body::new));
        let host = request.headers().get(header::HOST).cloned();
        let inside =
            Inside { inner: self.inner.clone(), host, extensions: request.extensions().clone() };
        async move {
            match attach_carrier(Arc::new(inside), request) {
                Ok(request) => router.oneshot(request).await,
                Err(error) => Ok(error.into_response()),
            }
        }
        .boxed()
    }
}

/// The service, and what of a request concerns it alone.
struct Inside<S> {
    inner: S,
    host: Option<HeaderValue>,
    extensions: Extensions,
}

impl<S, Answered> Carrier for Inside<S>
where
    S: Service<Request<Body>, Response = Response<Answered>> + Clone + Send + Sync + 'static,
    S::Error: Into<BoxError>,
    S::Future: Send,
    Answered: HttpBody<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
{
    fn door(&self) -> &'static str {
        "layer"
    }

    /// It may answer every path as it answers chats.
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
        let answered = self.inner.clone().oneshot(request);
        async move {
            let answer = answered.await.map_err(|error| {
                let why = error.into();
                ApiError::upstream("the service behind the guard failed")
                    .because(ecso::chain(why.as_ref()))
            })?;
            Ok(answer
                .map(|body| reqwest::Body::wrap_stream(Body::new(body).into_data_stream()))
                .into())
        }
        .boxed()
    }
}
