//! A model that comes from a server, and agents that share it by partitions: who holds what is told while they work, who
//! is over its budget is told what would fit, and who is important gets in.

use crate::network::{certificate, listen};
use crate::packages;
use crate::web::Browser;
use agentd_domain::agent_api::ReplyPart;
use agentd_domain::api::{Agent, Model};
use agentd_domain::ledger::{AgentHold, Devices, Enforcement, ModelPlan, PartitionView};
use anyhow::{Context, Result, ensure};
use rustls::{ServerConnection, StreamOwned};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Instant;
use tests_qemu::{Appliance, BOOT, Ctl, PASSWORD, Start, builtin_model, put_on_boot_partition};

/// The least that a partition may have; of the small model's cells it holds 256.
const QUIET_BYTES: u64 = 1 << 20;

/// A server of this machine that has one model, in the clear and in TLS; the guest's network shows it as 10.0.2.2.
struct Files {
    clear: u16,
    tls: u16,
    authority_pem: String,
    sha256: String,
    served: Arc<Served>,
}

struct Served {
    file: Vec<u8>,
    sum: String,
    /// The first lines of requests, with the `Range` where there was one.
    asked: Mutex<Vec<String>>,
    /// The next answer breaks off in the middle.
    breaks: AtomicBool,
}

impl Files {
    fn start(file: Vec<u8>) -> Result<Self> {
        let sha256 = sum(&file)?;
        let (config, authority_pem) = certificate("models.example.org")?;
        let served = Arc::new(Served {
            sum: format!("{sha256}  small.gguf\n"),
            file,
            asked: Mutex::default(),
            breaks: AtomicBool::new(false),
        });
        let in_clear = Arc::clone(&served);
        let clear = listen(move |mut stream| drop(in_clear.answer(&mut stream)))?;
        let in_tls = Arc::clone(&served);
        let tls = listen(move |stream| {
            if let Ok(connection) = ServerConnection::new(Arc::clone(&config)) {
                let mut stream = StreamOwned::new(connection, stream);
                let _ = in_tls.answer(&mut stream);
                stream.conn.send_close_notify();
                let _ = stream.flush();
            }
        })?;
        Ok(Self { clear, tls, authority_pem, sha256, served })
    }

    fn asked(&self) -> Vec<String> {
        self.served.asked.lock().unwrap().clone()
    }
}

impl Served {
    fn answer<S: Read + Write>(&self, stream: &mut S) -> std::io::Result<()> {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte)?;
            head.push(byte[0]);
        }
        let head = String::from_utf8_lossy(&head).to_ascii_lowercase();
        let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
        let range = head.lines().find_map(|line| line.strip_prefix("range: bytes="));
        let from = range.and_then(|range| range.trim_end_matches('-').parse::<usize>().ok());
        let shown = from.map_or_else(|| path.clone(), |from| format!("{path} from {from}"));
        self.asked.lock().unwrap().push(shown);
        if path.ends_with(".sha256") {
            let sum = &self.sum;
            return write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{sum}", sum.len());
        }
        let (total, begin) = (self.file.len(), from.unwrap_or(0));
        let status = match from {
            Some(from) => format!("206 Partial Content\r\nContent-Range: bytes {from}-{}/{total}", total - 1),
            None => "200 OK".to_owned(),
        };
        write!(stream, "HTTP/1.1 {status}\r\nETag: \"one\"\r\nContent-Length: {}\r\n\r\n", total - begin)?;
        let end = if self.breaks.swap(false, Ordering::SeqCst) { begin + (total - begin) / 2 } else { total };
        stream.write_all(self.file.get(begin..end).unwrap_or_default())?;
        stream.flush()
    }
}

/// By the program that a person would compare with.
fn sum(bytes: &[u8]) -> Result<String> {
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), bytes)?;
    let output = std::process::Command::new("sha256sum").arg(file.path()).output()?;
    let text = String::from_utf8(output.stdout)?;
    Ok(text.split_whitespace().next().context("no sum")?.to_owned())
}

