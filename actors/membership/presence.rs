//! Which nodes are heard of, and which have been away for too long: pure, time comes in as an argument.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::formation::Member;

/// What the membership knows of the nodes' signs of life. Shards are watched apart.
#[derive(Debug)]
pub(crate) struct Presence {
    heard: BTreeMap<String, Instant>,
    /// Since when a node and its shard are away.
    away: BTreeMap<String, Instant>,
    grace: Duration,
}

impl Presence {
    /// `grace` is how long a node may be away before the others go on without it.
    pub(crate) fn new(grace: Duration) -> Self {
        Self {
            heard: BTreeMap::new(),
            away: BTreeMap::new(),
            grace,
        }
    }

    /// A node has announced itself.
    pub(crate) fn heard(&mut self, node: &str, now: Instant) {
        self.heard.insert(node.to_owned(), now);
    }

    /// The link to a node is lost: nothing is known of it until it announces itself again.
    pub(crate) fn link_lost(&mut self, node: &str) {
        self.heard.remove(node);
    }

    /// Whether each node that has been heard of may still count as alive.
    pub(crate) fn standings(&self, now: Instant) -> impl Iterator<Item = (&str, bool)> {
        let alive = move |heard: &Instant| now.saturating_duration_since(*heard) < SILENCE_MAX;
        self.heard
            .iter()
            .map(move |(node, heard)| (node.as_str(), alive(heard)))
    }

    /// Who has been away, with its shard, for longer than the grace.
    pub(crate) fn away_too_long(&mut self, members: &[Member], now: Instant) -> Vec<String> {
        let is_gone = |member: &&Member| !member.node_alive && member.shard.is_none();
        let gone = members.iter().filter(is_gone).map(|member| &member.node);
        let since = |node: &String| (node.clone(), *self.away.get(node).unwrap_or(&now));
        self.away = gone.map(since).collect();
        let too_long = |since: &Instant| now.saturating_duration_since(*since) >= self.grace;
        let away = self.away.iter().filter(|(_, since)| too_long(since));
        let mut away: Vec<_> = away.map(|(node, _)| node.clone()).collect();
        away.sort();
        away
    }
}

/// Three announcements, and one to spare.
const SILENCE_MAX: Duration = Duration::from_secs(4);

#[cfg(test)]
mod tests {
    use offbook_protocol::Epoch;

    use super::*;
    use crate::membership::formation::Formation;

    #[test]
    fn the_grace_begins_anew_whenever_a_node_was_back() {
        let now = Instant::now();
        let second = |count| now + Duration::from_secs(count);
        let mut presence = Presence::new(Duration::from_secs(5));
        let mut formation = Formation::new(["b".into()], Epoch(0));
        let mut away = |alive, at| {
            formation.member_mut("b").unwrap().node_alive = alive;
            presence.away_too_long(formation.members(), second(at))
        };
        assert!(away(false, 0).is_empty());
        assert!(away(false, 4).is_empty());
        assert!(away(true, 5).is_empty());
        assert!(away(false, 6).is_empty());
        assert_eq!(away(false, 11), ["b"]);
    }

    #[test]
    fn a_silent_node_does_not_count_as_alive() {
        let now = Instant::now();
        let mut presence = Presence::new(Duration::ZERO);
        presence.heard("b", now);
        let standing = |presence: &Presence, second| {
            let now = now + Duration::from_secs(second);
            presence.standings(now).next().map(|(_, alive)| alive)
        };
        assert_eq!(standing(&presence, 3), Some(true));
        assert_eq!(standing(&presence, 4), Some(false));
        presence.link_lost("b");
        assert_eq!(standing(&presence, 4), None);
    }
}
