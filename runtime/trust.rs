//! Whom a process talks to: the cluster it belongs to and the keys it accepts.

use crate::identity::NodeKey;

/// What both ends of a link must agree on before a message passes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trust {
    /// The cluster's id. A process of another cluster is refused.
    pub cluster: String,
    /// A hash of the configuration that must be equal everywhere.
    pub config_hash: u64,
    /// The nodes, and the keys that each may show.
    pub nodes: Vec<TrustedNode>,
}

/// One node and its pinned keys. Two keys are listed while one replaces the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrustedNode {
    /// The node's name: the first part of its processes' names.
    pub name: String,
    /// The keys it may show.
    pub keys: Vec<NodeKey>,
}

impl Trust {
    /// One key for each node, and no shared configuration.
    pub fn pinned<'a>(cluster: &str, nodes: impl IntoIterator<Item = (&'a str, NodeKey)>) -> Self {
        let node = |(name, key): (&str, _)| TrustedNode {
            name: name.to_owned(),
            keys: vec![key],
        };
        Self {
            cluster: cluster.to_owned(),
            config_hash: 0,
            nodes: nodes.into_iter().map(node).collect(),
        }
    }

    /// Is `key` pinned for the node called `node`?
    pub fn is_pinned(&self, node: &str, key: &NodeKey) -> bool {
        self.nodes
            .iter()
            .any(|trusted| trusted.name == node && trusted.keys.contains(key))
    }

    /// All pinned keys.
    pub(crate) fn keys(&self) -> impl Iterator<Item = NodeKey> {
        self.nodes.iter().flat_map(|node| node.keys.iter().copied())
    }
}
