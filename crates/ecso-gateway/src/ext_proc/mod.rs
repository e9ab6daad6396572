//! The guard as a part of Envoy: external processing (`envoy.service.ext_proc.v3`) with bodies in
//! the mode `FULL_DUPLEX_STREAMED`.
//!
//! A request and its answer are one stream of messages (`exchange`). Envoy sends the request, the
//! guard says how it continues, reads the answer, and says what the client gets. All decisions are
//! made by the code of our own server; here, the gateway only carries the request.

mod body;
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

use crate::{connections::accept, server::Gateway};

/// The path of the service.
pub const PATH: &str = "/envoy.service.ext_proc.v3.ExternalProcessor/Process";
/// Bytes that a stream may send ahead. This bounds what an unread stream holds.
const STREAM_WINDOW: u32 = 256 << 10;
/// The same for a connection: no stream waits for another.
const CONNECTION_WINDOW: u32 = (1 << 31) - 1;
/// The interval of pings on a silent connection, and the time to answer one.
const PING_INTERVAL: Duration = Duration::from_secs(20);

/// Serves gateways until `stop` is ready, then accepts nothing new and finishes what runs. HTTP/2
/// without TLS: only the gateway may be able to reach it.
///
/// # Errors
/// If the listener fails.
pub async fn serve(
    gateway: Arc<Gateway>,
    listener: TcpListener,
    stop: impl Future<Output = ()> + Send,
) -> io::Result<()> {
    let streams = u32::try_from(gateway.state().settings.limits.connections).unwrap_or(u32::MAX);
    let process = Process { router: Arc::clone(&gateway).carrier_router(), gateway };
    let (graceful, mut stop) = (GracefulShutdown::new(), pin!(stop));
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_INTERVAL)
        .max_concurrent_streams(streams)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW);
    loop {
        let Some(stream) = accept(&listener, stop.as_mut(), || ()).await else { break };
        let process = process.clone();
        let service = service_fn(move |request| handle(process.clone(), request));
        let connection = graceful.watch(builder.serve_connection(TokioIo::new(stream), service));
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "the connection of a gateway failed");
            }
        });
    }
    drop(listener);
    graceful.shutdown().await;
    Ok(())
}

/// Handles a call of the service, or of an unknown path.
async fn handle(
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
        let Ok(permit) = Arc::clone(&self.gateway.connection_permits).try_acquire_owned() else {
            return ready(Err(Status::resource_exhausted(
                "too many requests are open: try again later",
            )))
            .boxed();
        };
        let patience = self.gateway.state().settings.limits.patience();
        let (sender, mut receiver) = mpsc::channel(4);
        let router = self.router.clone();
        tokio::spawn(async move {
            exchange::run(router, patience, request.into_inner(), sender).await;
            drop(permit);
        });
        // If a stream ended cleanly without a last reply, Envoy would let the rest pass unjudged.
        let replies = async_stream::stream! {
            loop {
                match receiver.recv().await {
                    Some(exchange::Outgoing::Reply(reply)) => yield Ok(ProcessingResponse { reply: Some(reply) }),
                    Some(exchange::Outgoing::Done) => break,
                    Some(exchange::Outgoing::Aborted) | None => {
                        yield Err(Status::aborted("the guard stopped before its last reply"));
                        break;
                    }
                }
            }
        };
        ready(Ok(tonic::Response::new(replies.boxed()))).boxed()
    }
}
