//! Owns the group that a shard belongs to: where it can be met, the meeting, and the end of it.
//! One per shard process.
//!
//! The operations of the group run on the device's stream and never pass through here. This actor
//! holds the handle that can end them.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use actix::{Actor, Context, Handler, Message, ResponseActFuture, WrapFuture};
use offbook_collectives::{
    CollectiveError, GroupHandle, JacclSpec, JoinSpec, NcclSpec, OneHost, QuicEndpoint,
    QuicOptions, QuicTransport, RingSpec, SharedMemoryOptions, SharedMemorySpec, TensorTls,
};
use offbook_protocol::{Epoch, GroupSpec, Transport};
use offbook_runtime::{Identity, IdentityError, Trust, free_port};

/// See the module's own words.
pub(crate) struct Collective {
    place: Place,
    /// Bound, and waiting for its peers.
    endpoint: Option<(Epoch, Bound)>,
    /// In use by the engine.
    group: Option<(Epoch, GroupHandle)>,
}

/// Where a shard can be met.
pub(crate) enum Place {
    Network {
        identity: Arc<Identity>,
        trust: Trust,
        /// The interface that tensors travel over.
        interface: IpAddr,
    },
    /// A simulation says who meets whom.
    #[cfg(test)]
    Played(crate::simulation::Hall),
}

enum Bound {
    Quic(Box<QuicEndpoint>),
    /// Where the ranks of an RDMA group meet.
    Jaccl(Box<QuicEndpoint>),
    SharedMemory,
    Ring,
    Nccl,
    #[cfg(test)]
    Played(crate::simulation::Hall),
}

/// A group about to be made on the engine's thread, where its operations will run.
pub(crate) enum GroupSeed {
    /// A group of one.
    Solo,
    Quic(Box<QuicTransport>),
    SharedMemory(Box<OneHost>),
    Ring(RingSpec),
    Nccl(NcclSpec),
    Jaccl(JacclSpec, Box<QuicTransport>),
}

impl Collective {
    pub(crate) fn new(place: Place) -> Self {
        Self {
            place,
            endpoint: None,
            group: None,
        }
    }

    fn bind(&mut self, epoch: Epoch, transport: Transport) -> Result<SocketAddr, BindError> {
        self.endpoint = None;
        let (bound, address) = match &self.place {
            Place::Network {
                identity,
                trust,
                interface,
            } => Bound::open(transport, identity, trust, *interface)?,
            #[cfg(test)]
            Place::Played(hall) => (Bound::Played(hall.clone()), hall.bind()),
        };
        self.endpoint = Some((epoch, bound));
        Ok(address)
    }
}

impl Bound {
    fn open(
        transport: Transport,
        identity: &Identity,
        trust: &Trust,
        interface: IpAddr,
    ) -> Result<(Self, SocketAddr), BindError> {
        let any = SocketAddr::new(interface, 0);
        // MLX binds its ports itself, later, and shared memory only needs a number that nobody else
        // has: this finds one that is free.
        let free = || free_port::tcp(interface);
        Ok(match transport {
            Transport::Quic | Transport::Jaccl => {
                let tls = TensorTls {
                    server: identity.server_config(trust, TensorTls::ALPN)?,
                    client: identity.client_config(trust, TensorTls::ALPN)?,
                };
                let endpoint = QuicEndpoint::bind(any, tls, QuicOptions::default())?;
                let (address, endpoint) = (endpoint.local_addr(), Box::new(endpoint));
                match transport {
                    Transport::Jaccl => (Self::Jaccl(endpoint), address),
                    _ => (Self::Quic(endpoint), address),
                }
            }
            Transport::SharedMemory => (Self::SharedMemory, free()?),
            Transport::Ring => (Self::Ring, free()?),
            Transport::Nccl => (Self::Nccl, free()?),
        })
    }
}

impl Actor for Collective {
    type Context = Context<Self>;
}

/// Opens the endpoint at which the peers of an epoch will meet this shard.
#[derive(Debug, Message)]
#[rtype(result = "Result<SocketAddr, BindError>")]
pub(crate) struct Bind {
    pub epoch: Epoch,
    pub transport: Transport,
}

impl Handler<Bind> for Collective {
    type Result = Result<SocketAddr, BindError>;

    fn handle(&mut self, bind: Bind, _: &mut Context<Self>) -> Self::Result {
        self.bind(bind.epoch, bind.transport)
    }
}

