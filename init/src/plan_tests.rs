use super::*;
use proptest::prelude::*;

fn up(children: &[Child]) -> State {
    let mut state = State::default();
    for child in children {
        assert_eq!(step(&mut state, Event::Start(*child), 0), [Effect::Spawn(*child)]);
    }
    state
}

#[test]
fn a_child_is_started_once() {
    let mut state = up(&[Child::Netd]);
    assert_eq!(step(&mut state, Event::Start(Child::Netd), 5), []);
}

#[test]
fn a_child_that_keeps_ending_waits_longer_and_longer_and_starts_over_after_a_good_life() {
    let mut state = up(&[Child::Agentd]);
    let mut now_ms = 0;
    let mut pauses = Vec::new();
    for _ in 0..9 {
        assert_eq!(step(&mut state, Event::Ended(Child::Agentd), now_ms), []);
        let until_ms = state.next_tick_ms().unwrap();
        pauses.push(until_ms - now_ms);
        assert_eq!(step(&mut state, Event::Tick, until_ms - 1), []);
        assert_eq!(step(&mut state, Event::Tick, until_ms), [Effect::Spawn(Child::Agentd)]);
        now_ms = until_ms;
    }
    assert_eq!(pauses, [250, 500, 1000, 2000, 4000, 8000, 16000, 30000, 30000]);
    assert_eq!(state.restarts(Child::Agentd), 9);
    now_ms += GOOD_LIFE_MS;
    step(&mut state, Event::Ended(Child::Agentd), now_ms);
    assert_eq!(state.next_tick_ms(), Some(now_ms + FIRST_PAUSE_MS));
}

#[test]
fn one_early_end_is_an_accident_and_two_are_a_pattern_until_it_lives_well() {
    let mut state = up(&[Child::Netd]);
    step(&mut state, Event::Ended(Child::Netd), 10);
    assert!(!state.is_restless(Child::Netd, 10));
    step(&mut state, Event::Tick, 260);
    step(&mut state, Event::Ended(Child::Netd), 270);
    assert!(state.is_restless(Child::Netd, 270));
    step(&mut state, Event::Tick, 770);
    assert!(state.is_restless(Child::Netd, 770 + GOOD_LIFE_MS - 1), "running again is not yet well");
    assert!(!state.is_restless(Child::Netd, 770 + GOOD_LIFE_MS));
}

#[test]
fn the_end_comes_in_waves_and_agentd_goes_first() {
    let mut state = up(&ALL);
    assert_eq!(step(&mut state, Event::End(Goal::PowerOff), 100), [Effect::Terminate(Child::Agentd)]);
    assert_eq!(step(&mut state, Event::Ended(Child::Agentd), 200), [Effect::Terminate(Child::Launcher)]);
    assert_eq!(
        step(&mut state, Event::Ended(Child::Launcher), 300),
        [Effect::Terminate(Child::Netd), Effect::Terminate(Child::ConsoleTty)]
    );
    assert_eq!(step(&mut state, Event::Ended(Child::Netd), 400), []);
    assert_eq!(step(&mut state, Event::Ended(Child::ConsoleTty), 500), [Effect::KillEverybody]);
    assert_eq!(step(&mut state, Event::Alone, 600), [Effect::Finish(Goal::PowerOff)]);
    assert_eq!(state.next_tick_ms(), None);
}

#[test]
fn the_first_goal_stands() {
    let mut state = up(&[Child::Agentd]);
    step(&mut state, Event::End(Goal::Restart), 0);
    assert_eq!(step(&mut state, Event::End(Goal::PowerOff), 1), []);
    step(&mut state, Event::Ended(Child::Agentd), 2);
    assert_eq!(step(&mut state, Event::Alone, 3), [Effect::Finish(Goal::Restart)]);
}

#[test]
fn a_child_that_does_not_end_is_killed_and_then_left_behind() {
    let mut state = up(&[Child::Agentd]);
    step(&mut state, Event::End(Goal::PowerOff), 0);
    assert_eq!(step(&mut state, Event::Tick, 14_999), []);
    assert_eq!(step(&mut state, Event::Tick, 15_000), [Effect::Kill(Child::Agentd)]);
    assert_eq!(step(&mut state, Event::Tick, 18_000), [Effect::KillEverybody]);
    assert_eq!(step(&mut state, Event::Tick, 21_000), [Effect::Finish(Goal::PowerOff)]);
}

#[test]
fn nothing_is_started_once_the_end_has_begun() {
    let mut state = up(&[Child::Netd, Child::Agentd]);
    step(&mut state, Event::Ended(Child::Netd), 10);
    step(&mut state, Event::End(Goal::Restart), 20);
    assert_eq!(step(&mut state, Event::Start(Child::Launcher), 30), []);
    assert_eq!(step(&mut state, Event::Tick, 10_000), []);
}

fn any_child() -> impl Strategy<Value = Child> {
    proptest::sample::select(ALL.to_vec())
}

fn any_event() -> impl Strategy<Value = Event> {
    prop_oneof![
        any_child().prop_map(Event::Start),
        any_child().prop_map(Event::Ended),
        Just(Event::Tick),
        Just(Event::Alone),
    ]
}

proptest! {
    /// Whatever the children do, the end comes within the sum of the deadlines, and comes once.
    #[test]
    fn the_end_always_comes(
        before in proptest::collection::vec((any_event(), 0..5_000_u64), 0..40),
        after in proptest::collection::vec((any_event(), 0..5_000_u64), 0..40),
    ) {
        let mut state = State::default();
        let mut now_ms = 0;
        for (event, pause_ms) in before {
            now_ms += pause_ms;
            step(&mut state, event, now_ms);
        }
        let begun_ms = now_ms;
        let mut effects = step(&mut state, Event::End(Goal::PowerOff), now_ms);
        for (event, pause_ms) in after {
            let until_ms = now_ms + pause_ms;
            while let Some(tick_ms) = state.next_tick_ms().filter(|tick_ms| *tick_ms <= until_ms) {
                now_ms = now_ms.max(tick_ms);
                effects.extend(step(&mut state, Event::Tick, now_ms));
            }
            now_ms = until_ms;
            effects.extend(step(&mut state, event, now_ms));
        }
        while let Some(tick_ms) = state.next_tick_ms() {
            now_ms = now_ms.max(tick_ms);
            effects.extend(step(&mut state, Event::Tick, now_ms));
            prop_assert!(now_ms - begun_ms <= 45_000 + 5_000, "the end did not come");
        }
        let ends = effects.iter().filter(|effect| matches!(effect, Effect::Finish(_))).count();
        prop_assert_eq!(ends, 1);
        prop_assert!(!effects.iter().any(|effect| matches!(effect, Effect::Spawn(_))));
    }

    /// A child is never spawned while it runs.
    #[test]
    fn no_child_runs_twice(events in proptest::collection::vec((any_event(), 0..40_000_u64), 0..60)) {
        let mut state = State::default();
        let mut running: Vec<Child> = Vec::new();
        let mut now_ms = 0;
        for (event, pause_ms) in events {
            now_ms += pause_ms;
            if let Event::Ended(child) = event {
                running.retain(|other| *other != child);
            }
            for effect in step(&mut state, event, now_ms) {
                if let Effect::Spawn(child) = effect {
                    prop_assert!(!running.contains(&child));
                    running.push(child);
                }
            }
        }
    }
}
