//! Sequences that begin alike, over caches that are modelled as what was written into them.

use super::*;

/// One cache as it would lie on a device.
#[derive(Clone, Debug, Default)]
struct Cache {
    rows: Vec<Row>,
    /// Positions that it occupies.
    capacity: usize,
}

/// What stands for keys and values: they depend on all tokens up to their own.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Row {
    token: u32,
    digest: u64,
}

/// All caches of a rank.
struct Store {
    sequences: HashMap<SequenceId, Cache>,
    entries: HashMap<EntryId, Cache>,
    capacity: usize,
    counts: Counts,
}

/// How often what happened.
#[derive(Default, Debug)]
struct Counts {
    retained: u64,
    trimmed: u64,
    evicted: u64,
    taken_over: u64,
    copied_from_entries: u64,
    copied_from_sequences: u64,
    preemptions: u64,
    cached_tokens: u64,
}

impl Store {
    fn new(limits: Limits) -> Self {
        Self {
            sequences: HashMap::new(),
            entries: HashMap::new(),
            capacity: limits.kv_capacity(),
            counts: Counts::default(),
        }
    }

    fn carry_out(&mut self, moves: Vec<CacheMove>) {
        for to_do in moves {
            self.carry_out_one(to_do);
            let all = self.sequences.values().chain(self.entries.values());
            let occupied: usize = all.map(|cache| cache.capacity).sum();
            assert!(occupied <= self.capacity, "{occupied} after {to_do:?}");
        }
    }

    fn carry_out_one(&mut self, to_do: CacheMove) {
        let counts = &mut self.counts;
        match to_do {
            CacheMove::Drop(sequence) => {
                self.sequences.remove(&sequence);
            }
            CacheMove::Retain { sequence, entry } => {
                counts.retained += 1;
                let cache = self.sequences.remove(&sequence).unwrap();
                assert!(self.entries.insert(entry, cache).is_none());
            }
            CacheMove::Trim { entry, reserve } => {
                counts.trimmed += 1;
                self.entries.get_mut(&entry).unwrap().trim(reserve);
            }
            CacheMove::Evict(entry) => {
                counts.evicted += 1;
                self.entries.remove(&entry).unwrap();
            }
            CacheMove::TakeOver {
                entry,
                sequence,
                reserve,
            } => {
                counts.taken_over += 1;
                let mut cache = self.entries.remove(&entry).unwrap();
                cache.trim(reserve);
                assert!(self.sequences.insert(sequence, cache).is_none());
            }
            CacheMove::Copy {
                from,
                sequence,
                positions,
                reserve,
            } => {
                let source = match from {
                    Source::Entry(entry) => {
                        counts.copied_from_entries += 1;
                        &self.entries[&entry]
                    }
                    Source::Sequence(other) => {
                        counts.copied_from_sequences += 1;
                        &self.sequences[&other]
                    }
                };
                let cache = Cache {
                    rows: source.rows[..positions].to_vec(),
                    capacity: reserve,
                };
                self.sequences.insert(sequence, cache);
            }
        }
    }

    /// Computes a step: the tokens that it draws. `drawn` are those of the step before.
    fn compute(&mut self, step: &StepBatch, drawn: &[u32]) -> Vec<u32> {
        let mut tokens = Vec::new();
        for segment in &step.segments {
            let cache = self.sequences.entry(segment.sequence).or_default();
            cache.rows.truncate(segment.start);
            assert_eq!(cache.rows.len(), segment.start, "a gap");
            cache.capacity = cache.capacity.max(segment.reserve);
            match &segment.input {
                Input::Prompt(rows) => rows.iter().for_each(|token| cache.push(*token)),
                Input::Drawn(place) => cache.push(drawn[*place]),
            }
            assert!(cache.rows.len() <= cache.capacity, "rows behind the room");
            if segment.draw.is_some() {
                tokens.push(next_token(cache.rows.last().unwrap().digest));
            }
        }
        tokens
    }
}

impl Cache {
    fn push(&mut self, token: u32) {
        let before = self.rows.last().map_or(0, |row| row.digest);
        let digest = extend(before, token);
        self.rows.push(Row { token, digest });
    }

    fn trim(&mut self, reserve: usize) {
        self.rows.truncate(reserve);
        self.capacity = self.capacity.min(reserve);
    }
}

fn extend(digest: u64, token: u32) -> u64 {
    (digest ^ u64::from(token))
        .wrapping_mul(0x9E37_79B9_7F4A_7C15)
        .rotate_left(23)
}

fn next_token(digest: u64) -> u32 {
    (digest % 1000) as u32
}

