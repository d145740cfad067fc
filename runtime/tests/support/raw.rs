//! A client with a good key that speaks bytes, not messages: what the wire looks like, by hand.

use std::sync::Arc;

use offbook_runtime::System;
use quinn::crypto::rustls::QuicClientConfig;

use super::Cluster;

/// An endpoint that shows a's key.
pub fn client(cluster: &Cluster) -> quinn::Endpoint {
    let config = cluster.config("a");
    let tls = config
        .identity
        .client_config(&config.trust, b"offbook-messages/1")
        .unwrap();
    let tls = QuicClientConfig::try_from(tls).unwrap();
    let mut endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    endpoint.set_default_client_config(quinn::ClientConfig::new(Arc::new(tls)));
    endpoint
}

/// Connects with a's key.
pub async fn connect(cluster: &Cluster, to: &System) -> (quinn::Endpoint, quinn::Connection) {
    let endpoint = client(cluster);
    let connection = endpoint
        .connect(to.local_addr(), "any.invalid")
        .unwrap()
        .await
        .unwrap();
    (endpoint, connection)
}

/// A hello from a to b, without its length.
pub fn hello_body() -> Vec<u8> {
    let mut bytes = b"OFBK\x01\0".to_vec();
    for number in [7u64, 1, 1, 0] {
        bytes.extend_from_slice(&number.to_le_bytes());
    }
    for text in ["test", "a", "b"] {
        bytes.extend_from_slice(&(text.len() as u16).to_le_bytes());
        bytes.extend_from_slice(text.as_bytes());
    }
    bytes
}

/// A hello from a to b.
pub fn hello() -> Vec<u8> {
    framed(&hello_body())
}

pub fn framed(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u32).to_le_bytes()[..], bytes].concat()
}

/// An ask of `subject` with the id 42.
pub fn ask(message: &str, deadline_us: u64, body: &[u8]) -> Vec<u8> {
    call(1, &[], (42, deadline_us), message, body)
}

/// A call of `subject`, kind first.
pub fn call(
    kind: u8,
    extension: &[u8],
    (id, deadline_us): (u64, u64),
    message: &str,
    body: &[u8],
) -> Vec<u8> {
    let mut call = vec![kind];
    call.extend_from_slice(&(extension.len() as u16).to_le_bytes());
    call.extend_from_slice(extension);
    call.extend_from_slice(&id.to_le_bytes());
    call.extend_from_slice(&deadline_us.to_le_bytes());
    for text in ["subject", message] {
        call.extend_from_slice(&(text.len() as u16).to_le_bytes());
        call.extend_from_slice(text.as_bytes());
    }
    call.extend_from_slice(&1u16.to_le_bytes());
    call.extend_from_slice(body);
    framed(&call)
}

/// One frame of the other side, without its length.
pub async fn read_frame(receiving: &mut quinn::RecvStream) -> Vec<u8> {
    let mut length = [0; 4];
    receiving.read_exact(&mut length).await.unwrap();
    let mut frame = vec![0; u32::from_le_bytes(length) as usize];
    receiving.read_exact(&mut frame).await.unwrap();
    frame
}

/// The ordered stream of a link that is up.
pub async fn link(connection: &quinn::Connection) -> (quinn::SendStream, quinn::RecvStream) {
    let (mut sending, mut receiving) = connection.open_bi().await.unwrap();
    sending.write_all(&hello()).await.unwrap();
    read_frame(&mut receiving).await;
    (sending, receiving)
}

/// Whether the connection ended, and with which code of theirs.
pub async fn close_code(connection: &quinn::Connection) -> u64 {
    match connection.closed().await {
        quinn::ConnectionError::ApplicationClosed(close) => close.error_code.into_inner(),
        other => panic!("{other}"),
    }
}
