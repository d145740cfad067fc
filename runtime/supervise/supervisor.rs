//! The supervisor of child processes, one for one: each child has a task that starts it, waits for
//! its end, asks the policy, and starts it again. Children are started in the order given and
//! stopped in reverse.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::child::{ChildSpec, Exit, Running};
use super::policy::{RestartHistory, RestartPolicy, Verdict};
use crate::sync::lock;

/// Keeps child processes running. Dropping it kills them.
pub struct Supervisor {
    policy: RestartPolicy,
    events: mpsc::Sender<Event>,
    children: Mutex<Vec<Child>>,
}

/// An order to kill one process, for a reason.
struct Kill {
    pid: u32,
    why: String,
}

struct Child {
    name: String,
    status: Arc<Mutex<ChildStatus>>,
    /// How long a stop may take, once one is wanted.
    stop: watch::Sender<Option<Duration>>,
    /// Why its present process is to be killed.
    kill: mpsc::Sender<Kill>,
    task: JoinHandle<()>,
}

impl Supervisor {
    /// A supervisor without children, and its news. News that nobody reads is dropped when
    /// 256 wait; [`status`](Self::status) always knows the truth.
    pub fn new(policy: RestartPolicy) -> (Self, mpsc::Receiver<Event>) {
        let (events, news) = mpsc::channel(EVENTS_MAX);
        (
            Self {
                policy,
                events,
                children: Mutex::new(Vec::new()),
            },
            news,
        )
    }

    /// Starts a child and keeps it running. Must be called within a tokio runtime, on a thread that
    /// lives as long as the child should: on Linux the child dies with the thread.
    ///
    /// # Errors
    /// [`SupervisorError::NameTaken`] while a child of that name is supervised.
    pub fn start(&self, spec: ChildSpec) -> Result<(), SupervisorError> {
        let mut children = lock(&self.children);
        children.retain(|child| !child.task.is_finished() || child.name != spec.name);
        if children.iter().any(|child| child.name == spec.name) {
            return Err(SupervisorError::NameTaken(spec.name));
        }
        let name = spec.name.clone();
        let status = Arc::new(Mutex::new(ChildStatus::new(&name)));
        let (stop, stopping) = watch::channel(None);
        let (kill, kills) = mpsc::channel(KILLS_MAX);
        let keeper = Keeper {
            spec,
            policy: self.policy.clone(),
            events: self.events.clone(),
            status: Arc::clone(&status),
            stopping,
            kills,
        };
        let task = tokio::spawn(keeper.keep());
        children.push(Child {
            name,
            status,
            stop,
            kill,
            task,
        });
        Ok(())
    }

    /// Every child, in the order they were started.
    pub fn status(&self) -> Vec<ChildStatus> {
        lock(&self.children)
            .iter()
            .map(|child| lock(&child.status).clone())
            .collect()
    }

    /// Kills a child's process that hangs, if it is still the one of that id. It counts as an end that
    /// nobody asked for: the child is restarted, and the record says `why`.
    ///
    /// # Errors
    /// [`SupervisorError::NoSuchChild`].
    pub fn kill_child(
        &self,
        name: &str,
        pid: u32,
        why: impl Into<String>,
    ) -> Result<(), SupervisorError> {
        let children = lock(&self.children);
        let child = children.iter().find(|child| child.name == name);
        let child = child.ok_or_else(|| SupervisorError::NoSuchChild(name.to_owned()))?;
        let why = why.into();
        // Nobody takes it when the child is not running, and as many wait already when it is full.
        let _ = child.kill.try_send(Kill { pid, why });
        Ok(())
    }

    /// Stops one child: SIGTERM, and SIGKILL when it has not ended by the deadline. It is not
    /// restarted, and its name is free again.
    ///
    /// # Errors
    /// [`SupervisorError::NoSuchChild`].
    pub async fn stop_child(&self, name: &str, deadline: Duration) -> Result<(), SupervisorError> {
        let child = {
            let mut children = lock(&self.children);
            let at = children.iter().position(|child| child.name == name);
            children.remove(at.ok_or_else(|| SupervisorError::NoSuchChild(name.to_owned()))?)
        };
        child.stop(deadline).await;
        Ok(())
    }