#[test]
fn a_model_comes_from_a_server_and_agents_share_it_by_partitions() -> Result<()> {
    let small =
        tests_models::ensure(&tests_models::cache()?, &tests_models::SMALL, tests_models::Layout::Q8_0)?;
    let files = Files::start(std::fs::read(&small)?)?;
    let mut appliance = Appliance::new()?;
    let settings = appliance.file("agentd.toml");
    std::fs::write(
        &settings,
        format!(
            "[[egress.private]]\nhost = \"nas.example.org\"\naddresses = [\"10.0.2.2\"]\n\
             [[egress.private]]\nhost = \"models.example.org\"\naddresses = [\"10.0.2.2\"]\nauthority = '''\n{}'''\n\
             [[gpu.partition]]\nname = \"quiet\"\ndevices = [\"CPU\"]\nbytes = \"1M\"\npriority = 10\n\
             agents = [\"echo\"]\n",
            files.authority_pem
        ),
    )?;
    put_on_boot_partition(&appliance.disk(), &settings)?;
    appliance.boot(&Start::default())?;
    appliance.claim()?;
    appliance.until("the image's models are loaded", BOOT, |ctl| {
        let models: Vec<Model> = ctl.json(&["model", "ls"])?;
        Ok((models.iter().filter(|model| model.loaded).count() == 2).then_some(()))
    })?;
    models_come_and_go(&mut appliance, &files, small.to_str().context("path")?)?;
    let fingerprint = appliance.said("fingerprint: ")?;
    let browser = Browser::new(&mut appliance, "owner", &fingerprint)?;
    browser.post("/sign-in", &[("password", PASSWORD)])?.leads_to("/")?;
    agents_are_put_into_partitions(&mut appliance)?;
    what_they_hold_is_told_while_they_work(&mut appliance, &browser)?;
    the_important_gets_in(&mut appliance)?;
    the_page_changes_partitions(&appliance, &browser)
}

/// E3, as somebody who has just claimed the machine.
fn models_come_and_go(appliance: &mut Appliance, files: &Files, small: &str) -> Result<()> {
    let ctl = appliance.ctl();
    let nas = format!("http://nas.example.org:{}/small.gguf", files.clear);
    let models = format!("https://models.example.org:{}/small.gguf", files.tls);
    // Before anything is sent: only the header of the file here is read.
    let plan: ModelPlan = ctl.json(&["model", "plan", small])?;
    let fit = |id: &str| plan.fits.iter().find(|fit| fit.partition.as_str() == id);
    ensure!(fit("default").is_some_and(|fit| fit.refusal.is_none()), "{plan:?}");
    let refused = fit("quiet").and_then(|fit| fit.refusal.as_ref()).context("1 MiB is enough for it?")?;
    ensure!(refused.code == "model_too_large", "{refused}");

    ensure!(ctl.refused(&["model", "pull", &nas])?.code == "sha256_required");
    let wrong = "0".repeat(64);
    ensure!(ctl.refused(&["model", "pull", &nas, "--sha256", &wrong])?.code == "sha256_differs");
    // The certificate is another host's, of an authority that is not known for this one.
    let unknown = format!("https://nas.example.org:{}/small.gguf", files.tls);
    let unknown = ctl.refused(&["model", "pull", &unknown])?;
    ensure!(unknown.code == "host_not_verified" && unknown.fix.contains("authority"), "{unknown}");

    let before = files.asked().len();
    files.served.breaks.store(true, Ordering::SeqCst);
    ctl.run(&["model", "pull", &nas, "--name", "by-sum", "--sha256", &files.sha256])?.success()?;
    let asked = files.asked().split_off(before);
    ensure!(
        matches!(asked.as_slice(), [first, rest] if first == "/small.gguf" && rest.contains(" from ")),
        "{asked:?}"
    );
    ctl.run(&["model", "pull", &models])?.success()?;
    ensure!(files.asked().last().is_some_and(|path| path == "/small.gguf.sha256"), "{:?}", files.asked());
    let tiny = builtin_model(agentd_domain::paths::BUILTIN_TINY)?;
    ctl.run(&["model", "add", tiny.to_str().context("path")?, "--name", "spare"])?.success()?;
    let names = |ctl: &Ctl| -> Result<Vec<String>> {
        let models: Vec<Model> = ctl.json(&["model", "ls"])?;
        Ok(models.into_iter().filter(|model| model.origin == "data").map(|model| model.name).collect())
    };
    ensure!(names(&ctl)? == ["by-sum", "small", "spare"], "{:?}", names(&ctl)?);
    for name in ["by-sum", "spare"] {
        ctl.run(&["model", "rm", name])?.success()?;
    }
    ensure!(names(&ctl)? == ["small"], "{:?}", names(&ctl)?);
    appliance.until("the small model is the default one", BOOT, |ctl| {
        let models: Vec<Model> = ctl.json(&["model", "ls"])?;
        Ok(models.iter().any(|model| model.name == "small" && model.loaded && model.default).then_some(()))
    })?;
    let plan: ModelPlan = appliance.ctl().json(&["model", "plan", "small"])?;
    ensure!(plan.need.kv_bytes_per_cell * 256 == QUIET_BYTES, "{plan:?}");
    Ok(())
}

