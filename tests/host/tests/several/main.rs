//! Do several models live on one device set, and what does a killed engine cost (E8)?
//!
//! Real launcher, agentd and engine, and two chat models of the test's own, of which the memory that models may have holds
//! one. The agent only sleeps; the test speaks for it. Each load is counted by the engine before, in a process of its own
//! (E5), and the store has the count afterwards.

use agentd_domain::device::MemoryPlan;
use serde_json::{Value, json};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use tests_host::line::{Line, answer, send, send_to};
use tests_host::scene::{LIMIT, Package, Programs, Scene};
use tests_models::{Layout, SMALL, Shape};

const MIB: u64 = 1 << 20;
/// Beside what agentd knows of the embedder and one chat model: what the engine's process takes besides is learned, and
/// must fit here; a second chat model must not.
const ROOM_BESIDE_PERCENT: u64 = 80;
/// The launcher starts an engine again after half a second; the rest is the engine's start and the models' load.
const BACK_WITHIN: Duration = Duration::from_secs(15);

/// With rows of logits wide enough that computing takes more than the engine's own process.
fn shape(name: &'static str, seed: u64) -> Shape {
    Shape { name, vocabulary: 65_536, seed, ..SMALL }
}

struct Way {
    line: Line,
    scene: Scene,
}

fn way() -> Option<Way> {
    let manifest = "schema = 1\n[agent]\nname = \"sleeper\"\nversion = \"1.0.0\"\n\
                    exec = [\"/agent/bin/sleep\", \"3600\"]\n[model]\nuse = \"default\"\n";
    let sleep = fs::canonicalize("/bin/sleep").expect("coreutils");
    let package = Package { name: "sleeper".to_owned(), program: sleep, manifest: manifest.to_owned() };
    let programs = match Programs::from_env() {
        Ok(programs) => programs,
        Err(why) => return skip(&why),
    };
    let mut scene = match Scene::new(programs.clone(), &[package]) {
        Ok(scene) => scene,
        Err(why) => return skip(&why),
    };
    let cache = tests_models::cache().expect("a cache");
    let made = |name, seed| tests_models::ensure(&cache, &shape(name, seed), Layout::Q8_0).expect("a model");
    let (alpha, beta) = (made("several-alpha", 1), made("several-beta", 2));
    let second = programs.models.join("all-minilm-l6-v2.q8_0.gguf");
    for (from, name) in [(&alpha, "alpha.gguf"), (&beta, "beta.gguf"), (&second, "second.gguf")] {
        fs::copy(from, scene.at("data/models").join(name)).expect("copied");
    }
    let chat = counted(&programs, &alpha, &[]);
    let embedder = counted(&programs, &programs.models.join("all-minilm-l6-v2.q8_0.gguf"), &["--embedding"]);
    println!(
        "the engine counts {} MiB for a chat model, {} MiB for the embedder",
        chat / MIB,
        embedder / MIB
    );
    leave(&scene, embedder + chat + chat * ROOM_BESIDE_PERCENT / 100);
    scene.start_launcher();
    let begun = scene.start_agentd();
    let Some((runs, _)) = scene.hear_runs(1, begun + LIMIT) else {
        panic!("the agent was not started:\n{}", scene.tail());
    };
    let pid = runs.values().next().expect("a run").pid;
    let way = Way { line: Line::of_run(pid), scene };
    way.scene.until("models can be named", || {
        let (status, models) = way.line.get("/v1/models");
        assert_eq!(status, 200, "{models}");
        let names =
            |name: &str| models["data"].as_array().is_some_and(|all| all.iter().any(|one| one["id"] == name));
        names("alpha") && names("beta") && names("tiny")
    });
    Some(way)
}

fn skip(why: &str) -> Option<Way> {
    println!("SKIP: several: {why}");
    None
}

/// What the engine says that a load takes of host memory.
fn counted(programs: &Programs, file: &Path, more: &[&str]) -> u64 {
    let mut command = Command::new(&programs.engine);
    command.arg("plan").arg(file).arg("--backends").arg(&programs.backends).args(more);
    let output = command.output().expect("the engine");
    let plan: MemoryPlan = serde_json::from_slice(&output.stdout).expect("a plan");
    plan.bytes_on("host", 0)
}

