//! What became of a message whose reply does not come. actix's own channels say of a panic only that
//! there is no reply; the supervisor knows better, and whoever sends through a plain `Recipient`
//! learns it here: sending and packing happen on one thread, one within the other.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::sync::{Arc, OnceLock};

/// Settled before the reply is given up: whoever misses the reply finds the reason.
#[derive(Debug, Default)]
pub(crate) struct Fate {
    panicked: OnceLock<String>,
}

impl Fate {
    /// That of the message which is being packed now, if its sender wants to know.
    pub(super) fn of_this_message() -> Option<Arc<Self>> {
        WANTED.get().then(|| {
            let fate = Arc::new(Self::default());
            MADE.set(Some(Arc::clone(&fate)));
            fate
        })
    }

    /// Its handler has panicked with these words.
    pub(super) fn settle(&self, cause: &str) {
        let _ = self.panicked.set(cause.to_owned());
    }

    /// The words with which its handler panicked, if it did.
    pub(crate) fn panicked(&self) -> Option<&str> {
        self.panicked.get().map(String::as_str)
    }
}

/// Sends a message, and says where its fate will be known: nowhere, if the actor is not supervised.
pub(crate) fn collect<R>(send: impl FnOnce() -> R) -> (R, Option<Arc<Fate>>) {
    MADE.take();
    let _restored = Restored {
        flag: &WANTED,
        before: WANTED.replace(true),
    };
    let sent = send();
    (sent, MADE.take())
}

/// Drops what a panic has left behind: to what is dropped meanwhile it looks as if the panic was
/// still under way, but a second one does not end the process.
pub(super) fn bury<T>(remains: T) {
    let _restored = Restored {
        flag: &BURYING,
        before: BURYING.replace(true),
    };
    drop(remains);
}

/// Is what is being dropped now dropped because of a panic?
pub(crate) fn is_panic_under_way() -> bool {
    std::thread::panicking() || BURYING.get()
}

/// What a panic said, cut to what a record may hold.
pub(super) fn words(panic: &(dyn Any + Send)) -> String {
    let said = panic.downcast_ref::<String>().map(String::as_str);
    let said = said.or_else(|| panic.downcast_ref::<&str>().copied());
    let said = said.unwrap_or("a panic without words");
    said.chars().take(WORDS_CHARS_MAX).collect()
}

struct Restored {
    flag: &'static std::thread::LocalKey<Cell<bool>>,
    before: bool,
}

impl Drop for Restored {
    fn drop(&mut self) {
        self.flag.set(self.before);
    }
}

thread_local! {
    static WANTED: Cell<bool> = const { Cell::new(false) };
    static MADE: RefCell<Option<Arc<Fate>>> = const { RefCell::new(None) };
    static BURYING: Cell<bool> = const { Cell::new(false) };
}

/// An assertion that prints two values is shorter; a panic that prints a buffer is no message.
const WORDS_CHARS_MAX: usize = 2000;
