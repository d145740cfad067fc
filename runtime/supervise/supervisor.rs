//! The supervisor of processes and actors: who its children are, in the order in which they were given
//! to it. They are started in that order and stopped in reverse; keepers do the rest.

use std::fmt;
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::Duration;

use actix::Actor;
use tokio::sync::{mpsc, oneshot};
use tokio_util::task::AbortOnDropHandle;

use super::actor::{self, ActorRef, ActorSpec, Fresh};
use super::child::{ChildSpec, Program};
use super::inbox::{Inbox, Kill};
use super::keeper::{Keeper, Member, OnEscalation};
use super::kept::Kept;
use super::policy::{RestartHistory, RestartPolicy};
use super::status::{ChildStatus, Event};
use crate::sync::lock;

/// Keeps child processes and actors running. Dropping it kills the processes and stops the actors.
pub struct Supervisor {
    strategy: Strategy,
    policy: RestartPolicy,
    events: mpsc::Sender<Event>,
    on_escalation: OnEscalation,
    children: Arc<Mutex<Children>>,
}

/// Who is restarted when one child ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strategy {
    /// That one alone. Each child has a count of its own.
    OneForOne,
    /// All: the others are stopped, the last one first, and all are started anew in order. Their ends
    /// are counted together.
    AllForOne,
}

#[derive(Default)]
struct Children {
    list: Vec<Child>,
    /// Resolves when the last one was started for the first time.
    begun: Option<oneshot::Receiver<()>>,
}

struct Child {
    name: String,
    is_process: bool,
    status: Arc<Mutex<ChildStatus>>,
    group: Arc<Group>,
}

/// Those that one keeper has.
struct Group {
    inbox: Arc<Inbox>,
    _task: AbortOnDropHandle<()>,
}

impl Supervisor {
    /// A supervisor without children that restarts one for one, and its news. News that nobody reads
    /// is dropped when 256 wait; [`status`](Self::status) always knows the truth.
    pub fn new(policy: RestartPolicy) -> (Self, mpsc::Receiver<Event>) {
        Self::with_strategy(Strategy::OneForOne, policy)
    }

    /// The same with another strategy.
    pub fn with_strategy(
        strategy: Strategy,
        policy: RestartPolicy,
    ) -> (Self, mpsc::Receiver<Event>) {
        let (events, news) = mpsc::channel(EVENTS_MAX);
        let supervisor = Self {
            strategy,
            policy,
            events,
            on_escalation: Arc::new(OnceLock::new()),
            children: Arc::default(),
        };
        (supervisor, news)
    }

    /// Has `told` called when a child is given up, before anything of it is dropped and before anybody
    /// can notice: for a process that is better ended than left without that child. Only the first
    /// call counts.
    pub fn on_escalation(&self, told: impl Fn(&ChildStatus) + Send + Sync + 'static) {
        let _ = self.on_escalation.set(Box::new(told));
    }

    /// Starts a child process and keeps it running. Must be called within a tokio runtime, on a thread
    /// that lives as long as the child should: on Linux the child dies with the thread.
    ///
    /// # Errors
    /// [`SupervisorError::NameTaken`] while a child of that name is supervised.
    pub fn start(&self, spec: ChildSpec) -> Result<(), SupervisorError> {
        let name = spec.name.clone();
        self.start_kept(name, Box::new(Program(spec)))
    }

    /// The same for a process that is none of the machine's.
    ///
    /// # Errors
    /// [`SupervisorError::NameTaken`] while a child of that name is supervised.
    pub fn start_kept(&self, name: String, kept: Box<dyn Kept>) -> Result<(), SupervisorError> {
        self.add(name, true, |_| ((), kept))
    }

    /// Starts an actor and keeps it running, on this thread's arbiter. `factory` makes the state of each
    /// life anew, and is given the reference that the actor is known by. A panic in a handler, in a
    /// handler's future, in `started` or in the factory ends a life, and so does a context that stops
    /// unasked. Messages that wait are handled by the next life, in order; the one whose handler
    /// panicked is a [dead letter](super::DeadLetter).
    ///
    /// A stop lets the handlers under way reply, begins no further message, and runs the actor's
    /// `stopping` and `stopped`.
    ///
    /// # Errors
    /// [`SupervisorError::NameTaken`] while a child of that name is supervised.
    ///
    /// # Panics
    /// Outside of an actix system, like every start of an actor.
    pub fn start_actor<A, F>(
        &self,
        spec: ActorSpec,
        factory: F,
    ) -> Result<ActorRef<A>, SupervisorError>
    where
        A: Actor,
        A::Context: Fresh<A>,
        F: FnMut(&ActorRef<A>) -> A + 'static,
    {
        let name = spec.name.clone();
        self.add(name, false, |status| actor::open(&spec, status, factory))
    }