/// Everything but so many bytes is guaranteed to a partition in which nobody is.
fn leave(scene: &Scene, bytes: u64) {
    let text = fs::read_to_string("/proc/meminfo").expect("meminfo");
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:")).expect("its memory");
    let total: u64 = line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") * 1024;
    // As agentd counts: the machine's memory without the system's share, without the ledger's reserve.
    let device = (total - 160 * MIB).max(total / 2).min(total);
    let others = device - 32 * MIB - bytes;
    let config = format!(
        "[[gpu.partition]]\nname = \"others\"\ndevices = [\"CPU\"]\nbytes = \"{others}\"\nguaranteed = true\n"
    );
    let path = scene.at("etc/agentd/agentd.toml");
    fs::create_dir_all(path.parent().expect("a folder")).expect("made");
    fs::write(path, config).expect("written");
}

impl Way {
    fn ask(&self, model: &str) -> (u16, Value) {
        self.line.post(&asks(model, 4))
    }

    fn answers(&self, model: &str) -> Duration {
        let begun = Instant::now();
        let (status, answer) = self.ask(model);
        assert_eq!(status, 200, "{model}: {answer}\n{}", self.scene.tail());
        assert_eq!(answer["usage"]["completion_tokens"], 4, "{answer}");
        begun.elapsed()
    }

    /// The engine that holds models: the launcher's child that has most memory.
    fn engine_pid(&self) -> i32 {
        let of = |path: PathBuf| {
            let status = fs::read_to_string(path.join("status")).ok()?;
            let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
            let parent: i32 = field("PPid:")?.parse().ok()?;
            let resident: u64 = field("VmRSS:")?.trim_end_matches(" kB").parse().ok()?;
            let name = field("Name:")?.to_owned();
            let pid: i32 = path.file_name()?.to_str()?.parse().ok()?;
            (parent == self.scene.launcher_pid() && name == "agentd-engine").then_some((resident, pid))
        };
        let all = fs::read_dir("/proc").expect("/proc").flatten().filter_map(|entry| of(entry.path()));
        all.max().expect("an engine").1
    }
}

fn asks(model: &str, max_tokens: u32) -> Value {
    json!({ "model": model, "prompt": "Hello", "max_tokens": max_tokens, "temperature": 0 })
}

#[test]
fn models_come_on_demand_go_when_idle_and_are_back_after_a_crash() {
    let Some(mut way) = way() else { return };
    // `default` is the owner's first; the other one waits for its first request, and then the idle one goes.
    way.answers("default");
    let first = way.answers("alpha");
    let swapped = way.answers("beta");
    way.answers("alpha");
    println!(
        "RESULT: an answer takes {} ms, with a model that has to come {} ms",
        first.as_millis(),
        swapped.as_millis()
    );
    assert!(way.scene.tail().contains("room is made for a model"), "{}", way.scene.tail());
    vectors(&way);
    busy(&way);
    together(&way);
    crash(&mut way);
    assert_eq!(way.ask("gamma").0, 404);
    way.scene.kill_agentd();
    kept(&way);
}

/// A further embedding model comes when it is named, beside the one of memories. It is the same file, so its vectors are.
fn vectors(way: &Way) {
    let embed = |model: &str, more: Value| {
        let mut body = json!({ "model": model, "input": ["a cat", "a dog"] });
        body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        let mut stream = way.line.connect();
        send_to(&mut stream, "/v1/embeddings", &body);
        let answer = answer(&mut stream);
        (answer.status, answer.json())
    };
    let loads = |way: &Way| way.scene.said("a model is being loaded");
    let before = loads(way);
    let (status, second) = embed("second", json!({}));
    assert_eq!(status, 200, "{second}\n{}", way.scene.tail());
    assert!(loads(way) > before, "it was not there");
    let (status, own) = embed("minilm", json!({}));
    assert_eq!(status, 200, "{own}");
    assert_eq!(second["data"], own["data"]);
    assert_eq!(embed("default", json!({})).1["model"], "minilm", "nobody else is the default");
    let (status, refused) = embed("second", json!({ "dimensions": 7 }));
    assert_eq!((status, &refused["error"]["code"]), (400, &"dimensions_unsupported".into()), "{refused}");
    assert_eq!(embed("alpha", json!({})).0, 404, "it chats");
    println!("RESULT: a further embedding model was loaded when it was named");
}

