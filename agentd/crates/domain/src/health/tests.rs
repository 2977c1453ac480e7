use super::signs::{CALM_MS, STUCK_COMPUTING_MS, STUCK_GRACE_MS, STUCK_MS};
use super::*;
use crate::plan::CgroupLimits;
use proptest::prelude::*;
use std::collections::BTreeSet;
use uuid::Uuid;

fn run(n: u128) -> RunId {
    RunId(Uuid::from_u128(n))
}

/// One agent, its clock, and all that was done to it.
struct Agent {
    health: Health,
    now: Now,
    runs: u128,
    reading: Reading,
    done: Vec<Effect>,
    seen: Vec<AgentState>,
}

impl Agent {
    fn new(wanted: bool) -> Self {
        let now = Now { boot_ms: 1_000, unix_ms: 1_000_000, jitter: 0 };
        Self {
            health: Health::known(wanted, Restart::Always, 0, History::default(), now),
            now,
            runs: 0,
            reading: Reading::default(),
            done: Vec::new(),
            seen: Vec::new(),
        }
    }

    fn running() -> Self {
        let mut agent = Self::new(true);
        agent.start();
        agent
    }

    fn step(&mut self, event: Event) -> Vec<Effect> {
        let effects = step(&mut self.health, event, self.now);
        self.done.extend(effects.clone());
        self.seen.push(self.health.state());
        assert!(!self.health.reason(self.now.boot_ms).is_empty());
        effects
    }

    fn start(&mut self) {
        let due_ms = self.health.due_ms().expect("it is due some time");
        self.pass(due_ms.saturating_sub(self.now.boot_ms));
        self.runs += 1;
        let run = run(self.runs);
        assert!(self.step(Event::Start { run }).contains(&Effect::Start { run }));
        self.step(Event::Started { run });
        // A new group's counters begin at zero.
        self.reading = Reading { machine: self.reading.machine, ..Reading::default() };
    }

    fn pass(&mut self, ms: u64) {
        self.now.boot_ms += ms;
        self.now.unix_ms += i64::try_from(ms).expect("a time");
    }

    /// A second later the counters are what `change` makes of them.
    fn read(&mut self, change: impl FnOnce(&mut Reading)) -> Vec<Effect> {
        self.pass(1_000);
        change(&mut self.reading);
        self.reading.at_ms = self.now.boot_ms;
        let (run, reading) = (run(self.runs), Box::new(self.reading.clone()));
        self.step(Event::Read { run, reading })
    }

    fn end(&mut self, cause: ExitCause) {
        let (run, ended_ms) = (run(self.runs), self.now.boot_ms);
        self.step(Event::Ended { run, cause, began_ms: 0, ended_ms });
    }

    fn fail(&mut self) {
        self.end(ExitCause::Exited { code: 1 });
    }

    fn state(&self) -> AgentState {
        self.health.state()
    }

    fn kills(&self) -> Vec<KillReason> {
        let kill = |effect: &Effect| match effect {
            Effect::Kill { why, .. } => Some(*why),
            _ => None,
        };
        self.done.iter().filter_map(kill).collect()
    }

    fn kinds_of_pain(&self) -> Vec<&str> {
        self.health.pains().history().pains.iter().map(|pain| pain.kind.as_str()).collect()
    }
}

/// The kernel holds every allocation back, nobody is killed: the livelock of `memory.high`.
fn livelock(reading: &mut Reading) {
    reading.memory.full_total_us += 950_000;
    reading.memory_high_events += 40;
}

#[test]
fn a_livelock_under_memory_high_is_ended_after_two_seconds() {
    let mut agent = Agent::running();
    agent.read(|_| {});
    assert!(agent.read(livelock).iter().all(|effect| !matches!(effect, Effect::Kill { .. })));
    let effects = agent.read(livelock);
    let kill = Effect::Kill { run: run(1), grace_ms: 0, why: KillReason::Pressure };
    assert!(effects.contains(&kill), "{effects:?}");
    assert_eq!((agent.state(), agent.kinds_of_pain()), (AgentState::Stuck, vec!["pressure"]));
    agent.end(ExitCause::Pressure);
    assert_eq!(agent.state(), AgentState::Crashed);
    assert_eq!(agent.health.due_ms(), Some(agent.now.boot_ms + BACKOFF_FIRST_MS));
}

