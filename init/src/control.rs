//! Who may ask init for what?
//!
//! One packet is one request, one packet the answer; the kernel names the peer's uid. The messages are
//! `agentd_domain::initctl`'s.
//!
//! Always: a client that does not read its answer loses it; init never waits for a client.

use crate::children::Child;
use crate::machine::Machine;
use crate::plan::Goal;
use crate::{status, steps};
use agentd_domain::config;
use agentd_domain::fault::Report;
use agentd_domain::initctl::{MAX_MESSAGE_BYTES, NetworkSettings, Request, Response};
use agentd_domain::paths::{UID_AGENTD, UID_CONSOLE_TTY};
use init_sys::packet::{self, Received};
use init_sys::{Signal, clock};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// agentd, the console and a tester keep one connection each; more is a mistake.
const MOST_CLIENTS: usize = 16;
/// Each is at most 900 bytes, so they fit into a packet.
const MOST_LINES: usize = 30;

#[derive(Debug)]
pub struct Control {
    listener: OwnedFd,
    clients: Vec<Client>,
}

#[derive(Debug)]
struct Client {
    socket: OwnedFd,
    uid: u32,
}

impl Control {
    pub fn listen(path: &Path) -> io::Result<Self> {
        Ok(Self { listener: packet::listen_at(path, 16)?, clients: Vec::new() })
    }

    pub fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        std::iter::once(self.listener.as_fd()).chain(self.clients.iter().map(|client| client.socket.as_fd()))
    }

    fn take_new(&mut self) {
        while let Ok(Some((socket, uid))) = packet::accept(self.listener.as_fd()) {
            // Others are dropped, which they see as a closed connection.
            if may_connect(uid) && self.clients.len() < MOST_CLIENTS {
                self.clients.push(Client { socket, uid });
            }
        }
    }

    /// One waiting message of each client; closed ones are dropped.
    fn take_messages(&mut self) -> Vec<(OwnedFd, u32, Received)> {
        let mut messages = Vec::new();
        self.clients.retain(|client| match packet::receive(client.socket.as_fd(), MAX_MESSAGE_BYTES) {
            Ok(Received::Nothing) => true,
            Ok(Received::Closed) | Err(_) => false,
            Ok(message) => match client.socket.try_clone() {
                Ok(socket) => {
                    messages.push((socket, client.uid, message));
                    true
                }
                Err(_) => false,
            },
        });
        messages
    }
}

/// Answers whoever waits.
pub fn serve(machine: &mut Machine) {
    let Some(control) = &mut machine.control else { return };
    control.take_new();
    for (socket, uid, message) in control.take_messages() {
        let response = match message {
            Received::Message(bytes) => match serde_json::from_slice::<Request>(&bytes) {
                Ok(request) => answer(machine, uid, request),
                Err(error) => Response::Refused(malformed(&error.to_string())),
            },
            _ => Response::Refused(malformed("the message is too long")),
        };
        if let Ok(bytes) = serde_json::to_vec(&response) {
            let _ = packet::send_now(socket.as_fd(), &bytes);
        }
    }
}

const ROOT: u32 = 0;

fn may_connect(uid: u32) -> bool {
    [ROOT, UID_AGENTD, UID_CONSOLE_TTY].contains(&uid)
}

/// Who may send this request. Everybody who may connect may look and may end the machine.
fn may_ask(uid: u32, request: &Request) -> bool {
    match request {
        Request::Status | Request::LastErrors | Request::Reboot | Request::PowerOff => may_connect(uid),
        Request::Report(_) => uid == UID_AGENTD,
        Request::SetNetwork(_)
        | Request::AllowFormat { .. }
        | Request::Repair { .. }
        | Request::RestartAgentd => uid == UID_CONSOLE_TTY || uid == ROOT,
    }
}

fn answer(machine: &mut Machine, uid: u32, request: Request) -> Response {
    if !may_ask(uid, &request) {
        return Response::Refused(Report::caller(
            "forbidden",
            "the request was refused",
            format!("uid {uid} may not send it"),
            "use the local console, or the web console of the appliance",
        ));
    }
    match request {
        Request::Status => Response::Status(Box::new(status::of(machine))),
        Request::LastErrors => Response::LastErrors { lines: machine.log.last(MOST_LINES) },
        Request::Report(report) => {
            machine.facts.milestone(status::MILESTONE_AGENTD, clock::boot_ms());
            machine.facts.agentd = Some(report);
            machine.facts.agentd_heard_ms = clock::boot_ms();
            // The first green is noted when it happens, not when somebody asks.
            let _ = status::of(machine);
            Response::Done
        }
        Request::Reboot => {
            machine.end(Goal::Restart, &format!("asked by uid {uid}"));
            Response::Done
        }
        Request::PowerOff => {
            machine.end(Goal::PowerOff, &format!("asked by uid {uid}"));
            Response::Done
        }
        Request::RestartAgentd => {
            machine.log.warn("agentd is killed and started again, as the local console asks");
            machine.signal(Child::Agentd, Signal::KILL);
            Response::Done
        }
        Request::AllowFormat { volume } => match steps::volumes::allow_format(machine, volume) {
            Ok(()) => {
                machine.end(Goal::Restart, "to format what the owner gave up");
                Response::Done
            }
            Err(report) => Response::Refused(report),
        },
        Request::Repair { volume } => match steps::volumes::unusable(machine, volume) {
            Ok(_) => {
                machine.facts.repair = Some(volume);
                Response::Done
            }
            Err(report) => Response::Refused(report),
        },
        Request::SetNetwork(settings) => {
            set_network(machine, settings).map_or_else(Response::Refused, |()| Response::Done)
        }
    }
}

fn set_network(machine: &mut Machine, settings: NetworkSettings) -> Result<(), Report> {
    if let Some(problem) = config::check_network(&settings).into_iter().next() {
        return Err(problem.report);
    }
    let text = config::with_network(&machine.facts.config_text, &settings);
    let stored = steps::config::store(machine, &text);
    // In force even if it cannot be kept: without it the owner may not get in at all.
    machine.facts.config.network = settings;
    steps::config::tell_netd(machine)?;
    machine.signal(Child::Netd, Signal::HUP);
    stored
}

fn malformed(why: &str) -> Report {
    Report::caller("malformed", "the request was not understood", why, "use the messages of initctl.rs")
}

#[cfg(test)]
mod tests {
    use super::*;
    use agentd_domain::initctl::AgentdReport;
    use agentd_domain::marker::Volume;

    #[test]
    fn each_request_has_its_senders() {
        let report = Request::Report(AgentdReport::default());
        let network = Request::SetNetwork(NetworkSettings::Dhcp);
        let format = Request::AllowFormat { volume: Volume::Data };
        let repair = Request::Repair { volume: Volume::Data };
        let restart = Request::RestartAgentd;
        for (uid, expected) in [
            (ROOT, [true, true, true, false, true, true, true, true]),
            (UID_AGENTD, [true, true, true, true, false, false, false, false]),
            (UID_CONSOLE_TTY, [true, true, true, false, true, true, true, true]),
            (1_000_000, [false; 8]),
            (201, [false; 8]),
        ] {
            let requests = [
                &Request::Status,
                &Request::Reboot,
                &Request::PowerOff,
                &report,
                &network,
                &format,
                &repair,
                &restart,
            ];
            assert_eq!(requests.map(|request| may_ask(uid, request)), expected, "uid {uid}");
        }
    }
}
