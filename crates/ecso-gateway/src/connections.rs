//! The server's connections. Their number is limited, and an idle connection never keeps out a new
//! one.

use std::{
    collections::VecDeque,
    convert::Infallible,
    io,
    pin::{Pin, pin},
    sync::{
        Arc, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{Router, body::Body};
use futures::future::BoxFuture;
use http_body_util::BodyExt;
use hyper::{Request, Response, body::Incoming, server::conn::http1, service::Service};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Notify,
};
use tokio_io_timeout::TimeoutStream;
use tower::ServiceExt;

use crate::server::Gateway;

/// Maximum bytes of a request head, and of what is read ahead of a body.
const MAX_BUFFER: usize = 64 << 10;
/// File descriptors that are reserved for other uses than connections.
const RESERVED_DESCRIPTORS: u64 = 32;

/// Serves until `stop` is ready, then accepts nothing new and finishes what runs.
///
/// # Errors
/// If the listener fails.
pub async fn serve(
    gateway: Arc<Gateway>,
    listener: TcpListener,
    stop: impl Future<Output = ()> + Send,
) -> io::Result<()> {
    let limits = gateway.state().settings.limits;
    let permits = Arc::clone(&gateway.connection_permits);
    let router = Arc::clone(&gateway).router();
    let (graceful, mut stop) = (GracefulShutdown::new(), pin!(stop));
    let mut connections = Connections::default();
    // Only HTTP/1: in HTTP/2 a client can leave answers unread for ever without being noticed.
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(limits.patience())
        .max_buf_size(MAX_BUFFER);
    loop {
        let accepted = accept(&listener, stop.as_mut(), || connections.close_idle()).await;
        let Some(stream) = accepted else { break };
        if permits.available_permits() == 0 {
            connections.close_idle();
        }
        let permit = tokio::select! {
            permit = Arc::clone(&permits).acquire_owned() => permit.map_err(io::Error::other)?,
            () = &mut stop => break,
        };
        let connection = connections.add();
        let mut stream = Box::pin(TimeoutStream::new(stream));
        // Clients that don't read lose their connection too.
        stream.as_mut().set_write_timeout_pinned(Some(limits.patience() * 3));
        let service = TrackedRouter { router: router.clone(), connection: Arc::clone(&connection) };
        let served = builder.serve_connection(TokioIo::new(stream), service);
        let served = graceful.watch(served);
        tokio::spawn(async move {
            tokio::select! {
                ended = served => if let Err(error) = ended {
                    tracing::debug!(%error, "a connection failed");
                },
                () = connection.close.notified() => {}
            }
            drop(permit);
        });
    }
    drop(listener);
    graceful.shutdown().await;
    Ok(())
}

/// Accepts the next connection. Returns `None` once `stop` is ready. A failure is logged, and
/// `make_room` is called before the next attempt: the process may be out of file descriptors.
pub(crate) async fn accept(
    listener: &TcpListener,
    mut stop: Pin<&mut impl Future<Output = ()>>,
    mut make_room: impl FnMut(),
) -> Option<TcpStream> {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = &mut stop => return None,
        };
        match accepted {
            Ok((stream, _)) => {
                // Small chunks of a stream are sent at once.
                let _ = stream.set_nodelay(true);
                return Some(stream);
            }
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted; trying again");
                make_room();
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// An open connection.
#[derive(Default)]
struct Connection {
    /// Requests that are running on it.
    active: AtomicUsize,
    close: Notify,
}

/// A request that is running.
struct ActiveRequest(Arc<Connection>);

impl ActiveRequest {
    fn on(connection: &Arc<Connection>) -> Self {
        connection.active.fetch_add(1, Ordering::AcqRel);
        Self(Arc::clone(connection))
    }
}

impl Drop for ActiveRequest {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Ordering::AcqRel);
    }
}

/// All connections, oldest first.
#[derive(Default)]
struct Connections(VecDeque<Weak<Connection>>);

impl Connections {
    fn add(&mut self) -> Arc<Connection> {
        self.0.retain(|connection| connection.strong_count() > 0);
        let connection = Arc::default();
        self.0.push_back(Arc::downgrade(&connection));
        connection
    }

    /// Closes the oldest idle connection, if there is one.
    fn close_idle(&mut self) {
        let mut idle = self.0.iter().filter_map(Weak::upgrade);
        if let Some(connection) =
            idle.find(|connection| connection.active.load(Ordering::Acquire) == 0)
        {
            connection.close.notify_one();
            self.0.retain(|other| !std::ptr::eq(other.as_ptr(), Arc::as_ptr(&connection)));
        }
    }
}

/// The routes for one connection. While an answer is written, the connection is active.
#[derive(Clone)]
struct TrackedRouter {
    router: Router,
    connection: Arc<Connection>,
}

impl Service<Request<Incoming>> for TrackedRouter {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<Body>, Infallible>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let (router, active) = (self.router.clone(), ActiveRequest::on(&self.connection));
        Box::pin(async move {
            let response = router.oneshot(request.map(Body::new)).await?;
            Ok(response.map(|body| {
                Body::new(body.map_frame(move |frame| {
                    let _ = &active;
                    frame
                }))
            }))
        })
    }
}

/// How many connections are possible: as many as `wanted`, as far as there are file descriptors for
/// them and for connections to the upstream.
pub(crate) fn max_connections(wanted: usize) -> usize {
    let descriptors = rlimit::increase_nofile_limit(u64::MAX).unwrap_or(1024);
    let most = descriptors.saturating_sub(RESERVED_DESCRIPTORS) / 2;
    wanted.min(usize::try_from(most).unwrap_or(usize::MAX)).max(1)
}
