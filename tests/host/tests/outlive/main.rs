//! Do agents outlive agentd, and is nothing of what they do lost or done twice (W9)?
//!
//! Real launcher, jails, engine and agentd; agents that stream completions and write memories with idempotency keys
//! (`src/bin/outlive-agent.rs`). agentd is killed again and again at times that a seed gives, then the launcher. At
//! the end the stores must hold exactly what the agents were told: see [`oracle`].
//!
//! Few agents and kills here; `scripts/test long outlive` has twenty agents and fifty kills, and then fifty kills of the
//! launcher alone, from other seeds.

mod oracle;

use oracle::{Told, differences, stored, told};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use tests_host::scene::{LIMIT, Package, Programs, Scene, Served};

/// Adoption takes less, natively or under KVM.
const ADOPTED_WITHIN: Duration = Duration::from_secs(1);
/// From the launcher's death to the last process that was below it. The kernel does it at once.
const ENDED_WITHIN: Duration = Duration::from_secs(5);
/// How long init waits before it starts agentd again (`init/src/plan.rs`, `FIRST_PAUSE_MS`); doubled when agentd does
/// not live for ten seconds, which would make this test long and no harder.
const INIT_PAUSE: Duration = Duration::from_millis(250);
/// Rows of requests that agentd keeps of each agent.
const ROWS_KEPT: usize = 1_000;

struct Size {
    agents: usize,
    kills: usize,
    seed: u64,
}

fn size() -> Size {
    let seed = std::env::var("AGENTD_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    match std::env::var_os("AGENTD_LONG") {
        Some(_) => Size { agents: 20, kills: 50, seed },
        None => Size { agents: 5, kills: 8, seed },
    }
}

/// Numbers that follow from the seed (SplitMix64, Steele, Lea and Flood 2014).
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % end
    }

    fn ms(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_millis(from + self.below(to - from))
    }
}

/// With so many agents that work without end. The error is why this cannot run here.
fn scene(agents: usize) -> Result<Scene, String> {
    let package = |number: usize| {
        let name = format!("busy-{number:02}");
        let program = Path::new(env!("CARGO_BIN_EXE_outlive-agent")).to_owned();
        Package { manifest: manifest(&name), program, name }
    };
    let packages: Vec<Package> = (1..=agents).map(package).collect();
    Scene::new(Programs::from_env()?, &packages)
}

fn manifest(name: &str) -> String {
    format!(
        r#"schema = 1
[agent]
name = "{name}"
version = "1.0.0"
exec = ["/agent/bin/outlive-agent"]
[model]
use = "default"
[limits]
memory_high = "48M"
memory_max = "64M"
pids = 16
disk = "64M"
inodes = 1000
open_files = 64
tmp = "8M"
[memory]
working = "rw"
spirit = "rw"
[restart]
policy = "always"
"#
    )
}

/// Times are measured: one scene after the other.
static ALONE: Mutex<()> = Mutex::new(());

/// A process, whatever becomes of its number later.
type Process = (i32, u64);

#[test]
fn agents_outlive_agentd_and_not_the_launcher() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let Size { agents, kills, seed } = size();
    let mut dice = Dice(seed);
    let mut scene = match scene(agents) {
        Ok(scene) => scene,
        Err(why) => return println!("SKIP: outlive: {why}"),
    };
    scene.start_launcher();
    let begun = scene.start_agentd();
    let Some((runs, _)) = scene.hear_runs(agents, begun + LIMIT) else {
        panic!("the agents were not started:\n{}", scene.tail());
    };
    scene.forget_packages();
    for work in scene.works().values() {
        scene.until("each agent has done something", || told(work).operations >= 3);
    }
    let before = processes(&runs);
    assert_eq!(before.len(), 2 * agents, "each run is a jail and its agent: {before:?}");

    let adoptions = kill_agentd(&mut scene, &mut dice, &runs, kills);
    assert_eq!(processes(&runs), before, "processes have changed");
    rest(&scene);
    scene.kill_agentd();
    let told = compare(&scene);
    println!("RESULT: seed {seed}: {agents} agents, {kills} kill -9 of agentd: {}", words(&adoptions, &told));
    assert!(told.resumed > 0, "no kill has hit a completion in its middle: this has shown nothing");
    assert!(adoptions.iter().all(|took| *took <= ADOPTED_WITHIN), "adoption took {adoptions:?}");

    let runs = runs_end_while_agentd_is_dead(&mut scene, runs);
    kill_launcher(&mut scene, &runs);
}

/// Nothing waits for ever for what a dead launcher owed: whenever it dies, also while runs and models are half started,
/// all agents are served by the next one, and the model answers them.
#[test]
fn the_launcher_may_die_at_any_moment() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let Size { kills, seed, .. } = size();
    let mut dice = Dice(!seed);
    let mut scene = match scene(3) {
        Ok(scene) => scene,
        Err(why) => return println!("SKIP: outlive: {why}"),
    };
    scene.start_launcher();
    let begun = scene.start_agentd();
    assert!(scene.hear_runs(3, begun + LIMIT).is_some(), "the agents were not started:\n{}", scene.tail());
    let mut longest = Duration::ZERO;
    for _ in 0..kills {
        match dice.below(3) {
            0 => longest = longest.max(answers(&scene)),
            _ => std::thread::sleep(dice.ms(0, 1_500)),
        }
        scene.kill_launcher();
        std::thread::sleep(dice.ms(0, 400));
        scene.start_launcher();
    }
    longest = longest.max(answers(&scene));
    println!(
        "RESULT: seed {seed}: {kills} kill -9 of the launcher: models answer all agents within {longest:?}"
    );
    rest(&scene);
    scene.kill_agentd();
    compare(&scene);
}

