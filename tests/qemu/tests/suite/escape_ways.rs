//! How does the escape suite set its stage and hear what happened?

use agentd_domain::api::{Agent, AgentState, LogLine};
use anyhow::{Context, Result, ensure};
use image::build::{self, Built};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::Read;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;
use tests_qemu::{Appliance, BOOT, Capture, Ctl, Start, Traffic, setup};

/// All attempts under emulation, beside other work of the machine.
const ATTACK: Duration = Duration::from_secs(420);
const NEIGHBOUR: &str = "neighbour";
const BYSTANDER: &str = "bystander";
/// The partition that holds nothing, from the image's layout.
const RESERVE: &str = agentd_domain::marker::PARTITION_RESERVE;

/// The image whose walls can be lowered, built once.
pub fn lowerable() -> Result<&'static Built> {
    static BUILT: OnceLock<Result<Built, String>> = OnceLock::new();
    let make = || build::lowerable(&setup().cache).map_err(|error| format!("{error:#}"));
    BUILT.get_or_init(make).as_ref().map_err(|error| anyhow::anyhow!("{error}"))
}

/// One attacker's life, as others saw it.
#[derive(Debug, Default)]
pub struct Attack {
    /// Attempts that had an effect.
    pub harmed: BTreeSet<String>,
    pub begun: BTreeSet<String>,
    /// Nothing was tried, because the walls that were left refused the start.
    pub refused: Option<String>,
    said: BTreeMap<String, String>,
}

impl Attack {
    pub fn tried(&self) -> usize {
        self.begun.len()
    }

    /// Attempts that the attacker itself calls successful, or about which it became silent.
    pub fn boasts(&self) -> Vec<&str> {
        let boast = |word: &str| word.starts_with("ESCAPED") || word.starts_with("silent");
        self.said.iter().filter(|(_, word)| boast(word)).map(|(id, _)| id.as_str()).collect()
    }

    pub fn own_word(&self, id: &str) -> String {
        match (self.said.get(id), self.begun.contains(id)) {
            (Some(word), _) => word.chars().take(80).collect(),
            (None, true) => "ended the run".to_owned(),
            (None, false) => "not tried".to_owned(),
        }
    }
}

impl fmt::Display for Attack {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.said.iter().try_for_each(|(id, word)| writeln!(formatter, "{id}: {word}"))
    }
}

/// A machine with a neighbour on it, and who listens outside of it.
pub struct Stage {
    appliance: Appliance,
    watchers: Vec<&'static str>,
    neighbour: Agent,
    tcp: TcpListener,
    udp: UdpSocket,
    secrets: BTreeSet<String>,
    attackers: u32,
}

impl Stage {
    /// The appliance itself.
    pub fn appliance() -> Result<Self> {
        Self::open(&setup().built, &[NEIGHBOUR], Start { capture: true, ..Start::default() })
    }

    /// The image whose walls can be lowered, with a bystander that sees the host.
    pub fn watched(kernel: Option<&Path>, command_line: &str) -> Result<Self> {
        let start = Start {
            capture: true,
            command_line: command_line.to_owned(),
            kernel: kernel.map(Path::to_owned),
            memory_mib: 1536,
            ..Start::default()
        };
        Self::open(lowerable()?, &[BYSTANDER, NEIGHBOUR], start)
    }