fn agents_are_put_into_partitions(appliance: &mut Appliance) -> Result<()> {
    let ctl = appliance.ctl();
    let packages = appliance.file("packages");
    let install = |name: &str, partition: Option<&str>| -> Result<String> {
        let folder = packages::asker(&packages, name, partition)?;
        Ok(folder.to_str().context("path")?.to_owned())
    };
    let nowhere = ctl.refused(&["agent", "install", &install("lost", Some("nowhere"))?])?;
    ensure!(nowhere.code == "not_found" && nowhere.why.contains("nowhere"), "{nowhere}");
    ensure!(nowhere.fix.contains("agentctl gpu partition set nowhere"), "{nowhere}");
    ctl.run(&["agent", "install", &install("low", Some("quiet"))?])?.success()?;
    for name in ["high", "crowd"] {
        ctl.run(&["agent", "install", &install(name, None)?])?.success()?;
    }
    let set = ["gpu", "partition", "set", "urgent", "--device", "CPU", "--bytes", "64M", "--priority", "90"];
    ctl.run(&set)?.success()?;
    let unknown = ctl.refused(&["gpu", "assign", "high", "nowhere"])?;
    ensure!(unknown.code == "not_found", "{unknown}");
    let now: Devices = ctl.json(&["gpu", "assign", "high", "urgent"])?;
    for (agent, id, configured) in [("low", "quiet", true), ("high", "urgent", false)] {
        let (one, hold) = found(&now, agent)?;
        ensure!((one.partition.id.as_str(), one.configured) == (id, configured), "{one:?}");
        ensure!(one.enforcement == Enforcement::Engine && one.problem.is_none(), "{one:?}");
        ensure!((hold.cells, hold.running) == (0, 0), "{hold:?}");
    }
    // What agentd.toml says is changed there.
    ensure!(found(&now, "echo")?.0.partition.id.as_str() == "quiet", "{now:?}");
    for order in [&["gpu", "partition", "rm", "quiet"], &["gpu", "assign", "echo", "urgent"]] {
        let theirs = ctl.refused(order)?;
        ensure!(theirs.code == "partition_configured", "{theirs}");
    }
    for agent in ["low", "high", "crowd"] {
        ctl.run(&["agent", "start", agent])?.success()?;
    }
    appliance.until("they run", BOOT, |ctl| {
        let agents: Vec<Agent> = ctl.json(&["agent", "ls"])?;
        let running =
            |name: &str| agents.iter().any(|agent| agent.name.as_str() == name && agent.state.is_running());
        Ok(["low", "high", "crowd"].into_iter().all(running).then_some(()))
    })
}

