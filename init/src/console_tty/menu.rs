//! What happens on a key?
//!
//! Pure. States: Idle -> Confirm(restart agentd | restart | power off) -> Idle;
//!       Idle -> GiveUp(format | repair, typed) -> Idle, offered only while a partition is foreign or damaged;
//!       Idle -> Network -> Field(interface, addresses, gateways, dns) -> Apply -> Idle.
//! Always: Escape leads back to Idle from everywhere; nothing is changed without a `y`.

use crate::screen::{self, Unusable};
use agentd_domain::config;
use agentd_domain::initctl::{NetworkSettings, Request};
use agentd_domain::marker::Volume;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Key {
    Char(char),
    Enter,
    Backspace,
    Escape,
}

#[derive(Debug)]
pub enum Effect {
    Print(Vec<String>),
    Prompt(String),
    Echo(String),
    Ask(Request),
    Status,
    LastErrors,
    /// Draw the facts again.
    Facts,
}

#[derive(Debug)]
pub struct Menu {
    terminal: String,
    state: State,
    /// Waits for the owner's yes.
    unusable: Option<Unusable>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Idle,
    Confirm(End),
    GiveUp { how: GiveUp, volume: Volume, typed: String },
    Network,
    Field { field: usize, typed: String, answers: Vec<String> },
    Apply(NetworkSettings),
}

/// What may lose the owner's data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum GiveUp {
    Format,
    Repair,
}

impl GiveUp {
    /// To be typed: a single key is too easily pressed for this.
    const fn word(self) -> &'static str {
        match self {
            Self::Format => "format",
            Self::Repair => "repair",
        }
    }

    const fn loss(self) -> &'static str {
        match self {
            Self::Format => "everything on the partition will be lost",
            Self::Repair => "damaged files on the partition may be lost",
        }
    }

    const fn request(self, volume: Volume) -> Request {
        match self {
            Self::Format => Request::AllowFormat { volume },
            Self::Repair => Request::Repair { volume },
        }
    }
}

/// What the owner may end with a key and a yes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// The web console and the APIs, when they hang; agents go on.
    Agentd,
    Restart,
    PowerOff,
}

impl End {
    const fn question(self) -> &'static str {
        match self {
            Self::Agentd => {
                "restart agentd now? web console and APIs are away for seconds, agents go on; y or n: "
            }
            Self::Restart => "restart now? y or n: ",
            Self::PowerOff => "power off now? y or n: ",
        }
    }

    const fn request(self) -> Request {
        match self {
            Self::Agentd => Request::RestartAgentd,
            Self::Restart => Request::Reboot,
            Self::PowerOff => Request::PowerOff,
        }
    }
}

const KEYS: &str = "keys: s status, e last errors, n network, a restart agentd, r restart, p power off";
const LONGEST_LINE: usize = 400;

const FIELDS: [&str; 4] = [
    "interface (name or MAC address): ",
    "addresses with prefix length, separated by commas: ",
    "gateways, separated by commas (empty for none): ",
    "name servers, separated by commas (empty for none): ",
];

impl Menu {
    pub fn new(terminal: String) -> Self {
        Self { terminal, state: State::Idle, unusable: None }
    }

    /// Tells the menu what the owner may give up now.
    pub fn offer(&mut self, unusable: Option<Unusable>) {
        self.unusable = unusable;
    }

    /// What the key may do now.
    fn offered(&self, key: Key) -> Option<(GiveUp, Volume)> {
        let unusable = self.unusable?;
        match key {
            Key::Char('f') => Some((GiveUp::Format, unusable.volume)),
            Key::Char('c') if unusable.can_be_repaired => Some((GiveUp::Repair, unusable.volume)),
            _ => None,
        }
    }

    fn keys(&self) -> String {
        let Some(unusable) = self.unusable else { return format!("{KEYS}\r\n") };
        let name = unusable.volume.partition_name();
        let repair = if unusable.can_be_repaired { ", c repair it" } else { "" };
        format!("{KEYS}, f format the {name} partition{repair}\r\n")
    }