    fn open(built: &Built, watchers: &[&'static str], start: Start) -> Result<Self> {
        let mut appliance = Appliance::of(built)?;
        appliance.boot(&start)?;
        appliance.claim()?;
        for name in watchers {
            let lower = if *name == BYSTANDER { "lower=all" } else { "" };
            install(&appliance, name, &[name, lower])?;
            appliance.ctl().run(&["agent", "start", name])?.success()?;
            appliance.until(&format!("{name} is ready"), BOOT, |ctl| {
                Ok(log(ctl, name)?.iter().any(|line| line == "ready").then_some(()))
            })?;
        }
        let neighbour = agent(&appliance.ctl(), NEIGHBOUR)?;
        let tcp = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        tcp.set_nonblocking(true)?;
        let udp = UdpSocket::bind((Ipv4Addr::LOCALHOST, tcp.local_addr()?.port()))?;
        udp.set_nonblocking(true)?;
        Ok(Self {
            appliance,
            watchers: watchers.to_vec(),
            neighbour,
            tcp,
            udp,
            secrets: BTreeSet::new(),
            attackers: 0,
        })
    }

    /// Lets one attacker try everything with these walls lowered, if this image can.
    pub fn attack(&mut self, lower: &str) -> Result<Attack> {
        self.attackers += 1;
        let name = format!("attacker-{}", self.attackers);
        let before = self.heard()?;
        let frames = Capture::read(&self.appliance.capture_file())?.frames.len();
        let serial = self.appliance.guest()?.serial_text();
        let victim = format!("victim={}", self.neighbour.agent_id);
        let outside = format!("outside={}", self.tcp.local_addr()?.port());
        let lower = format!("lower={lower}");
        let attacker = install(&self.appliance, &name, &["attack", &victim, &outside, &lower])?;
        self.appliance.ctl().run(&["agent", "start", &name])?.success()?;
        let mut lines = Vec::new();
        self.appliance.until("the attack is over", ATTACK, |ctl| {
            // The log first: what the end of the run printed is in it when the state is seen.
            let state = agent(ctl, &name)?.state;
            lines = log(ctl, &name)?;
            let over = lines.iter().any(|line| line == "attack over");
            let ended = match state {
                AgentState::Refused | AgentState::Quarantined => true,
                AgentState::Stopped | AgentState::Crashed => !lines.is_empty(),
                _ => false,
            };
            Ok((over || ended).then_some(()))
        })?;
        let state = agent(&self.appliance.ctl(), &name)?;
        if lines.is_empty()
            && state.state == AgentState::Refused
            && let Some(problem) = &state.problem
        {
            let refused = Some(problem.why.clone());
            self.appliance.ctl().run(&["agent", "rm", &name])?;
            return Ok(Attack { refused, ..Attack::default() });
        }
        self.let_watchers_look(2)?;
        self.appliance.ctl().run(&["agent", "stop", &name])?;
        self.appliance.until("the attacker is stopped", BOOT, |ctl| {
            let state = agent(ctl, &name)?;
            Ok((state.run.is_none() || state.state == AgentState::Stopped).then_some(()))
        })?;
        // What is still there after five looks has outlived the stop.
        self.let_watchers_look(7)?;
        let mut attack = Attack::default();
        ensure!(!lines.is_empty(), "the attacker said nothing: {state:?}");
        for line in &lines {
            if let Some(id) = line.strip_prefix("begin ") {
                attack.begun.insert(id.to_owned());
            }
            if let Some((id, word)) = line.strip_prefix("try ").and_then(|rest| rest.split_once(": ")) {
                attack.said.insert(id.to_owned(), word.to_owned());
            }
        }
        ensure!(!attack.begun.is_empty(), "nothing was tried: {lines:?} {state:?}");
        let after = self.heard()?;
        for (watcher, harms) in after {
            let known = before.get(watcher).cloned().unwrap_or_default();
            attack.harmed.extend(harms.into_iter().filter(|harm| !known.contains(harm)).map(|(_, id)| id));
        }
        self.judge_words(&mut attack);
        self.judge_outside(&mut attack, frames, &serial, &attacker)?;
        // With another's uid its folder cannot be removed by the ordinary way; the next attacker has another name.
        self.appliance.ctl().run(&["agent", "rm", &name])?;
        Ok(attack)
    }

    /// A secret in the attacker's mouth is a secret that was read.
    fn judge_words(&self, attack: &mut Attack) {
        let run = self.neighbour.run.as_ref().map(|run| run.run_id.to_string()).unwrap_or_default();
        for (id, word) in &attack.said {
            let knows = self.secrets.iter().any(|secret| word.contains(secret.as_str()));
            if knows || (id == "48-launcher" && !run.is_empty() && word.contains(&run)) {
                attack.harmed.insert(id.clone());
            }
        }
    }

    /// The serial line, the disk, the uplink, and what listens on this machine.
    fn judge_outside(
        &mut self,
        attack: &mut Attack,
        frames: usize,
        serial: &str,
        attacker: &Agent,
    ) -> Result<()> {
        let now = self.appliance.guest()?.serial_text();
        for (id, words) in [
            ("17-kmsg", "escape-mark 17-kmsg"),
            ("43-iopl", "escape-mark 43-iopl"),
            ("17-sysrq", "sysrq: HELP"),
        ] {
            if now.matches(words).count() > serial.matches(words).count() {
                attack.harmed.insert(id.to_owned());
            }
        }
        let reserve = image::layout::partition(RESERVE).context("no reserve partition")?;
        let sector = tests_qemu::read(&self.appliance.disk(), reserve.start_bytes, 512)?;
        if String::from_utf8_lossy(&sector).starts_with(&format!("escape-mark 17-disk {}", attacker.agent_id))
        {
            attack.harmed.insert("17-disk".to_owned());
        }
        while let Ok((mut stream, _)) = self.tcp.accept() {
            stream.set_read_timeout(Some(Duration::from_secs(2)))?;
            let mut bytes = [0; 64];
            let read = stream.read(&mut bytes).unwrap_or(0);
            if bytes.get(..read).is_some_and(|bytes| bytes.starts_with(b"54-tcp")) {
                attack.harmed.insert("54-tcp".to_owned());
            }
        }
        let mut bytes = [0; 64];
        while let Ok(read) = self.udp.recv(&mut bytes) {
            if bytes.get(..read).is_some_and(|bytes| bytes.starts_with(b"54-udp")) {
                attack.harmed.insert("54-udp".to_owned());
            }
        }
        for (_, traffic) in Capture::read(&self.appliance.capture_file())?.frames.iter().skip(frames) {
            let Traffic::Other(about) = traffic else { continue };
            if about.contains("169, 254, 169, 254") {
                attack.harmed.insert("57-metadata".to_owned());
            }
            // From the guest to the other end of its card, and not an answer to something else.
            if about.starts_with("protocol Some(1) ") && about.contains("[10, 0, 2, 15, 10, 0, 2, 2]") {
                attack.harmed.insert("54-icmp".to_owned());
            }
        }
        Ok(())
    }

    /// Harms so far, by who told of them; secrets are learned on the way.
    fn heard(&mut self) -> Result<BTreeMap<&'static str, BTreeSet<(u32, String)>>> {
        let mut heard = BTreeMap::new();
        for name in &self.watchers {
            let mut harms = BTreeSet::new();
            for line in log(&self.appliance.ctl(), name)? {
                if let Some((number, id)) = line.strip_prefix("harm ").and_then(|rest| rest.split_once(' ')) {
                    harms.insert((number.parse()?, id.to_owned()));
                }
                if let Some(secret) = line.strip_prefix("secret ") {
                    self.secrets.insert(secret.to_owned());
                }
            }
            heard.insert(*name, harms);
        }
        Ok(heard)
    }