/// Kills agentd at random times, also while it is still adopting, and in the end lets it live. How long each adoption
/// took that was not cut off. Goes on until a kill has hit a completion in its middle.
fn kill_agentd(
    scene: &mut Scene,
    dice: &mut Dice,
    runs: &BTreeMap<String, Served>,
    kills: usize,
) -> Vec<Duration> {
    let mut adoptions = Vec::new();
    for kill in 1.. {
        let killed = Instant::now();
        scene.kill_agentd();
        std::thread::sleep(INIT_PAUSE);
        let begun = scene.start_agentd();
        let last =
            kill >= kills && (kill >= 5 * kills || scene.works().values().any(|work| told(work).resumed > 0));
        let until = match (last, dice.below(5)) {
            (true, _) => begun + LIMIT,
            (_, 0) => begun + dice.ms(0, 200),
            _ => begun + dice.ms(100, 1_500),
        };
        match scene.hear_runs(runs.len(), until) {
            Some((adopted, at)) => {
                assert_eq!(&adopted, runs, "after kill {kill}");
                adoptions.push(at - killed);
            }
            None if last => panic!("not adopted:\n{}", scene.tail()),
            None => {}
        }
        if last {
            break;
        }
        std::thread::sleep(until.saturating_duration_since(Instant::now()));
    }
    adoptions
}

/// Runs that end while nobody looks: each is entered once, and its agent starts again.
fn runs_end_while_agentd_is_dead(
    scene: &mut Scene,
    mut runs: BTreeMap<String, Served>,
) -> BTreeMap<String, Served> {
    let victims: Vec<Served> = runs.values().take(3).cloned().collect();
    for victim in &victims {
        let process = alive(victim.pid).expect("it runs");
        signal_kill(victim.pid);
        scene.until("the run has ended", || alive(victim.pid) != Some(process));
        // Once more in the middle of storing it.
        scene.start_agentd();
        std::thread::sleep(Duration::from_millis(40));
        scene.kill_agentd();
    }
    let begun = scene.start_agentd();
    let Some((now, _)) = scene.hear_runs(runs.len(), begun + LIMIT) else {
        panic!("not all agents run again:\n{}", scene.tail());
    };
    for victim in &victims {
        assert_ne!(now[&victim.agent_id].run_id, victim.run_id);
    }
    scene.until("the launcher has forgotten the ends", || scene.exit_records() == 0);
    for work in works(scene) {
        resume(&work);
    }
    runs.extend(now);
    progress(scene);
    rest(scene);
    scene.kill_agentd();
    for victim in &victims {
        let ended = oracle::ended_runs(&scene.system_store(), &victim.agent_id);
        let row =
            ended.get(&victim.run_id).unwrap_or_else(|| panic!("the end of {victim:?} is lost: {ended:?}"));
        assert_eq!(row["exit"]["cause"]["kind"], "signalled", "{row}");
        let restarts = oracle::restarts(&scene.system_store(), &victim.agent_id);
        assert_eq!(restarts, 1, "no agentd saw this end, and it counts once: {victim:?}");
    }
    compare(scene);
    let begun = scene.start_agentd();
    let served = scene.hear_runs(runs.len(), begun + LIMIT);
    assert_eq!(served.map(|served| served.0).as_ref(), Some(&runs), "{}", scene.tail());
    for work in works(scene) {
        resume(&work);
    }
    runs
}

/// Every run and engine ends with the launcher; the next one's agents are started by agentd, which lives on.
fn kill_launcher(scene: &mut Scene, runs: &BTreeMap<String, Served>) {
    progress(scene);
    let below = descendants(scene.launcher_pid());
    assert!(below.len() > 2 * runs.len(), "jails, agents and an engine: {below:?}");
    let killed = Instant::now();
    scene.kill_launcher();
    scene.until("everything below the launcher has ended", || {
        below.iter().all(|one| alive(one.0) != Some(one.1))
    });
    let ended = killed.elapsed();
    assert!(ended <= ENDED_WITHIN, "it took {ended:?}");
    assert!(scene.agentd_lives());
    scene.start_launcher();
    let restarted = Instant::now();
    let Some((now, at)) = scene.hear_runs(runs.len(), restarted + LIMIT) else {
        panic!("the agents were not started again:\n{}", scene.tail());
    };
    assert!(now.iter().all(|(agent, run)| run.run_id != runs[agent].run_id));
    println!(
        "RESULT: launcher killed: {} processes ended within {} ms; all agents served {} ms after its restart",
        below.len(),
        ended.as_millis(),
        (at - restarted).as_millis()
    );
    progress(scene);
    rest(scene);
    scene.kill_agentd();
    compare(scene);
}

