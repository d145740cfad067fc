//! A network of the tests' own: each machine is a network namespace, its only cable ends in this
//! process, and a thread here is the switch that carries packets from cable to cable, or does not.
//!
//! It needs root, `ip` and `/dev/net/tun`. Nothing outside its own namespaces is touched, and they are
//! gone with it.
#![allow(unsafe_code)]

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use rustix::ioctl::{Setter, ioctl, opcode};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// The way from one machine to another; the way back is another one.
#[derive(Clone, Copy, Debug, Default)]
pub struct Way {
    pub is_cut: bool,
    /// From 0 to 1.
    pub loss: f64,
    /// A packet takes up to so long: later ones overtake it.
    pub jitter: Duration,
    /// 0 is as fast as it goes. What waits for more than [`QUEUE_MAX`] is dropped.
    pub bytes_per_second: u32,
}

/// So many machines, every one with a way to every other.
pub struct Network {
    namespaces: Vec<String>,
    ways: Arc<Mutex<Vec<Vec<Way>>>>,
    over: Arc<AtomicBool>,
    switch: Option<JoinHandle<()>>,
}

impl Network {
    /// # Errors
    /// Why this system cannot have one.
    pub fn of(machines: usize) -> Result<Self, String> {
        if !rustix::process::geteuid().is_root() {
            return Err("network namespaces take root".into());
        }
        if !Path::new(TUN).exists() {
            return Err(format!("there is no {TUN}"));
        }
        let number = NETWORKS.fetch_add(1, Ordering::Relaxed);
        let name = |machine| format!("offbook-{}-{number}-{machine}", std::process::id());
        let mut network = Self {
            namespaces: Vec::new(),
            ways: Arc::new(Mutex::new(vec![vec![Way::default(); machines]; machines])),
            over: Arc::new(AtomicBool::new(false)),
            switch: None,
        };
        let mut cables = Vec::new();
        for machine in 0..machines {
            let name = name(machine);
            ip(&["netns", "add", &name])?;
            network.namespaces.push(name.clone());
            cables.push(lay_cable(&name)?);
            let address = format!("{}/24", address_of(machine));
            ip(&["-n", &name, "address", "add", &address, "dev", CABLE])?;
            ip(&["-n", &name, "link", "set", CABLE, "up"])?;
            ip(&["-n", &name, "link", "set", "lo", "up"])?;
        }
        let switch = Switch {
            cables,
            ways: Arc::clone(&network.ways),
            over: Arc::clone(&network.over),
            free: vec![vec![Instant::now(); machines]; machines],
            waiting: BinaryHeap::new(),
            chance: StdRng::seed_from_u64(SEED),
        };
        network.switch = Some(std::thread::spawn(move || switch.run()));
        Ok(network)
    }

    /// Where a node on this machine may listen.
    pub fn address(&self, machine: usize) -> SocketAddr {
        SocketAddr::new(address_of(machine).into(), 7000)
    }

    /// What [`on`] takes, of each machine.
    pub fn machines(&self) -> Vec<String> {
        self.namespaces.clone()
    }

    /// Puts the calling thread on this machine, and all threads that it starts from now on.
    pub fn enter(&self, machine: usize) {
        enter(&self.namespaces[machine]).expect("the namespace is there");
    }

    pub fn set(&self, from: usize, to: usize, way: Way) {
        self.ways.lock().expect("nobody panics")[from][to] = way;
    }

    pub fn set_all(&self, way: Way) {
        for row in self.ways.lock().expect("nobody panics").iter_mut() {
            row.fill(way);
        }
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
        if let Some(switch) = self.switch.take() {
            let _ = switch.join();
        }
        for name in &self.namespaces {
            let _ = ip(&["netns", "delete", name]);
        }
    }
}

/// A command that runs another one on this machine.
pub fn on(machine: &str) -> Command {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", machine]);
    command
}

fn address_of(machine: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, 0, machine as u8 + 1)
}

fn ip(arguments: &[&str]) -> Result<(), String> {
    let ran = Command::new("ip")
        .args(arguments)
        .stdin(Stdio::null())
        .output();
    let ran = ran.map_err(|error| format!("there is no `ip`: {error}"))?;
    let said = String::from_utf8_lossy(&ran.stderr);
    ran.status
        .success()
        .then_some(())
        .ok_or_else(|| format!("`ip {}`: {}", arguments.join(" "), said.trim()))
}

fn enter(namespace: &str) -> Result<(), String> {
    let path = format!("/run/netns/{namespace}");
    let file = File::open(&path).map_err(|error| format!("{path}: {error}"))?;
    move_into_link_name_space(
        std::os::fd::AsFd::as_fd(&file),
        Some(LinkNameSpaceType::Network),
    )
    .map_err(|error| format!("cannot enter {path}: {error}"))
}

