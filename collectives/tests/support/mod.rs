//! Ranks for tests: an identity that they share, and ranks as threads or as processes.
#![allow(dead_code, reason = "each test uses the part that it needs")]
#![allow(unreachable_pub, reason = "a module of each test, not of a library")]

use std::{
    io::{BufRead, BufReader, Write},
    net::{SocketAddr, TcpListener},
    process::{Child, ChildStdout, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};

use offbook_collectives::{
    FastSynch, Group, JoinSpec, QuicEndpoint, QuicOptions, QuicTransport, RingSpec, SharedMemory,
    SharedMemoryOptions, SharedMemorySpec, TensorTls, Transport,
};
use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer},
    server::WebPkiClientVerifier,
};

/// Longer than anything here takes on a loaded machine; a test that needs it has failed.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// One key for all ranks of a test: each side accepts it and nothing else.
#[derive(Clone)]
pub struct Identity {
    certificate: Vec<u8>,
    key: Vec<u8>,
}

impl Identity {
    pub fn new() -> Self {
        let made =
            rcgen::generate_simple_self_signed(vec![TensorTls::SERVER_NAME.to_owned()]).unwrap();
        Self {
            certificate: made.cert.der().to_vec(),
            key: made.signing_key.serialize_der(),
        }
    }

    pub fn tls(&self) -> TensorTls {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let chain = vec![CertificateDer::from(self.certificate.clone())];
        let key = || PrivateKeyDer::from(PrivatePkcs8KeyDer::from(self.key.clone()));
        let mut roots = RootCertStore::empty();
        roots.add(chain[0].clone()).unwrap();
        let roots = Arc::new(roots);
        let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone());
        let mut server = rustls::ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_client_cert_verifier(verifier.build().unwrap())
            .with_single_cert(chain.clone(), key())
            .unwrap();
        server.alpn_protocols = vec![TensorTls::ALPN.to_vec()];
        let mut client = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key())
            .unwrap();
        client.alpn_protocols = vec![TensorTls::ALPN.to_vec()];
        TensorTls { server, client }
    }

    fn to_text(&self) -> String {
        let hex = |bytes: &[u8]| {
            bytes
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect::<String>()
        };
        format!("{}:{}", hex(&self.certificate), hex(&self.key))
    }

    fn from_text(text: &str) -> Self {
        let bytes = |hex: &str| {
            (0..hex.len())
                .step_by(2)
                .map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap())
                .collect()
        };
        let (certificate, key) = text.split_once(':').unwrap();
        Self {
            certificate: bytes(certificate),
            key: bytes(key),
        }
    }
}

pub fn endpoint(identity: &Identity, options: QuicOptions) -> QuicEndpoint {
    QuicEndpoint::bind(([127, 0, 0, 1], 0).into(), identity.tls(), options).unwrap()
}

/// Connected transports, by rank.
pub fn transports(size: usize, options: QuicOptions) -> Vec<QuicTransport> {
    let identity = Identity::new();
    let endpoints: Vec<_> = (0..size)
        .map(|_| endpoint(&identity, options.clone()))
        .collect();
    let peers: Vec<_> = endpoints.iter().map(QuicEndpoint::local_addr).collect();
    let joining: Vec<_> = endpoints
        .into_iter()
        .enumerate()
        .map(|(rank, endpoint)| {
            let spec = JoinSpec {
                epoch: 1,
                rank,
                peers: peers.clone(),
            };
            thread::spawn(move || endpoint.join(&spec, PATIENCE).unwrap())
        })
        .collect();
    joining
        .into_iter()
        .map(|rank| rank.join().unwrap())
        .collect()
}

/// Connected transports through memory, by rank; the ranks are threads of this process.
pub fn shared_memory(size: usize, options: &SharedMemoryOptions) -> Vec<SharedMemory> {
    let name = new_name();
    let joining: Vec<_> = (0..size)
        .map(|rank| {
            let spec = SharedMemorySpec {
                epoch: 1,
                rank,
                size,
                name: name.clone(),
            };
            let options = options.clone();
            thread::spawn(move || SharedMemory::join(&spec, &options, PATIENCE).unwrap())
        })
        .collect();
    joining
        .into_iter()
        .map(|rank| rank.join().unwrap())
        .collect()
}

/// A name for a segment that no other test uses.
pub fn new_name() -> String {
    static NAMES: AtomicUsize = AtomicUsize::new(0);
    let number = NAMES.fetch_add(1, Relaxed);
    format!("offbook-test-{}-{number}", std::process::id())
}

/// Runs `rank` on a thread per transport, and gives the results by rank.
pub fn on_threads<T: Send + 'static, R: Send + 'static>(
    transports: Vec<T>,
    rank: impl Fn(T) -> R + Send + Sync + 'static,
) -> Vec<R> {
    let rank = Arc::new(rank);
    let threads: Vec<_> = transports
        .into_iter()
        .map(|transport| {
            let rank = rank.clone();
            thread::spawn(move || rank(transport))
        })
        .collect();
    // All first: MLX does not take it well when the process ends under a working thread.
    let ended: Vec<_> = threads.into_iter().map(|thread| thread.join()).collect();
    ended.into_iter().map(Result::unwrap).collect()
}

/// A rank in a process of its own: this very program, told by its environment what to be.
pub struct RankProcess {
    pub child: Child,
    lines: BufReader<ChildStdout>,
}