    /// What stands at the cursor, to be drawn again after other lines came between.
    pub fn prompt(&self) -> String {
        match &self.state {
            State::Idle => self.keys(),
            State::GiveUp { how, volume, typed } => format!(
                "{} ({}); type `{}` and Enter: {typed}",
                how.loss(),
                volume.partition_name(),
                how.word()
            ),
            State::Confirm(end) => end.question().to_owned(),
            State::Network => "network: d automatic (DHCP), s static, Escape to leave: ".to_owned(),
            State::Field { field, typed, .. } => {
                format!("{}{typed}", FIELDS.get(*field).copied().unwrap_or_default())
            }
            State::Apply(_) => "apply these settings? y or n: ".to_owned(),
        }
    }

    #[cfg(test)]
    fn is_idle(&self) -> bool {
        self.state == State::Idle
    }
}

pub fn step(menu: &mut Menu, key: Key) -> Vec<Effect> {
    let state = std::mem::replace(&mut menu.state, State::Idle);
    let (next, mut effects) = match (state, key) {
        (State::Idle, key) => match menu.offered(key) {
            Some((how, volume)) => (State::GiveUp { how, volume, typed: String::new() }, Vec::new()),
            None => idle(key, &menu.terminal, &menu.keys()),
        },
        (_, Key::Escape) => (State::Idle, vec![line("left as it was"), Effect::Prompt(menu.keys())]),
        (State::Confirm(end), key) => confirm(end, key),
        (State::GiveUp { how, volume, typed }, key) => give_up_key(how, volume, typed, key),
        (State::Network, key) => network(key),
        (State::Field { field, typed, answers }, key) => field_key(field, typed, answers, key),
        (State::Apply(settings), key) => apply(settings, key),
    };
    let moved = std::mem::discriminant(&next) != std::mem::discriminant(&State::Idle)
        && !effects.iter().any(|effect| matches!(effect, Effect::Echo(_) | Effect::Prompt(_)));
    menu.state = next;
    if moved {
        effects.push(Effect::Prompt(menu.prompt()));
    }
    effects
}

fn line(text: impl Into<String>) -> Effect {
    Effect::Print(vec![text.into()])
}

fn idle(key: Key, terminal: &str, keys: &str) -> (State, Vec<Effect>) {
    match key {
        Key::Char('s') => (State::Idle, vec![Effect::Status]),
        Key::Char('e') => (State::Idle, vec![Effect::LastErrors]),
        Key::Char('n') => (State::Network, Vec::new()),
        Key::Char('a') => (State::Confirm(End::Agentd), Vec::new()),
        Key::Char('r') => (State::Confirm(End::Restart), Vec::new()),
        Key::Char('p') => (State::Confirm(End::PowerOff), Vec::new()),
        Key::Enter => (State::Idle, vec![Effect::Facts]),
        Key::Char(other) => (
            State::Idle,
            vec![
                line(format!("`{other}` is no key of this console ({terminal})")),
                Effect::Prompt(keys.to_owned()),
            ],
        ),
        Key::Escape | Key::Backspace => (State::Idle, Vec::new()),
    }
}

fn confirm(end: End, key: Key) -> (State, Vec<Effect>) {
    match key {
        Key::Char('y') => (State::Idle, vec![line("y"), Effect::Ask(end.request())]),
        _ => (State::Idle, vec![line("no")]),
    }
}

fn give_up_key(how: GiveUp, volume: Volume, mut typed: String, key: Key) -> (State, Vec<Effect>) {
    match key {
        Key::Enter if typed == how.word() => (State::Idle, vec![line(""), Effect::Ask(how.request(volume))]),
        Key::Enter | Key::Escape => (State::Idle, vec![line(""), line("left as it was")]),
        key => {
            let echo = edit(&mut typed, key);
            (State::GiveUp { how, volume, typed }, vec![Effect::Echo(echo)])
        }
    }
}

