//! The connections of clients: so many at the same time, and none that says nothing for ever.
//!
//! One more than that is told so at once, in HTTP, and closed; without a bound a crowd would take the file
//! descriptors that links, journals and shards need.

use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

/// What bounds them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// At the same time.
    pub(super) connections: usize,
    /// From the accepted connection, or from an answer's end, to the end of the next request's head.
    pub(super) silence: Duration,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            connections: 4096,
            // Longer than the pools of common clients keep an idle connection: they close it first.
            silence: Duration::from_secs(120),
        }
    }
}

/// Serves until `closing`; then waits for the requests under way.
pub(super) async fn serve(
    listener: TcpListener,
    router: Router,
    bounds: Bounds,
    closing: CancellationToken,
) -> io::Result<()> {
    let room = Arc::new(Semaphore::new(bounds.connections));
    let room_to_refuse = Arc::new(Semaphore::new(REFUSALS));
    let mut is_full = false;
    let graceful = GracefulShutdown::new();
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(bounds.silence);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(bounds.silence / 4);
    let mut closed = pin!(closing.cancelled_owned());
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = &mut closed => break,
        };
        let Some((stream, client)) = took(accepted).await else {
            continue;
        };
        let Ok(place) = Arc::clone(&room).try_acquire_owned() else {
            if !is_full {
                let connections = bounds.connections;
                tracing::warn!(connections, "too many connections: others are refused");
            }
            is_full = true;
            if let Ok(place) = Arc::clone(&room_to_refuse).try_acquire_owned() {
                tokio::spawn(refuse(stream, place));
            }
            continue;
        };
        is_full = false;
        // A token is a small packet, and must not wait until the client has acknowledged the last one.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "a client may get its tokens late");
        }
        let service = TowerToHyperService::new(router.clone());
        let (builder, watcher) = (builder.clone(), graceful.watcher());
        tokio::spawn(async move {
            // Which HTTP it will be is told by the first bytes, for which hyper would wait for ever.
            let mut first = [0];
            let spoken = tokio::time::timeout(bounds.silence, stream.peek(&mut first));
            if !matches!(spoken.await, Ok(Ok(1))) {
                return;
            }
            let connection = builder.serve_connection(TokioIo::new(stream), service);
            if let Err(error) = watcher.watch(connection.into_owned()).await {
                tracing::debug!(%client, %error, "a connection has ended");
            }
            drop(place);
        });
    }
    drop(listener);
    graceful.shutdown().await;
    Ok(())
}

/// A connection, unless it could not be accepted.
async fn took(accepted: io::Result<(TcpStream, SocketAddr)>) -> Option<(TcpStream, SocketAddr)> {
    match accepted {
        Ok(accepted) => Some(accepted),
        // The client has left meanwhile, or this process has no file descriptor to spare.
        Err(error) => {
            tracing::warn!(%error, "a connection could not be accepted");
            tokio::time::sleep(PAUSE).await;
            None
        }
    }
}

/// Says that there is no room, once the client has asked: an answer that comes before the question is
/// lost to many clients.
async fn refuse(mut stream: TcpStream, _place: OwnedSemaphorePermit) {
    let body = json!({"error": {
        "message": "too many connections: try again in a moment",
        "type": "server_error", "param": null, "code": "too_many_connections",
    }});
    let body = body.to_string();
    let answer = format!(
        "HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut asked = [0; 1024];
    let refused = async {
        if stream.read(&mut asked).await? > 0 {
            stream.write_all(answer.as_bytes()).await?;
            stream.shutdown().await?;
            // A close with bytes unread would reset the connection, and the answer with it.
            while stream.read(&mut asked).await? > 0 {}
        }
        io::Result::Ok(())
    };
    let _ = tokio::time::timeout(REFUSAL_MAX, refused).await;
}

/// Connections that are being refused at the same time; more are closed without a word.
const REFUSALS: usize = 64;
const REFUSAL_MAX: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use super::*;
    use axum::routing::get;

    async fn served(bounds: Bounds) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new().route("/", get(|| async { "here" }));
        tokio::spawn(serve(listener, router, bounds, CancellationToken::new()));
        address
    }

    /// What comes until the connection is closed.
    async fn ask(mut connection: TcpStream) -> String {
        let question = b"GET / HTTP/1.1\r\nhost: offbook\r\nconnection: close\r\n\r\n";
        connection.write_all(question).await.unwrap();
        let mut answer = String::new();
        connection.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn one_too_many_is_told_so_and_there_is_room_again_afterwards() {
        let address = served(Bounds {
            connections: 2,
            ..Bounds::default()
        })
        .await;
        let connect = || async { TcpStream::connect(address).await.unwrap() };
        let (first, second) = (connect().await, connect().await);
        let refused = ask(connect().await).await;
        assert!(refused.starts_with("HTTP/1.1 503 "), "{refused}");
        let (_, body) = refused.split_once("\r\n\r\n").unwrap();
        let body: serde_json::Value = serde_json::from_str(body).unwrap();
        assert_eq!(body["error"]["code"], "too_many_connections");

        // Those that have a place are served, and leave it to others.
        assert!(ask(first).await.ends_with("here"));
        assert!(ask(second).await.ends_with("here"));
        loop {
            match ask(connect().await).await {
                answer if answer.ends_with("here") => break,
                // Its end may be seen a moment before ours.
                _ => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
    }

    #[tokio::test]
    async fn half_a_question_is_not_waited_for_for_ever() {
        let address = served(Bounds {
            silence: Duration::from_millis(200),
            ..Bounds::default()
        })
        .await;
        for beginning in ["", "GET / HTTP/1.1\r\nhost: off"] {
            let mut slow = TcpStream::connect(address).await.unwrap();
            slow.write_all(beginning.as_bytes()).await.unwrap();
            let mut said = Vec::new();
            let ended = slow.read_to_end(&mut said);
            let ended = tokio::time::timeout(Duration::from_secs(10), ended).await;
            ended
                .unwrap_or_else(|_| panic!("{beginning:?} is waited for"))
                .unwrap();
        }
    }
}
