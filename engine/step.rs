//! Builds and submits one step: embed, layers, sample. Nothing here waits for the step; the tokens
//! stay on the device, where the next step finds them.
//!
//! The last thing that a step does is the message: one array of 32-bit integers that the sampling
//! rank tells the others: three control words, then the tokens. All ranks go on with the tokens in it, so
//! they cannot diverge. A rank alone needs no message.
//!
//! The message is a broadcast, at the end of every step on every rank. In a pipeline with micro-batches it
//! is sent to each rank by itself, and taken there as late as it can be: before the first step that needs
//! its tokens, or that is as many steps later as there are lanes. Until then the rank sends on what it has
//! computed of other steps. All ranks take the same messages between the same steps.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use mlx_rs::error::Exception;
use mlx_rs::ops::indexing::{TryIndexOp, take_axis};
use mlx_rs::ops::{concatenate, zeros_dtype};
use mlx_rs::transforms::async_eval;
use mlx_rs::{Array, Dtype};
use offbook_collectives::{Gathered, Group};
use offbook_protocol::{Layout, SequenceId};

use crate::batch::{Batch, CacheMove, Chunks, Draw, Input, StepBatch};
use crate::engine::Engine;
use crate::kv_cache::{Caches, KeptCaches};
use crate::models::Fault;
use crate::models::decoder::{DeviceKind, Divided, Hidden, Rows};
use crate::reshaping::Reshaping;
use crate::sampler::{self, Drawn, Logprobs, RowLogprobs, host};
use crate::window::{Window, WorkKind};

/// What one rank keeps from step to step.
pub(crate) struct Stepper<'a> {
    engine: &'a Engine,
    group: &'a Group,
    caches: Caches,
    /// Of sequences that are gone.
    kept: KeptCaches,
    /// What the step before drew, in each lane: `[draws]`.
    tokens: Vec<Option<Array>>,
    mail: Mail,
    reshaping: Reshaping,
    in_flight: InFlight,
    steps: u64,
}

/// A step that was submitted.
pub(crate) struct Submitted {
    serial: u64,
    /// Who draws, in row order.
    pub(crate) draws: Vec<SequenceId>,
    pub(crate) work: Work,
    /// `None` where the message is still to be taken.
    message: Option<Array>,
    logprobs: Option<Logprobs>,
    /// How long the host was held back while it built the step: by the throttle, or by MLX.
    pub(crate) blocked: Duration,
}

/// What a step works on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Work {
    pub(crate) sequences: usize,
    /// Tokens of prompts.
    pub(crate) prefill_tokens: usize,
    /// Whether a sequence decodes in it.
    pub(crate) decodes: bool,
}

/// What a step said, on the host.
pub(crate) struct Answer {
    /// What the sampling rank put into its message; `None` on a rank alone.
    pub(crate) control: Option<Control>,
    pub(crate) tokens: Vec<u32>,
    /// One entry per token on the rank that samples, when a sequence asked for it; else empty.
    pub(crate) logprobs: Vec<RowLogprobs>,
}

/// What the sampling rank decides for all: the first words of its message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Control {
    /// See [`PlanInbox::control_word`](crate::PlanInbox::control_word).
    pub(crate) plans: u32,
    /// How many tokens of prompts the steps read that are built once this is known.
    pub(crate) chunks: Chunks,
}

impl Control {
    fn words(self) -> [u32; CONTROL_WORDS as usize] {
        let word = |tokens: usize| u32::try_from(tokens).unwrap_or(u32::MAX);
        let Chunks {
            beside_decode,
            alone,
        } = self.chunks;
        [self.plans, word(beside_decode), word(alone)]
    }

    fn of([plans, beside_decode, alone]: [u32; CONTROL_WORDS as usize]) -> Self {
        Self {
            plans,
            chunks: Chunks {
                beside_decode: beside_decode as usize,
                alone: alone as usize,
            },
        }
    }
}

/// How a step is to be submitted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Orders<'w> {
    /// What the message carries when this rank samples.
    pub(crate) control: Control,
    /// Layers in flight at most, over all steps.
    pub(crate) window: &'w Window,
}

