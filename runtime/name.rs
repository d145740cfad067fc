//! Names of processes and of the actors in them. Checked when they are made, so that nobody who
//! holds one has to check it again.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The name of a process: `node-2` for a node, `node-2/worker-0` for a child process of it.
///
/// A child uses its node's key, so a process may only call itself by a name whose first part is the
/// node that its key is pinned for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ProcessName(String);

impl ProcessName {
    /// Checks and takes a name: one or two parts of letters, digits, `-`, `_` and `.`.
    ///
    /// # Errors
    /// [`NameError`] when it is empty, too long, or has other characters or more parts.
    pub fn new(name: impl Into<String>) -> Result<Self, NameError> {
        let name = name.into();
        if name.len() > NAME_BYTES_MAX {
            return Err(NameError::TooLong { bytes: name.len() });
        }
        let mut parts = name.split('/');
        let good = parts.by_ref().take(2).all(is_word) && parts.next().is_none();
        if good {
            Ok(Self(name))
        } else {
            Err(NameError::Process(name))
        }
    }

    /// The name of a child process of this process's node.
    ///
    /// # Errors
    /// [`NameError`] when `child` is not one word.
    pub fn child(&self, child: &str) -> Result<Self, NameError> {
        Self::new(format!("{}/{child}", self.node()))
    }

    /// The node this process belongs to: the part before the slash.
    pub fn node(&self) -> &str {
        self.0.split('/').next().unwrap_or(&self.0)
    }

    /// The whole name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ProcessName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for ProcessName {
    type Err = NameError;

    fn from_str(name: &str) -> Result<Self, NameError> {
        Self::new(name)
    }
}

impl TryFrom<String> for ProcessName {
    type Error = NameError;

    fn try_from(name: String) -> Result<Self, NameError> {
        Self::new(name)
    }
}

impl From<ProcessName> for String {
    fn from(name: ProcessName) -> Self {
        name.0
    }
}

/// Where an actor is: a process, and the name it is registered under there. Written `node-2#actor`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ActorPath {
    /// The process that the actor runs in.
    pub process: ProcessName,
    /// The name that it was registered under.
    pub actor: String,
}

impl ActorPath {
    /// The actor called `actor` in `process`.
    pub fn new(process: ProcessName, actor: impl Into<String>) -> Self {
        Self {
            process,
            actor: actor.into(),
        }
    }
}

impl fmt::Display for ActorPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}#{}", self.process, self.actor)
    }
}

impl FromStr for ActorPath {
    type Err = NameError;

    fn from_str(path: &str) -> Result<Self, NameError> {
        match path.split_once('#') {
            Some((process, actor)) if is_word(actor) => Ok(Self::new(process.parse()?, actor)),
            _ => Err(NameError::Path(path.to_owned())),
        }
    }
}

/// A name that cannot be one: the fault is with whoever wrote it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Not one or two words.
    #[error(
        "{0:?} is no process name: write `node` or `node/child`, of letters, digits, -, _ and ."
    )]
    Process(String),
    /// Not `process#actor`.
    #[error("{0:?} is no actor path: write `process#actor`")]
    Path(String),
    /// Longer than the wire carries.
    #[error("a name of {bytes} bytes is longer than {NAME_BYTES_MAX}")]
    TooLong {
        /// How long it is.
        bytes: usize,
    },
}

fn is_word(word: &str) -> bool {
    !word.is_empty()
        && word
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
}

/// Two host names of 63 bytes, the longest label DNS allows, and a slash.
const NAME_BYTES_MAX: usize = 127;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_one_or_two_words() {
        for good in ["a", "node-1", "node-1/worker-0", "A.b_c"] {
            assert_eq!(ProcessName::new(good).unwrap().as_str(), good);
        }
        for bad in [
            "",
            "/",
            "a/",
            "/a",
            "a/b/c",
            "a b",
            "a#b",
            "ä",
            &"x".repeat(128),
        ] {
            assert!(ProcessName::new(bad).is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn a_child_belongs_to_its_node() {
        let child: ProcessName = "node-1/worker-0".parse().unwrap();
        assert_eq!(child.node(), "node-1");
        assert_eq!(child.child("worker-1").unwrap().as_str(), "node-1/worker-1");
    }

    #[test]
    fn a_path_survives_being_written() {
        let path: ActorPath = "node-1/worker-0#counter".parse().unwrap();
        assert_eq!(path.to_string().parse(), Ok(path));
        assert!("node-1".parse::<ActorPath>().is_err());
        assert!("node-1#".parse::<ActorPath>().is_err());
        assert!("node-1#a#b".parse::<ActorPath>().is_err());
    }
}