#[test]
fn pressure_without_high_events_or_with_progress_is_left_alone_for_a_while() {
    let mut slow_disk = Agent::running();
    let mut works = Agent::running();
    for _ in 0..8 {
        slow_disk.read(|reading| reading.memory.full_total_us += 950_000);
        let now_ms = works.now.boot_ms + 1_000;
        works.read(|reading| {
            livelock(reading);
            reading.pulse.progress_ms = now_ms;
        });
    }
    assert_eq!((slow_disk.kills(), works.kills()), (vec![], vec![]));
    for _ in 0..4 {
        let now_ms = works.now.boot_ms + 1_000;
        works.read(|reading| {
            livelock(reading);
            reading.pulse.progress_ms = now_ms;
        });
    }
    assert_eq!(works.kills(), [KillReason::Pressure], "a heartbeat is no licence");
}

#[test]
fn a_slow_leak_that_starves_is_ended_after_ten_seconds() {
    let mut agent = Agent::running();
    agent.read(|_| {});
    for second in 1..=10 {
        agent.read(|reading| {
            reading.memory.full_total_us += 400_000;
            reading.memory_high_events += 1;
        });
        assert_eq!(agent.kills().len(), usize::from(second == 10), "second {second}");
    }
}

#[test]
fn a_message_in_hand_without_progress_is_stuck_then_killed() {
    let mut agent = Agent::running();
    for _ in 0..STUCK_MS / 1_000 {
        agent.read(|reading| reading.pulse.work = 1);
        assert_eq!(agent.state(), AgentState::Busy);
    }
    agent.read(|_| {});
    assert_eq!((agent.state(), agent.kills()), (AgentState::Stuck, vec![]));
    let now_ms = agent.now.boot_ms + 1_000;
    agent.read(|reading| reading.pulse.progress_ms = now_ms);
    assert_eq!(agent.state(), AgentState::Busy, "it came to");
    for _ in 0..(STUCK_MS + STUCK_GRACE_MS) / 1_000 + 1 {
        agent.read(|_| {});
    }
    assert_eq!(agent.kills(), [KillReason::Stuck]);
    agent.end(ExitCause::Stuck);
    assert_eq!((agent.state(), agent.health.restarts()), (AgentState::Crashed, 1));
}

#[test]
fn what_agentd_answers_slowly_is_not_the_agents_fault_and_computing_has_more_time() {
    let mut waits = Agent::running();
    let mut computes = Agent::running();
    for _ in 0..2 * STUCK_MS / 1_000 {
        waits.read(|reading| (reading.pulse.work, reading.pulse.open) = (1, 1));
        computes.read(|reading| {
            reading.pulse.work = 1;
            reading.cpu_us += 900_000;
        });
    }
    assert_eq!((waits.state(), computes.state()), (AgentState::Busy, AgentState::Busy));
    for _ in 0..STUCK_COMPUTING_MS / 1_000 {
        computes.read(|reading| reading.cpu_us += 900_000);
    }
    assert_eq!(computes.kills(), [KillReason::Stuck]);
}

#[test]
fn forks_against_the_limit_are_throttled_at_once_and_restored_when_calm() {
    let mut agent = Agent::running();
    agent.read(|_| {});
    let effects = agent.read(|reading| reading.pids_refused += 500);
    assert!(effects.contains(&Effect::Limit { run: run(1), throttle: Throttle::Half }), "{effects:?}");
    agent.read(|reading| reading.pids_refused += 500);
    assert_eq!((agent.state(), agent.health.vitals().throttle()), (AgentState::Throttled, Throttle::Quarter));
    for _ in 0..CALM_MS / 1_000 {
        agent.read(|_| {});
    }
    let last = agent.done.iter().rev().find(|effect| matches!(effect, Effect::Limit { .. }));
    assert_eq!(last, Some(&Effect::Limit { run: run(1), throttle: Throttle::None }));
    assert_eq!(agent.state(), AgentState::Ready);
    assert_eq!(agent.health.pains().worst(agent.now.unix_ms), None, "what is over does not hurt any more");
}

