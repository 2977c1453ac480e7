use super::*;
use agentd_domain::api::AgentState;
use agentd_domain::health::{
    BACKOFF_FIRST_MS, FAILURES_MOST, HEALTHY_MS, NotStarted, Phase, QUARANTINE_MS, Reading,
};
use agentd_domain::launcher::{ExitCause, KillReason};
use proptest::prelude::*;
use uuid::Uuid;

/// What concerns the one agent of these tests.
fn of(event: health::Event) -> Event {
    Event::Of { agent: id(1), event }
}

fn want(wanted: bool) -> Event {
    of(health::Event::Want(wanted))
}

fn started(run: RunId) -> Event {
    of(health::Event::Started { run })
}

fn not_started(run: RunId, why: NotStarted) -> Event {
    of(health::Event::NotStarted { run, why })
}

fn ended(run: RunId, cause: ExitCause) -> Event {
    of(health::Event::Ended { run, cause, began_ms: 0, ended_ms: u64::MAX })
}

fn known(wanted: bool, restart: Restart) -> Event {
    Event::Known { agent: id(1), wanted, restart, restarts: 0, history: History::default() }
}

fn act(effect: Effect) -> Action {
    Action::For { agent: id(1), effect }
}

fn kill(run: RunId) -> Action {
    act(Effect::Kill { run, grace_ms: GRACE_MS, why: KillReason::Order })
}

fn id(n: u128) -> AgentId {
    AgentId(Uuid::from_u128(n))
}

/// Drives `step` with a counter for run ids.
#[derive(Default)]
struct Driver {
    state: State,
    now_ms: u64,
    runs: u128,
}

impl Driver {
    /// What is to be done; what is told is the domain's.
    fn step(&mut self, event: Event) -> Vec<Action> {
        let runs = &mut self.runs;
        let mut fresh_run = || {
            *runs += 1;
            RunId(Uuid::from_u128(1000 + *runs))
        };
        let mut now = Now { boot_ms: self.now_ms, unix_ms: 0, fresh_run: &mut fresh_run, jitter: &mut || 0 };
        let mut actions = step(&mut self.state, event, &mut now);
        actions.retain(|action| !matches!(action, Action::For { effect: Effect::Tell(_), .. }));
        actions
    }

    fn with_agent(wanted: bool) -> Self {
        let mut driver = Self::default();
        driver.step(known(wanted, Restart::Always));
        driver
    }

    /// Wanted, listed, started.
    fn running() -> (Self, RunId) {
        let mut driver = Self::with_agent(true);
        let run = only_start(&driver.step(Event::Listed { runs: vec![] }));
        driver.step(started(run));
        (driver, run)
    }

    fn phase(&self) -> Phase {
        self.state.agents[&id(1)].health.phase()
    }

    fn shown(&self) -> AgentState {
        self.state.agents[&id(1)].health.state()
    }

    fn fail(&mut self, run: RunId) -> Vec<Action> {
        self.step(ended(run, ExitCause::Exited { code: 1 }))
    }

    /// Waits for the next tick and starts; gives the new run.
    fn start_again(&mut self) -> RunId {
        self.now_ms = next_tick_ms(&self.state).expect("something waits");
        let run = only_start(&self.step(Event::Tick));
        self.step(started(run));
        run
    }
}

fn only_start(actions: &[Action]) -> RunId {
    match actions {
        [Action::For { effect: Effect::Start { run }, .. }] => *run,
        other => panic!("one start expected, got {other:?}"),
    }
}

#[test]
fn nothing_starts_before_the_launchers_list_is_seen() {
    let mut driver = Driver::with_agent(true);
    assert_eq!(driver.step(Event::Tick), []);
    only_start(&driver.step(Event::Listed { runs: vec![] }));
}

#[test]
fn a_run_that_outlived_agentd_is_adopted_and_not_doubled() {
    let mut driver = Driver::with_agent(true);
    let run = RunId(Uuid::from_u128(7));
    let effects = driver.step(Event::Listed { runs: vec![(run, id(1))] });
    assert_eq!(effects, [act(Effect::Adopt { run })]);
    assert_eq!(driver.step(started(run)), []);
    assert_eq!(driver.shown(), AgentState::Ready);
}