/// Adds or takes a character; gives what the terminal is to show for it.
fn edit(typed: &mut String, key: Key) -> String {
    match key {
        Key::Char(c) if typed.len() < LONGEST_LINE => {
            typed.push(c);
            c.to_string()
        }
        Key::Backspace if typed.pop().is_some() => "\u{8} \u{8}".to_owned(),
        _ => String::new(),
    }
}

fn network(key: Key) -> (State, Vec<Effect>) {
    match key {
        Key::Char('d') => (State::Apply(NetworkSettings::Dhcp), vec![line("automatic (DHCP)")]),
        Key::Char('s') => {
            (State::Field { field: 0, typed: String::new(), answers: Vec::new() }, vec![line("static")])
        }
        _ => (State::Idle, vec![line("left as it was")]),
    }
}

fn field_key(field: usize, mut typed: String, mut answers: Vec<String>, key: Key) -> (State, Vec<Effect>) {
    match key {
        Key::Char(_) | Key::Backspace => {
            let echo = edit(&mut typed, key);
            (State::Field { field, typed, answers }, vec![Effect::Echo(echo)])
        }
        Key::Enter if field + 1 < FIELDS.len() => {
            answers.push(typed);
            (State::Field { field: field + 1, typed: String::new(), answers }, vec![line("")])
        }
        Key::Enter => {
            answers.push(typed);
            checked(settings(&answers))
        }
        Key::Escape => (State::Idle, Vec::new()),
    }
}

/// All mistakes at once, then from the beginning; or the question whether to apply.
fn checked(settings: NetworkSettings) -> (State, Vec<Effect>) {
    let problems = config::check_network(&settings);
    if problems.is_empty() {
        let summary = screen::network(&settings);
        return (State::Apply(settings), vec![Effect::Print(vec![String::new(), summary])]);
    }
    let mut lines = vec![String::new()];
    for problem in &problems {
        lines.push(format!("wrong: {}", problem.report.why));
        lines.push(format!("  fix: {}", problem.report.fix));
    }
    lines.push("enter them again, or Escape to leave".to_owned());
    (State::Field { field: 0, typed: String::new(), answers: Vec::new() }, vec![Effect::Print(lines)])
}

fn settings(answers: &[String]) -> NetworkSettings {
    let answer = |index: usize| answers.get(index).map_or("", |text| text.trim());
    let list = |index: usize| {
        answer(index).split(',').map(str::trim).filter(|text| !text.is_empty()).map(str::to_owned).collect()
    };
    NetworkSettings::Static {
        interface: answer(0).to_owned(),
        addresses: list(1),
        gateways: list(2),
        dns: list(3),
    }
}