/// Why no endpoint could be opened.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BindError {
    #[error("cannot use this node's key for tensors: {0}")]
    Identity(#[from] IdentityError),
    #[error("cannot open the tensor endpoint: {0}")]
    Endpoint(#[from] CollectiveError),
    #[error("cannot open the tensor endpoint: {0}")]
    Io(#[from] std::io::Error),
}

/// Meets all peers of the epoch that was bound.
#[derive(Debug, Message)]
#[rtype(result = "Result<GroupSeed, MeetError>")]
pub(crate) struct Meet {
    pub spec: GroupSpec,
    pub deadline: Duration,
}

impl Handler<Meet> for Collective {
    type Result = ResponseActFuture<Self, Result<GroupSeed, MeetError>>;

    fn handle(&mut self, meet: Meet, _: &mut Context<Self>) -> Self::Result {
        let Meet { spec, deadline } = meet;
        let bound = self.endpoint.take_if(|(epoch, _)| *epoch == spec.epoch);
        let seed = async move {
            let Some((_, bound)) = bound else {
                return Err(MeetError::NotBound(spec.epoch));
            };
            let peers: Vec<_> = spec.members.iter().map(|member| member.address).collect();
            let rank = spec.rank.index();
            match bound {
                _ if peers.len() == 1 => Ok(GroupSeed::Solo),
                Bound::Ring => Ok(GroupSeed::Ring(RingSpec {
                    rank,
                    addresses: peers,
                })),
                Bound::Nccl => Ok(GroupSeed::Nccl(NcclSpec {
                    rank,
                    size: peers.len(),
                    meeting: peers[0],
                })),
                Bound::SharedMemory => {
                    let spec = one_host(&spec, &peers)?;
                    let met = tokio::task::spawn_blocking(move || {
                        OneHost::meet(&spec, &SharedMemoryOptions::default(), deadline)
                    });
                    let host = met.await.map_err(|_| MeetError::Panicked)??;
                    Ok(GroupSeed::SharedMemory(Box::new(host)))
                }
                // The engine that plays knows whom it has met.
                #[cfg(test)]
                Bound::Played(hall) => {
                    hall.meet(&spec, deadline).await?;
                    Ok(GroupSeed::Solo)
                }
                Bound::Quic(endpoint) => Ok(GroupSeed::Quic(
                    join(endpoint, &spec, peers, deadline).await?,
                )),
                Bound::Jaccl(endpoint) => {
                    let side = join(endpoint, &spec, peers, deadline).await?;
                    let devices = spec.members.into_iter().map(|member| member.rdma);
                    let devices = devices.collect();
                    Ok(GroupSeed::Jaccl(JacclSpec { devices }, side))
                }
            }
        };
        Box::pin(seed.into_actor(self))
    }
}

async fn join(
    endpoint: Box<QuicEndpoint>,
    spec: &GroupSpec,
    peers: Vec<SocketAddr>,
    deadline: Duration,
) -> Result<Box<QuicTransport>, MeetError> {
    let join = JoinSpec {
        epoch: spec.epoch.0,
        rank: spec.rank.index(),
        peers,
    };
    let joined = tokio::task::spawn_blocking(move || endpoint.join(&join, deadline)).await;
    Ok(Box::new(joined.map_err(|_| MeetError::Panicked)??))
}

/// The memory of one epoch, named after the port of rank 0, which is its alone on this host.
fn one_host(spec: &GroupSpec, peers: &[SocketAddr]) -> Result<SharedMemorySpec, MeetError> {
    if let Some(rank) = peers.iter().position(|peer| peer.ip() != peers[0].ip()) {
        return Err(MeetError::OtherHost { rank });
    }
    Ok(SharedMemorySpec {
        epoch: spec.epoch.0,
        rank: spec.rank.index(),
        size: peers.len(),
        name: format!("offbook-{}-{}", peers[0].port(), spec.epoch),
    })
}

/// Why the peers were not met.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MeetError {
    #[error("nothing is bound for epoch {0}")]
    NotBound(Epoch),
    #[error(transparent)]
    Peer(#[from] CollectiveError),
    #[error("rank {rank} is on another host than rank 0: transport shm is for one host, take quic")]
    OtherHost { rank: usize },
    #[error("the meeting panicked")]
    Panicked,
}

/// The engine's thread has made the group; from now on this actor can end it.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub(crate) struct Hold {
    pub epoch: Epoch,
    pub group: GroupHandle,
}

impl Handler<Hold> for Collective {
    type Result = ();

    fn handle(&mut self, hold: Hold, _: &mut Context<Self>) {
        self.group = Some((hold.epoch, hold.group));
    }
}

/// Ends whatever the group is doing, and every operation after it. Later epochs are untouched.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub(crate) struct Abort {
    pub epoch: Epoch,
    pub why: String,
}

impl Handler<Abort> for Collective {
    type Result = ();

    fn handle(&mut self, abort: Abort, _: &mut Context<Self>) {
        if self
            .endpoint
            .as_ref()
            .is_some_and(|(epoch, _)| *epoch <= abort.epoch)
        {
            self.endpoint = None;
        }
        if let Some((epoch, group)) = self.group.take_if(|(epoch, _)| *epoch <= abort.epoch) {
            tracing::debug!(%epoch, why = abort.why, "the group is left");
            group.poison(CollectiveError::Poisoned { why: abort.why });
        }
    }
}