#[test]
fn runs_that_nobody_wants_are_killed() {
    let mut driver = Driver::with_agent(false);
    let (ours, foreign) = (RunId(Uuid::from_u128(7)), RunId(Uuid::from_u128(8)));
    let effects = driver.step(Event::Listed { runs: vec![(ours, id(1)), (foreign, id(2))] });
    assert_eq!(effects, [kill(ours), Action::Kill { run: foreign, grace_ms: 0 }]);
}

#[test]
fn an_agent_that_exits_at_once_over_and_over_is_quarantined_and_tried_again() {
    let (mut driver, mut run) = Driver::running();
    for pause_ms in [1_000, 2_000, 4_000, 8_000] {
        driver.fail(run);
        assert_eq!(
            driver.phase(),
            Phase::Waiting { until_ms: driver.now_ms + pause_ms, after: health::After::End }
        );
        run = driver.start_again();
    }
    driver.fail(run);
    assert_eq!(driver.phase(), Phase::Quarantined { until_ms: driver.now_ms + QUARANTINE_MS });
    run = driver.start_again();
    driver.fail(run);
    assert_eq!(driver.shown(), AgentState::Quarantined, "one failure in probation is enough");
    run = driver.start_again();
    driver.now_ms += HEALTHY_MS;
    driver.fail(run);
    assert_eq!(
        driver.phase(),
        Phase::Waiting { until_ms: driver.now_ms + BACKOFF_FIRST_MS, after: health::After::End },
        "healthy forgives"
    );
}

#[test]
fn a_person_ends_a_quarantine() {
    let (mut driver, mut run) = Driver::running();
    for _ in 1..FAILURES_MOST {
        driver.fail(run);
        run = driver.start_again();
    }
    driver.fail(run);
    only_start(&driver.step(want(true)));
}

#[test]
fn a_stop_during_a_start_kills_what_was_started() {
    let mut driver = Driver::with_agent(true);
    let run = only_start(&driver.step(Event::Listed { runs: vec![] }));
    assert_eq!(driver.step(want(false)), []);
    let effects = driver.step(started(run));
    assert_eq!(effects, [kill(run)]);
    driver.step(ended(run, ExitCause::Stopped));
    assert_eq!(driver.phase(), Phase::Stopped);
}

#[test]
fn wanted_again_while_stopping_starts_once_the_old_run_is_gone() {
    let (mut driver, run) = Driver::running();
    driver.step(want(false));
    assert_eq!(driver.step(want(true)), []);
    let effects = driver.step(ended(run, ExitCause::Stopped));
    assert_ne!(only_start(&effects), run);
}

#[test]
fn runs_that_died_with_the_launcher_are_started_again_without_blame() {
    let (mut driver, run) = Driver::running();
    driver.step(Event::LauncherLost);
    assert_eq!(driver.step(Event::Tick), []);
    let effects = driver.step(Event::Listed { runs: vec![] });
    assert_ne!(only_start(&effects), run);
    assert_eq!(driver.state.agents[&id(1)].health.restarts(), 0);
}

#[test]
fn a_lost_answer_is_settled_by_the_list() {
    for lives in [true, false] {
        let mut driver = Driver::with_agent(true);
        let run = only_start(&driver.step(Event::Listed { runs: vec![] }));
        let unsure = not_started(run, NotStarted::Unsure);
        assert_eq!(driver.step(unsure), [Action::List]);
        let runs = if lives { vec![(run, id(1))] } else { vec![] };
        let effects = driver.step(Event::Listed { runs });
        if lives {
            assert_eq!(effects, [act(Effect::Adopt { run })]);
        } else {
            assert_ne!(only_start(&effects), run);
        }
    }
}

