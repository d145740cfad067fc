//! How many may stand before the door: connections that come in and have not said hello yet. Each takes
//! memory and a processor's time before it is known to be anybody's, so that only so many are let begin.
//!
//! What waits here is one of three: an address that nobody has proved to be the sender's, an address,
//! or a key. Each has a bound of its own, so that whoever takes all of its places leaves the others'.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};

use crate::identity::NodeKey;
use crate::sync::lock;

/// The places before the door of one endpoint.
#[derive(Clone, Default)]
pub(crate) struct Door(Arc<Mutex<Waiting>>);

#[derive(Default)]
struct Waiting {
    all: usize,
    hosts: BTreeMap<IpAddr, usize>,
    keys: BTreeMap<NodeKey, usize>,
}

/// What becomes of somebody's first packet.
pub(crate) enum Knock {
    /// The handshake begins; the place is given back when this is dropped.
    Enter(Place),
    /// First it must show that it receives what is sent to its address. That takes no memory here.
    ProveAddress,
    /// No place is free. An honest dialler sends its first packet again and again, so that it gets in when
    /// there is one; a refusal would end its dial.
    ComeAgain,
}

impl Door {
    /// Somebody's first packet has come; has it proved its address?
    pub(crate) fn knock(&self, host: IpAddr, proved: bool) -> Knock {
        let mut waiting = lock(&self.0);
        if !proved && waiting.all >= PROOF_FROM {
            return Knock::ProveAddress;
        }
        let of_host = waiting.hosts.get(&host).copied().unwrap_or(0);
        if waiting.all >= PLACES || of_host >= PLACES_PER_HOST {
            return Knock::ComeAgain;
        }
        waiting.all += 1;
        waiting.hosts.insert(host, of_host + 1);
        Knock::Enter(Place {
            door: self.clone(),
            host,
            key: None,
        })
    }
}

/// One that has begun its handshake. Dropped when it has said hello, or never will.
pub(crate) struct Place {
    door: Door,
    host: IpAddr,
    key: Option<NodeKey>,
}

impl Place {
    /// TLS is done and the key is known: may one more with this key take its time for the hello?
    pub(crate) fn shows(&mut self, key: NodeKey) -> bool {
        let mut waiting = lock(&self.door.0);
        let of_key = waiting.keys.entry(key).or_default();
        if self.key.is_some() || *of_key >= PLACES_PER_KEY {
            return false;
        }
        *of_key += 1;
        self.key = Some(key);
        true
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut waiting = lock(&self.door.0);
        waiting.all -= 1;
        one_less(&mut waiting.hosts, &self.host);
        if let Some(key) = self.key {
            one_less(&mut waiting.keys, &key);
        }
    }
}

/// What nobody stands for takes no memory.
fn one_less<K: Ord>(counts: &mut BTreeMap<K, usize>, key: &K) {
    if let Some(count) = counts.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(key);
        }
    }
}

/// A handshake takes milliseconds: when all processes of a cluster dial at once, so many are under way
/// together at most.
const PLACES: usize = 64;

/// Up to here nobody is asked to prove an address, which would cost each honest dial a round trip.
const PROOF_FROM: usize = 16;

/// One machine leaves half of the places to the others.
const PLACES_PER_HOST: usize = PLACES / 2;

/// A node's processes share its key. Those that dial together, and say hello at once.
const PLACES_PER_KEY: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::Identity;

    fn host(number: u8) -> IpAddr {
        [10, 0, 0, number].into()
    }

    fn enter(door: &Door, host: IpAddr, proved: bool) -> Option<Place> {
        match door.knock(host, proved) {
            Knock::Enter(place) => Some(place),
            Knock::ProveAddress | Knock::ComeAgain => None,
        }
    }

    #[test]
    fn addresses_that_nobody_proved_leave_places_to_those_that_are() {
        let door = Door::default();
        let mut places: Vec<_> = (0..PROOF_FROM as u8)
            .map(|number| enter(&door, host(number), false).unwrap())
            .collect();
        assert!(matches!(door.knock(host(99), false), Knock::ProveAddress));
        places.push(enter(&door, host(99), true).unwrap());
        places.clear();
        assert!(enter(&door, host(99), false).is_some());
    }

    #[test]
    fn one_host_leaves_places_to_others_and_all_together_end() {
        let door = Door::default();
        let mut places = Vec::new();
        for number in [1, 2] {
            for _ in 0..PLACES_PER_HOST {
                places.push(enter(&door, host(number), true).unwrap());
            }
            assert!(matches!(door.knock(host(number), true), Knock::ComeAgain));
        }
        assert!(matches!(door.knock(host(3), true), Knock::ComeAgain));
        places.pop();
        assert!(enter(&door, host(3), true).is_some());
        places.clear();
        let waiting = lock(&door.0);
        assert!(waiting.all == 0 && waiting.hosts.is_empty() && waiting.keys.is_empty());
    }

    #[test]
    fn one_key_has_its_places_and_shows_itself_once() {
        let door = Door::default();
        let [ours, other] = ["a", "b"].map(|node| Identity::generate(node).unwrap().key());
        let mut places = Vec::new();
        for number in 0..PLACES_PER_KEY as u8 {
            let mut place = enter(&door, host(number), true).unwrap();
            assert!(place.shows(ours) && !place.shows(ours));
            places.push(place);
        }
        let mut late = enter(&door, host(99), true).unwrap();
        assert!(!late.shows(ours));
        assert!(late.shows(other));
        places.pop();
        assert!(enter(&door, host(99), true).unwrap().shows(ours));
    }
}
