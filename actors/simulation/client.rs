//! Clients, whose right answers are known beforehand, and what the disk of the head has of each answer.

use offbook_protocol::{FinishReason, Rejection, Request, SampledToken, Sampling, SequenceId};

use super::timeline::{Chance, mix};
use super::{CONTEXT_TOKENS, Local, VOCABULARY, World};

pub(super) type ClientId = usize;

pub(super) struct Client {
    request: Request,
    expected: Vec<u32>,
    /// What was written to the disk of the head before the client had it.
    pub(super) journal: Vec<u32>,
    pub(super) stage: Stage,
    pub(super) left: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Stage {
    /// To be asked, at first or again.
    Outside,
    Taken(SequenceId),
    Answered,
    Failed(String),
}

impl Client {
    pub(super) fn new(chance: &mut Chance) -> Self {
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
            journal: Vec::new(),
            stage: Stage::Outside,
            left: false,
        }
    }

    pub(super) fn sequence(&self) -> Option<SequenceId> {
        match self.stage {
            Stage::Taken(sequence) => Some(sequence),
            _ => None,
        }
    }

    pub(super) fn is_over(&self) -> bool {
        matches!(self.stage, Stage::Answered | Stage::Failed(_))
    }
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

impl World {
    /// Asks, for the first time or for the rest of an answer that a former head had begun.
    pub(super) fn submit(&mut self, id: ClientId) {
        let pause = self.chance.ms(50, 400);
        let client = &self.clients[id];
        if client.stage != Stage::Outside || client.left {
            return;
        }
        let request = Request {
            delivered: client.journal.clone(),
            ..client.request.clone()
        };
        let head = self
            .head
            .as_mut()
            .filter(|head| self.processes[head.pid as usize].runs());
        let Some(head) = head else {
            return self.timeline.after(pause, super::Event::Submit(id));
        };
        let pid = head.pid;
        match head.admission.submit(request, id) {
            Ok(sequence) => {
                self.note(|| format!("client {id} is taken as {sequence}"));
                self.clients[id].stage = Stage::Taken(sequence);
                self.local_after(self.limits.request_deadline, pid, Local::Late(sequence));
                self.send_plans();
            }
            Err((
                Rejection::NotReady { .. }
                | Rejection::Overloaded { .. }
                | Rejection::ShareUsed { .. },
                _,
            )) => {
                self.timeline.after(pause, super::Event::Submit(id));
            }
            Err((rejection, _)) => panic!("client {id} is refused: {rejection}"),
        }
    }

    /// A token for a client. False when nobody is there to take it.
    pub(super) fn client_got(&mut self, id: ClientId, token: &SampledToken) -> bool {
        let client = &mut self.clients[id];
        let Stage::Taken(sequence) = client.stage else {
            panic!("client {id} gets a token though it is {:?}", client.stage);
        };
        assert_eq!(sequence, token.sequence, "client {id} gets another's token");
        let place = client.journal.len();
        let expected = client.expected.get(place).copied();
        assert_eq!(Some(token.token), expected, "token {place} of client {id}");
        client.journal.push(token.token);
        let is_last = client.journal.len() == client.expected.len();
        let is_stop = client.request.stop_tokens.contains(&token.token);
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
            client.stage = Stage::Answered;
        }
        !client.left
    }

    pub(super) fn client_failed(&mut self, id: ClientId, why: &str) {
        self.note(|| format!("client {id} fails: {why}"));
        let client = &mut self.clients[id];
        assert!(
            matches!(client.stage, Stage::Taken(_)),
            "client {id} fails though it is {:?}",
            client.stage
        );
        client.stage = Stage::Failed(why.to_owned());
    }

    /// The head is gone: those whose answers it had begun ask the next one for the rest.
    pub(super) fn clients_lost_head(&mut self) {
        for id in 0..self.clients.len() {
            if matches!(self.clients[id].stage, Stage::Taken(_)) {
                self.clients[id].stage = Stage::Outside;
                let pause = self.chance.ms(100, 500);
                self.timeline.after(pause, super::Event::Submit(id));
            }
        }
    }
}