#[test]
fn a_missing_wall_is_refused_and_tried_again_ever_more_slowly() {
    let mut driver = Driver::with_agent(true);
    let mut run = only_start(&driver.step(Event::Listed { runs: vec![] }));
    let mut pauses = Vec::new();
    for _ in 0..10 {
        driver.step(not_started(run, NotStarted::Refused));
        assert_eq!(driver.shown(), AgentState::Refused);
        pauses.push(next_tick_ms(&driver.state).expect("waits") - driver.now_ms);
        driver.now_ms += pauses[pauses.len() - 1];
        run = only_start(&driver.step(Event::Tick));
    }
    assert_eq!(pauses[..3], [5_000, 10_000, 20_000]);
    assert_eq!(pauses[9], QUARANTINE_MS);
}

#[test]
fn an_agent_that_is_not_to_be_restarted_rests() {
    let mut driver = Driver::default();
    driver.step(known(true, Restart::Never));
    let run = only_start(&driver.step(Event::Listed { runs: vec![] }));
    driver.step(started(run));
    driver.fail(run);
    assert_eq!((driver.phase(), next_tick_ms(&driver.state)), (Phase::Stopped, None));
}

#[test]
fn removal_waits_for_the_end_of_the_run() {
    let (mut driver, run) = Driver::running();
    assert_eq!(driver.step(Event::Remove { agent: id(1) }), [kill(run)]);
    assert_eq!(driver.step(want(true)), [], "what is being removed stays away");
    let effects = driver.step(ended(run, ExitCause::Stopped));
    assert_eq!(effects, [Action::Remove { agent: id(1) }]);
    assert!(driver.state.agents.is_empty());
}

/// What the world may do next in the model below.
#[derive(Debug, Clone)]
enum Move {
    Want(bool),
    /// The launcher works off its oldest order: it succeeds, is refused, or its answer is lost.
    Serve {
        refused: bool,
        answer_lost: bool,
    },
    /// A living run ends by itself.
    Exit(usize),
    List,
    LauncherDies,
    AgentdDies,
    Pass(u64),
    /// A reading of a living run, which may be anything.
    Read(Box<Reading>),
}

fn moves() -> impl Strategy<Value = Vec<Move>> {
    let one = prop_oneof![
        2 => any::<bool>().prop_map(Move::Want),
        6 => (prop::bool::weighted(0.1), prop::bool::weighted(0.2))
            .prop_map(|(refused, answer_lost)| Move::Serve { refused, answer_lost }),
        3 => (0..4usize).prop_map(Move::Exit),
        3 => Just(Move::List),
        1 => Just(Move::LauncherDies),
        1 => Just(Move::AgentdDies),
        3 => (0..700_000u64).prop_map(Move::Pass),
        4 => (any::<u64>(), any::<u64>(), any::<u64>(), 0..3u32).prop_map(|(high, stalled, cpu_us, work)| {
            let mut reading = Reading { memory_high_events: high, cpu_us, ..Reading::default() };
            reading.memory.full_total_us = stalled;
            reading.pulse.work = work;
            Move::Read(Box::new(reading))
        }),
    ];
    prop::collection::vec(one, 1..120)
}

/// The launcher: orders in a queue, runs that live, ends that were not yet told.
#[derive(Default)]
struct World {
    driver: Driver,
    orders: Vec<Action>,
    living: Vec<RunId>,
    told: Vec<(RunId, ExitCause)>,
    wanted: bool,
}

impl World {
    fn tell(&mut self, event: Event) {
        let effects = self.driver.step(event);
        self.orders.extend(effects);
    }

    fn list(&mut self) {
        for (run, cause) in std::mem::take(&mut self.told) {
            self.tell(ended(run, cause));
        }
        let runs = self.living.iter().map(|&run| (run, id(1))).collect();
        self.tell(Event::Listed { runs });
    }

