//! Which request a message belongs to: the context of a trace, which travels with every message.
//!
//! What is current on a thread is a stack. A tracing span that is entered puts its context there,
//! where [`TraceLayer`] is installed; [`TraceContext::in_scope`] does the same by hand. Whatever is
//! sent carries the top of it, and an actor that runs in a [`TracedContext`] finds it there again.

use std::cell::RefCell;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::str::FromStr;
use std::task::{Context, Poll};

use tracing::span::{Attributes, Id};
use tracing_subscriber::layer::{self, Layer};
use tracing_subscriber::registry::LookupSpan;

mod context;

pub use context::TracedContext;

/// One place in one trace: the trace's id, and that of the span that is the parent of what follows.
/// Neither is zero. Written and parsed as W3C's `traceparent`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TraceContext {
    pub(crate) trace: u128,
    pub(crate) span: u64,
}

impl TraceContext {
    /// Begins a trace.
    pub fn begin() -> Self {
        Self {
            trace: rand::random::<u128>().max(1),
            span: rand::random::<u64>().max(1),
        }
    }

    /// A new span of the same trace.
    pub fn child(self) -> Self {
        Self {
            trace: self.trace,
            span: rand::random::<u64>().max(1),
        }
    }

    /// What a message sent by this thread now would carry.
    pub fn current() -> Option<Self> {
        CURRENT.with_borrow(|entries| entries.last().map(|entry| entry.context))
    }

    /// The id of the whole trace.
    pub fn trace_id(self) -> u128 {
        self.trace
    }

    /// The id of the span that is the parent of what follows.
    pub fn span_id(self) -> u64 {
        self.span
    }

    /// Runs `work` with this as the current context.
    pub fn in_scope<T>(self, work: impl FnOnce() -> T) -> T {
        let _entered = Entered::new(Some(self));
        work()
    }

    /// Drives `work` with this as the current context, on whatever thread.
    pub fn scope<F: Future>(self, work: F) -> Scope<F> {
        Scope {
            context: self,
            work: Box::pin(work),
        }
    }
}

impl fmt::Display for TraceContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{:032x}-{:016x}-01", self.trace, self.span)
    }
}

impl FromStr for TraceContext {
    type Err = TraceError;

    fn from_str(text: &str) -> Result<Self, TraceError> {
        parse_traceparent(text).ok_or(TraceError)
    }
}

fn parse_traceparent(text: &str) -> Option<TraceContext> {
    let mut parts = text.split('-');
    let mut next = |digits: usize| {
        let part = parts.next().filter(|part| part.len() == digits)?;
        let is_hex = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        part.bytes().all(is_hex).then_some(part)
    };
    let version = next(2).filter(|&version| version != "ff")?;
    let trace = u128::from_str_radix(next(32)?, 16).ok()?;
    let span = u64::from_str_radix(next(16)?, 16).ok()?;
    next(2)?;
    // A later version may append fields; version 0 has none.
    let is_whole = version != "00" || parts.next().is_none();
    (trace != 0 && span != 0 && is_whole).then_some(TraceContext { trace, span })
}

/// The text is no trace context.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a traceparent is 00-TRACE-SPAN-FLAGS with 32, 16 and 2 lower-case hexadecimal digits")]
pub struct TraceError;

/// A future with a trace context, see [`TraceContext::scope`].
#[derive(Debug)]
pub struct Scope<F> {
    context: TraceContext,
    work: Pin<Box<F>>,
}

impl<F: Future> Future for Scope<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let _entered = Entered::new(Some(self.context));
        self.work.as_mut().poll(cx)
    }
}

/// Gives every tracing span a context: that of its parent's trace, or a new trace. Install it with
/// the subscriber of the process, `tracing_subscriber::registry().with(TraceLayer)`; it records
/// nothing itself.
#[derive(Clone, Copy, Debug, Default)]
pub struct TraceLayer;