/// Starts `size` ranks with these arguments, and introduces them to each other.
pub fn processes(
    size: usize,
    arguments: &[&str],
    environment: &[(&str, &str)],
) -> Vec<RankProcess> {
    let (identity, segment) = (Identity::new().to_text(), new_name());
    let mut ranks: Vec<_> = (0..size)
        .map(|rank| {
            let mut child = Command::new(std::env::current_exe().unwrap())
                .args(arguments)
                .envs(environment.iter().copied())
                .env(RANK, format!("{rank} {size}"))
                .env(IDENTITY, &identity)
                .env(SEGMENT, &segment)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let lines = BufReader::new(child.stdout.take().unwrap());
            RankProcess { child, lines }
        })
        .collect();
    let addresses: Vec<_> = ranks.iter_mut().map(|rank| rank.says("address")).collect();
    for rank in &mut ranks {
        writeln!(
            rank.child.stdin.as_mut().unwrap(),
            "{}",
            addresses.join(" ")
        )
        .unwrap();
    }
    ranks
}

impl RankProcess {
    /// The next thing that the rank says under this name; panics when it ends without.
    pub fn says(&mut self, name: &str) -> String {
        let mark = format!("@{name} ");
        loop {
            let mut line = String::new();
            assert!(
                self.lines.read_line(&mut line).unwrap() > 0,
                "the rank never said its {name}"
            );
            // The test harness may have begun the line.
            if let Some(at) = line.find(&mark) {
                return line[at + mark.len()..].trim().to_owned();
            }
        }
    }
}

impl RankProcess {
    /// Sends the process a signal, which must exist.
    pub fn signal(&self, signal: rustix::process::Signal) {
        let process = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(process, signal).unwrap();
    }

    /// Lets a rank go on that waits in [`listen`].
    pub fn tell(&mut self, line: &str) {
        writeln!(self.child.stdin.as_mut().unwrap(), "{line}").unwrap();
    }
}

impl Drop for RankProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What carries the bytes of a group in a test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Carrier {
    Quic,
    SharedMemory,
    /// Through so little memory that nearly every operand goes in pieces.
    NarrowMemory,
    /// MLX's own, over TCP.
    Ring,
}

impl Carrier {
    const ALL: [Self; 4] = [
        Self::Quic,
        Self::SharedMemory,
        Self::NarrowMemory,
        Self::Ring,
    ];

    /// For a rank's environment.
    pub fn name(self) -> String {
        format!("{self:?}")
    }

    pub fn named(name: &str) -> Self {
        let mut all = Self::ALL.into_iter();
        all.find(|carrier| carrier.name() == name).unwrap()
    }
}

/// What a rank process knows about itself.
pub struct Place {
    pub rank: usize,
    pub size: usize,
    identity: Identity,
    segment: String,
}

impl Place {
    /// In a rank process, its place; elsewhere nothing.
    pub fn of_this_process() -> Option<Self> {
        let place = std::env::var(RANK).ok()?;
        let (rank, size) = place.split_once(' ').unwrap();
        Some(Self {
            rank: rank.parse().unwrap(),
            size: size.parse().unwrap(),
            identity: Identity::from_text(&std::env::var(IDENTITY).unwrap()),
            segment: std::env::var(SEGMENT).unwrap(),
        })
    }

    /// The group of all ranks.
    pub fn group(&self, carrier: Carrier, deadline: Duration) -> Group {
        let transport: Box<dyn Transport> = match carrier {
            Carrier::Quic => Box::new(self.join_quic(QuicOptions::default())),
            Carrier::SharedMemory => Box::new(self.join_memory(None)),
            Carrier::NarrowMemory => Box::new(self.join_memory(Some(4096))),
            Carrier::Ring => {
                let spec = RingSpec {
                    rank: self.rank,
                    addresses: self.ring_addresses(),
                };
                return Group::ring(&spec).unwrap();
            }
        };
        Group::over(transport, deadline, FastSynch::On).unwrap()
    }

    fn join_memory(&self, channel_bytes: Option<usize>) -> SharedMemory {
        // The name says it all; the address is only there to be exchanged.
        introduce(([127, 0, 0, 1], 0).into());
        let spec = SharedMemorySpec {
            epoch: 1,
            rank: self.rank,
            size: self.size,
            name: self.segment.clone(),
        };
        let options = SharedMemoryOptions {
            channel_bytes,
            ..SharedMemoryOptions::default()
        };
        SharedMemory::join(&spec, &options, PATIENCE).unwrap()
    }

    pub fn join_quic(&self, options: QuicOptions) -> QuicTransport {
        let endpoint = endpoint(&self.identity, options);
        let peers = introduce(endpoint.local_addr());
        endpoint
            .join(
                &JoinSpec {
                    epoch: 1,
                    rank: self.rank,
                    peers,
                },
                PATIENCE,
            )
            .unwrap()
    }

    /// Free TCP ports for MLX's ring, which insists on binding them itself.
    pub fn ring_addresses(&self) -> Vec<SocketAddr> {
        let free = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        introduce(free)
    }
}

/// To the parent.
pub fn say(name: &str, what: impl std::fmt::Display) {
    println!("@{name} {what}");
}

/// The parent's next line; empty when the parent is gone.
pub fn listen() -> String {
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    line.trim().to_owned()
}

fn introduce(own: SocketAddr) -> Vec<SocketAddr> {
    say("address", own);
    listen()
        .split_whitespace()
        .map(|address| address.parse().unwrap())
        .collect()
}

const RANK: &str = "OFFBOOK_TEST_RANK";
const IDENTITY: &str = "OFFBOOK_TEST_IDENTITY";
const SEGMENT: &str = "OFFBOOK_TEST_SEGMENT";
