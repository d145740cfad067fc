//! The task that keeps children, processes and actors alike: starts them in order, waits for an end,
//! asks the policy, and starts them again. All members of one keeper share their fate: when one ends,
//! the others are stopped in reverse and all begin anew. A supervisor that restarts one for one has a
//! keeper for each child.

use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::sync::{mpsc, oneshot};

use super::inbox::{Asked, Inbox, Stop};
use super::kept::{End, Kept, Life};
use super::policy::{RestartHistory, RestartPolicy, Verdict};
use super::status::{ChildState, ChildStatus, Event, Restart};
use crate::clock;
use crate::sync::lock;

/// What is called when a child is given up, before anything of it is dropped.
pub(super) type OnEscalation = Arc<OnceLock<Box<dyn Fn(&ChildStatus) + Send + Sync>>>;

/// See the module's own words.
pub(super) struct Keeper {
    pub(super) members: Vec<Member>,
    pub(super) policy: RestartPolicy,
    pub(super) history: RestartHistory,
    pub(super) events: mpsc::Sender<Event>,
    pub(super) on_escalation: OnEscalation,
    pub(super) inbox: Arc<Inbox>,
    /// Resolves when whoever was given to the supervisor before has been started.
    pub(super) turn: oneshot::Receiver<()>,
    /// Dropped when the members were started once.
    pub(super) begun: Option<oneshot::Sender<()>>,
}

/// One child of a keeper.
pub(super) struct Member {
    pub(super) name: String,
    pub(super) status: Arc<Mutex<ChildStatus>>,
    kept: Box<dyn Kept>,
    life: Option<Box<dyn Life>>,
    /// When its last life began.
    began: Instant,
    /// Why its present life is being ended.
    why: String,
}

impl Keeper {
    pub(super) async fn keep(mut self) {
        // An error says that whoever was before is gone.
        let _ = (&mut self.turn).await;
        loop {
            let not_started = self.start().await;
            self.begun = None;
            let ended = match not_started {
                Some(ended) => Some(ended),
                None => self.watch().await,
            };
            let Some((index, end)) = ended else { return };
            let Some(pause) = self.judge(index, end).await else {
                return;
            };
            if self.is_done_within(pause).await {
                return;
            }
        }
    }

    /// Starts all that do not run, in order. Whoever does not start has ended.
    async fn start(&mut self) -> Option<(usize, End)> {
        for (index, member) in self.members.iter_mut().enumerate() {
            if member.life.is_some() {
                continue;
            }
            lock(&member.status).generation += 1;
            let life = match member.kept.start().await {
                Ok(life) => life,
                Err(exit) => return Some((index, exit.into())),
            };
            let pid = life.pid();
            member.life = Some(life);
            member.began = clock::now();
            member.change(ChildState::Running, |status| status.pid = pid);
            tracing::info!(child = %member.name, pid, "a child was started");
            let started = Event::Started {
                child: member.name.clone(),
                pid: pid.unwrap_or_else(std::process::id),
            };
            tell(&self.events, started);
        }
        None
    }

    /// Waits for the first end, and does what is asked meanwhile; `None` when nobody is left.
    async fn watch(&mut self) -> Option<(usize, End)> {
        loop {
            let members = self.members.iter_mut().enumerate();
            let lives = members.filter_map(|(index, member)| Some((index, member.life.as_mut()?)));
            let ends = lives.map(|(index, life)| async move { (index, life.ended().await) });
            let mut ends: FuturesUnordered<_> = ends.collect();
            tokio::select! {
                biased;
                Some(ended) = ends.next() => return Some(ended),
                () = self.inbox.stirred() => {}
            }
            drop(ends);
            if self.carry_out().await {
                return None;
            }
            if let Some(ended) = self.start().await {
                return Some(ended);
            }
        }
    }

    /// Notes an end, and says after which pause all are started again; `None` when they are given up.
    async fn judge(&mut self, index: usize, end: End) -> Option<Duration> {
        let member = &mut self.members[index];
        let restart = Restart {
            when: SystemTime::now(),
            exit: end.exit,
            why: std::mem::take(&mut member.why),
            last_lines: end.last_lines,
        };
        let (exit, why) = (&restart.exit, &restart.why);
        tracing::warn!(child = %member.name, %exit, why, "a child ended");
        let (now, chance) = (clock::now(), rand::random());
        let verdict = match exit.is_from_outside() {
            true => {
                let lived = now - member.began;
                self.history.killed(&self.policy, now, lived, chance)
            }
            false => self.history.failed(&self.policy, now, chance),
        };
        match verdict {
            Verdict::RestartAfter(pause) => {
                member.rest(restart, pause, &self.events);
                self.stop_siblings(index, |member, restart, events| {
                    member.rest(restart, pause, events);
                })
                .await;
                Some(pause)
            }
            Verdict::Escalate => {
                self.give_up(index, restart).await;
                None
            }
        }
    }

