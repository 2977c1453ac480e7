//! Sockets of the host's, and the network: classes E and F of the suite, as far as they go without the egress.

use crate::files::done;
use crate::scene::{Attempt, Outcome, Scene};
use crate::sys::{self, Arg};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// The machine that runs the test, as QEMU shows it to its guest.
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
const PATIENCE: Duration = Duration::from_secs(5);

pub const ATTEMPTS: &[Attempt] = &[
    ("48-socket", |_| speak(UnixStream::connect(crate::bystander::SOCKET)?, "48-socket")),
    ("48-launcher", |_| launcher()),
    ("49-abstract", |_| {
        let address = std::os::unix::net::SocketAddr::from_abstract_name(crate::bystander::ABSTRACT)?;
        speak(UnixStream::connect_addr(&address)?, "49-abstract")
    }),
    ("51-replace", |_| done(std::fs::remove_file(crate::bystander::SPARE_SOCKET))),
    ("52-loopback", |_| {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, crate::bystander::TCP_PORT));
        speak(TcpStream::connect_timeout(&address, PATIENCE)?, "52-loopback")
    }),
    ("54-tcp", |scene| {
        let address = SocketAddr::from((OUTSIDE, scene.outside_port));
        speak(TcpStream::connect_timeout(&address, PATIENCE)?, "54-tcp")
    }),
    ("54-udp", |scene| {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        done(socket.send_to(b"54-udp\n", (OUTSIDE, scene.outside_port)))
    }),
    ("54-icmp", raw_icmp),
    ("57-metadata", |_| {
        // A datagram needs no answer to have been sent.
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        done(socket.send_to(b"57-metadata\n", (METADATA, 80)))
    }),
];

fn speak(mut stream: impl Write, id: &str) -> Outcome {
    done(stream.write_all(format!("{id}\n").as_bytes()))
}

/// What agentd would ask, as agentd's own user if that can be become: a list of everything that runs.
fn launcher() -> Outcome {
    const AGENTD: i64 = 200;
    if sys::user_id() == 0 {
        let _ = sys::call(libc::SYS_setresgid, [Arg::N(AGENTD), Arg::N(AGENTD), Arg::N(AGENTD)]);
        let _ = sys::call(libc::SYS_setresuid, [Arg::N(AGENTD), Arg::N(AGENTD), Arg::N(AGENTD)]);
    }
    const PATH: &[u8] = b"/run/agentd/launcher.sock\0";
    let socket = sys::call(
        libc::SYS_socket,
        [Arg::N(libc::AF_UNIX.into()), Arg::N(libc::SOCK_SEQPACKET.into()), Arg::N(0)],
    )?;
    let address = [&1_u16.to_ne_bytes()[..], PATH].concat();
    let length = i64::try_from(address.len()).unwrap_or(0);
    sys::call(libc::SYS_connect, [Arg::N(socket), Arg::In(&address), Arg::N(length)])?;
    let ask = br#"{"type":"list"}"#;
    let length = i64::try_from(ask.len()).unwrap_or(0);
    sys::call(libc::SYS_write, [Arg::N(socket), Arg::In(ask), Arg::N(length)])?;
    let mut answer = vec![0_u8; 1 << 16];
    let read = sys::call(libc::SYS_read, [Arg::N(socket), Arg::Out(&mut answer), Arg::N(1 << 16)])?;
    answer.truncate(usize::try_from(read).unwrap_or(0));
    let answer = String::from_utf8_lossy(&answer).into_owned();
    // The first part of a listing holds every run's id.
    if answer.contains("run_id") {
        Ok(answer.chars().take(3000).collect())
    } else {
        Err(io::Error::other(format!("it answered {}", answer.chars().take(200).collect::<String>())))
    }
}

/// An echo request without payload, built by hand.
fn raw_icmp(_: &Scene) -> Outcome {
    let socket = sys::call(
        libc::SYS_socket,
        [Arg::N(libc::AF_INET.into()), Arg::N(libc::SOCK_RAW.into()), Arg::N(libc::IPPROTO_ICMP.into())],
    )?;
    // sockaddr_in: family, port 0, address, 8 bytes of nothing.
    let mut address = 2_u16.to_ne_bytes().to_vec();
    address.extend([0, 0]);
    address.extend(OUTSIDE.octets());
    address.extend([0; 8]);
    // Type 8, checksum of the whole.
    let packet = [8, 0, 0xf7, 0xff, 0, 0, 0, 0];
    let send = [Arg::N(socket), Arg::In(&packet), Arg::N(8), Arg::N(0), Arg::In(&address), Arg::N(16)];
    done(sys::call(libc::SYS_sendto, send))
}

/// What a stranger said, for whoever listens.
pub fn first_line(mut stream: impl Read) -> String {
    let mut bytes = [0_u8; 64];
    let read = stream.read(&mut bytes).unwrap_or(0);
    String::from_utf8_lossy(bytes.get(..read).unwrap_or_default()).trim().to_owned()
}