/// Makes the cable of a machine, and hands out its end.
fn lay_cable(namespace: &str) -> Result<File, String> {
    let namespace = namespace.to_owned();
    // A device belongs to the namespace of the thread that makes it.
    let laid = std::thread::spawn(move || {
        enter(&namespace)?;
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        options.custom_flags(OFlags::NONBLOCK.bits() as i32);
        let end = options
            .open(TUN)
            .map_err(|error| format!("{TUN}: {error}"))?;
        let mut request = InterfaceRequest {
            name: [0; 16],
            flags: IFF_TUN | IFF_NO_PI,
            rest: [0; 22],
        };
        request.name[..CABLE.len()].copy_from_slice(CABLE.as_bytes());
        // SAFETY: the kernel reads a `struct ifreq` of 40 bytes for TUNSETIFF, and that is what
        // `InterfaceRequest` is; it keeps no pointer to it.
        let made = unsafe {
            ioctl(
                &end,
                Setter::<{ opcode::write::<i32>(b'T', 202) }, InterfaceRequest>::new(request),
            )
        };
        made.map_err(|error| format!("cannot make a device of {TUN}: {error}"))?;
        Ok(end)
    });
    laid.join().expect("it does not panic")
}

/// `struct ifreq` as TUNSETIFF reads it.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

struct Switch {
    /// One per machine. What is read is what the machine has sent.
    cables: Vec<File>,
    ways: Arc<Mutex<Vec<Vec<Way>>>>,
    over: Arc<AtomicBool>,
    /// When each way has sent what was given to it.
    free: Vec<Vec<Instant>>,
    waiting: BinaryHeap<Reverse<Packet>>,
    chance: StdRng,
}

/// On its way.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Packet {
    due: Instant,
    to: usize,
    bytes: Vec<u8>,
}

impl Switch {
    fn run(mut self) {
        let mut buffer = vec![0; 65536];
        while !self.over.load(Ordering::Acquire) {
            self.wait();
            for from in 0..self.cables.len() {
                while let Some(length) = take(&self.cables[from], &mut buffer) {
                    self.accept(from, &buffer[..length]);
                }
            }
            while let Some(Reverse(packet)) = self.waiting.peek() {
                if packet.due > Instant::now() {
                    break;
                }
                let Some(Reverse(packet)) = self.waiting.pop() else {
                    break;
                };
                // A machine that takes no more loses it, as a network card does.
                let _ = (&self.cables[packet.to]).write(&packet.bytes);
            }
        }
    }

    /// Until a packet comes or is due.
    fn wait(&self) {
        let next = self.waiting.peek().map(|Reverse(packet)| packet.due);
        let pause = next.map_or(LOOK_EVERY, |due| {
            due.saturating_duration_since(Instant::now())
        });
        let pause = Timespec::try_from(pause.min(LOOK_EVERY)).expect("it is short");
        let mut ends: Vec<_> = self
            .cables
            .iter()
            .map(|cable| PollFd::new(cable, PollFlags::IN))
            .collect();
        let _ = poll(&mut ends, Some(&pause));
    }

    fn accept(&mut self, from: usize, bytes: &[u8]) {
        let Some(to) = machine_of(bytes).filter(|to| *to < self.cables.len()) else {
            return;
        };
        let way = self.ways.lock().expect("nobody panics")[from][to];
        if way.is_cut || self.chance.random_bool(way.loss) {
            return;
        }
        let now = Instant::now();
        let mut sent = now;
        if way.bytes_per_second > 0 {
            let took = bytes.len() as f64 / f64::from(way.bytes_per_second);
            sent = self.free[from][to].max(now) + Duration::from_secs_f64(took);
            if sent - now > QUEUE_MAX {
                return;
            }
            self.free[from][to] = sent;
        }
        let late: f64 = self.chance.random();
        self.waiting.push(Reverse(Packet {
            due: sent + way.jitter.mul_f64(late),
            to,
            bytes: bytes.to_vec(),
        }));
    }
}

fn take(mut cable: &File, buffer: &mut [u8]) -> Option<usize> {
    match cable.read(buffer) {
        Ok(length) => Some(length),
        Err(error) if error.kind() == ErrorKind::WouldBlock => None,
        Err(error) => panic!("a cable cannot be read: {error}"),
    }
}

/// Whose address an IPv4 packet bears.
fn machine_of(packet: &[u8]) -> Option<usize> {
    let is_ipv4 = packet.first()? >> 4 == 4;
    let address: [u8; 4] = packet.get(16..20)?.try_into().ok()?;
    let [10, 77, 0, last] = address else {
        return None;
    };
    is_ipv4.then(|| usize::from(last).checked_sub(1))?
}

static NETWORKS: AtomicU32 = AtomicU32::new(0);
const TUN: &str = "/dev/net/tun";
const CABLE: &str = "cable0";
const IFF_TUN: u16 = 0x0001;
const IFF_NO_PI: u16 = 0x1000;
/// What is lost is the same in every run, as far as packets come in the same order.
const SEED: u64 = 1;
/// How often the switch looks whether it is over.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// What a slow way holds back at most.
pub const QUEUE_MAX: Duration = Duration::from_millis(200);
