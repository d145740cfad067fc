//! Forms the groups of a measurement: the one place that knows how each transport meets.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use offbook_collectives::measure::Echo;
use offbook_collectives::{
    FastSynch, Group, JoinSpec, NcclSpec, OneHost, QuicEndpoint, QuicOptions, QuicTransport,
    RingSpec, SharedMemoryOptions, SharedMemorySpec, TensorTls,
};
use offbook_protocol::Transport;
use offbook_runtime::{Identity, Trust, TrustedNode};

use super::ranks::{Assignment, GroupPlan, rank_name};
use super::wire::Wire;

/// Meets all ranks of one group. Blocks until they are there.
pub(super) fn form(
    plan: &GroupPlan,
    assignment: &Assignment,
    rank: usize,
    identity: &Identity,
) -> Result<Group> {
    let Some(fast_synch) = plan.fast_synch else {
        return Ok(Group::solo());
    };
    let fast_synch = wish(fast_synch);
    let deadline = assignment.deadline;
    let addresses = plan.addresses.clone();
    let first = *addresses.first().context("a group has ranks")?;
    let size = addresses.len();
    let transport = match plan.wire {
        Wire::Over(transport) => transport,
        Wire::Echo => return Ok(Group::over(Box::new(Echo), deadline, fast_synch)?),
    };
    Ok(match transport {
        Transport::Quic => {
            let transport = join_quic(addresses, assignment, rank, identity)?;
            Group::over(Box::new(transport), deadline, fast_synch)?
        }
        Transport::SharedMemory => {
            let spec = SharedMemorySpec {
                epoch: EPOCH,
                rank,
                size,
                name: format!("offbook-rank-{}", first.port()),
            };
            let host = OneHost::meet(&spec, &SharedMemoryOptions::default(), MEETING_MAX)?;
            Group::on_one_host(host, deadline, fast_synch)?
        }
        Transport::Ring => Group::ring(&RingSpec { rank, addresses })?,
        Transport::Nccl => Group::nccl(&NcclSpec {
            rank,
            size,
            meeting: first,
        })?,
        Transport::Jaccl => {
            bail!("jaccl needs RDMA devices, which only a cluster file can name")
        }
    })
}

fn join_quic(
    peers: Vec<std::net::SocketAddr>,
    assignment: &Assignment,
    rank: usize,
    identity: &Identity,
) -> Result<QuicTransport> {
    let node = |(rank, key): (usize, &_)| TrustedNode {
        name: rank_name(rank),
        keys: vec![*key],
    };
    let trust = Trust {
        cluster: "bench".into(),
        config_hash: 0,
        nodes: assignment.keys.iter().enumerate().map(node).collect(),
    };
    let tls = TensorTls {
        server: identity.server_config(&trust, TensorTls::ALPN)?,
        client: identity.client_config(&trust, TensorTls::ALPN)?,
    };
    let own = *peers.get(rank).context("this rank has no address")?;
    let endpoint = QuicEndpoint::bind(own, tls, QuicOptions::default())?;
    let spec = JoinSpec {
        epoch: EPOCH,
        rank,
        peers,
    };
    Ok(endpoint.join(&spec, MEETING_MAX)?)
}

fn wish(fast_synch: offbook_protocol::FastSynch) -> FastSynch {
    match fast_synch {
        offbook_protocol::FastSynch::Auto => FastSynch::Auto,
        offbook_protocol::FastSynch::On => FastSynch::On,
        offbook_protocol::FastSynch::Off => FastSynch::Off,
        offbook_protocol::FastSynch::Require => FastSynch::Require,
    }
}

/// These groups live once.
const EPOCH: u64 = 1;
/// Processes start in less, unless the machine is very busy.
pub(super) const MEETING_MAX: Duration = Duration::from_secs(60);