#[test]
fn a_fork_bomb_is_throttled_at_the_first_reading_and_what_was_before_agentd_is_not_held_against_a_run() {
    let mut bomb = Agent::running();
    bomb.read(|reading| reading.pids_refused = 500);
    assert_eq!(bomb.health.vitals().throttle(), Throttle::Half);
    let mut adopted = Agent::new(true);
    adopted.runs = 1;
    adopted.step(Event::Lives { run: run(1) });
    adopted.step(Event::Started { run: run(1) });
    adopted.read(|reading| reading.pids_refused = 500);
    assert_eq!(adopted.health.vitals().throttle(), Throttle::None);
    let mut failing_before = Agent::running();
    failing_before.read(|reading| (reading.pulse.calls, reading.pulse.errors) = (100, 100));
    assert_eq!(failing_before.health.vitals().throttle(), Throttle::None, "its last run asked that");
}

#[test]
fn limits_that_were_not_set_are_ordered_again_and_an_adopted_run_gets_its_own() {
    let mut agent = Agent::running();
    agent.read(|_| {});
    agent.read(|reading| reading.pids_refused += 5);
    agent.step(Event::NotThrottled { run: run(1) });
    let effects = agent.read(|_| {});
    assert!(effects.contains(&Effect::Limit { run: run(1), throttle: Throttle::Half }), "{effects:?}");
    let mut adopted = Agent::new(true);
    adopted.runs = 1;
    assert_eq!(adopted.step(Event::Lives { run: run(1) }), [Effect::Adopt { run: run(1) }]);
    adopted.step(Event::Started { run: run(1) });
    assert_eq!(adopted.read(|_| {}), [Effect::Limit { run: run(1), throttle: Throttle::None }]);
    assert_eq!(adopted.read(|_| {}), []);
}

#[test]
fn five_ends_are_a_quarantine_whose_trial_start_may_end_it() {
    let mut agent = Agent::running();
    for _ in 1..FAILURES_MOST {
        agent.fail();
        assert_eq!(agent.state(), AgentState::Crashed);
        agent.start();
    }
    agent.fail();
    assert_eq!(agent.state(), AgentState::Quarantined);
    let kept = agent.health.pains().worst(agent.now.unix_ms).map(|pain| pain.kind.clone());
    assert_eq!(kept.as_deref(), Some("quarantine"));
    agent.start();
    agent.fail();
    assert_eq!(agent.state(), AgentState::Quarantined, "one failure of the trial is enough");
    agent.start();
    for _ in 0..=HEALTHY_MS / 1_000 {
        agent.read(|_| {});
    }
    let told: Vec<About> = agent
        .done
        .iter()
        .filter_map(|effect| match effect {
            Effect::Tell(notice) => Some(notice.about),
            _ => None,
        })
        .collect();
    assert!(told.ends_with(&[About::Probe, About::Recovered]), "{told:?}");
    agent.fail();
    assert_eq!(agent.state(), AgentState::Crashed, "it is as good as any other again");
}

/// What a new agentd makes of an agent that the one before has kept.
fn next_agentd(before: &Agent, boot_ms: u64, unix_ms: i64) -> Agent {
    let kept = serde_json::to_string(before.health.pains().history()).expect("JSON");
    let history = serde_json::from_str(&kept).expect("the same");
    let mut next = Agent::new(true);
    next.now = Now { boot_ms, unix_ms, jitter: 0 };
    next.runs = before.runs;
    next.health = Health::known(true, Restart::Always, before.health.restarts(), history, next.now);
    next
}

#[test]
fn an_end_that_no_agentd_saw_counts_once() {
    let mut agent = Agent::running();
    agent.fail();
    agent.start();
    agent.pass(500);
    let mut next = next_agentd(&agent, agent.now.boot_ms + 5_000, agent.now.unix_ms + 5_000);
    let ended_ms = agent.now.boot_ms + 4_000;
    let end =
        |run| Event::Ended { run, cause: ExitCause::Exited { code: 1 }, began_ms: ended_ms - 100, ended_ms };
    next.step(end(run(2)));
    assert_eq!((next.state(), next.health.restarts()), (AgentState::Crashed, 2));
    assert_eq!(
        next.health.due_ms(),
        Some(ended_ms + 2 * BACKOFF_FIRST_MS),
        "the second pause, from its end on"
    );
    // Its record is listed again, and an older one too: the orders to forget them were lost.
    next.step(end(run(2)));
    next.step(end(run(1)));
    assert_eq!((next.health.restarts(), next.health.due_ms()), (2, Some(ended_ms + 2 * BACKOFF_FIRST_MS)));
    let again = next_agentd(&next, next.now.boot_ms, next.now.unix_ms);
    assert_eq!(again.health.failures.len(), 2);
}