impl<'a> Stepper<'a> {
    /// For a batch in so many lanes.
    pub(crate) fn new(engine: &'a Engine, group: &'a Group, lanes: usize) -> Self {
        Self {
            engine,
            group,
            caches: Caches::new(),
            kept: KeptCaches::default(),
            tokens: vec![None; lanes],
            mail: Mail::default(),
            reshaping: Reshaping::default(),
            in_flight: InFlight::default(),
            steps: 0,
        }
    }

    /// Does with caches what the batch has decided, and forgets what else was kept of sequences that
    /// are not in it any more.
    pub(crate) fn settle(&mut self, moves: &[CacheMove], batch: &Batch) -> Result<(), Exception> {
        self.reshaping.forget_all_but(batch);
        for to_do in moves {
            self.kept.carry_out(*to_do, &mut self.caches)?;
        }
        Ok(())
    }

    /// Builds the step and hands it to the device.
    pub(crate) fn submit(
        &mut self,
        batch: &StepBatch,
        orders: Orders<'_>,
    ) -> Result<Submitted, Fault> {
        for segment in &batch.segments {
            self.caches
                .entry(segment.sequence)
                .or_insert_with(|| self.engine.model.cache());
        }
        self.steps += 1;
        let waited = self.in_flight.waited;
        self.take_mail(self.needed(batch))?;
        let hidden = self.forward(batch, orders.window)?;
        let drawn = self.draw(batch, &hidden)?;
        let draws = batch.draws();
        let message = match self.mails() && !self.samples() {
            true => {
                self.mail.owed.push_back(Owed {
                    serial: self.steps,
                    lane: batch.lane,
                    draws: draws.len(),
                });
                None
            }
            false => {
                let words = self.words(&drawn, draws.len(), orders.control)?;
                let message = self.tell(&words)?;
                // Who sends has the tokens before they are sent.
                let known = match self.mails() {
                    true => &words,
                    false => &message,
                };
                self.tokens[batch.lane] = Some(match self.alone() {
                    true => known.clone(),
                    false => known.try_index(CONTROL_WORDS..)?,
                });
                Some(message)
            }
        };
        let logprobs = drawn.sampled.and_then(|sampled| sampled.logprobs);
        let mut outputs = vec![message.as_ref().unwrap_or(&drawn.last)];
        outputs.extend(logprobs.iter().flat_map(Logprobs::arrays));
        let since = Instant::now();
        async_eval(outputs)?;
        let mut blocked = self.in_flight.waited - waited;
        if self.engine.model.numerics.device == DeviceKind::Cpu {
            // There MLX lets no more than ten tasks wait: submitting is waiting for the rest.
            blocked += since.elapsed();
        }
        Ok(Submitted {
            serial: self.steps,
            draws,
            work: Work {
                sequences: batch.segments.len(),
                prefill_tokens: batch.prefill_tokens(),
                decodes: batch.decodes(),
            },
            message,
            logprobs,
            blocked,
        })
    }

    /// Waits for the step and brings its answer to the host.
    pub(crate) fn read(&mut self, step: &Submitted) -> Result<Answer, Fault> {
        let message = match &step.message {
            Some(message) => message.clone(),
            None => {
                self.take_mail(step.serial)?;
                let taken = self.mail.taken.pop_front();
                taken.ok_or_else(|| Exception::custom("steps are read in their order"))?
            }
        };
        message.eval()?;
        self.in_flight.done(step.serial);
        if self.alone() && step.draws.is_empty() {
            return Ok(Answer {
                control: None,
                tokens: Vec::new(),
                logprobs: Vec::new(),
            });
        }
        let words: Vec<u32> = host::<i32>(&message)?
            .into_iter()
            .map(i32::cast_unsigned)
            .collect();
        let (control, tokens) = match words.split_first_chunk() {
            Some((&control, tokens)) if !self.alone() => {
                (Some(Control::of(control)), tokens.to_vec())
            }
            _ => (None, words),
        };
        let logprobs = match &step.logprobs {
            Some(logprobs) => logprobs.read()?,
            None => Vec::new(),
        };
        Ok(Answer {
            control,
            tokens,
            logprobs,
        })
    }

