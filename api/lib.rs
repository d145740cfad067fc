//! Text and HTTP: what lies between a client and token ids.
//!
//! [`text`] turns a conversation into token ids and token ids into words, thoughts and tool calls.
//! [`http`] is the OpenAI-compatible API. [`chat_client`] is a client of that API for a terminal.
//! All this crate asks of the cluster is a [`Backend`].
//!
//! What is deliberately absent: actors, tensors, scheduling. Prompts and answers are never logged.

pub mod text;
mod journal;
mod backend;
pub mod http;
pub mod chat_client;

pub use backend::{Backend, Progress, StreamError, Tokens};
pub use http::{Origin, Service, serve};
pub use journal::Journal;