#[test]
fn an_end_on_request_or_of_one_that_is_not_to_run_again_is_no_failure() {
    for (cause, restart, expected) in [
        (ExitCause::Stopped, Restart::Always, Some(1_000)),
        (ExitCause::Exited { code: 1 }, Restart::Never, None),
    ] {
        let mut agent = Agent::new(true);
        agent.health = Health::known(true, restart, 0, History::default(), agent.now);
        agent.step(Event::Ended { run: run(7), cause, began_ms: 0, ended_ms: 900 });
        assert_eq!((agent.health.due_ms(), agent.health.restarts()), (expected, 0));
    }
}

#[test]
fn neither_a_new_agentd_nor_a_reboot_ends_a_quarantine() {
    let mut agent = Agent::running();
    for _ in 1..FAILURES_MOST {
        agent.fail();
        let mut next = next_agentd(&agent, agent.now.boot_ms, agent.now.unix_ms);
        next.start();
        agent = next;
    }
    agent.fail();
    assert_eq!(agent.state(), AgentState::Quarantined, "no agentd has seen more than one of these ends");
    let minute = 60_000;
    let next = next_agentd(&agent, agent.now.boot_ms + minute, agent.now.unix_ms + 60_000);
    assert_eq!((next.state(), next.health.due_ms()), (AgentState::Quarantined, agent.health.due_ms()));
    let mut booted = next_agentd(&agent, 3_000, agent.now.unix_ms + 60_000);
    assert_eq!(booted.health.due_ms(), Some(3_000 + QUARANTINE_MS - minute));
    booted.start();
    booted.fail();
    assert_eq!(booted.state(), AgentState::Quarantined, "the trial start is the only one");
    booted.step(Event::Want(true));
    let forgiven = next_agentd(&booted, 4_000, booted.now.unix_ms);
    assert_eq!((forgiven.state(), forgiven.health.probation), (AgentState::Starting, false));
    // A clock that was set back or far ahead in between.
    for unix_ms in [0, agent.now.unix_ms + 86_400_000] {
        assert_eq!(next_agentd(&agent, 3_000, unix_ms).state(), AgentState::Starting);
    }
}

#[test]
fn every_state_is_reached_and_left() {
    let mut agent = Agent::new(false);
    agent.step(Event::Want(true));
    agent.start();
    agent.read(|_| {});
    agent.read(|reading| reading.cpu_us += 500_000);
    for _ in 0..70 {
        agent.read(|_| {});
    }
    assert_eq!(agent.state(), AgentState::Idle);
    agent.read(|reading| reading.pids_refused += 9);
    for _ in 0..=CALM_MS / 1_000 {
        agent.read(|_| {});
    }
    for _ in 0..=STUCK_MS / 1_000 {
        agent.read(|reading| reading.pulse.work = 1);
    }
    agent.read(|reading| reading.pulse.work = 0);
    for _ in 0..FAILURES_MOST {
        agent.fail();
        agent.start();
    }
    agent.end(ExitCause::WallFailed { why: "x".to_owned() });
    agent.step(Event::Want(false));
    for state in AgentState::ALL {
        let at = agent.seen.iter().position(|seen| *seen == state);
        let at = at.unwrap_or_else(|| panic!("{state:?} is not reached: {:?}", agent.seen));
        let left = agent.seen[at..].iter().any(|later| *later != state);
        assert!(left || state == AgentState::Stopped, "{state:?} is not left");
    }
    agent.step(Event::Want(true));
    assert_eq!(agent.state(), AgentState::Starting, "stopped is left by a wish");
}

