//! Connections: so many at one time, and none that only waits keeps out one that has something to
//! say.

use std::{
    collections::VecDeque,
    convert::Infallible,
    io,
    pin::pin,
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
use tokio::{net::TcpListener, sync::Notify};
use tokio_io_timeout::TimeoutStream;
use tower::ServiceExt;

use crate::server::Gateway;

/// Most bytes of a head, and of what is read ahead of a body.
const HEAD: usize = 64 << 10;
/// Descriptors that are kept for all but connections.
const KEPT: u64 = 32;

/// Serves until `stop`; then takes no new work and finishes what runs.
///
/// # Errors
/// When the listener fails.
pub async fn serve(
    gateway: Arc<Gateway>,
    listener: TcpListener,
    stop: impl Future<Output = ()> + Send,
) -> io::Result<()> {
    let limits = gateway.state().settings.limits;
    let places = Arc::clone(&gateway.places);
    let router = Arc::clone(&gateway).router();
    let (graceful, mut stop) = (GracefulShutdown::new(), pin!(stop));
    let mut seats = Seats::default();
    // HTTP/1 alone: in HTTP/2 a client can leave answers unread for ever, and nobody sees it.
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(limits.patience()).max_buf_size(HEAD);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = &mut stop => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "a connection can't be taken");
                seats.free();
                // Descriptors are used up: others end in a while.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        if places.available_permits() == 0 {
            seats.free();
        }
        let place = tokio::select! {
            place = Arc::clone(&places).acquire_owned() => place.map_err(io::Error::other)?,
            () = &mut stop => break,
        };
        // Small pieces of a stream are not to wait for more.
        let _ = stream.set_nodelay(true);
        let seat = seats.take();
        let mut stream = Box::pin(TimeoutStream::new(stream));
        // Whoever does not read makes room as well.
        stream.as_mut().set_write_timeout_pinned(Some(limits.patience() * 3));
        let seated = Seated { router: router.clone(), seat: Arc::clone(&seat) };
        let connection = builder.serve_connection(TokioIo::new(stream), seated);
        let connection = graceful.watch(connection);
        tokio::spawn(async move {
            tokio::select! {
                ended = connection => if let Err(error) = ended {
                    tracing::debug!(%error, "a connection broke");
                },
                () = seat.leave.notified() => {}
            }
            drop(place);
        });
    }
    drop(listener);
    graceful.shutdown().await;
    Ok(())
}

/// Where a connection sits.
#[derive(Default)]
struct Seat {
    /// Requests under way on it.
    busy: AtomicUsize,
    leave: Notify,
}

/// A request under way.
struct Busy(Arc<Seat>);

impl Busy {
    fn on(seat: &Arc<Seat>) -> Self {
        seat.busy.fetch_add(1, Ordering::AcqRel);
        Self(Arc::clone(seat))
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.busy.fetch_sub(1, Ordering::AcqRel);
    }
}

/// All connections, the oldest first.
#[derive(Default)]
struct Seats(VecDeque<Weak<Seat>>);

impl Seats {
    fn take(&mut self) -> Arc<Seat> {
        self.0.retain(|seat| seat.strong_count() > 0);
        let seat = Arc::default();
        self.0.push_back(Arc::downgrade(&seat));
        seat
    }

    /// Ends the oldest connection on which nothing is under way, if there is one.
    fn free(&mut self) {
        let mut idle = self.0.iter().filter_map(Weak::upgrade);
        if let Some(seat) = idle.find(|seat| seat.busy.load(Ordering::Acquire) == 0) {
            seat.leave.notify_one();
            self.0.retain(|other| !std::ptr::eq(other.as_ptr(), Arc::as_ptr(&seat)));
        }
    }
}

/// The routes for one connection; while an answer is written, its seat is busy.
#[derive(Clone)]
struct Seated {
    router: Router,
    seat: Arc<Seat>,
}

impl Service<Request<Incoming>> for Seated {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<Body>, Infallible>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let (router, busy) = (self.router.clone(), Busy::on(&self.seat));
        Box::pin(async move {
            let response = router.oneshot(request.map(Body::new)).await?;
            Ok(response.map(|body| {
                Body::new(body.map_frame(move |frame| {
                    let _ = &busy;
                    frame
                }))
            }))
        })
    }
}

/// How many connections at one time: as many as are `wanted`, as far as there are descriptors for
/// them and for the upstream's.
pub(crate) fn places(wanted: usize) -> usize {
    let descriptors = rlimit::increase_nofile_limit(u64::MAX).unwrap_or(1024);
    let most = descriptors.saturating_sub(KEPT) / 2;
    wanted.min(usize::try_from(most).unwrap_or(usize::MAX)).max(1)
}