    fn add<R>(
        &self,
        name: String,
        is_process: bool,
        open: impl FnOnce(Arc<Mutex<ChildStatus>>) -> (R, Box<dyn Kept>),
    ) -> Result<R, SupervisorError> {
        let mut children = lock(&self.children);
        let is_over = |child: &Child| child.group.inbox.is_closed();
        children
            .list
            .retain(|child| child.name != name || !is_over(child));
        if children.list.iter().any(|child| child.name == name) {
            return Err(SupervisorError::NameTaken(name));
        }
        let status = Arc::new(Mutex::new(ChildStatus::new(&name)));
        let (opened, kept) = open(Arc::clone(&status));
        let member = Member::new(name.clone(), Arc::clone(&status), kept);
        let group = self.give(member, &mut children);
        children.list.push(Child {
            name,
            is_process,
            status,
            group,
        });
        Ok(opened)
    }

    /// Gives a child to the keeper that shares its fate.
    fn give(&self, member: Member, children: &mut Children) -> Arc<Group> {
        let last = children.list.last().map(|child| Arc::clone(&child.group));
        let siblings = last.filter(|_| self.strategy == Strategy::AllForOne);
        let Some(group) = siblings else {
            return self.keep(member, children);
        };
        match group.inbox.add(member) {
            Ok(()) => group,
            Err(member) => self.keep(*member, children),
        }
    }

    /// A keeper of its own.
    fn keep(&self, member: Member, children: &mut Children) -> Arc<Group> {
        let inbox = Arc::new(Inbox::default());
        let (begun, has_begun) = oneshot::channel();
        let (_, nobody) = oneshot::channel();
        let keeper = Keeper {
            members: vec![member],
            policy: self.policy.clone(),
            history: RestartHistory::default(),
            events: self.events.clone(),
            on_escalation: Arc::clone(&self.on_escalation),
            inbox: Arc::clone(&inbox),
            turn: children.begun.replace(has_begun).unwrap_or(nobody),
            begun: Some(begun),
        };
        Arc::new(Group {
            inbox,
            _task: AbortOnDropHandle::new(tokio::spawn(keeper.keep())),
        })
    }

    /// Every child, in the order they were started.
    pub fn status(&self) -> Vec<ChildStatus> {
        status_of(&self.children)
    }

    /// A way to read that from anywhere.
    pub fn roster(&self) -> Roster {
        Roster {
            children: Arc::downgrade(&self.children),
        }
    }

    /// Kills a child's process that hangs, if it is still the one of that id. It counts as an end that
    /// nobody asked for: the child is restarted, and the record says `why`.
    ///
    /// # Errors
    /// [`SupervisorError::NoSuchChild`] and [`SupervisorError::NotAProcess`].
    pub fn kill_child(
        &self,
        name: &str,
        pid: u32,
        why: impl Into<String>,
    ) -> Result<(), SupervisorError> {
        let children = lock(&self.children);
        let child = children.list.iter().find(|child| child.name == name);
        let child = child.ok_or_else(|| SupervisorError::NoSuchChild(name.to_owned()))?;
        if !child.is_process {
            return Err(SupervisorError::NotAProcess(name.to_owned()));
        }
        child.group.inbox.kill(Kill {
            child: name.to_owned(),
            pid,
            why: why.into(),
        });
        Ok(())
    }

    /// Stops one child: SIGTERM, and SIGKILL when it has not ended by the deadline; an actor is dropped
    /// then. It is not restarted, and its name is free again. Its siblings go on.
    ///
    /// # Errors
    /// [`SupervisorError::NoSuchChild`].
    pub async fn stop_child(&self, name: &str, deadline: Duration) -> Result<(), SupervisorError> {
        let child = {
            let mut children = lock(&self.children);
            let at = children.list.iter().position(|child| child.name == name);
            let at = at.ok_or_else(|| SupervisorError::NoSuchChild(name.to_owned()))?;
            children.list.remove(at)
        };
        child.group.inbox.stop(Some(child.name), deadline).await;
        Ok(())
    }

    /// Stops all children, the last started first, each within `deadline`.
    pub async fn stop(&self, deadline: Duration) {
        loop {
            let group = {
                let mut children = lock(&self.children);
                let Some(last) = children.list.pop() else {
                    return;
                };
                let siblings = |child: &Child| Arc::ptr_eq(&child.group, &last.group);
                children.list.retain(|child| !siblings(child));
                last.group
            };
            group.inbox.stop(None, deadline).await;
        }
    }
}

/// Reads what a supervisor knows about its children, and keeps neither it nor them.
#[derive(Clone)]
pub struct Roster {
    children: Weak<Mutex<Children>>,
}

impl Roster {
    /// Every child, in the order they were started; nobody when the supervisor is gone.
    pub fn status(&self) -> Vec<ChildStatus> {
        let children = self.children.upgrade();
        children.map_or_else(Vec::new, |children| status_of(&children))
    }
}

impl fmt::Debug for Roster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.status()).finish()
    }
}

fn status_of(children: &Mutex<Children>) -> Vec<ChildStatus> {
    let children = lock(children);
    let status = |child: &Child| lock(&child.status).clone();
    children.list.iter().map(status).collect()
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
    /// That child is an actor.
    #[error("the child {0:?} is no process that could be killed")]
    NotAProcess(String),
}

/// More than any operator reads; a crash loop escalates long before.
const EVENTS_MAX: usize = 256;
