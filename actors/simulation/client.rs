//! Clients, whose right answers are known beforehand, and what the disk of the head has of each answer.
//! They ask within the head's process, as the API does, and their connections end with it.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use futures::StreamExt;
use offbook_protocol::{
    FinishReason, Rejection, Request, RequestEvent, SampledToken, Sampling, SequenceId,
};
use offbook_runtime::{ActorPath, RemoteStream, Subscription, System};
use tokio::sync::Notify;
use tokio::time::sleep;

use super::story::Story;
use super::timeline::{Chance, mix};
use super::{CALM_FROM, CONTEXT_TOKENS, LATE_CLIENTS, Plot, VOCABULARY};
use crate::names;
use crate::scheduler::Submit;

pub(super) type ClientId = usize;
pub(super) type Clients = Rc<Vec<RefCell<Client>>>;

pub(super) struct Client {
    request: Request,
    expected: Vec<u32>,
    comes: Duration,
    /// What was written to the disk of the head before the client had it.
    pub(super) journal: Vec<u32>,
    pub(super) stage: Stage,
    pub(super) left: bool,
    leaves: Rc<Notify>,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Stage {
    /// To be asked, at first or again.
    Outside,
    /// Once its first token has come, it is known as what.
    Taken(Option<SequenceId>),
    Answered,
    Failed(String),
}

impl Client {
    /// So many clients and those that come late.
    pub(super) fn crowd(chance: &mut Chance, count: usize, plot: Plot) -> Clients {
        let mut clients = Vec::new();
        for id in 0..count + LATE_CLIENTS {
            let comes = match id < count {
                true => chance.ms(0, 2000),
                false => CALM_FROM + chance.ms(0, 200),
            };
            let mut client = Self::new(chance, comes);
            if plot == Plot::Deadly && id == super::DEADLY_CLIENT {
                client.request.prompt = deadly_prompt();
                client.expected = answer(&client.request);
            }
            clients.push(RefCell::new(client));
        }
        Rc::new(clients)
    }

    fn new(chance: &mut Chance, comes: Duration) -> Self {
        let mut prompt: Vec<u32> = (0..=chance.below(20))
            .map(|_| chance.below(VOCABULARY as usize) as u32)
            .collect();
        // Many begin alike, and find what others have computed.
        if prompt.len().is_multiple_of(2) {
            prompt.splice(..0, (0..20).map(|i| i % VOCABULARY));
        }
        let stops = if chance.once_in(2) {
            vec![chance.below(VOCABULARY as usize) as u32]
        } else {
            Vec::new()
        };
        let request = Request {
            prompt,
            sampling: Sampling {
                seed: chance.below(1 << 30) as u64,
                ..Sampling::greedy()
            },
            max_tokens: 1 + chance.below(50) as u32,
            max_tokens_by_default: true,
            stop_tokens: stops,
            delivered: Vec::new(),
            priority: chance.below(3) as i32,
            client: offbook_protocol::ClientId(chance.below(2) as u64),
        };
        Self {
            expected: answer(&request),
            request,
            comes,
            journal: Vec::new(),
            stage: Stage::Outside,
            left: false,
            leaves: Rc::default(),
        }
    }

    /// It has all, or knows that it will not; or it has left.
    pub(super) fn is_over(&self) -> bool {
        self.left || matches!(self.stage, Stage::Answered | Stage::Failed(_))
    }

    pub(super) fn leave(&mut self) {
        self.left = true;
        self.leaves.notify_one();
    }

    /// Its answer is what it must be, up to this token.
    fn got(&mut self, id: ClientId, token: &SampledToken) {
        let Stage::Taken(sequence) = &mut self.stage else {
            panic!("client {id} gets a token though it is {:?}", self.stage);
        };
        let sequence = *sequence.get_or_insert(token.sequence);
        assert_eq!(sequence, token.sequence, "client {id} gets another's token");
        let place = self.journal.len();
        let expected = self.expected.get(place).copied();
        assert_eq!(Some(token.token), expected, "token {place} of client {id}");
        self.journal.push(token.token);
        let is_last = self.journal.len() == self.expected.len();
        let is_stop = self.request.stop_tokens.contains(&token.token);
        let finish = is_last.then_some(if is_stop {
            FinishReason::Stop
        } else {
            FinishReason::Length
        });
        assert_eq!(
            token.finish, finish,
            "the end of client {id}, at token {place}"
        );
        if is_last {
            self.stage = Stage::Answered;
        }
    }
}

/// No other begins like this.
pub(super) fn deadly_prompt() -> Vec<u32> {
    vec![VOCABULARY - 1; 6]
}

/// The digest of a sequence that goes on by `token`.
pub(super) fn extend(digest: u64, token: u32) -> u64 {
    mix(digest ^ u64::from(token))
}

/// The token that a model draws behind these tokens: a pure function of them all, their number and the seed.
pub(super) fn draw(digest: u64, position: usize, sampling: &Sampling) -> u32 {
    let noise = mix(digest ^ mix(sampling.seed ^ mix(position as u64)));
    (noise % u64::from(VOCABULARY)) as u32
}

/// The whole answer, drawn one token after the other without any epochs.
fn answer(request: &Request) -> Vec<u32> {
    let mut digest = request
        .prompt
        .iter()
        .fold(0, |digest, token| extend(digest, *token));
    let room = CONTEXT_TOKENS as usize - request.prompt.len();
    let mut tokens = Vec::new();
    while tokens.len() < room.min(request.max_tokens as usize) {
        let position = request.prompt.len() + tokens.len();
        let token = draw(digest, position, &request.sampling);
        digest = extend(digest, token);
        tokens.push(token);
        if request.stop_tokens.contains(&token) {
            break;
        }
    }
    tokens
}

/// All clients, as one life of the head has them.
pub(super) struct Crowd {
    clients: Clients,
    story: Rc<Story>,
    chances: Vec<Chance>,
}

impl Crowd {
    pub(super) fn new(clients: &Clients, story: &Rc<Story>, chance: &mut Chance) -> Self {
        let chances = clients
            .iter()
            .map(|_| Chance::new(chance.below(1 << 40) as u64));
        Self {
            clients: Rc::clone(clients),
            story: Rc::clone(story),
            chances: chances.collect(),
        }
    }