#[test]
fn pains_are_counted_bounded_and_one_line_each() {
    let mut agent = Agent::running();
    let now = agent.now.unix_ms;
    let pain =
        |kind: &str, n: i64| Pain::of_agent(kind, Severity::Critical, "no\nway", now + n).expect("a pain");
    let told = agent.step(Event::Hurt(pain("tool.broken", 0)));
    let text = "pain, critical: tool.broken: no way".to_owned();
    let brief = "critical: tool.broken".to_owned();
    assert_eq!(told, [Effect::Tell(Notice { about: About::Pain, text, brief })]);
    assert_eq!(agent.step(Event::Hurt(pain("tool.broken", 1))), [], "a repetition is counted");
    assert_eq!(agent.health.pains().history().pains[0].count, 2);
    for n in 0..100 {
        agent.step(Event::Hurt(pain(&format!("k{n}"), n)));
    }
    assert_eq!(agent.health.pains().history().pains.len(), 32);
    for (kind, message) in [("", "x"), ("Tool", "x"), ("a b", "x"), ("<b>", "x"), ("ok", &"x".repeat(501))] {
        assert!(Pain::of_agent(kind, Severity::Low, message, 0).is_err(), "{kind:?}");
    }
}

#[test]
fn a_day_s_budget_is_told_near_its_end_and_at_its_end_and_once_a_day() {
    let mut agent = Agent::running();
    let spend = |agent: &mut Agent, name: &str, used| {
        let renewal = Renewal::EachDay;
        let told = agent.step(Event::Budget { name: name.to_owned(), used, most: 1000, renewal });
        told.iter().filter(|effect| matches!(effect, Effect::Tell(_))).count()
    };
    let told: Vec<usize> =
        [799, 800, 940, 950, 999, 1000, 1001].into_iter().map(|used| spend(&mut agent, "a", used)).collect();
    assert_eq!(told, [0, 1, 0, 1, 0, 1, 0]);
    assert_eq!(spend(&mut agent, "b", 900), 1, "another budget is another pain");
    let severities = |agent: &Agent| {
        let pains = agent.health.pains().history().pains.iter();
        pains.map(|pain| (pain.severity, pain.over)).collect::<Vec<_>>()
    };
    assert_eq!(severities(&agent), [(Severity::Critical, false), (Severity::Medium, false)]);
    let mut next = next_agentd(&agent, agent.now.boot_ms, agent.now.unix_ms + 20 * 60_000);
    assert_eq!(spend(&mut next, "a", 1000), 0, "the agentd before has told it today");
    next.pass(24 * 3_600_000);
    assert_eq!(spend(&mut next, "a", 0), 0);
    assert_eq!(
        severities(&next),
        [(Severity::Critical, true), (Severity::Medium, false)],
        "it has more again"
    );
    assert_eq!(spend(&mut next, "a", 1000), 1, "the next day");
}

#[test]
fn a_budget_is_told_when_it_is_near_its_end_and_again_when_it_is_very_near() {
    let mut agent = Agent::running();
    let mut told = Vec::new();
    for used in [10, 790, 800, 900, 951, 1000, 100, 810] {
        let renewal = Renewal::WhenFreed;
        let budget = Event::Budget { name: "processes".to_owned(), used, most: 1000, renewal };
        agent.step(budget);
        let pain = agent.health.pains().history().pains.last();
        told.push(pain.map(|pain| (pain.count, pain.severity)));
    }
    use Severity::{High, Medium};
    let expected = [
        None,
        None,
        Some((1, Medium)),
        Some((1, Medium)),
        Some((2, High)),
        Some((2, High)),
        Some((2, High)),
        Some((3, Medium)),
    ];
    assert_eq!(told, expected);
}

fn plan() -> CgroupLimits {
    CgroupLimits {
        memory_high_bytes: 28 << 20,
        memory_max_bytes: 32 << 20,
        pids_max: 8,
        cpu_quota_us: 50_000,
        cpu_period_us: 100_000,
        io_bytes_per_second: None,
    }
}

#[test]
fn a_throttle_takes_processor_time_and_nothing_else() {
    assert_eq!(Throttle::None.within(&plan()), plan());
    assert_eq!(Throttle::Quarter.within(&plan()), CgroupLimits { cpu_quota_us: 12_500, ..plan() });
    let tiny = CgroupLimits { cpu_quota_us: 1_000, ..plan() };
    assert_eq!(Throttle::Quarter.within(&tiny), tiny, "the kernel takes no less");
}