/// A model with work stays, and who wants its room is told what is short.
fn busy(way: &Way) {
    let mut stream = way.line.connect();
    let mut body = asks("alpha", 3000);
    body["stream"] = true.into();
    send(&mut stream, &body);
    stream.read_exact(&mut [0; 64]).expect("a beginning");
    let refused = way.line.whole(&asks("beta", 4));
    assert_eq!(refused.status, 429, "{}\n{}", refused.body, way.scene.tail());
    assert_eq!(refused.json()["error"]["code"], "vram_budget_exceeded", "{}", refused.body);
    assert!(refused.head.contains("retry-after: 1"), "{}", refused.head);
    // What fits beside both does come.
    way.answers("tiny");
    stream.read_exact(&mut [0; 64]).expect("it goes on");
    drop(stream);
    way.scene.until("the other one fits when the first is idle", || way.ask("beta").0 == 200);
}

/// Many who want a model that is not there wait for one load.
fn together(way: &Way) {
    let loads = |way: &Way| way.scene.said("a model is being loaded");
    let before = loads(way);
    let line = &way.line;
    let answers = std::thread::scope(|scope| {
        let asking: Vec<_> = (0..12).map(|_| scope.spawn(|| line.post(&asks("alpha", 4)))).collect();
        asking.into_iter().map(|one| one.join().expect("an answer")).collect::<Vec<_>>()
    });
    for (status, answer) in answers {
        assert_eq!(status, 200, "{answer}\n{}", way.scene.tail());
    }
    assert_eq!(loads(way), before + 1, "{}", way.scene.tail());
}

/// SIGKILL in the middle of an answer.
fn crash(way: &mut Way) {
    let mut stream = way.line.connect();
    let mut body = asks("alpha", 3000);
    body["stream"] = true.into();
    send(&mut stream, &body);
    stream.read_exact(&mut [0; 64]).expect("a beginning");
    let pid = way.engine_pid();
    let killed = Instant::now();
    assert!(
        Command::new("kill").args(["-9", &pid.to_string()]).status().is_ok_and(|status| status.success())
    );
    let mut rest = String::new();
    stream.read_to_string(&mut rest).expect("an end");
    let told = killed.elapsed();
    // Who comes after it waits for the next one and knows nothing of it.
    let back = way.answers("alpha");
    assert!(rest.contains("engine_lost") && rest.contains("again"), "{rest}");
    assert!(!rest.contains("[DONE]"), "{rest}");
    println!(
        "RESULT: engine killed: the answer in flight was told {} ms after it, the next one came {} ms after it",
        told.as_millis(),
        killed.elapsed().as_millis()
    );
    assert!(back < BACK_WITHIN, "it took {back:?}");
    assert!(way.scene.agentd_lives());
    way.answers("default");
}

/// What was counted and learned stands in the store for the next agentd.
fn kept(way: &Way) {
    use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
    let store = Database::create(way.scene.system_store()).expect("a store");
    let txn = store.begin_read().expect("readable");
    let rows = |name: &str| {
        let table = txn.open_table(TableDefinition::<&str, &[u8]>::new(name)).expect("a table");
        let rows = table.iter().expect("rows").flatten();
        rows.map(|(key, row)| {
            let value: Value = serde_json::from_slice(row.value()).expect("JSON");
            (key.value().to_owned(), value)
        })
        .collect::<Vec<_>>()
    };
    let counts = rows("model_count");
    for file in ["alpha.gguf", "beta.gguf", "tiny.gguf", "all-minilm-l6-v2.q8_0.gguf"] {
        assert!(counts.iter().any(|(path, _)| path.ends_with(file)), "{file}: {counts:?}");
    }
    let learned = rows("device_overhead");
    println!("RESULT: learned: {learned:?}");
    assert!(learned.iter().all(|(device, _)| device == "CPU"), "{learned:?}");
}