/// The answer to a prompt, as a rank draws it that keeps nothing.
fn answer(prompt: &[u32], tokens: usize) -> Vec<u32> {
    let mut digest = prompt
        .iter()
        .fold(0, |digest, token| extend(digest, *token));
    let next = |()| {
        let token = next_token(digest);
        digest = extend(digest, token);
        token
    };
    std::iter::repeat_n((), tokens).map(next).collect()
}

/// One request of a game.
struct Asked {
    prompt: Vec<u32>,
    max_tokens: usize,
    seen: Vec<u32>,
    left: bool,
}

struct Game {
    dice: Dice,
    batch: Batch,
    store: Store,
    asked: HashMap<SequenceId, Asked>,
    stems: Vec<Vec<u32>>,
    /// Built and not read: what each draws.
    ahead: VecDeque<(StepBatch, Vec<u32>)>,
    /// What each lane's last step drew.
    drawn: Vec<Vec<u32>>,
}

impl Game {
    fn new(seed: u64, lanes: usize) -> Self {
        let mut dice = Dice(seed);
        let limits = Limits {
            prefill_chunk_tokens: 1 + dice.below(300) as usize,
            context_tokens: 4 * KV_BLOCK_TOKENS,
            kv_tokens: (4 + dice.below(8) as usize) * KV_BLOCK_TOKENS,
            retained_tokens: match seed % 4 {
                0 => 2 * KV_BLOCK_TOKENS,
                _ => usize::MAX,
            },
        };
        let stems = (0..3).map(|_| tokens(&mut dice, 400)).collect();
        Self {
            dice,
            batch: Batch::in_lanes(limits, lanes),
            store: Store::new(limits),
            asked: HashMap::new(),
            stems,
            ahead: VecDeque::new(),
            drawn: vec![Vec::new(); lanes],
        }
    }

    /// Somebody asks: with one of a few beginnings, or going on with an answer.
    fn ask(&mut self, id: SequenceId) {
        let dice = &mut self.dice;
        let earlier = self.asked.get(&SequenceId(1 + dice.below(id.0)));
        let mut prompt = match earlier.filter(|one| one.prompt.len() < 400) {
            Some(earlier) => [&earlier.prompt[..], &earlier.seen].concat(),
            None => self.stems[dice.below(3) as usize].clone(),
        };
        prompt.truncate(1 + dice.below(500) as usize);
        let more = dice.below(40) as usize;
        prompt.extend(tokens(dice, more));
        let max_tokens = 1 + dice.below(400) as usize;
        let one = Join {
            prompt: prompt.clone(),
            stop_tokens: Vec::new(),
            ..join(id.0, 1, max_tokens as u32)
        };
        self.batch.apply(&plan(vec![one], vec![])).unwrap();
        let asked = Asked {
            prompt,
            max_tokens,
            seen: Vec::new(),
            left: false,
        };
        self.asked.insert(id, asked);
    }

    fn leave(&mut self, id: SequenceId) {
        self.batch.apply(&plan(vec![], vec![id.0])).unwrap();
        self.asked.get_mut(&id).unwrap().left = true;
    }

    /// One step ahead in each lane and one more, as the ranks do it. False when there is nothing to do.
    fn step(&mut self) -> bool {
        while self.ahead.len() < self.drawn.len() + 1
            && let Some(step) = self.batch.next_batch(Chunks {
                beside_decode: 1 + self.dice.below(300) as usize,
                alone: 1 + self.dice.below(300) as usize,
            })
        {
            let kv = self.batch.kv_use();
            assert!(kv.held_tokens + kv.retained_tokens <= kv.capacity_tokens);
            if let Some(next) = self.batch.waiting.front() {
                let free = kv.capacity_tokens - kv.held_tokens;
                assert!(
                    next.wanted() as u64 > free,
                    "somebody waits for what is kept"
                );
            }
            self.store.carry_out(self.batch.cache_moves());
            let before: HashMap<SequenceId, usize> = self.written_before(&step);
            let drawn = self.store.compute(&step, &self.drawn[step.lane]);
            self.check_rows(&before);
            self.drawn[step.lane].clone_from(&drawn);
            self.ahead.push_back((step, drawn));
        }
        let Some((step, tokens)) = self.ahead.pop_front() else {
            assert!(self.batch.is_empty(), "nobody goes on");
            return false;
        };
        for seen in self.batch.observe(&step.draws(), &tokens) {
            self.store.counts.cached_tokens += seen.cached_tokens as u64;
            let asked = self.asked.get_mut(&seen.sequence).unwrap();
            assert!(!asked.left, "a token of one that has left");
            assert!(seen.cached_tokens < asked.prompt.len());
            assert!(
                seen.cached_tokens == 0 || asked.seen.is_empty(),
                "told twice"
            );
            asked.seen.push(seen.token);
            assert_eq!(seen.finish.is_some(), asked.seen.len() == asked.max_tokens);
        }
        self.store.carry_out(self.batch.cache_moves());
        true
    }

