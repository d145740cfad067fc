//! Ports that somebody else will bind in a moment.
//!
//! Binding port 0 and letting go of it hands out a number of the range from which the kernel serves
//! every outgoing connection: on a busy machine another socket has it before its owner comes. These
//! are below that range, on Linux and on macOS, and drawn at random; a process is given none twice.

use std::collections::HashSet;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::ops::Range;
use std::sync::{LazyLock, Mutex};

use crate::sync::lock;

/// A TCP port at which nobody listens on this interface.
///
/// # Errors
/// When the interface is not this machine's, or all that were tried are taken.
pub fn tcp(interface: IpAddr) -> io::Result<SocketAddr> {
    drawn(interface, |address| TcpListener::bind(address).map(drop))
}

/// A UDP port that nobody has on this interface.
///
/// # Errors
/// As [`tcp`].
pub fn udp(interface: IpAddr) -> io::Result<SocketAddr> {
    drawn(interface, |address| UdpSocket::bind(address).map(drop))
}

fn drawn(interface: IpAddr, bind: impl Fn(SocketAddr) -> io::Result<()>) -> io::Result<SocketAddr> {
    let mut tries = 0;
    loop {
        let port = rand::random_range(PORTS);
        let address = SocketAddr::new(interface, port);
        let bound = match lock(&GIVEN).insert(port) {
            true => bind(address),
            false => Err(io::ErrorKind::AddrInUse.into()),
        };
        match bound {
            Ok(()) => return Ok(address),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && tries < TRIES_MAX => {
                tries += 1;
            }
            Err(error) => return Err(error),
        }
    }
}

/// Those who were given one may not have bound it yet.
static GIVEN: LazyLock<Mutex<HashSet<u16>>> = LazyLock::new(Mutex::default);
const PORTS: Range<u16> = 16_384..32_768;
const TRIES_MAX: u32 = 100;

#[cfg(test)]
mod tests {
    use super::*;

    const LOOPBACK: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    #[test]
    fn a_free_port_is_none_that_an_outgoing_connection_gets() {
        for free in [tcp, udp] {
            let address = free(LOOPBACK).unwrap();
            assert!(PORTS.contains(&address.port()), "{address}");
        }
        let outgoing = UdpSocket::bind((LOOPBACK, 0)).unwrap();
        assert!(!PORTS.contains(&outgoing.local_addr().unwrap().port()));
    }

    #[test]
    fn a_port_is_given_once() {
        let all_are_free = |_| Ok(());
        let ports = (0..1000).map(|_| drawn(LOOPBACK, all_are_free).unwrap().port());
        assert_eq!(ports.collect::<HashSet<_>>().len(), 1000);
    }

    #[test]
    fn a_port_that_is_taken_is_not_free() {
        let tried = std::cell::Cell::new(0);
        let fourth_is_free = |_| {
            tried.set(tried.get() + 1);
            let taken = tried.get() < 4;
            if taken {
                Err(io::ErrorKind::AddrInUse.into())
            } else {
                Ok(())
            }
        };
        drawn(LOOPBACK, fourth_is_free).unwrap();
        assert_eq!(tried.get(), 4);
        let never = drawn(LOOPBACK, |_| Err(io::ErrorKind::AddrInUse.into()));
        assert_eq!(never.unwrap_err().kind(), io::ErrorKind::AddrInUse);
    }
}