    /// Stops all children, the last started first, each within `deadline`.
    pub async fn stop(&self, deadline: Duration) {
        loop {
            let Some(child) = lock(&self.children).pop() else {
                return;
            };
            child.stop(deadline).await;
        }
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        // Aborting the task drops the child's handle, which kills the child.
        for child in lock(&self.children).drain(..) {
            child.task.abort();
        }
    }
}

impl Child {
    async fn stop(self, deadline: Duration) {
        self.stop.send_replace(Some(deadline));
        let _ = self.task.await;
    }
}

/// The task of one child.
struct Keeper {
    spec: ChildSpec,
    policy: RestartPolicy,
    events: mpsc::Sender<Event>,
    status: Arc<Mutex<ChildStatus>>,
    stopping: watch::Receiver<Option<Duration>>,
    kills: mpsc::Receiver<Kill>,
}

impl Keeper {
    async fn keep(mut self) {
        let mut history = RestartHistory::default();
        loop {
            let began = Instant::now();
            let Some(End {
                exit,
                why,
                last_lines,
            }) = self.run_once().await
            else {
                return;
            };
            tracing::warn!(child = %self.spec.name, %exit, why, "a child ended");
            let (now, chance) = (Instant::now(), rand::random());
            let verdict = if exit.is_from_outside() {
                history.killed(&self.policy, now, now - began, chance)
            } else {
                history.failed(&self.policy, now, chance)
            };
            let restart = Restart {
                when: SystemTime::now(),
                exit,
                why,
                last_lines,
            };
            match verdict {
                Verdict::RestartAfter(pause) => {
                    self.change(ChildState::BackingOff, |status| {
                        status.note(restart.clone())
                    });
                    self.tell(Event::Exited {
                        child: self.spec.name.clone(),
                        restart,
                        pause,
                    });
                    if self.stopped_within(pause).await {
                        return;
                    }
                }
                Verdict::Escalate => {
                    let restarts = lock(&self.status).restarts;
                    let (exit, why) = (&restart.exit, &restart.why);
                    tracing::error!(
                        child = %self.spec.name, restarts, %exit, why,
                        last_lines = ?restart.last_lines,
                        "a child failed too often and is given up"
                    );
                    self.change(ChildState::Escalated, |status| {
                        status.last = Some(restart.clone())
                    });
                    self.tell(Event::Escalated {
                        child: self.spec.name.clone(),
                        restart,
                    });
                    return;
                }
            }
        }
    }

    /// One life of the child; `None` when it ended because it was told to.
    async fn run_once(&mut self) -> Option<End> {
        let mut running = match Running::start(&self.spec) {
            Ok(running) => running,
            Err(error) => {
                return Some(End {
                    exit: Exit::NotStarted(error.to_string()),
                    why: String::new(),
                    last_lines: Vec::new(),
                });
            }
        };
        let pid = running.pid();
        self.change(ChildState::Running, |status| status.pid = pid);
        tracing::info!(child = %self.spec.name, pid, "a child was started");
        self.tell(Event::Started {
            child: self.spec.name.clone(),
            pid: pid.unwrap_or_default(),
        });
        let mut why = String::new();
        let deadline = loop {
            tokio::select! {
                exit = running.exited() => {
                    let last_lines = running.last_lines().await;
                    return Some(End { exit, why, last_lines });
                }
                deadline = wanted(&mut self.stopping) => break deadline,
                Some(kill) = self.kills.recv() => if Some(kill.pid) == pid {
                    running.kill();
                    why = kill.why;
                }
            }
        };
        let exit = running.stop(deadline).await;
        tracing::info!(child = %self.spec.name, %exit, "a child was stopped");
        self.note_stopped();
        None
    }

    async fn stopped_within(&mut self, pause: Duration) -> bool {
        let stopped = tokio::time::timeout(pause, wanted(&mut self.stopping))
            .await
            .is_ok();
        if stopped {
            self.note_stopped();
        }
        stopped
    }

