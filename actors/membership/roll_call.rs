//! Which actors the processes of the cluster keep, and what became of them, by what each process said
//! last. Pure: it decides nothing, and is for the report alone.

use std::collections::BTreeMap;

use offbook_protocol::ActorReport;

/// See the module's own words.
#[derive(Debug, Default)]
pub(super) struct RollCall {
    nodes: BTreeMap<String, OfNode>,
}

#[derive(Debug, Default)]
struct OfNode {
    own: Vec<ActorReport>,
    of_shard: Vec<ActorReport>,
}

impl RollCall {
    /// A node has said this of its own.
    pub(super) fn node_said(&mut self, node: &str, actors: Vec<ActorReport>) {
        self.of(node).own = bounded(actors);
    }

    /// The shard of this node has said this of its own.
    pub(super) fn shard_said(&mut self, node: &str, actors: Vec<ActorReport>) {
        self.of(node).of_shard = bounded(actors);
    }

    fn of(&mut self, node: &str) -> &mut OfNode {
        self.nodes.entry(node.to_owned()).or_default()
    }

    /// All of these nodes, in their order.
    pub(super) fn report<'a>(&self, nodes: impl Iterator<Item = &'a str>) -> Vec<ActorReport> {
        let known = nodes.filter_map(|node| self.nodes.get(node));
        let actors = known.flat_map(|node| node.own.iter().chain(&node.of_shard));
        actors.cloned().collect()
    }
}

fn bounded(mut actors: Vec<ActorReport>) -> Vec<ActorReport> {
    actors.truncate(ACTORS_MAX);
    actors
}

/// Of one process. A head has three.
const ACTORS_MAX: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    fn actor(name: &str) -> ActorReport {
        ActorReport {
            name: name.into(),
            ..ActorReport::default()
        }
    }

    #[test]
    fn what_was_said_last_counts_in_the_order_of_nodes() {
        let mut call = RollCall::default();
        call.shard_said("b", vec![actor("worker of b")]);
        call.node_said("b", vec![actor("first agent of b")]);
        call.node_said("b", vec![actor("agent of b")]);
        call.node_said("a", vec![actor("agent of a"); ACTORS_MAX + 1]);
        call.node_said("stranger", vec![actor("spy")]);
        let report = call.report(["a", "b", "c"].into_iter());
        let names: Vec<_> = report.iter().map(|actor| &*actor.name).collect();
        assert_eq!(names[..ACTORS_MAX], ["agent of a"; ACTORS_MAX]);
        assert_eq!(names[ACTORS_MAX..], ["agent of b", "worker of b"]);
    }
}