    /// Each asks when its time has come, for the first time or for the rest of an answer that a former head
    /// had begun.
    pub(super) fn come(self, system: &System) {
        let scheduler = ActorPath::new(system.process().clone(), names::SCHEDULER);
        for (id, mut chance) in self.chances.into_iter().enumerate() {
            let began = {
                let mut client = self.clients[id].borrow_mut();
                if client.is_over() {
                    continue;
                }
                let began = client.stage != Stage::Outside || !client.journal.is_empty();
                client.stage = Stage::Outside;
                began
            };
            let pause = if began {
                chance.ms(100, 500)
            } else {
                Duration::ZERO
            };
            let asking = Asking {
                id,
                clients: Rc::clone(&self.clients),
                story: Rc::clone(&self.story),
                scheduler: system.remote_stream(&scheduler),
                chance,
            };
            tokio::task::spawn_local(asking.ask(pause));
        }
    }
}

/// A client's connection.
struct Asking {
    id: ClientId,
    clients: Clients,
    story: Rc<Story>,
    scheduler: RemoteStream<Submit>,
    chance: Chance,
}

impl Asking {
    fn client(&self) -> std::cell::RefMut<'_, Client> {
        self.clients[self.id].borrow_mut()
    }

    async fn ask(mut self, pause: Duration) {
        let comes = self.client().comes;
        sleep(pause.max(comes.saturating_sub(self.story.now()))).await;
        loop {
            let request = {
                let client = self.client();
                if client.is_over() {
                    return;
                }
                Request {
                    delivered: client.journal.clone(),
                    ..client.request.clone()
                }
            };
            if let Ok(events) = self
                .scheduler
                .subscribe(Submit(request), SUBMIT_DEADLINE)
                .await
                && self.listen(events).await
            {
                return;
            }
            sleep(self.chance.ms(50, 400)).await;
        }
    }

    /// False when it is to ask again.
    async fn listen(&self, mut events: Subscription<RequestEvent>) -> bool {
        let (id, leaves) = (self.id, Rc::clone(&self.client().leaves));
        loop {
            let event = tokio::select! {
                biased;
                () = leaves.notified() => return true,
                event = events.next() => event,
            };
            let event = match event {
                Some(Ok(event)) => event,
                ended if self.client().is_over() => {
                    assert!(ended.is_none(), "client {id} loses its connection");
                    return true;
                }
                _ => panic!("client {id} is told of no end, and gets no more"),
            };
            match event {
                RequestEvent::Accepted => {
                    self.story.note(|| format!("client {id} is taken"));
                    self.client().stage = Stage::Taken(None);
                }
                RequestEvent::Token(token) => self.client().got(id, &token),
                RequestEvent::Paused => self.story.note(|| format!("client {id} waits")),
                RequestEvent::Failed(failure) => {
                    self.story.note(|| format!("client {id} fails: {failure}"));
                    let mut client = self.client();
                    let stage = &client.stage;
                    assert!(
                        matches!(stage, Stage::Taken(_)),
                        "client {id} fails though it is {stage:?}"
                    );
                    client.stage = Stage::Failed(failure.to_string());
                }
                RequestEvent::Rejected(
                    Rejection::NotReady { .. }
                    | Rejection::Overloaded { .. }
                    | Rejection::ShareUsed { .. },
                ) => return false,
                RequestEvent::Rejected(rejection) => panic!("client {id} is refused: {rejection}"),
            }
        }
    }
}

/// The scheduler is in the same process.
const SUBMIT_DEADLINE: Duration = Duration::from_secs(5);