    fn written_before(&self, step: &StepBatch) -> HashMap<SequenceId, usize> {
        let firsts = step.segments.iter().map(|s| (s.sequence, s.start));
        firsts.collect()
    }

    /// What the sequences of a step found in their caches is what they would have written.
    fn check_rows(&self, before: &HashMap<SequenceId, usize>) {
        for (id, &start) in before {
            let asked = &self.asked[id];
            let rows = self.store.sequences[id].rows[..start].iter();
            let own = asked.prompt.iter().chain(&asked.seen);
            assert!(rows.zip(own).all(|(row, token)| row.token == *token));
        }
    }
}

fn tokens(dice: &mut Dice, count: usize) -> Vec<u32> {
    (0..count).map(|_| dice.below(1000) as u32).collect()
}

/// Plays one random schedule to the end.
fn play(seed: u64, lanes: usize) -> Counts {
    let mut game = Game::new(seed, lanes);
    let mut last = 0;
    for _ in 0..20_000 {
        let asks = game.batch.is_empty() || game.dice.below(30) == 0;
        // Often several at once.
        for _ in 0..1 + game.dice.below(4) {
            if asks && last < 12 {
                last += 1;
                game.ask(SequenceId(last));
            }
        }
        let id = SequenceId(1 + game.dice.below(12));
        if game.dice.below(300) == 0 && game.batch.contains(id) {
            game.leave(id);
        }
        if !game.step() && last == 12 {
            break;
        }
    }
    for (id, asked) in &game.asked {
        let expected = answer(&asked.prompt, asked.max_tokens);
        match asked.left {
            true => assert!(expected.starts_with(&asked.seen), "seed {seed}: {id}"),
            false => assert_eq!(asked.seen, expected, "seed {seed}: {id}"),
        }
    }
    let kv = game.batch.kv_use();
    assert_eq!((last, kv.held_tokens), (12, 0));
    assert!(game.store.sequences.is_empty());
    game.store.counts.preemptions = kv.preemptions;
    game.store.counts
}

#[test]
fn whoever_begins_with_what_is_kept_draws_the_same_tokens() {
    let mut all = Counts::default();
    for seed in 1..=3000 {
        let lanes = 1 + seed as usize % 3;
        let Counts {
            retained,
            trimmed,
            evicted,
            taken_over,
            copied_from_entries,
            copied_from_sequences,
            preemptions,
            cached_tokens,
        } = play(seed, lanes);
        all.retained += retained;
        all.trimmed += trimmed;
        all.evicted += evicted;
        all.taken_over += taken_over;
        all.copied_from_entries += copied_from_entries;
        all.copied_from_sequences += copied_from_sequences;
        all.preemptions += preemptions;
        all.cached_tokens += cached_tokens;
    }
    let least = [
        all.retained,
        all.trimmed,
        all.evicted,
        all.taken_over,
        all.copied_from_entries,
        all.copied_from_sequences,
        all.preemptions,
        all.cached_tokens / 100,
    ];
    println!("{all:?}");
    assert!(least.iter().all(|count| *count > 500), "{all:?}");
}

const KEEPING: Limits = Limits {
    prefill_chunk_tokens: 300,
    context_tokens: 8 * KV_BLOCK_TOKENS,
    kv_tokens: 8 * KV_BLOCK_TOKENS,
    retained_tokens: 8 * KV_BLOCK_TOKENS,
};

/// Ends a sequence that has had its prompt read: what it leaves behind is its prompt.
fn read_and_leave(batch: &mut Batch, id: u64, prompt: usize) {
    let joins = vec![join(id, prompt, 200)];
    batch.apply(&plan(joins, vec![])).unwrap();
    while batch.running.iter().any(Sequence::is_reading) || batch.running.is_empty() {
        batch.next_batch(configured(batch)).unwrap();
    }
    batch.apply(&plan(vec![], vec![id])).unwrap();
    batch.cache_moves();
}

fn take_over(moves: &[CacheMove]) -> bool {
    let is_one = |one: &CacheMove| matches!(one, CacheMove::TakeOver { .. });
    moves.iter().any(is_one)
}

#[test]
fn what_is_kept_is_taken_over_where_little_is_lost_and_copied_elsewhere() {
    for (prompt, used, taken) in [(400, 399, true), (322, 321, true), (319, 318, false)] {
        let mut batch = Batch::new(KEEPING);
        read_and_leave(&mut batch, 1, 400);
        assert_eq!(batch.kv_use().held_tokens, 0);
        assert_eq!(batch.kv_use().retained_tokens, 3 * KV_BLOCK_TOKENS as u64);
        batch
            .apply(&plan(vec![join(2, prompt, 200)], vec![]))
            .unwrap();
        let step = batch.next_batch(configured(&batch)).unwrap();
        assert_eq!(shape(&step), [(2, used, 1, true)], "the last token is read");
        let moves = batch.cache_moves();
        assert_eq!(take_over(&moves), taken, "{prompt}: {moves:?}");
        assert_eq!(batch.kv_use().retained_tokens == 0, taken);
    }
}

