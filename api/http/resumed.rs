//! Answers that a former process of this node has begun: they are finished here, whether somebody asks
//! for them or not. `GET …/{id}` gives the events of a stream, from the one after `Last-Event-ID` on, and
//! any other answer when it is whole. The id may also be the client's own, of `X-Request-Id`.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use futures::stream;
use offbook_protocol::Rejection;
use serde_json::Value;
use tokio::sync::watch;

use super::error::ApiError;
use super::name::Name;
use super::sse::{self, Chunks, Said, Script};
use super::{Api, chat, completions};
use crate::journal::Endpoint;

/// The answers, by each name that their clients know.
#[derive(Default)]
pub(super) struct Resumed {
    answers: Mutex<HashMap<String, watch::Receiver<Told>>>,
}

/// What has been said of one answer.
#[derive(Default)]
pub(super) struct Told {
    /// Of a stream: the texts of its events, in order.
    events: Vec<Arc<str>>,
    /// Of any other: all of it, or why there is none.
    whole: Option<Result<Value, ApiError>>,
    is_stream: bool,
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
        let (tell, told) = watch::channel(Told {
            is_stream: one.asked.body["stream"] == true,
            ..Told::default()
        });
        let names = [Some(id.clone()), one.asked.request_id.clone()];
        let names: Vec<String> = names.into_iter().flatten().collect();
        // Before anybody can ask for it.
        api.resumed.put(&names, &told);
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
            api.resumed.remove(&names, &told);
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

    /// Tells all of an answer that is not streamed, or why there is none.
    pub(super) fn tell_whole(self, whole: Result<Value, ApiError>) {
        let Self(tell) = self;
        tell.send_modify(|told| {
            told.whole = Some(whole);
            told.ended = true;
        });
    }
}

impl Resumed {
    fn put(&self, names: &[String], told: &watch::Receiver<Told>) {
        let mut answers = self.lock();
        for name in names {
            answers.insert(name.clone(), told.clone());
        }
    }

    /// A client may have given a later request the same name.
    fn remove(&self, names: &[String], told: &watch::Receiver<Told>) {
        let mut answers = self.lock();
        for name in names {
            if answers
                .get(name)
                .is_some_and(|known| known.same_channel(told))
            {
                answers.remove(name);
            }
        }
    }

    fn get(&self, id: &str) -> Option<watch::Receiver<Told>> {
        self.lock().get(id).cloned()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, watch::Receiver<Told>>> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The events of a stream, those that are to come included; any other answer when it is whole.
pub(super) async fn answer(
    State(api): State<Api>,
    Name(id): Name,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let Some(told) = api.resumed.get(&id) else {
        return Err(match api.ledger.standing(&id) {
            Some(standing) => ApiError::Unreadable { id, standing },
            None => ApiError::NotFound {
                what: format!("an answer {id}"),
            },
        });
    };
    let is_stream = told.borrow().is_stream;
    if is_stream {
        events(told, &headers)
    } else {
        whole(told).await
    }
}

async fn whole(mut told: watch::Receiver<Told>) -> Result<Response, ApiError> {
    let ended = tokio::time::timeout(WHOLE_WITHIN, told.wait_for(|told| told.ended)).await;
    let unknown = |why: &str| ApiError::from(Rejection::NotReady { detail: why.into() });
    let ended = ended.map_err(|_| unknown("the answer is not complete yet: ask again"))?;
    let ended = ended.map_err(|_| unknown("the answer cannot go on"))?;
    let whole = ended.whole.clone();
    let whole = whole.unwrap_or_else(|| Err(unknown("the answer was not told")))?;
    Ok(Json(whole).into_response())
}

fn events(told: watch::Receiver<Told>, headers: &HeaderMap) -> Result<Response, ApiError> {
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
    let rest = stream::unfold((told, first), |(mut told, number)| async move {
        // The sender ends with the stream.
        let seen = told.wait_for(|told| told.ended || told.events.len() > number);
        let text = seen.await.ok()?.events.get(number)?.to_string();
        Some((Said::Data(text).line(number), (told, number + 1)))
    });
    Ok(sse::lines(rest))
}

const LAST_EVENT_ID: &str = "last-event-id";
/// Longer than a request may take by default.
const WHOLE_WITHIN: Duration = Duration::from_secs(900);
/// After its end an answer can still be read for so long.
const KEPT_FOR: Duration = Duration::from_secs(600);