impl<S> Layer<S> for TraceLayer
where
    S: tracing::Subscriber + for<'a> LookupSpan<'a>,
{
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, ctx: layer::Context<'_, S>) {
        let Some(span) = ctx.span(id) else { return };
        let parent = match attributes.parent() {
            Some(parent) => ctx
                .span(parent)
                .and_then(|parent| parent.extensions().get::<TraceContext>().copied()),
            None if attributes.is_contextual() => TraceContext::current(),
            None => None,
        };
        let context = parent.map_or_else(TraceContext::begin, TraceContext::child);
        span.extensions_mut().insert(context);
    }

    fn on_enter(&self, id: &Id, ctx: layer::Context<'_, S>) {
        let context = ctx
            .span(id)
            .and_then(|span| span.extensions().get::<TraceContext>().copied());
        if let Some(context) = context {
            let span = Some(id.into_u64());
            CURRENT.with_borrow_mut(|entries| entries.push(Entry { span, context }));
        }
    }

    fn on_exit(&self, id: &Id, _: layer::Context<'_, S>) {
        // Guards may be dropped in another order than they were made.
        CURRENT.with_borrow_mut(|entries| {
            let of_span = |entry: &Entry| entry.span == Some(id.into_u64());
            if let Some(at) = entries.iter().rposition(of_span) {
                entries.remove(at);
            }
        });
    }
}

/// While it lives, its context is the current one of this thread; none, if it has none.
pub(crate) struct Entered {
    outside: Vec<Entry>,
}

impl Entered {
    pub(crate) fn new(context: Option<TraceContext>) -> Self {
        let entry = context.map(|context| Entry {
            span: None,
            context,
        });
        let outside = CURRENT.replace(entry.into_iter().collect());
        Self { outside }
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        CURRENT.set(std::mem::take(&mut self.outside));
    }
}

struct Entry {
    /// The tracing span that put it there.
    span: Option<u64>,
    context: TraceContext,
}

thread_local! {
    static CURRENT: RefCell<Vec<Entry>> = const { RefCell::new(Vec::new()) };
}

#[cfg(test)]
mod tests {
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    #[test]
    fn a_context_survives_being_written() {
        let context = TraceContext::begin();
        assert_eq!(context.to_string().parse(), Ok(context));
        let known = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        assert_eq!(known.parse::<TraceContext>().unwrap().to_string(), known);
        for wrong in [
            "",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
            "00-4BF92F3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-x",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        ] {
            assert_eq!(wrong.parse::<TraceContext>(), Err(TraceError), "{wrong}");
        }
    }

    #[test]
    fn a_span_inside_another_is_of_the_same_trace() {
        let subscriber = tracing_subscriber::registry().with(TraceLayer);
        tracing::subscriber::with_default(subscriber, || {
            assert_eq!(TraceContext::current(), None);
            let outer = tracing::info_span!("outer").entered();
            let of_outer = TraceContext::current().unwrap();
            let inner = tracing::info_span!("inner").entered();
            let of_inner = TraceContext::current().unwrap();
            assert_eq!(of_inner.trace_id(), of_outer.trace_id());
            assert_ne!(of_inner.span_id(), of_outer.span_id());
            // In the wrong order, as guards may be.
            drop(outer);
            assert_eq!(TraceContext::current(), Some(of_inner));
            drop(inner);
            assert_eq!(TraceContext::current(), None);
            let other = tracing::info_span!("other").entered();
            assert_ne!(
                TraceContext::current().map(TraceContext::trace_id),
                Some(of_outer.trace_id())
            );
            drop(other);
        });
    }

    #[test]
    fn a_scope_ends_where_it_began() {
        let (outer, inner) = (TraceContext::begin(), TraceContext::begin());
        outer.in_scope(|| {
            inner.in_scope(|| assert_eq!(TraceContext::current(), Some(inner)));
            assert_eq!(TraceContext::current(), Some(outer));
        });
        assert_eq!(TraceContext::current(), None);
    }
}