#[test]
fn who_begins_alike_waits_one_step_for_the_first() {
    let mut batch = Batch::new(KEEPING);
    let joins = vec![join(1, 100, 9), join(2, 90, 9), join(3, 15, 9)];
    batch.apply(&plan(joins, vec![])).unwrap();
    let first = batch.next_batch(configured(&batch)).unwrap();
    let expected = [(1, 0, 100, true), (3, 0, 15, true)];
    assert_eq!(shape(&first), expected, "3 has too little in common with 1");
    assert_eq!(batch.cache_moves(), []);
    let second = batch.next_batch(configured(&batch)).unwrap();
    assert_eq!(shape(&second)[2], (2, 89, 1, true));
    let copy = CacheMove::Copy {
        from: Source::Sequence(SequenceId(1)),
        sequence: SequenceId(2),
        positions: 89,
        reserve: KV_BLOCK_TOKENS,
    };
    assert_eq!(batch.cache_moves(), [copy]);
    let told = batch.observe(&second.draws(), &[5, 6, 7]);
    let told: Vec<_> = told.iter().map(|seen| seen.cached_tokens).collect();
    assert_eq!(told, [0, 0, 89]);
}

#[test]
fn what_nobody_used_for_longest_goes_first_and_from_its_end() {
    let mut batch = Batch::new(KEEPING);
    let other = |id, prompt: u32, from: u32| Join {
        prompt: (from..from + prompt).collect(),
        ..join(id, 1, 1)
    };
    for (id, from) in [(1, 0), (2, 1000)] {
        batch
            .apply(&plan(vec![other(id, 700, from)], vec![]))
            .unwrap();
        while let Some(step) = batch.next_batch(configured(&batch)) {
            batch.observe(&step.draws(), &vec![5; step.draws().len()]);
        }
    }
    batch.cache_moves();
    assert_eq!(batch.kv_use().retained_tokens, 6 * KV_BLOCK_TOKENS as u64);
    batch
        .apply(&plan(vec![other(3, 900, 2000)], vec![]))
        .unwrap();
    batch.next_batch(configured(&batch)).unwrap();
    let trim = CacheMove::Trim {
        entry: EntryId(0),
        reserve: KV_BLOCK_TOKENS,
    };
    assert_eq!(batch.cache_moves(), [trim]);
    batch.apply(&plan(vec![], vec![3])).unwrap();
    batch.apply(&plan(vec![other(4, 700, 0)], vec![])).unwrap();
    let step = batch.next_batch(configured(&batch)).unwrap();
    assert_eq!(shape(&step)[0].1, KV_BLOCK_TOKENS, "what was left of it");
}

#[test]
fn who_was_preempted_begins_behind_what_was_left_of_its_cache() {
    let mut batch = Batch::new(Limits {
        kv_tokens: 5 * KV_BLOCK_TOKENS,
        ..KEEPING
    });
    let joins = vec![
        join(1, 250, 300),
        Join {
            prompt: (1000..1500).collect(),
            ..join(2, 1, 290)
        },
    ];
    batch.apply(&plan(joins, vec![])).unwrap();
    let mut of_2 = Vec::new();
    while let Some(step) = batch.next_batch(configured(&batch)) {
        of_2.extend(shape(&step).into_iter().filter(|s| s.0 == 2 && s.2 > 1));
        for seen in batch.observe(&step.draws(), &vec![5; step.draws().len()]) {
            assert_eq!(seen.cached_tokens, 0, "its own work is not told");
        }
    }
    assert_eq!(batch.kv_use().preemptions, 1);
    let again = of_2.last().unwrap();
    assert_eq!(again.1, 2 * KV_BLOCK_TOKENS, "{of_2:?}");
}

#[test]
fn nothing_is_kept_where_nothing_may_be() {
    let mut batch = Batch::new(Limits {
        retained_tokens: 0,
        ..KEEPING
    });
    read_and_leave(&mut batch, 1, 400);
    assert_eq!(batch.kv_use().retained_tokens, 0);
    let joins = vec![join(2, 400, 200), join(3, 400, 200)];
    batch.apply(&plan(joins, vec![])).unwrap();
    let step = batch.next_batch(configured(&batch)).unwrap();
    assert_eq!(shape(&step)[0], (2, 0, 300, false));
}