/// What may happen to an agent, without the sense that the world has.
#[derive(Debug, Clone)]
enum Any {
    Want(bool),
    Due,
    Started(bool),
    End(u8),
    Missing,
    Lives(bool),
    Read(Box<Reading>),
    Hurt,
    Pass(u64),
}

fn readings() -> impl Strategy<Value = Reading> {
    let step = prop_oneof![4 => Just(0u64), 1 => 0..2_000_000u64];
    (step.clone(), step.clone(), step.clone(), step, 0..3u32, 0..2u32).prop_map(
        |(stalled, cpu_us, forks, errors, work, open)| {
            let mut reading =
                Reading { cpu_us, pids_refused: forks, memory_high_events: forks, ..Reading::default() };
            reading.memory.full_total_us = stalled;
            reading.pulse = Pulse { errors, calls: errors, work, open, ..Pulse::default() };
            reading
        },
    )
}

fn anything() -> impl Strategy<Value = Vec<(Any, u16)>> {
    let one = prop_oneof![
        1 => any::<bool>().prop_map(Any::Want),
        6 => Just(Any::Due),
        4 => any::<bool>().prop_map(Any::Started),
        4 => (0..6u8).prop_map(Any::End),
        1 => Just(Any::Missing),
        1 => any::<bool>().prop_map(Any::Lives),
        8 => readings().prop_map(|reading| Any::Read(Box::new(reading))),
        1 => Just(Any::Hurt),
        4 => (0..700_000u64).prop_map(Any::Pass),
    ];
    prop::collection::vec((one, any::<u16>()), 1..200)
}

