//! Does an agent's way to a model hold whatever an agent sends through it (E20)?
//!
//! Real launcher, jail, agentd and engine; the agent only sleeps, and the test speaks for it through its own socket,
//! `/run/agentd.sock` of its jail. What is refused says why in OpenAI's form, others are served meanwhile, and agentd
//! and the engine are the same processes afterwards.

use serde_json::{Value, json};
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use tests_host::line::{Line, send};
use tests_host::scene::{LIMIT, Package, Programs, Scene};
use tests_models::words;

/// More connections than agentd takes of one agent at once.
const CONNECTIONS: usize = 200;
const REQUESTS: usize = 10_000;
/// What agentd may grow by, with its caches and what waits.
const GROWTH_MOST_KIB: u64 = 64 * 1024;

struct Way {
    line: Line,
    scene: Scene,
}

fn way() -> Option<Way> {
    let manifest = "schema = 1\n[agent]\nname = \"sleeper\"\nversion = \"1.0.0\"\n\
                    exec = [\"/agent/bin/sleep\", \"3600\"]\n[model]\nuse = \"default\"\n";
    let sleep = fs::canonicalize("/bin/sleep").expect("coreutils");
    let package = Package { name: "sleeper".to_owned(), program: sleep, manifest: manifest.to_owned() };
    let started = Programs::from_env().and_then(|programs| Scene::new(programs, &[package]));
    let mut scene = match started {
        Ok(scene) => scene,
        Err(why) => {
            println!("SKIP: serving: {why}");
            return None;
        }
    };
    scene.start_launcher();
    let begun = scene.start_agentd();
    let Some((runs, _)) = scene.hear_runs(1, begun + LIMIT) else {
        panic!("the agent was not started:\n{}", scene.tail());
    };
    let pid = runs.values().next().expect("a run").pid;
    let way = Way { line: Line::of_run(pid), scene };
    way.scene.until("the chat model is loaded", || {
        let (status, models) = way.line.get("/v1/models");
        assert_eq!(status, 200, "{models}");
        models["data"].as_array().is_some_and(|models| models.iter().any(|model| model["id"] == "tiny"))
    });
    Some(way)
}

impl Way {
    fn still_answers(&self) {
        let (status, answer) = self.line.post(&ask("again", 4));
        assert_eq!(status, 200, "{answer}\n{}", self.scene.tail());
        assert_eq!(answer["usage"]["completion_tokens"], 4, "{answer}");
    }
}

fn ask(prompt: &str, max_tokens: u32) -> Value {
    json!({ "model": "default", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0 })
}

fn resident_kib(pid: i32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).expect("a process");
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("its memory");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

#[test]
fn an_agents_way_to_a_model_holds() {
    let Some(mut way) = way() else { return };
    refused_with_a_reason(&way);
    let before = resident_kib(way.scene.agentd_pid());
    disconnected(&way);
    hardly_read(&way);
    queued(&way);
    way.still_answers();
    let grown = resident_kib(way.scene.agentd_pid()).saturating_sub(before);
    println!("agentd has grown by {grown} KiB");
    assert!(grown < GROWTH_MOST_KIB, "agentd has grown by {grown} KiB");
    assert!(way.scene.agentd_lives(), "{}", way.scene.tail());
    let tail = way.scene.tail();
    assert!(!tail.contains("the engine is away"), "the engine ended meanwhile:\n{tail}");
}

fn refused_with_a_reason(way: &Way) {
    let of = |key: &str, value: Value| {
        let mut body = ask("Hello", 4);
        body[key] = value;
        way.line.refusal(&body)
    };
    assert_eq!(of("model", "no-such-model".into()), (404, "model_not_found".to_owned()));
    assert_eq!(of("prompt", words(1, 100_000).into()), (400, "prompt_too_long".to_owned()));
    assert_eq!(of("prompt", "".into()), (400, "prompt_empty".to_owned()));
    assert_eq!(of("max_tokens", (-1).into()), (400, "max_tokens".to_owned()));
    assert_eq!(of("temperature", 99.into()), (400, "out_of_range".to_owned()));
    // Larger than any context: read no further than the limit.
    let (status, _) = way.line.post(&ask(&"x".repeat(6 * 1024 * 1024), 4));
    assert_eq!(status, 413);
    way.still_answers();
}