    /// Whether messages go to each rank by itself.
    fn mails(&self) -> bool {
        self.tokens.len() > 1
    }

    fn samples(&self) -> bool {
        self.group.rank() == self.sampling_rank()
    }

    /// The last step whose message must be here before this one is built.
    fn needed(&self, batch: &StepBatch) -> u64 {
        let aged = self.steps.saturating_sub(self.tokens.len() as u64);
        let in_lane = self.mail.owed.iter().filter(|owed| owed.lane == batch.lane);
        match batch.decodes() {
            true => in_lane.map(|owed| owed.serial).max().unwrap_or(0).max(aged),
            false => aged,
        }
    }

    /// Takes the messages of all steps up to this one, as far as they are owed: on the device, unseen.
    fn take_mail(&mut self, upto: u64) -> Result<(), Fault> {
        let root = self.sampling_rank();
        while let Some(owed) = self.mail.owed.pop_front_if(|owed| owed.serial <= upto) {
            let shape = [CONTROL_WORDS + owed.draws as i32];
            let message = self.group.recv(&shape, Dtype::Int32, root)?;
            async_eval([&message])?;
            self.tokens[owed.lane] = Some(message.try_index(CONTROL_WORDS..)?);
            self.mail.taken.push_back(message);
        }
        Ok(())
    }

    fn alone(&self) -> bool {
        self.group.size() == 1
    }

    fn sampling_rank(&self) -> usize {
        self.engine.partition().sampling_rank().index()
    }

    fn pipelined(&self) -> bool {
        !self.alone() && self.engine.layout() == Layout::Pipeline
    }

    /// Through this rank's layers: `[rows, hidden]`, as it was sent on where another rank follows.
    fn forward(&mut self, batch: &StepBatch, window: &Window) -> Result<Array, Fault> {
        let model = &self.engine.model;
        let divided = Divided::by(self.engine.layout(), self.group.size());
        let rows = model.rows(batch, self.group, divided);
        let mut hidden = Hidden::new(self.first(batch, &rows)?);
        // A prompt's layers are submitted one by one: they hold much memory and take long. A decode
        // step goes whole, as long as the window leaves room for the one behind it.
        let layers = model.layers();
        let kind = match batch.is_decode() {
            true => WorkKind::Decode,
            false => WorkKind::Prefill,
        };
        // It may move while the step is built.
        let room = || window.layers(kind) as usize;
        let stride = match kind {
            WorkKind::Decode if room() >= 2 * layers => layers,
            WorkKind::Decode => (room() / 2).max(1),
            WorkKind::Prefill => 1,
        };
        let mut unsubmitted = 0;
        for index in 0..layers {
            if unsubmitted == stride {
                let last = hidden.last();
                async_eval([last])?;
                self.in_flight.push(self.steps, unsubmitted, last.clone());
                unsubmitted = 0;
            }
            if unsubmitted == 0 {
                self.in_flight.make_room(stride, room())?;
            }
            hidden = model.layer(index, hidden, &rows, &mut self.caches)?;
            unsubmitted += 1;
        }
        let mut x = hidden.whole()?;
        if self.pipelined() && self.group.rank() + 1 < self.group.size() {
            x = self.group.send(&x, self.group.rank() + 1)?;
        }
        self.in_flight.push(self.steps, unsubmitted, x.clone());
        Ok(x)
    }

    /// What the first of this rank's layers reads: embeddings, or what the rank before sent.
    fn first(&self, batch: &StepBatch, rows: &Rows<'_>) -> Result<Array, Fault> {
        let model = &self.engine.model;
        if self.pipelined() && self.group.rank() > 0 {
            let shape = [rows.count, model.numerics.hidden];
            let before = self.group.rank() - 1;
            return Ok(self.group.recv(&shape, model.numerics.dtype, before)?);
        }
        let ids = self.ids(batch)?;
        let embedded = model.embed(&ids)?;
        Ok(embedded.ok_or_else(|| Exception::custom("the rank that embeds has no embedding"))?)
    }