    fn note_stopped(&self) {
        self.change(ChildState::Stopped, |_| {});
        self.tell(Event::Stopped {
            child: self.spec.name.clone(),
        });
    }

    fn change(&self, state: ChildState, more: impl FnOnce(&mut ChildStatus)) {
        let mut status = lock(&self.status);
        status.state = state;
        status.pid = None;
        more(&mut status);
    }

    fn tell(&self, event: Event) {
        if self.events.try_send(event).is_err() {
            tracing::debug!(child = %self.spec.name, "nobody reads the supervisor's news");
        }
    }
}

/// How one life of a child ended.
struct End {
    exit: Exit,
    why: String,
    last_lines: Vec<String>,
}

/// Resolves when a stop is wanted. A supervisor that is gone aborts the task instead.
async fn wanted(stopping: &mut watch::Receiver<Option<Duration>>) -> Duration {
    let deadline = stopping
        .wait_for(Option::is_some)
        .await
        .ok()
        .and_then(|deadline| *deadline);
    match deadline {
        Some(deadline) => deadline,
        None => std::future::pending().await,
    }
}

/// What a child is doing now, and what became of it before.
#[derive(Clone, Debug)]
pub struct ChildStatus {
    /// Its name in the supervisor.
    pub name: String,
    /// Its process id, while it runs.
    pub pid: Option<u32>,
    /// What it is doing.
    pub state: ChildState,
    /// How often it was restarted since it was given to the supervisor.
    pub restarts: u64,
    /// The last end that nobody had asked for.
    pub last: Option<Restart>,
    /// The last 16 of them, the oldest first.
    pub history: VecDeque<Restart>,
}

impl ChildStatus {
    fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            pid: None,
            state: ChildState::BackingOff,
            restarts: 0,
            last: None,
            history: VecDeque::new(),
        }
    }

    fn note(&mut self, restart: Restart) {
        self.restarts += 1;
        if self.history.len() == HISTORY_MAX {
            self.history.pop_front();
        }
        self.history.push_back(restart.clone());
        self.last = Some(restart);
    }
}

/// What a child is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ChildState {
    /// It runs.
    Running,
    /// It waits to be started, for the first time or again.
    BackingOff,
    /// It failed too often and is left alone.
    Escalated,
    /// It was told to stop.
    Stopped,
}

/// The record of one end that nobody had asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restart {
    /// When it ended.
    pub when: SystemTime,
    /// How.
    pub exit: Exit,
    /// Why it was killed, where its supervisor was told to; else empty.
    pub why: String,
    /// The last 50 lines it wrote to standard error.
    pub last_lines: Vec<String>,
}

/// News of a supervisor.
#[derive(Clone, Debug)]
pub enum Event {
    /// A child was started, for the first time or again.
    Started {
        /// Its name.
        child: String,
        /// Its process id.
        pid: u32,
    },
    /// A child ended unasked and will be started again after `pause`.
    Exited {
        /// Its name.
        child: String,
        /// How it ended.
        restart: Restart,
        /// When it will be started.
        pause: Duration,
    },
    /// A child ended unasked too often and is left alone.
    Escalated {
        /// Its name.
        child: String,
        /// How it ended the last time.
        restart: Restart,
    },
    /// A child was stopped as asked.
    Stopped {
        /// Its name.
        child: String,
    },
}

/// A request that a supervisor cannot fulfil: the caller's fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SupervisorError {
    /// A child of that name is supervised already.
    #[error("there is a child {0:?} already")]
    NameTaken(String),
    /// No child of that name is supervised.
    #[error("there is no child {0:?}")]
    NoSuchChild(String),
}

/// More than any operator reads; a crash loop escalates long before.
const EVENTS_MAX: usize = 256;

/// One is enough; a second one may come while the first is carried out.
const KILLS_MAX: usize = 4;

/// Enough to see a pattern; the log has the rest.
const HISTORY_MAX: usize = 16;
