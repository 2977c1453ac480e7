//! Where can an agent knock?
//!
//! In:     the plan's network. Out: sockets that are bound inside the run's own namespaces, for agentd to accept on.
//! Always: bound as root before the agent's process exists, so no port can be taken first; non-blocking, as all copies
//!         share that; kept open by the jail, so that connections wait while agentd is restarted.
//! Never:  a way out. Whatever arrives here goes through agentd or nowhere: the namespace has `lo` and nothing else.
//!
//! With rules for the network `lo` has every synthetic address too (198.18.0.0/15, [`sys::add_local_network`]); a
//! listener on all addresses catches what programs that know no proxy send there. Its own address tells agentd which
//! name was meant.

use super::{Failure, step};
use crate::sys;
use agentd_domain::paths::inside;
use agentd_domain::plan::NetworkPlan;
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with, sockopt,
};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::OwnedFd;

/// Connections that wait while no agentd accepts: more than an agent opens at once.
const BACKLOG: i32 = 64;
/// Benchmarking addresses (RFC 2544, RFC 6890): routed by nobody.
const SYNTHETIC: (Ipv4Addr, Ipv4Addr) = (Ipv4Addr::new(198, 18, 0, 0), Ipv4Addr::new(255, 254, 0, 0));
const FLAGS: SocketFlags = SocketFlags::CLOEXEC.union(SocketFlags::NONBLOCK);

pub(super) fn api_tcp() -> Result<OwnedFd, Failure> {
    step("network: listen on 127.0.0.1:7070", tcp(Ipv4Addr::LOCALHOST, inside::API_PORT))
}

pub(super) fn api_unix() -> Result<OwnedFd, Failure> {
    step("network: listen on /run/agentd.sock", unix())
}

/// In the order of [`agentd_domain::launcher::HANDOVER_FDS`]' followers; none without rules.
pub(super) fn egress(network: &NetworkPlan) -> Result<Vec<OwnedFd>, Failure> {
    let NetworkPlan::Egress { capture_tcp, .. } = network else { return Ok(Vec::new()) };
    step("network: synthetic addresses", sys::add_local_network(SYNTHETIC.0, SYNTHETIC.1))?;
    let local = Ipv4Addr::LOCALHOST;
    let mut sockets = vec![
        step("network: listen on 127.0.0.1:7071", tcp(local, inside::EGRESS_PROXY))?,
        step("network: bind to 127.0.0.1:53", udp(local, inside::EGRESS_DNS))?,
        step("network: listen on 127.0.0.1:53", tcp(local, inside::EGRESS_DNS))?,
    ];
    for &port in capture_tcp {
        sockets.push(step(&format!("network: catch port {port}"), tcp(Ipv4Addr::UNSPECIFIED, port))?);
    }
    Ok(sockets)
}

fn tcp(address: Ipv4Addr, port: u16) -> Result<OwnedFd, Errno> {
    let socket = socket_with(AddressFamily::INET, SocketType::STREAM, FLAGS, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    // Two runs in the host's network can only be in the escape suite.
    #[cfg(feature = "walls-can-be-lowered")]
    sockopt::set_socket_reuseport(&socket, true)?;
    bind(&socket, &SocketAddrV4::new(address, port))?;
    listen(&socket, BACKLOG)?;
    Ok(socket)
}

fn udp(address: Ipv4Addr, port: u16) -> Result<OwnedFd, Errno> {
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, FLAGS, None)?;
    bind(&socket, &SocketAddrV4::new(address, port))?;
    Ok(socket)
}

/// Root's file in root's folder: the agent can connect, and can neither remove nor replace it.
fn unix() -> Result<OwnedFd, Errno> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, FLAGS, None)?;
    bind(&socket, &SocketAddrUnix::new(inside::API_SOCKET)?)?;
    rustix::fs::chmod(inside::API_SOCKET, Mode::from_raw_mode(0o666))?;
    listen(&socket, BACKLOG)?;
    Ok(socket)
}