    async fn give_up(&mut self, index: usize, restart: Restart) {
        // Who comes later finds it closed and is another's.
        let Asked { newcomers, .. } = self.inbox.close();
        self.members.extend(newcomers);
        let member = &mut self.members[index];
        let restarts = lock(&member.status).restarts;
        let (exit, why) = (&restart.exit, &restart.why);
        tracing::error!(
            child = %member.name, restarts, %exit, why, last_lines = ?restart.last_lines,
            "a child failed too often and is given up"
        );
        member.leave(&restart);
        let status = lock(&member.status).clone();
        let child = member.name.clone();
        tell(&self.events, Event::Escalated { child, restart });
        if let Some(told) = self.on_escalation.get() {
            told(&status);
        }
        self.members[index].life = None;
        self.stop_siblings(index, |member, restart, _| member.leave(&restart))
            .await;
        for newcomer in &self.members {
            newcomer.change(ChildState::Escalated, |_| {});
        }
    }

    /// Stops all but one, the last first, and has each noted.
    async fn stop_siblings(
        &mut self,
        ended: usize,
        note: impl Fn(&mut Member, Restart, &mpsc::Sender<Event>),
    ) {
        let why = format!("its sibling {} had ended", self.members[ended].name);
        for index in (0..self.members.len())
            .rev()
            .filter(|index| *index != ended)
        {
            let member = &mut self.members[index];
            let exit = match &mut member.life {
                Some(life) => life.stop(SIBLING_STOP_DEADLINE).await,
                // It had not been started again, or yet.
                None => continue,
            };
            let restart = Restart {
                when: SystemTime::now(),
                exit,
                why: why.clone(),
                last_lines: Vec::new(),
            };
            note(member, restart, &self.events);
            member.life = None;
        }
    }

    /// Waits before a restart, and does what is asked meanwhile. True when nobody is left.
    async fn is_done_within(&mut self, pause: Duration) -> bool {
        let until = tokio::time::Instant::now() + pause;
        while tokio::time::timeout_at(until, self.inbox.stirred())
            .await
            .is_ok()
        {
            if self.carry_out().await {
                return true;
            }
        }
        false
    }

    /// Does what is asked. True when that leaves nobody.
    async fn carry_out(&mut self) -> bool {
        let asked = self.inbox.take();
        self.members.extend(asked.newcomers);
        for kill in asked.kills {
            for member in &mut self.members {
                if let Some(life) = &mut member.life
                    && member.name == kill.child
                    && life.pid() == Some(kill.pid)
                {
                    life.kill();
                    member.why.clone_from(&kill.why);
                }
            }
        }
        for stop in asked.stops {
            self.stop(&stop).await;
        }
        self.members.is_empty() && self.inbox.close_if_idle()
    }

    async fn stop(&mut self, stop: &Stop) {
        for index in (0..self.members.len()).rev() {
            let named = stop.child.as_ref();
            if named.is_some_and(|child| *child != self.members[index].name) {
                continue;
            }
            let mut member = self.members.remove(index);
            if let Some(mut life) = member.life.take() {
                let exit = life.stop(stop.deadline).await;
                tracing::info!(child = %member.name, %exit, "a child was stopped");
            }
            let Member {
                name, status, kept, ..
            } = member;
            kept.leave().await;
            change(&status, ChildState::Stopped, |_| {});
            tell(&self.events, Event::Stopped { child: name });
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        drop(self.inbox.close());
    }
}

impl Member {
    pub(super) fn new(name: String, status: Arc<Mutex<ChildStatus>>, kept: Box<dyn Kept>) -> Self {
        Self {
            name,
            status,
            kept,
            life: None,
            began: clock::now(),
            why: String::new(),
        }
    }

    /// It has ended, and will be started again.
    fn rest(&mut self, restart: Restart, pause: Duration, events: &mpsc::Sender<Event>) {
        self.life = None;
        self.change(ChildState::BackingOff, |status| {
            status.note(restart.clone())
        });
        let child = self.name.clone();
        let exited = Event::Exited {
            child,
            restart,
            pause,
        };
        tell(events, exited);
    }

    /// It has ended, and will not be started again.
    fn leave(&mut self, restart: &Restart) {
        self.change(ChildState::Escalated, |status| {
            status.last = Some(restart.clone());
        });
    }

    fn change(&self, state: ChildState, more: impl FnOnce(&mut ChildStatus)) {
        change(&self.status, state, more);
    }
}

fn change(status: &Mutex<ChildStatus>, state: ChildState, more: impl FnOnce(&mut ChildStatus)) {
    let mut status = lock(status);
    status.state = state;
    status.pid = None;
    more(&mut status);
}

fn tell(events: &mpsc::Sender<Event>, event: Event) {
    if let Err(error) = events.try_send(event) {
        tracing::debug!(%error, "nobody reads the supervisor's news");
    }
}

/// What an end of one may cost the others before they begin again together.
const SIBLING_STOP_DEADLINE: Duration = Duration::from_secs(5);
