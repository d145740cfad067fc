//! Tokens per second of one model on one rank: `decode MODEL [PROMPT_TOKENS] [TOKENS] [SEQUENCES]`.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::{Duration, Instant};

use offbook_collectives::Group;
use offbook_engine::{
    Command, Engine, LoopOptions, Report, StepError, StepTiming, Window, step_loop,
};
use offbook_protocol::{
    Epoch, FastSynch, Join, KvBits, Layout, NodeWeight, Plan, PlanNumber, Rank, Sampling,
    SequenceId, ShardSpec, StepOutcome, Transport,
};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let model = PathBuf::from(arguments.next().ok_or("which model directory?")?);
    let mut number = |default: u32| match arguments.next() {
        Some(text) => text.parse::<u32>(),
        None => Ok(default),
    };
    let (prompt, tokens, sequences) = (number(16)?, number(128)?, number(1)?);

    let engine = Engine::load(&spec(model, prompt + tokens), &mut |_| ())?;
    let vocabulary = engine.config().vocabulary_size as u32;
    let joins = (0..u64::from(sequences)).map(|id| Join {
        sequence: SequenceId(id),
        prompt: (0..prompt)
            .map(|i| (i * 7 + id as u32 + 1) % vocabulary)
            .collect(),
        delivered: 0,
        sampling: Sampling::greedy(),
        max_tokens: tokens,
        stop_tokens: Vec::new(),
    });
    let (tx, rx) = sync_channel(4);
    tx.send(Command::Plan(Plan {
        epoch: Epoch(1),
        number: PlanNumber(1),
        joins: joins.collect(),
        leaves: Vec::new(),
    }))?;
    let watch = Watch {
        tx,
        left: sequences,
        first: None,
        drawn: 0,
        sums: [Duration::ZERO; 4],
        steps: 0,
    };
    step_loop::run(engine, Group::solo(), rx, watch, options());
    Ok(())
}

fn spec(model: PathBuf, context_tokens: u32) -> ShardSpec {
    ShardSpec {
        epoch: Epoch(1),
        rank: Rank(0),
        model,
        layout: Layout::Tensor,
        weights: vec![NodeWeight(1.0)],
        transport: Transport::Quic,
        fast_synch: FastSynch::Auto,
        prefill_chunk_tokens: 512,
        context_tokens: context_tokens + 1,
        sequences_max: 64,
        kv_tokens: None,
        kv_bits: KvBits::AsComputed,
        // Every prompt is to be read.
        prefix_cache: false,
        micro_batches: None,
        collective_deadline: Duration::from_secs(10),
    }
}

fn options() -> LoopOptions {
    LoopOptions {
        epoch: Epoch(1),
        window: Arc::new(Window::new(100, 100)),
        step_log_every: 0,
        micro_batches: None,
        plan_deadline: Duration::from_secs(10),
    }
}

/// Counts from the first token of the last sequence to begin, so that prefill is left out.
struct Watch {
    tx: SyncSender<Command>,
    left: u32,
    first: Option<Instant>,
    drawn: u64,
    sums: [Duration; 4],
    steps: u32,
}

impl Report for Watch {
    fn outcome(&mut self, outcome: StepOutcome) {
        if self.first.is_some() {
            self.drawn += outcome.tokens.len() as u64;
        } else if outcome.tokens.len() as u32 == self.left {
            self.first = Some(Instant::now());
        }
        let ended = outcome.tokens.iter().filter(|t| t.finish.is_some()).count();
        self.left -= ended as u32;
        if self.left > 0 {
            return;
        }
        let took = self.first.map_or(Duration::ZERO, |first| first.elapsed());
        println!("{} tokens in {took:?}", self.drawn);
        println!("{:.1} tokens/s", self.drawn as f64 / took.as_secs_f64());
        for (name, sum) in ["total", "model", "gpu_eval", "eval"].iter().zip(self.sums) {
            println!(
                "{name}: {:.3} ms per step",
                sum.as_secs_f64() * 1e3 / f64::from(self.steps)
            );
        }
        // The loop reads it before it would block; the channel has room.
        let _ = self.tx.try_send(Command::Shutdown);
    }

    fn timing(&mut self, timing: StepTiming) {
        if self.first.is_some() {
            let parts = [timing.total, timing.model, timing.gpu_eval, timing.eval];
            self.sums
                .iter_mut()
                .zip(parts)
                .for_each(|(sum, part)| *sum += part);
            self.steps += 1;
        }
    }

    fn failed(&mut self, error: &StepError) {
        eprintln!("{error}");
    }
}