fn what_they_hold_is_told_while_they_work(appliance: &mut Appliance, browser: &Browser) -> Result<()> {
    let ctl = appliance.ctl();
    // Over its budget: 256 cells are all it may ever have.
    let (status, body) = asked(&ctl, "low", 1, 400)?;
    let error = &body["error"];
    ensure!(status == 413 && error["code"] == "context_exceeds_budget", "{status} {body}");
    ensure!(error["message"].as_str().is_some_and(|text| text.contains("ask for at most ")), "{body}");

    let busy = Busy::begin(&ctl, "low", 1, 120);
    let watched = watched(appliance, browser, &busy);
    let answered = busy.end();
    watched?;
    answered?;
    let now = appliance.until("nobody holds anything", BOOT, |ctl| {
        let now: Devices = ctl.json(&["gpu", "ls"])?;
        let idle =
            |agent: &str| found(&now, agent).is_ok_and(|(_, hold)| hold.cells == 0 && hold.running == 0);
        Ok((idle("low") && idle("high")).then_some(now))
    })?;
    let small = now.models.iter().find(|model| model.model == "small").context("no small model")?;
    let usage = small.usage.as_ref().context("the engine says nothing of its cache")?;
    ensure!(usage.cached_prompt_tokens > 0 && usage.computed_prompt_tokens > 0, "{usage:?}");
    ensure!(
        usage.cells_private + usage.cells_shared == usage.cells_cached && small.cells_held == 0,
        "{usage:?}"
    );
    Ok(())
}

fn watched(appliance: &mut Appliance, browser: &Browser, busy: &Busy) -> Result<()> {
    // Two requests of a share that is enough for one: one works, one waits, and nobody else's does.
    let now = appliance.until("low holds its share, and waits for more", BOOT, |ctl| {
        let now: Devices = ctl.json(&["gpu", "ls"])?;
        let (_, hold) = found(&now, "low")?;
        Ok((hold.cells > 0 && hold.running == 1 && hold.waiting >= 1).then_some(now))
    })?;
    holds_add_up(&now)?;
    let (_, low) = found(&now, "low")?;
    println!(
        "RESULT: low held {} cells ({} bytes), {} promised, {} running, {} waiting",
        low.cells, low.kv_bytes, low.cells_promised, low.running, low.waiting
    );
    let ctl = appliance.ctl();
    let text = ctl.run(&["gpu", "ls"])?.success()?;
    for words in ["UNKNOWN", "FROM CACHE", "GAVE WAY", "low", "quiet", "engine", "kernel"] {
        ensure!(text.contains(words), "`gpu ls` lacks {words:?}:\n{text}");
    }
    appliance.until("the page says what low holds", BOOT, |_| {
        let page = browser.get("/devices")?.with_status(200)?;
        page.says(&[
            "What the device reports",
            "Unknown: used, and in no plan",
            "Cache of small",
            "/agents/low",
        ])?;
        Ok(page.says(&["1 at work, "]).is_ok().then_some(()))
    })?;
    let ended = busy.ended();
    let (status, body) = asked(&ctl, "high", 1, 8)?;
    ensure!(status == 200 && body["usage"]["completion_tokens"] == 8, "{status} {body}");
    // The same words as low's: its owner's agents compute them once.
    let cached = &body["usage"]["prompt_tokens_details"]["cached_tokens"];
    ensure!(cached.as_u64().is_some_and(|tokens| tokens > 0), "{body}");
    println!("RESULT: while high was answered, {} of low's answers ended", busy.ended() - ended);
    Ok(())
}

