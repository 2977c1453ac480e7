use super::*;
use proptest::prelude::*;
use uuid::Uuid;

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
    fn step(&mut self, event: Event) -> Vec<Effect> {
        let runs = &mut self.runs;
        let mut fresh_run = || {
            *runs += 1;
            RunId(Uuid::from_u128(1000 + *runs))
        };
        step(&mut self.state, event, &mut Now { boot_ms: self.now_ms, fresh_run: &mut fresh_run })
    }

    fn with_agent(wanted: bool) -> Self {
        let mut driver = Self::default();
        driver.step(Event::Known { agent: id(1), wanted, restart: Restart::Always, restarts: 0 });
        driver
    }

    /// Wanted, listed, started.
    fn running() -> (Self, RunId) {
        let mut driver = Self::with_agent(true);
        let run = only_start(&driver.step(Event::Listed { runs: vec![] }));
        driver.step(Event::Started { agent: id(1), run });
        (driver, run)
    }

    fn phase(&self) -> Phase {
        self.state.agents[&id(1)].phase
    }

    fn fail(&mut self, run: RunId) -> Vec<Effect> {
        self.step(Event::Ended { agent: id(1), run, cause: ExitCause::Exited { code: 1 } })
    }

    /// Waits for the next tick and starts; gives the new run.
    fn start_again(&mut self) -> RunId {
        self.now_ms = next_tick_ms(&self.state).expect("something waits");
        let run = only_start(&self.step(Event::Tick));
        self.step(Event::Started { agent: id(1), run });
        run
    }
}