/// Adds to the counters, which only grow.
fn grow(total: &mut Reading, by: &Reading) {
    total.memory.full_total_us += by.memory.full_total_us;
    total.memory_high_events += by.memory_high_events;
    total.cpu_us += by.cpu_us;
    total.pids_refused += by.pids_refused;
    total.pulse = Pulse {
        calls: total.pulse.calls + by.pulse.calls,
        errors: total.pulse.errors + by.pulse.errors,
        ..by.pulse
    };
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever happens: a start only while there is no run; a quarantine ends by its trial or by the owner; what is
    /// throttled is never wider than the plan; and nobody is killed but for a reason that shows.
    #[test]
    fn one_run_in_flight_and_quarantine_holds(events in anything()) {
        let mut agent = Agent::new(true);
        let mut total = Reading::default();
        // Runs that were asked for and have not ended.
        let mut flying: BTreeSet<RunId> = BTreeSet::new();
        for (event, jitter) in events {
            agent.now.jitter = jitter;
            let before = agent.state();
            let ours = agent.health.phase().run();
            let mut owner_or_probe = false;
            let effects = match event {
                Any::Want(wanted) => { owner_or_probe = true; agent.step(Event::Want(wanted)) }
                Any::Due => match agent.health.due_ms() {
                    Some(due_ms) => {
                        owner_or_probe = due_ms <= agent.now.boot_ms;
                        agent.runs += 1;
                        let run = run(agent.runs);
                        agent.step(Event::Start { run })
                    }
                    None => Vec::new(),
                },
                Any::Started(ours_too) => {
                    let run = ours.filter(|_| ours_too).unwrap_or(run(999));
                    agent.step(Event::Started { run })
                }
                Any::End(cause) => {
                    let Some(run) = ours else { continue };
                    flying.remove(&run);
                    total = Reading::default();
                    let cause = match cause {
                        0 => ExitCause::Stopped,
                        1 => ExitCause::OutOfMemory,
                        2 => ExitCause::Pressure,
                        3 => ExitCause::Stuck,
                        4 => ExitCause::WallFailed { why: String::new() },
                        _ => ExitCause::Exited { code: 0 },
                    };
                    let ended_ms = agent.now.boot_ms;
                    agent.step(Event::Ended { run, cause, began_ms: 0, ended_ms })
                }
                Any::Missing => {
                    let effects = agent.step(Event::Missing);
                    if agent.health.phase().run().is_none() { flying.clear(); }
                    effects
                }
                Any::Lives(ours_too) => {
                    let known = ours.filter(|_| ours_too).unwrap_or(run(998));
                    if agent.health.phase().run().is_none() { flying.insert(known); owner_or_probe = true; }
                    agent.step(Event::Lives { run: known })
                }
                Any::Read(by) => {
                    agent.pass(1_000);
                    grow(&mut total, &by);
                    total.at_ms = agent.now.boot_ms;
                    let run = ours.unwrap_or(run(997));
                    agent.step(Event::Read { run, reading: Box::new(total.clone()) })
                }
                Any::Hurt => {
                    let pain = Pain::of_agent("x", Severity::Critical, "", agent.now.unix_ms).expect("a pain");
                    let effects = agent.step(Event::Hurt(pain));
                    prop_assert!(effects.iter().all(|effect| matches!(effect, Effect::Tell(_))), "a pain only tells");
                    effects
                }
                Any::Pass(ms) => { agent.pass(ms); Vec::new() }
            };
            for effect in &effects {
                if let Effect::Start { run } = effect {
                    prop_assert!(flying.is_empty(), "{flying:?} while {run} starts");
                    flying.insert(*run);
                }
                if let Effect::Limit { throttle, .. } = effect {
                    prop_assert!(throttle.within(&plan()).cpu_quota_us <= plan().cpu_quota_us);
                }
            }
            if before == AgentState::Quarantined && agent.state() != AgentState::Quarantined {
                prop_assert!(owner_or_probe, "it left quarantine for {:?}", agent.state());
            }
        }
    }

    /// Nothing is done to an agent that has no work, uses nothing and says nothing, however long.
    #[test]
    fn idle_is_healthy(steps in prop::collection::vec((1..3_600_000u64, any::<u64>()), 2..80)) {
        let mut agent = Agent::running();
        for (ms, memory_bytes) in steps {
            agent.pass(ms);
            let effects = agent.read(|reading| reading.memory_bytes = memory_bytes);
            prop_assert_eq!(effects, vec![]);
            prop_assert!(matches!(agent.state(), AgentState::Ready | AgentState::Idle), "{:?}", agent.state());
        }
        agent.pass(QUARANTINE_MS);
        agent.read(|_| {});
        prop_assert_eq!((agent.state(), agent.health.restarts()), (AgentState::Idle, 0));
    }

    /// However an agent was throttled: ten calm seconds later it has all of its limits.
    #[test]
    fn who_calms_down_has_everything_back(heat in prop::collection::vec(readings(), 1..30)) {
        let mut agent = Agent::running();
        for by in heat {
            agent.read(|total| {
                grow(total, &by);
                // This is about throttles, not about ends.
                (total.memory.full_total_us, total.pulse.work) = (0, 0);
            });
        }
        for _ in 0..=CALM_MS / 1_000 {
            agent.read(|_| {});
        }
        let last = agent.done.iter().rev().find_map(|effect| match effect {
            Effect::Limit { throttle, .. } => Some(throttle.within(&plan())),
            _ => None,
        });
        prop_assert!(last.clone().is_none_or(|limits| limits == plan()), "{last:?}");
        prop_assert_ne!(agent.state(), AgentState::Throttled);
    }

    /// Pauses grow, and chance does not turn them round.
    #[test]
    fn back_off_is_monotone_within_its_jitter(jitters in prop::collection::vec(any::<u16>(), 4)) {
        let mut agent = Agent::running();
        let mut last_ms = 0;
        for (n, jitter) in jitters.into_iter().enumerate() {
            agent.now.jitter = jitter;
            agent.fail();
            let pause_ms = agent.health.due_ms().expect("it waits") - agent.now.boot_ms;
            let base_ms = (BACKOFF_FIRST_MS << n).min(BACKOFF_MOST_MS);
            let most_ms = base_ms + base_ms * u64::from(JITTER_MOST_PERMILLE) / 1000;
            prop_assert!((base_ms..=most_ms).contains(&pause_ms), "{pause_ms} after {n}");
            prop_assert!(pause_ms > last_ms);
            last_ms = pause_ms;
            agent.start();
        }
    }
}