    /// The rows' token ids: `[rows]`. Those of decode rows come from the step before, unseen.
    fn ids(&self, batch: &StepBatch) -> Result<Array, Exception> {
        let mut places = Vec::new();
        let mut known = Vec::new();
        for segment in &batch.segments {
            match &segment.input {
                Input::Drawn(place) => places.push(*place as i32),
                Input::Prompt(tokens) => known.extend(tokens.iter().map(|t| t.cast_signed())),
            }
        }
        let known_count = known.len() as i32;
        let known = (known_count > 0).then(|| Array::from_slice(&known, &[known_count]));
        let drawn = match (&self.tokens[batch.lane], places.is_empty()) {
            (_, true) => None,
            (None, false) => return Err(Exception::custom("a first step cannot continue")),
            (Some(tokens), false) => Some(pick(tokens, &places)?),
        };
        match (drawn, known) {
            // Decode rows come first in every batch.
            (Some(drawn), Some(known)) => concatenate(&[drawn, known], 0),
            (Some(ids), None) | (None, Some(ids)) => Ok(ids),
            (None, None) => Err(Exception::custom("a step without rows")),
        }
    }

    /// Draws on the rank that samples; the others send it their part of the logits.
    fn draw(&mut self, batch: &StepBatch, hidden: &Array) -> Result<Outcome, Fault> {
        let mut rows = Vec::new();
        let mut draws: Vec<&Draw> = Vec::new();
        let mut row = 0;
        for segment in &batch.segments {
            row += segment.rows() as i32;
            if let Some(draw) = &segment.draw {
                rows.push(row - 1);
                draws.push(draw);
            }
        }
        if draws.is_empty() {
            return Ok(Outcome::without(hidden));
        }
        let part = self.engine.model.logits(hidden, &rows)?;
        if self.alone() || self.pipelined() {
            return match part {
                Some(logits) => Ok(self.sample(&logits, &draws, batch.lane)?),
                None => Ok(Outcome::without(hidden)),
            };
        }
        let count = draws.len() as i32;
        let part = match part {
            Some(part) => part.transpose_axes(&[1, 0])?,
            // No rows, but made from what came before, so that no exchange overtakes another.
            None => {
                let nothing = hidden.try_index(..0)?.reshape(&[0, count])?;
                nothing.as_dtype(Dtype::Float32)?
            }
        };
        let rows: Vec<i32> = self
            .engine
            .partition()
            .vocabulary_rows()
            .iter()
            .map(|r| r.len() as i32)
            .collect();
        let gathered = self.group.gather_to(&part, &rows, self.sampling_rank())?;
        match gathered {
            Gathered::Root(logits) => {
                let logits = logits.transpose_axes(&[1, 0])?;
                Ok(self.sample(&logits, &draws, batch.lane)?)
            }
            // A rank may have no rows to send; its message still has to come after the gathering.
            Gathered::Elsewhere(sent) if sent.size() == 0 => {
                let any = first_of(hidden)?.as_dtype(sent.dtype())?;
                let sent = sent.reshape(&[0])?;
                Ok(Outcome::without(&concatenate(&[sent, any], 0)?))
            }
            Gathered::Elsewhere(sent) => Ok(Outcome::without(&sent)),
        }
    }

    /// Of the whole vocabulary's logits, on the rank that has them.
    fn sample(
        &mut self,
        logits: &Array,
        draws: &[&Draw],
        lane: usize,
    ) -> Result<Outcome, Exception> {
        let before = self.tokens[lane].as_ref();
        let shaped = self.reshaping.apply(logits, draws, before)?;
        let sampled = sampler::draw(logits, shaped.as_ref().unwrap_or(logits), draws)?;
        Ok(Outcome {
            last: sampled.tokens.clone(),
            sampled: Some(sampled),
        })
    }