/// All places are taken by one agent of the default partition. One of a partition with more priority takes one of them,
/// and nobody fails for it.
fn the_important_gets_in(appliance: &mut Appliance) -> Result<()> {
    let ctl = appliance.ctl();
    let places = appliance.until("the engine has places", BOOT, |ctl| {
        let now: Devices = ctl.json(&["gpu", "ls"])?;
        Ok(now.models.iter().find(|model| model.model == "small").map(|model| model.need.sequences))
    })?;
    let crowd = Busy::begin(&ctl, "crowd", u32::try_from(places)?, 32);
    let got_in = got_in(appliance, places);
    let answered = crowd.end();
    got_in?;
    answered
}

fn got_in(appliance: &mut Appliance, places: u64) -> Result<()> {
    let ctl = appliance.ctl();
    let gave_way = |now: &Devices| {
        let usages = now.models.iter().filter_map(|model| model.usage.as_ref());
        usages.map(|usage| usage.preemptions).sum::<u64>()
    };
    // The crowd's own rounds end together: at such a moment there is a place for nothing.
    for tries in 1..=10 {
        let before = appliance.until("the crowd has all places", BOOT, |ctl| {
            let now: Devices = ctl.json(&["gpu", "ls"])?;
            let (_, hold) = found(&now, "crowd")?;
            Ok((hold.running == places && hold.waiting > 0).then(|| gave_way(&now)))
        })?;
        let begun = Instant::now();
        let (status, body) = asked(&ctl, "high", 1, 8)?;
        let took = begun.elapsed();
        ensure!(status == 200 && body["usage"]["completion_tokens"] == 8, "{status} {body}");
        let now: Devices = ctl.json(&["gpu", "ls"])?;
        if gave_way(&now) > before {
            println!(
                "RESULT: high was answered in {} ms while {places} of {places} places were taken (try {tries})",
                took.as_millis()
            );
            return Ok(());
        }
    }
    anyhow::bail!("nobody ever gave way to high")
}

/// What agents hold is what their partitions hold, by class, and the plan stands beside what the device says.
fn holds_add_up(now: &Devices) -> Result<()> {
    let (quiet, low) = found(now, "low")?;
    let small = now.models.iter().find(|model| model.model == "small").context("no small model")?;
    ensure!(low.kv_bytes == low.cells * small.need.kv_bytes_per_cell && low.cells <= 256, "{low:?}");
    ensure!(quiet.held.kv_bytes == low.kv_bytes && quiet.held.total_bytes() <= QUIET_BYTES, "{quiet:?}");
    // Its bytes are the cells'; what they leave is shown as its share of the weights.
    ensure!(quiet.held.weights_bytes > 0 || quiet.held.kv_bytes == QUIET_BYTES, "{quiet:?}");
    let host = now.devices.iter().find(|device| device.kind == "cpu").context("no host memory")?;
    ensure!(host.enforcement == Enforcement::Kernel, "{host:?}");
    ensure!(host.used_bytes.is_some() && host.difference_bytes.is_some(), "{host:?}");
    ensure!(host.planned.total_bytes() + host.reserve_bytes <= host.total_bytes, "{host:?}");
    let weights: u64 = now.partitions.iter().map(|one| one.held.weights_bytes).sum();
    ensure!(weights == host.planned.weights_bytes, "shares of {weights} bytes of weights: {now:?}");
    Ok(())
}

