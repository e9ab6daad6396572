//! The guard as a part of somebody else's gateway: Envoy's external processing
//! (`envoy.service.ext_proc.v3`), with bodies in the mode `FULL_DUPLEX_STREAMED`.
//!
//! A request and its answer are one stream of messages (`exchange`). The gateway tells of the
//! request; the guard says how it goes on, hears the answer, and says what the client gets. All
//! that is decided is decided by the code of our own server: here a request is only carried by
//! another.

mod exchange;
mod headers;
pub mod messages;

use std::{convert::Infallible, io, pin::pin, sync::Arc, time::Duration};

use axum::Router;
use futures::{
    FutureExt, StreamExt,
    future::{BoxFuture, ready},
    stream::BoxStream,
};
use hyper::{Request, Response, body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
};
use messages::{ProcessingRequest, ProcessingResponse};
use tokio::{net::TcpListener, sync::mpsc};
use tonic::{Status, Streaming, server::StreamingService};
use tonic_prost::ProstCodec;

use crate::server::Gateway;

/// Where the service is.
pub const PATH: &str = "/envoy.service.ext_proc.v3.ExternalProcessor/Process";
/// Bytes that a stream may send ahead: whoever does not read holds no more.
const AHEAD: u32 = 256 << 10;
/// The same for a connection: no stream waits for another.
const AHEAD_TOGETHER: u32 = (1 << 31) - 1;
/// Seconds after which a connection that says nothing is asked whether it is there, and for its
/// answer.
const STILL_THERE: Duration = Duration::from_secs(20);

/// Serves gateways until `stop`; then takes no new work and finishes what runs. HTTP/2 without TLS:
/// only the gateway may reach it.
///
/// # Errors
/// When the listener fails.
pub async fn serve(
    gateway: Arc<Gateway>,
    listener: TcpListener,
    stop: impl Future<Output = ()> + Send,
) -> io::Result<()> {
    let streams = u32::try_from(gateway.state().settings.limits.connections).unwrap_or(u32::MAX);
    let process = Process { router: Arc::clone(&gateway).carried(), gateway };
    let (graceful, mut stop) = (GracefulShutdown::new(), pin!(stop));
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .keep_alive_interval(STILL_THERE)
        .keep_alive_timeout(STILL_THERE)
        .max_concurrent_streams(streams)
        .initial_stream_window_size(AHEAD)
        .initial_connection_window_size(AHEAD_TOGETHER);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = &mut stop => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "a connection can't be taken");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let _ = stream.set_nodelay(true);
        let process = process.clone();
        let called = service_fn(move |request| called(process.clone(), request));
        let connection = graceful.watch(builder.serve_connection(TokioIo::new(stream), called));
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a gateway's connection broke");
            }
        });
    }
    drop(listener);
    graceful.shutdown().await;
    Ok(())
}

/// A call of the service, or of what is not there.
async fn called(
    process: Process,
    request: Request<Incoming>,
) -> Result<Response<tonic::body::Body>, Infallible> {
    if request.uri().path() != PATH {
        return Ok(
            Status::unimplemented("only ExternalProcessor/Process is served here").into_http()
        );
    }
    let longest = process.gateway.state().settings.limits.body;
    let mut grpc = tonic::server::Grpc::new(ProstCodec::default())
        .max_decoding_message_size(longest.max(4 << 20));
    Ok(grpc.streaming(process, request).await)
}

/// The service.
#[derive(Clone)]
struct Process {
    gateway: Arc<Gateway>,
    router: Router,
}

impl StreamingService<ProcessingRequest> for Process {
    type Response = ProcessingResponse;
    type ResponseStream = BoxStream<'static, Result<ProcessingResponse, Status>>;
    type Future = BoxFuture<'static, Result<tonic::Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: tonic::Request<Streaming<ProcessingRequest>>) -> Self::Future {
        let Ok(place) = Arc::clone(&self.gateway.places).try_acquire_owned() else {
            return ready(Err(Status::resource_exhausted("too many requests are open"))).boxed();
        };
        let patience = self.gateway.state().settings.limits.patience();
        let (said, mut heard) = mpsc::channel(4);
        let router = self.router.clone();
        tokio::spawn(async move {
            exchange::exchange(router, patience, request.into_inner(), said).await;
            drop(place);
        });
        // A stream that ended well without a last word would let pass what nobody judged.
        let replies = async_stream::stream! {
            loop {
                match heard.recv().await {
                    Some(exchange::Said::Reply(reply)) => yield Ok(ProcessingResponse { reply: Some(reply) }),
                    Some(exchange::Said::Done) => break,
                    Some(exchange::Said::Broken) | None => {
                        yield Err(Status::aborted("the guard broke off"));
                        break;
                    }
                }
            }
        };
        ready(Ok(tonic::Response::new(replies.boxed()))).boxed()
    }
}