fn apply(settings: NetworkSettings, key: Key) -> (State, Vec<Effect>) {
    match key {
        Key::Char('y') => (State::Idle, vec![line("y"), Effect::Ask(Request::SetNetwork(settings))]),
        _ => (State::Idle, vec![line("left as it was")]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn menu() -> Menu {
        Menu::new("ttyS0".to_owned())
    }

    fn type_in(menu: &mut Menu, text: &str) -> Vec<Effect> {
        let key = |c| match c {
            '\n' => Key::Enter,
            '<' => Key::Backspace,
            '!' => Key::Escape,
            other => Key::Char(other),
        };
        text.chars().flat_map(|c| step(menu, key(c))).collect()
    }

    fn asked(effects: Vec<Effect>) -> Vec<Request> {
        let asked = |effect| match effect {
            Effect::Ask(request) => Some(request),
            _ => None,
        };
        effects.into_iter().filter_map(asked).collect()
    }

    #[test]
    fn the_end_needs_a_yes() {
        assert!(asked(type_in(&mut menu(), "rn")).is_empty());
        assert!(asked(type_in(&mut menu(), "p\n")).is_empty());
        assert!(asked(type_in(&mut menu(), "an")).is_empty());
        assert!(matches!(asked(type_in(&mut menu(), "ay")).as_slice(), [Request::RestartAgentd]));
        assert!(matches!(asked(type_in(&mut menu(), "ry")).as_slice(), [Request::Reboot]));
        assert!(matches!(asked(type_in(&mut menu(), "py")).as_slice(), [Request::PowerOff]));
    }

    #[test]
    fn a_static_network_is_entered_with_corrections() {
        let mut menu = menu();
        let requests = asked(type_in(&mut menu, "nseth0x<\n192.168.1.10/24, fd00::10/64\n192.168.1.1\n\ny"));
        let expected = NetworkSettings::Static {
            interface: "eth0".to_owned(),
            addresses: vec!["192.168.1.10/24".to_owned(), "fd00::10/64".to_owned()],
            gateways: vec!["192.168.1.1".to_owned()],
            dns: Vec::new(),
        };
        assert!(matches!(requests.as_slice(), [Request::SetNetwork(settings)] if *settings == expected));
        assert!(menu.is_idle());
    }

    #[test]
    fn all_mistakes_are_told_and_nothing_is_applied() {
        let mut menu = menu();
        let effects = type_in(&mut menu, "nseth0\n192.168.1.10\nrouter\ndns\n");
        let lines: Vec<String> = effects
            .iter()
            .filter_map(|effect| match effect {
                Effect::Print(lines) => Some(lines.clone()),
                _ => None,
            })
            .flatten()
            .collect();
        assert_eq!(lines.iter().filter(|line| line.starts_with("wrong:")).count(), 3, "{lines:?}");
        assert!(!menu.is_idle(), "it asks again");
        assert!(asked(type_in(&mut menu, "!")).is_empty());
        assert!(menu.is_idle());
    }

    const DAMAGED: Unusable = Unusable { volume: Volume::Data, can_be_repaired: true };
    const FOREIGN: Unusable = Unusable { volume: Volume::Data, can_be_repaired: false };

    #[test]
    fn formatting_is_offered_only_when_needed_and_needs_the_whole_word() {
        assert!(asked(type_in(&mut menu(), "fformat\n")).is_empty(), "nothing is foreign");
        let mut menu = menu();
        menu.offer(Some(FOREIGN));
        assert!(menu.prompt().contains("f format the data partition"));
        assert!(asked(type_in(&mut menu, "fy\n")).is_empty());
        assert!(asked(type_in(&mut menu, "fforma\n")).is_empty());
        assert!(asked(type_in(&mut menu, "cepai!")).is_empty(), "foreign data is not repaired");
        let requests = asked(type_in(&mut menu, "ffoo<rmat\n"));
        assert!(
            matches!(requests.as_slice(), [Request::AllowFormat { volume: Volume::Data }]),
            "{requests:?}"
        );
        assert!(menu.is_idle());
    }

    #[test]
    fn a_damaged_partition_can_be_repaired_or_formatted() {
        let mut menu = menu();
        menu.offer(Some(DAMAGED));
        assert!(asked(type_in(&mut menu, "cformat\n")).is_empty());
        let requests = asked(type_in(&mut menu, "crepair\n"));
        assert!(matches!(requests.as_slice(), [Request::Repair { volume: Volume::Data }]), "{requests:?}");
        let requests = asked(type_in(&mut menu, "fformat\n"));
        assert!(
            matches!(requests.as_slice(), [Request::AllowFormat { volume: Volume::Data }]),
            "{requests:?}"
        );
    }

    #[test]
    fn automatic_addresses_need_a_yes_too() {
        assert!(asked(type_in(&mut menu(), "ndn")).is_empty());
        let requests = asked(type_in(&mut menu(), "ndy"));
        assert!(matches!(requests.as_slice(), [Request::SetNetwork(NetworkSettings::Dhcp)]));
    }

    proptest! {
        /// Line noise on a serial port changes nothing unless it says `y` at the right place, and Escape always
        /// leads back.
        #[test]
        fn noise_without_a_yes_asks_for_nothing(text in "[a-xz0-9\n<!,./:]{0,60}") {
            let mut menu = menu();
            menu.offer(Some(DAMAGED));
            prop_assert!(asked(type_in(&mut menu, &text)).is_empty());
            type_in(&mut menu, "!");
            prop_assert!(menu.is_idle());
        }
    }
}