fn the_page_changes_partitions(appliance: &Appliance, browser: &Browser) -> Result<()> {
    let ctl = appliance.ctl();
    let fields = |bytes: &'static str| {
        [
            ("name", "paged"),
            ("devices", "CPU"),
            ("bytes", bytes),
            ("priority", "70"),
            ("weight", "7"),
            ("sequences_most", "2"),
        ]
    };
    browser.post("/devices/partitions", &fields("8M"))?.leads_to("/devices")?;
    browser.post("/devices/partitions", &fields("9M"))?.leads_to("/devices")?;
    browser.post("/devices/assign", &[("agent", "low"), ("partition", "paged")])?.leads_to("/devices")?;
    let now: Devices = ctl.json(&["gpu", "ls"])?;
    let (paged, _) = found(&now, "low")?;
    let partition = &paged.partition;
    ensure!((partition.id.as_str(), partition.bytes) == ("paged", 9 << 20), "{paged:?}");
    ensure!((partition.priority, partition.weight, partition.sequences_most) == (70, 7, 2), "{paged:?}");
    let huge = browser.post("/devices/partitions", &fields("900G"))?;
    huge.says(&["partition_too_large", "What to do"])?;
    browser.post("/devices/partitions/quiet/remove", &[])?.says(&["partition_configured"])?;
    browser.post("/devices/partitions/paged/remove", &[])?.leads_to("/devices")?;
    let now: Devices = ctl.json(&["gpu", "ls"])?;
    ensure!(now.partitions.iter().all(|one| one.partition.id.as_str() != "paged"), "{now:?}");
    ensure!(found(&now, "low").is_err(), "it is in no partition that anybody defined: {now:?}");
    let log = ctl.run(&["audit", "ls", "--limit", "100", "--json"])?.success()?;
    for action in ["partition.set", "partition.assign", "partition.remove", "model.pull"] {
        ensure!(log.contains(&format!("\"action\":\"{action}\"")), "{action} is missing: {log}");
    }
    Ok(())
}

/// The partition of an agent, and what it holds.
fn found<'a>(now: &'a Devices, agent: &str) -> Result<(&'a PartitionView, &'a AgentHold)> {
    let is = |hold: &&AgentHold| hold.agent.as_ref().is_some_and(|name| name.as_str() == agent);
    let found = now.partitions.iter().find_map(|one| Some((one, one.agents.iter().find(is)?)));
    found.with_context(|| format!("{agent} is in no partition: {now:?}"))
}

/// What an agent is answered on its own HTTP API.
pub(crate) fn asked(ctl: &Ctl, agent: &str, times: u32, max_tokens: u32) -> Result<(u16, Value)> {
    let body = json!({
        "model": "default", "temperature": 0, "max_tokens": max_tokens,
        "messages": [{ "role": "user", "content": "What is for breakfast on a ship that sails before the sun is up, and who makes it?" }],
    });
    let said = ctl.run(&["chat", agent, &format!("{times} {body}"), "--json"])?.success()?;
    let mut text = String::new();
    for line in said.lines() {
        match serde_json::from_str(line).with_context(|| said.clone())? {
            ReplyPart::Text { text: piece } => text.push_str(&piece),
            ReplyPart::Failed { report } => anyhow::bail!("{report}"),
            ReplyPart::Note { .. } | ReplyPart::Done => {}
        }
    }
    let (status, body) = text.split_once(' ').with_context(|| text.clone())?;
    Ok((status.parse()?, serde_json::from_str(body).with_context(|| text.clone())?))
}

/// Two voices that keep an agent asking: whichever was answered asks again.
struct Busy {
    over: Arc<AtomicBool>,
    ended: Arc<AtomicUsize>,
    voices: Vec<JoinHandle<Result<()>>>,
}

impl Busy {
    fn begin(ctl: &Ctl, agent: &'static str, times: u32, max_tokens: u32) -> Self {
        let (over, ended) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let voice = |_| {
            let (ctl, over, ended) = (ctl.clone(), Arc::clone(&over), Arc::clone(&ended));
            std::thread::spawn(move || {
                while !over.load(Ordering::SeqCst) {
                    let (status, body) = asked(&ctl, agent, times, max_tokens)?;
                    ensure!(status == 200, "{agent} was answered {status} {body}");
                    ended.fetch_add(1, Ordering::SeqCst);
                }
                Ok(())
            })
        };
        let voices = (0..2).map(voice).collect();
        Self { over, ended, voices }
    }

    fn ended(&self) -> usize {
        self.ended.load(Ordering::SeqCst)
    }

    fn end(self) -> Result<()> {
        self.over.store(true, Ordering::SeqCst);
        for voice in self.voices {
            voice.join().map_err(|_| anyhow::anyhow!("a voice panicked"))??;
        }
        Ok(())
    }
}