    fn serve(&mut self, refused: bool, answer_lost: bool) {
        if self.orders.is_empty() {
            return;
        }
        match self.orders.remove(0) {
            Action::For { effect: Effect::Start { run }, .. } => {
                if !refused {
                    self.living.push(run);
                }
                let why = if answer_lost { NotStarted::Unsure } else { NotStarted::Refused };
                if refused || answer_lost {
                    self.tell(not_started(run, why));
                } else {
                    self.tell(started(run));
                }
            }
            Action::For { effect: Effect::Adopt { run }, .. } => {
                if self.living.contains(&run) && !answer_lost {
                    self.tell(started(run));
                } else {
                    self.tell(not_started(run, NotStarted::Unsure));
                }
            }
            Action::For { effect: Effect::Kill { run, why, .. }, .. } => self.kill(run, why),
            Action::Kill { run, .. } => self.kill(run, KillReason::Order),
            Action::List => self.list(),
            // Of those that are told of here none changes which runs live.
            Action::For { .. } => {}
            Action::Remove { .. } => panic!("nothing is removed in this model"),
        }
    }

    fn kill(&mut self, run: RunId, why: KillReason) {
        if self.living.contains(&run) {
            self.living.retain(|&living| living != run);
            self.told.push((
                run,
                match why {
                    KillReason::Order => ExitCause::Stopped,
                    KillReason::Pressure => ExitCause::Pressure,
                    KillReason::Stuck => ExitCause::Stuck,
                },
            ));
        }
    }

    fn apply(&mut self, next: Move) {
        match next {
            Move::Want(wanted) => {
                self.wanted = wanted;
                self.tell(want(wanted));
            }
            Move::Serve { refused, answer_lost } => self.serve(refused, answer_lost),
            Move::Exit(which) => {
                if which < self.living.len() {
                    let run = self.living.remove(which);
                    self.told.push((run, ExitCause::Exited { code: 0 }));
                }
            }
            Move::List => self.list(),
            Move::LauncherDies => {
                self.living.clear();
                self.told.clear();
                // Orders on their way are lost with it; those who gave them learn that.
                for order in std::mem::take(&mut self.orders) {
                    if let Action::For { effect: Effect::Start { run } | Effect::Adopt { run }, .. } = order {
                        self.tell(not_started(run, NotStarted::NotAsked));
                    }
                }
                self.tell(Event::LauncherLost);
            }
            Move::AgentdDies => {
                // Orders that were not sent die with it; what lives goes on.
                self.orders.clear();
                let runs = self.driver.runs;
                self.driver = Driver { now_ms: self.driver.now_ms, runs, ..Driver::default() };
                self.tell(known(self.wanted, Restart::Always));
            }
            Move::Read(mut reading) => {
                let Some(&run) = self.living.first() else { return };
                self.driver.now_ms += 1_000;
                reading.at_ms = self.driver.now_ms;
                self.tell(of(health::Event::Read { run, reading }));
            }
            Move::Pass(ms) => {
                self.driver.now_ms += ms;
                self.tell(Event::Tick);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    /// Whatever the world does: never two runs of one agent; and once it calms down, the agent runs exactly
    /// when it is wanted.
    #[test]
    fn one_run_at_most_and_the_owners_wish_wins(moves in moves(), wish in any::<bool>()) {
        let mut world = World::default();
        world.tell(known(false, Restart::Always));
        for next in moves {
            world.apply(next);
            prop_assert!(world.living.len() <= 1, "{:?}", world.living);
        }
        world.apply(Move::Want(wish));
        for _ in 0..30 {
            world.apply(Move::Serve { refused: false, answer_lost: false });
            world.apply(Move::List);
            world.apply(Move::Pass(QUARANTINE_MS));
            prop_assert!(world.living.len() <= 1, "{:?}", world.living);
        }
        prop_assert_eq!(world.living.len(), usize::from(wish));
        let state = world.driver.shown();
        prop_assert!(state.is_running() == wish && (wish || state == AgentState::Stopped), "{:?}", state);
    }

    /// A pause is never shorter than the first and never longer than a quarantine.
    #[test]
    fn pauses_are_bounded(lives_ms in prop::collection::vec(0..120_000u64, 1..40)) {
        let (mut driver, mut run) = Driver::running();
        for life_ms in lives_ms {
            driver.now_ms += life_ms;
            driver.fail(run);
            let pause_ms = next_tick_ms(&driver.state).expect("waits") - driver.now_ms;
            prop_assert!((BACKOFF_FIRST_MS..=QUARANTINE_MS).contains(&pause_ms));
            run = driver.start_again();
        }
    }
}
