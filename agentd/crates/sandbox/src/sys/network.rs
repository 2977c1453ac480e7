//! The network settings that a jail makes: netdevice(7).

use super::check;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};

/// Brings up `lo` of the caller's network namespace; the kernel gives it 127.0.0.1/8 and ::1 by itself.
pub fn loopback_up() -> Result<(), Errno> {
    let mut request = request(b"lo\0");
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    interface(&any_socket()?, libc::SIOCSIFFLAGS, &request)
}

/// Gives `lo` a second address with a network around it. On a loopback interface the kernel makes the route to an
/// address's network a local one (`fib_add_ifaddr`, net/ipv4/fib_frontend.c), as it does for 127.0.0.0/8: every
/// address of the network is the machine itself.
pub fn add_local_network(network: Ipv4Addr, mask: Ipv4Addr) -> Result<(), Errno> {
    // A label of its own: without one the call would replace 127.0.0.1. The first address, so that programs are not
    // given the network's own number as their source.
    const LABEL: &[u8] = b"lo:1\0";
    let socket = any_socket()?;
    let address = Ipv4Addr::from_bits(network.to_bits() | 1);
    let mut asked = request(LABEL);
    asked.ifr_ifru.ifru_addr = socket_address(address);
    interface(&socket, libc::SIOCSIFADDR, &asked)?;
    let mut asked = request(LABEL);
    asked.ifr_ifru.ifru_netmask = socket_address(mask);
    interface(&socket, libc::SIOCSIFNETMASK, &asked)
}

fn any_socket() -> Result<OwnedFd, Errno> {
    socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
}

fn request(name: &[u8]) -> libc::ifreq {
    // SAFETY: `ifreq` is plain data for which all zeros is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays the NUL that it is, however long the name.
    let room = request.ifr_name.len().saturating_sub(1);
    for (place, byte) in request.ifr_name.iter_mut().take(room).zip(name) {
        *place = *byte as libc::c_char;
    }
    request
}

/// A `sockaddr_in` in the bytes of a `sockaddr`: the port, then the address in network order (ip(7)).
fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    let mut data = [0; 14];
    for (place, byte) in data.iter_mut().skip(2).zip(address.octets()) {
        *place = byte as libc::c_char;
    }
    libc::sockaddr { sa_family: libc::AF_INET as libc::sa_family_t, sa_data: data }
}

fn interface(socket: &OwnedFd, number: libc::Ioctl, request: &libc::ifreq) -> Result<(), Errno> {
    // SAFETY: each of the three calls above reads one `struct ifreq` with a NUL-terminated name and nothing behind it,
    // which `request` is, and the socket is open over the call.
    check(libc::c_long::from(unsafe { libc::ioctl(socket.as_raw_fd(), number, std::ptr::from_ref(request)) }))
        .map(|_| ())
}
