//! Streams that a former process of this node has begun: they are finished here, whether somebody asks
//! for them or not, and `GET …/{id}` gives their events, from the one after `Last-Event-ID` on.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::extract::{Path, State};
use axum::http::HeaderMap;
use axum::response::Response;
use futures::stream;
use tokio::sync::watch;

use super::error::ApiError;
use super::sse::{self, Chunks, Said, Script};
use super::{Api, chat, completions};
use crate::journal::Endpoint;

/// The streams, by the id that their clients know.
#[derive(Default)]
pub(super) struct Resumed {
    streams: Mutex<HashMap<String, watch::Receiver<Told>>>,
}

/// What has been said in one stream.
#[derive(Default)]
pub(super) struct Told {
    /// The texts of its events, in order.
    events: Vec<Arc<str>>,
    ended: bool,
}

/// Finishes the answers that the journal has. Returns at once.
pub(super) fn begin(api: &Api) {
    let Some(journal) = &api.service.journal else {
        return;
    };
    let unfinished = journal.unfinished().unwrap_or_else(|error| {
        tracing::error!(%error, "answers under way cannot be read: is the data folder there?");
        Vec::new()
    });
    for one in unfinished {
        let (api, id) = (api.clone(), one.asked.id.clone());
        tracing::info!(id, tokens = one.tokens.len(), "an answer goes on");
        let (tell, told) = watch::channel(Told::default());
        // Before anybody can ask for it.
        api.resumed.put(id.clone(), told);
        tokio::spawn(async move {
            let teller = Teller(tell);
            let resumed = match one.asked.endpoint {
                Endpoint::Chat => chat::resume(&api, one, teller).await,
                Endpoint::Completions => completions::resume(&api, one, teller).await,
            };
            match resumed {
                Ok(()) => tokio::time::sleep(KEPT_FOR).await,
                Err(error) => tracing::warn!(id, %error, "an answer cannot go on"),
            }
            api.resumed.remove(&id);
        });
    }
}

/// Keeps what is said in one stream.
pub(super) struct Teller(watch::Sender<Told>);

impl Teller {
    /// Runs the stream to its end.
    pub(super) async fn tell_all<C: Chunks>(self, mut script: Script<C>) {
        let Self(tell) = self;
        while let Some(said) = script.next().await {
            if let Said::Data(text) = said {
                tell.send_modify(|told| told.events.push(text.into()));
            }
        }
        tell.send_modify(|told| told.ended = true);
    }
}

impl Resumed {
    fn put(&self, id: String, told: watch::Receiver<Told>) {
        self.lock().insert(id, told);
    }

    fn remove(&self, id: &str) {
        self.lock().remove(id);
    }

    fn get(&self, id: &str) -> Option<watch::Receiver<Told>> {
        self.lock().get(id).cloned()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, watch::Receiver<Told>>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The events of a stream, those that are to come included.
pub(super) async fn events(
    State(api): State<Api>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let first = match headers.get(LAST_EVENT_ID) {
        None => 0,
        Some(last) => {
            let last = last
                .to_str()
                .ok()
                .and_then(|last| last.parse::<usize>().ok());
            let why = "must be the id of an event, a whole number";
            1 + last.ok_or_else(|| ApiError::invalid("Last-Event-ID", why))?
        }
    };
    let told = api.resumed.get(&id).ok_or_else(|| ApiError::NotFound {
        what: format!("an answer {id} that is being resumed"),
    })?;
    let rest = stream::unfold((told, first), |(mut told, number)| async move {
        // The sender ends with the stream.
        let seen = told.wait_for(|told| told.ended || told.events.len() > number);
        let text = seen.await.ok()?.events.get(number)?.to_string();
        Some((Said::Data(text).event(number), (told, number + 1)))
    });
    Ok(sse::events(rest))
}

const LAST_EVENT_ID: &str = "last-event-id";
/// After its end a stream can still be read for so long.
const KEPT_FOR: Duration = Duration::from_secs(600);