    /// Two rounds of each: the first may have begun before what is looked for.
    fn let_watchers_look(&mut self, times: u32) -> Result<()> {
        for name in self.watchers.clone() {
            let looks = |ctl: &Ctl| -> Result<u32> {
                let lines = log(ctl, name)?;
                let last = lines.iter().rev().find_map(|line| line.strip_prefix("looked "));
                Ok(last.and_then(|number| number.parse().ok()).unwrap_or(0))
            };
            let now = looks(&self.appliance.ctl())?;
            self.appliance.until(&format!("{name} has looked around"), BOOT, |ctl| {
                Ok((looks(ctl)? >= now + times).then_some(()))
            })?;
        }
        Ok(())
    }

    pub fn end(mut self) -> Result<()> {
        self.appliance.power_off_hard()
    }
}

/// A package with the suite's program, installed under the suite's limits.
fn install(appliance: &Appliance, name: &str, arguments: &[&str]) -> Result<Agent> {
    let folder: PathBuf = appliance.file("packages").join(name);
    std::fs::create_dir_all(folder.join("bin"))?;
    std::fs::copy(env!("CARGO_BIN_EXE_escape"), folder.join("bin/escape"))?;
    std::fs::write(folder.join("spare"), "to be moved away")?;
    let words: Vec<String> = ["/agent/bin/escape"]
        .iter()
        .chain(arguments)
        .filter(|word| !word.is_empty())
        .map(|word| format!("{word:?}"))
        .collect();
    let manifest = format!(
        "[agent]\nname = \"{name}\"\nexec = [{}]\n\n[limits]\nmemory_max = \"64M\"\nmemory_high = \"64M\"\npids = 64\n\
         cpu = \"50%\"\ndisk = \"16M\"\ninodes = 400\n\n[restart]\npolicy = \"never\"\n",
        words.join(", ")
    );
    std::fs::write(folder.join("agent.toml"), manifest)?;
    appliance.ctl().json(&["agent", "install", folder.to_str().context("path")?])
}

fn agent(ctl: &Ctl, name: &str) -> Result<Agent> {
    let agents: Vec<Agent> = ctl.json(&["agent", "ls"])?;
    agents.into_iter().find(|agent| agent.name.as_str() == name).with_context(|| format!("no agent {name}"))
}

/// What an agent printed, oldest first.
fn log(ctl: &Ctl, name: &str) -> Result<Vec<String>> {
    let answer = ctl.run(&["agent", "logs", name, "--lines", "500", "--json"])?.success()?;
    let lines: Vec<LogLine> = answer.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    Ok(lines.into_iter().filter(|line| line.stream == "out").map(|line| line.text).collect())
}