fn only_start(effects: &[Effect]) -> RunId {
    match effects {
        [Effect::Start { run, .. }] => *run,
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
    assert_eq!(effects, [Effect::Adopt { agent: id(1), run }]);
    assert_eq!(driver.step(Event::Started { agent: id(1), run }), []);
    assert_eq!(driver.phase().shown(), AgentState::Running);
}

#[test]
fn runs_that_nobody_wants_are_killed() {
    let mut driver = Driver::with_agent(false);
    let (ours, foreign) = (RunId(Uuid::from_u128(7)), RunId(Uuid::from_u128(8)));
    let effects = driver.step(Event::Listed { runs: vec![(ours, id(1)), (foreign, id(2))] });
    assert_eq!(
        effects,
        [Effect::Kill { run: ours, grace_ms: GRACE_MS }, Effect::Kill { run: foreign, grace_ms: 0 }]
    );
}

#[test]
fn an_agent_that_exits_at_once_over_and_over_is_quarantined_and_tried_again() {
    let (mut driver, mut run) = Driver::running();
    for pause_ms in [1_000, 2_000, 4_000, 8_000] {
        driver.fail(run);
        assert_eq!(driver.phase(), Phase::Waiting { until_ms: driver.now_ms + pause_ms });
        run = driver.start_again();
    }
    driver.fail(run);
    assert_eq!(driver.phase(), Phase::Quarantined { until_ms: driver.now_ms + QUARANTINE_MS });
    run = driver.start_again();
    driver.fail(run);
    assert_eq!(driver.phase().shown(), AgentState::Quarantined, "one failure in probation is enough");
    run = driver.start_again();
    driver.now_ms += HEALTHY_MS;
    driver.fail(run);
    assert_eq!(
        driver.phase(),
        Phase::Waiting { until_ms: driver.now_ms + BACKOFF_FIRST_MS },
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
    only_start(&driver.step(Event::Want { agent: id(1), wanted: true }));
}

#[test]
fn a_stop_during_a_start_kills_what_was_started() {
    let mut driver = Driver::with_agent(true);
    let run = only_start(&driver.step(Event::Listed { runs: vec![] }));
    assert_eq!(driver.step(Event::Want { agent: id(1), wanted: false }), []);
    let effects = driver.step(Event::Started { agent: id(1), run });
    assert_eq!(effects, [Effect::Kill { run, grace_ms: GRACE_MS }]);
    driver.step(Event::Ended { agent: id(1), run, cause: ExitCause::Stopped });
    assert_eq!(driver.phase(), Phase::Stopped);
}

#[test]
fn wanted_again_while_stopping_starts_once_the_old_run_is_gone() {
    let (mut driver, run) = Driver::running();
    driver.step(Event::Want { agent: id(1), wanted: false });
    assert_eq!(driver.step(Event::Want { agent: id(1), wanted: true }), []);
    let effects = driver.step(Event::Ended { agent: id(1), run, cause: ExitCause::Stopped });
    assert_ne!(only_start(&effects), run);
}

#[test]
fn runs_that_died_with_the_launcher_are_started_again_without_blame() {
    let (mut driver, run) = Driver::running();
    driver.step(Event::LauncherLost);
    assert_eq!(driver.step(Event::Tick), []);
    let effects = driver.step(Event::Listed { runs: vec![] });
    assert_ne!(only_start(&effects), run);
    assert_eq!(driver.state.agents[&id(1)].restarts, 0);
}

#[test]
fn a_lost_answer_is_settled_by_the_list() {
    for lives in [true, false] {
        let mut driver = Driver::with_agent(true);
        let run = only_start(&driver.step(Event::Listed { runs: vec![] }));
        let unsure = Event::NotStarted { agent: id(1), run, why: NotStarted::Unsure };
        assert_eq!(driver.step(unsure), [Effect::List]);
        let runs = if lives { vec![(run, id(1))] } else { vec![] };
        let effects = driver.step(Event::Listed { runs });
        if lives {
            assert_eq!(effects, [Effect::Adopt { agent: id(1), run }]);
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
        driver.step(Event::NotStarted { agent: id(1), run, why: NotStarted::Refused });
        assert_eq!(driver.phase().shown(), AgentState::Refused);
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
    driver.step(Event::Known { agent: id(1), wanted: true, restart: Restart::Never, restarts: 0 });
    let run = only_start(&driver.step(Event::Listed { runs: vec![] }));
    driver.step(Event::Started { agent: id(1), run });
    driver.fail(run);
    assert_eq!((driver.phase(), next_tick_ms(&driver.state)), (Phase::Stopped, None));
}

#[test]
fn removal_waits_for_the_end_of_the_run() {
    let (mut driver, run) = Driver::running();
    assert_eq!(driver.step(Event::Remove { agent: id(1) }), [Effect::Kill { run, grace_ms: GRACE_MS }]);
    assert_eq!(
        driver.step(Event::Want { agent: id(1), wanted: true }),
        [],
        "what is being removed stays away"
    );
    let effects = driver.step(Event::Ended { agent: id(1), run, cause: ExitCause::Stopped });
    assert_eq!(effects, [Effect::Remove { agent: id(1) }]);
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
    ];
    prop::collection::vec(one, 1..120)
}

/// The launcher: orders in a queue, runs that live, ends that were not yet told.
#[derive(Default)]
struct World {
    driver: Driver,
    orders: Vec<Effect>,
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
            self.tell(Event::Ended { agent: id(1), run, cause });
        }
        let runs = self.living.iter().map(|&run| (run, id(1))).collect();
        self.tell(Event::Listed { runs });
    }

    fn serve(&mut self, refused: bool, answer_lost: bool) {
        if self.orders.is_empty() {
            return;
        }
        match self.orders.remove(0) {
            Effect::Start { agent, run } => {
                if !refused {
                    self.living.push(run);
                }
                let why = if answer_lost { NotStarted::Unsure } else { NotStarted::Refused };
                if refused || answer_lost {
                    self.tell(Event::NotStarted { agent, run, why });
                } else {
                    self.tell(Event::Started { agent, run });
                }
            }
            Effect::Adopt { agent, run } => {
                if self.living.contains(&run) && !answer_lost {
                    self.tell(Event::Started { agent, run });
                } else {
                    self.tell(Event::NotStarted { agent, run, why: NotStarted::Unsure });
                }
            }
            Effect::Kill { run, .. } => {
                if self.living.contains(&run) {
                    self.living.retain(|&living| living != run);
                    self.told.push((run, ExitCause::Stopped));
                }
            }
            Effect::List => self.list(),
            Effect::Remove { .. } => panic!("nothing is removed in this model"),
        }
    }

    fn apply(&mut self, next: Move) {
        match next {
            Move::Want(wanted) => {
                self.wanted = wanted;
                self.tell(Event::Want { agent: id(1), wanted });
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
                    if let Effect::Start { agent, run } | Effect::Adopt { agent, run } = order {
                        self.tell(Event::NotStarted { agent, run, why: NotStarted::NotAsked });
                    }
                }
                self.tell(Event::LauncherLost);
            }
            Move::AgentdDies => {
                // Orders that were not sent die with it; what lives goes on.
                self.orders.clear();
                let runs = self.driver.runs;
                self.driver = Driver { now_ms: self.driver.now_ms, runs, ..Driver::default() };
                self.tell(Event::Known {
                    agent: id(1),
                    wanted: self.wanted,
                    restart: Restart::Always,
                    restarts: 0,
                });
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
        world.tell(Event::Known { agent: id(1), wanted: false, restart: Restart::Always, restarts: 0 });
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
        let expected = if wish { AgentState::Running } else { AgentState::Stopped };
        prop_assert_eq!(world.driver.phase().shown(), expected);
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