fn works(scene: &Scene) -> Vec<std::path::PathBuf> {
    scene.works().into_values().collect()
}

/// Until no agent begins anything new, and everything begun was acknowledged.
fn rest(scene: &Scene) {
    for work in works(scene) {
        fs::write(work.join("stop"), "").expect("written");
    }
    scene.until("the agents have come to rest", || {
        works(scene).iter().all(|work| work.join("resting").exists())
    });
}

fn resume(work: &std::path::Path) {
    let _ = fs::remove_file(work.join("stop"));
}

/// Until each agent has done something more.
fn progress(scene: &Scene) {
    let before: Vec<u64> = works(scene).iter().map(|work| told(work).operations).collect();
    scene.until("every agent goes on", || {
        works(scene).iter().zip(&before).all(|(work, before)| told(work).operations >= before + 3)
    });
}

/// Until each agent has one more whole answer of the model; how long that took.
fn answers(scene: &Scene) -> Duration {
    let begun = Instant::now();
    let before: Vec<usize> = scene.works().values().map(|work| told(work).requests.len()).collect();
    scene.until("the model answers every agent", || {
        let mut works = scene.works().into_values().zip(&before);
        works.all(|(work, before)| told(&work).requests.len() > *before)
    });
    begun.elapsed()
}

/// The stores of all agents against what they were told; agentd must be dead.
fn compare(scene: &Scene) -> Told {
    let mut all = Told::default();
    let mut found = Vec::new();
    for (agent_id, work) in scene.works() {
        let told = told(&work);
        let stored = stored(&scene.memory_of(&agent_id), &scene.system_store(), &agent_id, &told.memories);
        found.extend(
            differences(&told, &stored, ROWS_KEPT).into_iter().map(|line| format!("{agent_id}: {line}")),
        );
        all.operations += told.operations;
        all.repeats += told.repeats;
        all.retried += told.retried;
        all.resumed += told.resumed;
        all.left += told.left;
        all.longest_ms = all.longest_ms.max(told.longest_ms);
        all.memories.extend(told.memories);
        all.requests.extend(told.requests);
    }
    assert!(found.is_empty(), "{} differences:\n{}\n\n{}", found.len(), found.join("\n"), scene.tail());
    assert!(!all.memories.is_empty() && !all.requests.is_empty());
    all
}

fn words(adoptions: &[Duration], told: &Told) -> String {
    format!(
        "from the kill to the last adopted run, init's pause of 250 ms included, p50 {} ms, most {} ms ({} lives were \
         long enough); {} completions and {} memories, {} repeated, {} retried, {} completions broken in their middle, {} left by their agent and \
         asked for again; longest operation {} ms; \
         nothing lost, nothing twice",
        median(adoptions).as_millis(),
        adoptions.iter().max().map_or(0, Duration::as_millis),
        adoptions.len(),
        told.requests.len(),
        told.memories.len(),
        told.repeats,
        told.retried,
        told.resumed,
        told.left,
        told.longest_ms,
    )
}

fn median(times: &[Duration]) -> Duration {
    let mut times = times.to_vec();
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

/// Each run's jail and what it has started.
fn processes(runs: &BTreeMap<String, Served>) -> Vec<Process> {
    let mut found: Vec<Process> = Vec::new();
    for run in runs.values() {
        found.extend(alive(run.pid).map(|process| (run.pid, process)));
        found.extend(descendants(run.pid));
    }
    found.sort_unstable();
    found
}

/// All processes below this one, without itself.
fn descendants(pid: i32) -> Vec<Process> {
    let mut parents: Vec<(i32, i32, u64)> = Vec::new();
    for entry in fs::read_dir("/proc").expect("/proc").flatten() {
        if let Some((parent, pid, started)) = entry.file_name().to_str().and_then(stat_of) {
            parents.push((parent, pid, started));
        }
    }
    let mut found = Vec::new();
    let mut look = vec![pid];
    while let Some(of) = look.pop() {
        for (_, pid, started) in parents.iter().filter(|(parent, _, _)| *parent == of) {
            found.push((*pid, *started));
            look.push(*pid);
        }
    }
    found
}

/// When the process with this number was started; `None` when it has ended, also if nobody has waited for it.
fn alive(pid: i32) -> Option<u64> {
    stat_of(&pid.to_string()).map(|(_, _, started)| started)
}

/// Parent, pid and start of a living process. Source: proc_pid_stat(5).
fn stat_of(pid: &str) -> Option<(i32, i32, u64)> {
    let pid: i32 = pid.parse().ok()?;
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name may hold anything; after its closing bracket come state, parent, and the start as field 22.
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
    if matches!(*fields.first()?, "Z" | "X") {
        return None;
    }
    Some((fields.get(1)?.parse().ok()?, pid, fields.get(19)?.parse().ok()?))
}

fn signal_kill(pid: i32) {
    assert!(
        Command::new("kill").args(["-9", &pid.to_string()]).status().is_ok_and(|status| status.success())
    );
}