/// Before the answer, in its middle, and in the middle of the request.
fn disconnected(way: &Way) {
    for number in 0..60 {
        let mut stream = way.line.connect();
        match number % 3 {
            0 => send(&mut stream, &ask(&words(number, 50), 500)),
            1 => {
                let mut body = ask(&words(number, 50), 500);
                body["stream"] = true.into();
                send(&mut stream, &body);
                stream.read_exact(&mut [0; 64]).expect("a beginning");
            }
            _ => stream.write_all(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-le").expect("read"),
        }
    }
    way.still_answers();
}

/// Streams whose reader takes a byte a second, while others come and go.
fn hardly_read(way: &Way) {
    let mut slow: Vec<UnixStream> = (0..8)
        .map(|number| {
            let mut stream = way.line.connect();
            let mut body = ask(&words(number, 50), 3000);
            body["stream"] = true.into();
            send(&mut stream, &body);
            stream
        })
        .collect();
    for _ in 0..3 {
        way.still_answers();
        for stream in &mut slow {
            stream.read_exact(&mut [0; 1]).expect("a byte");
        }
        std::thread::sleep(Duration::from_secs(1));
    }
}

/// Ten thousand requests over more connections than one agent may have: each is answered or refused in words.
fn queued(way: &Way) {
    let (begun, line) = (Instant::now(), &way.line);
    let (answered, refused) = std::thread::scope(|scope| {
        let asking: Vec<_> = (0..CONNECTIONS)
            .map(|connection| {
                scope.spawn(move || {
                    let (mut answered, mut refused) = (0, 0);
                    for number in 0..REQUESTS / CONNECTIONS {
                        let (status, said) = line.post(&ask(&format!("{connection} {number}"), 1));
                        match status {
                            200 => answered += 1,
                            429 | 503 => {
                                assert!(said["error"]["code"].is_string(), "{said}");
                                refused += 1;
                            }
                            other => panic!("{other}: {said}"),
                        }
                    }
                    (answered, refused)
                })
            })
            .collect();
        asking
            .into_iter()
            .map(|asking| asking.join().expect("an answer to each"))
            .fold((0, 0), |(answered, refused), (more, no)| (answered + more, refused + no))
    });
    println!("{answered} answered, {refused} refused within {} s", begun.elapsed().as_secs());
    assert_eq!(answered + refused, REQUESTS);
    assert!(answered > 0);
}

/// E7: what does not fit into memory goes to a folder on the data partition that is this engine's alone; an engine that
/// was killed leaves nothing there for long.
#[test]
fn an_engine_has_a_folder_of_its_own_to_swap_to() {
    use std::os::unix::fs::MetadataExt;
    let Some(way) = way() else { return };
    let engine = engine_of(&way.scene).expect("an engine");
    let words = fs::read(format!("/proc/{engine}/cmdline")).expect("the engine's words");
    let words: Vec<&[u8]> = words.split(|byte| *byte == 0).collect();
    let folder = way.scene.at("data/swap/host");
    let at = words.iter().position(|word| *word == b"--swap-dir").expect("a folder is named");
    assert_eq!(words[at + 1], folder.as_os_str().as_encoded_bytes());
    assert!(words.contains(&b"--swap-disk-mib".as_slice()), "and how much may be in it");
    let seen = fs::metadata(&folder).expect("it is there");
    assert_eq!((seen.uid(), seen.mode() & 0o7777), (agentd_domain::paths::UID_ENGINE, 0o700));
    // As if it had been killed with something put aside.
    let left = folder.join("1-0-1.kv");
    fs::write(&left, "keys and values").expect("written");
    assert!(
        std::process::Command::new("kill")
            .args(["-9", &engine.to_string()])
            .status()
            .expect("kill")
            .success()
    );
    way.scene.until("another engine has removed what was left", || !left.exists());
    assert_ne!(engine_of(&way.scene), Some(engine));
}

fn engine_of(scene: &Scene) -> Option<i32> {
    let launcher = scene.launcher_pid();
    let children = fs::read_to_string(format!("/proc/{launcher}/task/{launcher}/children")).ok()?;
    children.split_whitespace().filter_map(|pid| pid.parse().ok()).find(|pid: &i32| {
        fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "agentd-engine")
    })
}