    /// What this rank has for the step's message. It depends on all that this rank has to do in the
    /// step, so that no rank runs its exchanges in another order.
    fn words(&self, drawn: &Outcome, draws: usize, control: Control) -> Result<Array, Fault> {
        let tokens = drawn.sampled.as_ref().map(|sampled| &sampled.tokens);
        // Where nothing is sampled only the shape counts; but it comes after what was computed.
        let nothing = || {
            first_of(&drawn.last)?
                .as_type::<i32>()?
                .multiply(Array::from_int(0))
        };
        let zeros = || zeros_dtype(&[draws as i32], Dtype::Int32);
        if self.alone() {
            return match tokens {
                Some(tokens) => Ok(tokens.clone()),
                None if draws == 0 => Ok(drawn.last.clone()),
                // A share that is measured alone may hold no part of the vocabulary.
                None => Ok(zeros()?.add(nothing()?)?),
            };
        }
        let control = control.words().map(u32::cast_signed);
        let control = Array::from_slice(&control, &[CONTROL_WORDS]);
        Ok(match tokens {
            Some(tokens) => concatenate(&[&control, tokens], 0)?,
            None => concatenate(&[control.add(nothing()?)?, zeros()?], 0)?,
        })
    }

    /// The step's last word on every rank, or where it goes by mail on the one that sends it.
    fn tell(&self, words: &Array) -> Result<Array, Fault> {
        if self.alone() {
            return Ok(words.clone());
        }
        if !self.mails() {
            return Ok(self.group.broadcast(words, self.sampling_rank())?);
        }
        let mut sent = words.clone();
        for rank in (0..self.group.size()).filter(|rank| *rank != self.group.rank()) {
            // Each stands behind the one before, so that all are sent when the last one is.
            sent = self.group.send(&sent, rank)?;
        }
        Ok(sent)
    }
}

/// Messages that go to each rank by itself, oldest first.
#[derive(Default)]
struct Mail {
    /// Of steps that were submitted: nobody has asked for them here.
    owed: VecDeque<Owed>,
    /// Asked for, and not read.
    taken: VecDeque<Array>,
}

struct Owed {
    serial: u64,
    lane: usize,
    draws: usize,
}

/// What came of the last rows.
struct Outcome {
    sampled: Option<Drawn>,
    /// The last thing computed, for those who did not sample.
    last: Array,
}

impl Outcome {
    fn without(last: &Array) -> Self {
        Self {
            sampled: None,
            last: last.clone(),
        }
    }
}

/// Layers that were handed to the device and are not known to be done, oldest first.
#[derive(Default)]
struct InFlight {
    submitted: VecDeque<Layers>,
    layers: usize,
    /// How long the host has been held back, over all steps.
    waited: Duration,
}

struct Layers {
    step: u64,
    count: usize,
    output: Array,
}

impl InFlight {
    fn push(&mut self, step: u64, count: usize, output: Array) {
        self.layers += count;
        self.submitted.push_back(Layers {
            step,
            count,
            output,
        });
    }

    /// Waits until `count` more layers fit the window.
    fn make_room(&mut self, count: usize, window: usize) -> Result<(), Exception> {
        while self.layers + count > window
            && let Some(oldest) = self.submitted.pop_front()
        {
            let since = Instant::now();
            oldest.output.eval()?;
            self.waited += since.elapsed();
            self.layers -= oldest.count;
        }
        Ok(())
    }

    /// A step was read: so all that it was made of is done.
    fn done(&mut self, step: u64) {
        while let Some(oldest) = self.submitted.front()
            && oldest.step <= step
        {
            self.layers -= oldest.count;
            self.submitted.pop_front();
        }
    }
}

/// How many words of a message come before its tokens.
pub(crate) const CONTROL_WORDS: i32 = 3;

/// The first element, as `[1]`.
fn first_of(x: &Array) -> Result<Array, Exception> {
    x.reshape(&[-1])?.try_index(..1)
}

/// `tokens[places]`, without an operation when that is `tokens` itself.
fn pick(tokens: &Array, places: &[i32]) -> Result<Array, Exception> {
    let count = places.len() as i32;
    if tokens.dim(0) == count && places.iter().zip(0..).all(|(&place, i)| place == i) {
        return Ok(tokens.clone());
    }
    take_axis(tokens, Array::from_slice(places, &[count]), 0)
}
