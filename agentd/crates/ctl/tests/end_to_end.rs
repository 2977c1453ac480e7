//! Long because every command is driven in one scene: the real `agentctl` against a real TLS port with the fake appliance
//! behind it.

#[path = "../../console/tests/fake/mod.rs"]
mod fake;

use agentd_audit::{Signer, genesis, link, linked_line, signed_line};
use agentd_capability::token::{Fresh, Grant, RootKey, mint};
use agentd_capability::{asked, parse_manifest};
use agentd_console::{Auth, Authority, StateFiles, boot_clock, router, serve_tls};
use agentd_domain::api::{Agent, ApplianceStatus, Model};
use agentd_domain::audit::{Actor, Head, Linked, Record, VERSION, Verdict};
use agentd_domain::fault::Report;
use agentd_domain::ledger::{Devices, ModelPlan};
use agentd_domain::rights::Limit;
use agentd_domain::token::{Shown, Verified};
use fake::{Fake, Files, NOW_UNIX_MS};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use serde_json::Value;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpListener;
use tokio::process::{Child, Command};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

const PASSWORD: &str = "correct horse battery";
const DEADLINE: Duration = Duration::from_secs(120);

struct Scene {
    fake: Arc<Fake>,
    auth: Arc<Auth>,
    authority: Authority,
    address: SocketAddr,
    home: TempDir,
    _stop: tokio_util::sync::DropGuard,
}

impl Scene {
    async fn new() -> Self {
        Self::at("127.0.0.1:0", NOW_UNIX_MS / 1000).await
    }

    async fn at(address: &str, clock_unix_s: i64) -> Self {
        let files = Arc::new(Files::default());
        let auth = Arc::new(Auth::open(files.clone(), boot_clock()).expect("opens"));
        let authority = Authority::open(files as Arc<dyn StateFiles>).expect("made");
        authority.refresh(&[], clock_unix_s).expect("issued");
        let listener = TcpListener::bind(address).await.expect("bound");
        let address = listener.local_addr().expect("an address");
        let fake = Arc::new(Fake::default());
        let stop = CancellationToken::new();
        let tls = authority.tls_config().expect("a configuration");
        tokio::spawn(serve_tls(listener, tls, router(fake.clone(), auth.clone()), stop.clone()));
        let home = tempfile::tempdir().expect("a folder");
        Self { fake, auth, authority, address, home, _stop: stop.drop_guard() }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_agentctl"));
        command
            .args(arguments)
            .env_clear()
            .env("HOME", self.home.path())
            .env("AGENTCTL_HOST", format!("https://{}", self.address))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        command
    }

    async fn run(&self, arguments: &[&str], input: &str) -> Output {
        let mut child = self.command(arguments).spawn().expect("started");
        let mut stdin = child.stdin.take().expect("piped");
        // A command that reads no input may have ended before it was written.
        let _ = stdin.write_all(input.as_bytes()).await;
        drop(stdin);
        timeout(DEADLINE, child.wait_with_output()).await.expect("ends in time").expect("waited for")
    }

    /// Runs it, expects success, and gives what it printed.
    async fn good(&self, arguments: &[&str]) -> String {
        success(arguments, self.run(arguments, "").await)
    }

    async fn json<T: serde::de::DeserializeOwned>(&self, arguments: &[&str]) -> T {
        let arguments: Vec<&str> = arguments.iter().copied().chain(["--json"]).collect();
        let text = self.good(&arguments).await;
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{arguments:?}: {e}: {text}"))
    }

    /// Runs it, expects this exit code, and gives the report it printed.
    async fn bad(&self, code: i32, arguments: &[&str], input: &str) -> Report {
        let arguments: Vec<&str> = arguments.iter().copied().chain(["--json"]).collect();
        let output = self.run(&arguments, input).await;
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {error}");
        let first = error.lines().next().unwrap_or_default();
        serde_json::from_str(first).unwrap_or_else(|e| panic!("{arguments:?}: {e}: {error}"))
    }

    async fn claim(&self) {
        let code = self.auth.claim_code().expect("unclaimed");
        let arguments =
            ["claim", "--code", &code, "--password-stdin", "--fingerprint", self.authority.fingerprint()];
        let text = success(&arguments, self.run(&arguments, &format!("{PASSWORD}\n")).await);
        assert_eq!(text, format!("signed in to https://{}\n", self.address));
    }

    fn config(&self) -> PathBuf {
        self.home.path().join(".config/agentctl/config.toml")
    }
}

fn success(arguments: &[&str], output: Output) -> String {
    let (out, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{arguments:?}: {error}{out}");
    out.into_owned()
}

fn package(manifest: &str, program: bool) -> TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    fs::write(folder.path().join("agent.toml"), manifest).expect("written");
    fs::create_dir(folder.path().join("bin")).expect("made");
    if program {
        let path = folder.path().join("bin/guest");
        fs::write(&path, b"#!/agent/bin/none\n").expect("written");
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("set");
    }
    folder
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

const MANIFEST: &str = "[agent]\nname = \"guest\"\nexec = [\"/agent/bin/guest\"]\n";

#[tokio::test]
async fn claiming_pins_the_authority_and_keeps_the_session_private() {
    let scene = Scene::new().await;
    scene.claim().await;
    assert!(scene.auth.is_claimed());
    let mode = fs::metadata(scene.config()).expect("written").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let config = fs::read_to_string(scene.config()).expect("read");
    assert!(config.contains(scene.authority.fingerprint()) && !config.contains(PASSWORD));

    // Known now: the next sign-in needs no fingerprint.
    let login = scene.run(&["login", "--password-stdin"], PASSWORD).await;
    success(&["login"], login);
    let wrong = scene.bad(2, &["login", "--password-stdin"], "not this one\n").await;
    assert_eq!(wrong.code, "unauthorized");
    scene.good(&["status"]).await;
    scene.good(&["logout"]).await;
    assert_eq!(scene.bad(2, &["status"], "").await.code, "not_signed_in");
}

#[tokio::test]
async fn nothing_secret_is_sent_to_a_server_that_was_not_confirmed() {
    let scene = Scene::new().await;
    let code = scene.auth.claim_code().expect("unclaimed");
    let unknown = scene.bad(2, &["claim", "--code", &code, "--password-stdin"], PASSWORD).await;
    assert_eq!(unknown.code, "fingerprint_needed");
    let other = "0".repeat(64);
    let wrong = scene
        .bad(2, &["claim", "--code", &code, "--password-stdin", "--fingerprint", &other], PASSWORD)
        .await;
    assert_eq!(wrong.code, "wrong_authority");
    assert!(wrong.why.contains(scene.authority.fingerprint()), "{wrong}");
    assert!(!scene.auth.is_claimed());
    assert!(!scene.config().exists());
}

/// Someone with a certificate of their own who shows the pinned authority beside it.
#[tokio::test]
async fn showing_the_right_authority_is_not_enough() {
    let scene = Scene::new().await;
    let leaf = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).expect("made");
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(leaf.signing_key.serialize_der()));
    let chain = vec![leaf.cert.der().clone(), scene.authority.certificate().clone()];
    let config =
        rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .expect("a configuration");
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let host = format!("https://{}", listener.local_addr().expect("an address"));
    let stop = CancellationToken::new();
    let _stop = stop.clone().drop_guard();
    let routes = router(scene.fake.clone(), scene.auth.clone());
    tokio::spawn(serve_tls(listener, Arc::new(config), routes, stop));

    let pin = scene.authority.fingerprint();
    let code = scene.auth.claim_code().expect("unclaimed");
    let arguments = ["claim", "--host", &host, "--code", &code, "--password-stdin", "--fingerprint", pin];
    let report = scene.bad(3, &arguments, PASSWORD).await;
    assert_eq!(report.code, "appliance_unreachable", "{report}");
    assert!(!scene.auth.is_claimed());
}

/// The appliance's address, taken over by another machine.
#[tokio::test]
async fn a_known_appliance_that_changed_its_authority_is_refused() {
    let scene = Scene::new().await;
    scene.claim().await;
    let other = Scene::new().await;
    let config = fs::read_to_string(scene.config()).expect("read");
    let moved = config.replace(&scene.address.to_string(), &other.address.to_string());
    fs::write(scene.config(), moved).expect("written");
    let host = format!("https://{}", other.address);
    let report = scene.bad(2, &["status", "--host", &host], "").await;
    assert_eq!(report.code, "wrong_authority");
    // The owner who set it up anew says so.
    let code = other.auth.claim_code().expect("unclaimed");
    let pin = other.authority.fingerprint();
    let claim = ["claim", "--host", &host, "--code", &code, "--password-stdin", "--fingerprint", pin];
    success(&claim, scene.run(&claim, PASSWORD).await);
    success(&["status"], scene.run(&["status", "--host", &host], "").await);
}

#[tokio::test]
async fn clocks_that_stand_wrong_lock_nobody_out() {
    for clock_unix_s in [0, 4_070_908_800] {
        let scene = Scene::at("127.0.0.1:0", clock_unix_s).await;
        scene.claim().await;
        scene.good(&["status"]).await;
    }
}

#[tokio::test]
async fn what_the_api_says_is_shown_or_passed_on() {
    let scene = Scene::new().await;
    scene.claim().await;

    let status = scene.good(&["status"]).await;
    for words in [
        "0.1.0~214",
        "yellow",
        "2 h 14 min",
        "not confirmed",
        "276 MiB of 978 MiB",
        "agentd     31 MiB",
        "tiny (chat",
        "fix: connect a network",
    ] {
        assert!(status.contains(words), "no {words:?} in\n{status}");
    }
    let status: ApplianceStatus = scene.json(&["status"]).await;
    assert_eq!(status.version, "0.1.0~214");

    let table = scene.good(&["agent", "ls"]).await;
    let column = table.lines().next().expect("a head").find("STATE").expect("a column");
    for (name, state) in [("echo", "ready"), ("indexer", "quarantined"), ("scout", "throttled")] {
        let row = table.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{table}"));
        assert!(row[column..].starts_with(state), "{table}");
    }
    let agents: Vec<Agent> = scene.json(&["agent", "ls"]).await;
    assert_eq!(agents.len(), 3);
    let scout = scene.good(&["agent", "show", "scout"]).await;
    for words in [
        "it starts processes against its limit",
        "memory 71.5 %",
        "over its soft memory limit 42 times",
        "high sensor.lost (3 times), it says: <b>the boiler</b>",
        "note       2026-11-20",
        "seccomp: the forbidden system call ptrace",
        "pressure: it only waited for memory",
        "audit trail",
    ] {
        assert!(scout.contains(words), "no {words:?} in\n{scout}");
    }
    let shown: Agent = scene.json(&["agent", "show", "scout"]).await;
    assert_eq!(shown.health.exits.len(), 2);

    scene.good(&["agent", "stop", "echo"]).await;
    let started: Agent = scene.json(&["agent", "start", "echo"]).await;
    assert!(started.wanted);
    scene.good(&["agent", "rm", "indexer"]).await;
    let missing = scene.bad(2, &["agent", "start", "indexer"], "").await;
    assert_eq!(missing.code, "not_found");

    let log = scene.good(&["agent", "logs", "echo", "--lines", "2"]).await;
    assert_eq!(log.lines().count(), 2);
    let log = scene.good(&["agent", "logs", "echo", "--json"]).await;
    let line: Value = serde_json::from_str(log.lines().next().expect("a line")).expect("JSON");
    assert_eq!(line["stream"], "agentd");

    let listed = scene.good(&["model", "ls"]).await;
    let words = ["tiny (default)", "pinned, idle 1 min", "loaded, 2 requests", "11-20 12:04:03", "40 MiB"];
    assert!(words.iter().all(|words| listed.contains(words)) && listed.lines().count() >= 4, "{listed}");
    assert!(scene.good(&["model", "pin", "tiny"]).await.contains("pinned"));
    assert!(!scene.good(&["model", "unpin", "tiny"]).await.contains("pinned"));
    assert_eq!(scene.bad(2, &["model", "pin", "nobody"], "").await.code, "not_found");
    scene.good(&["model", "rm", "half-model"]).await;
    let pulled: Vec<Model> = scene.json(&["model", "pull", "https://example.org/new.gguf?x=1"]).await;
    assert_eq!(pulled[0].name, "new");
    assert_eq!(
        scene.bad(2, &["model", "pull", "ftp://example.org/new.gguf"], "").await.code,
        "url_malformed"
    );
    scene.good(&["reboot"]).await;
    scene.good(&["poweroff"]).await;
    assert_eq!(
        scene.fake.calls(),
        [
            "stop echo",
            "start echo",
            "remove indexer",
            "start indexer",
            "pin tiny",
            "unpin tiny",
            "pin nobody",
            "pull new from https://example.org/new.gguf?x=1",
            "pull new from ftp://example.org/new.gguf",
            "reboot",
            "poweroff"
        ]
    );
}

#[tokio::test]
async fn devices_are_shared_out_and_plans_made() {
    let scene = Scene::new().await;
    scene.claim().await;
    let shown = scene.good(&["gpu", "ls"]).await;
    let echo =
        "echo   chat       4096   1024    0         512 MiB  2        3        1         64 MiB  engine";
    for words in ["CUDA0", "kernel", "489 MiB", "4096 of 4096", echo, "UNKNOWN", "21000", "CUDA7"] {
        assert!(shown.contains(words), "no {words:?} in\n{shown}");
    }
    let set = ["gpu", "partition", "set", "new", "--bytes", "2G", "--guaranteed", "true", "--priority", "90"];
    let after: Devices = scene.json(&set).await;
    let new = after.partitions.iter().find(|one| one.partition.id.as_str() == "new").expect("there");
    assert_eq!((new.partition.devices.as_slice(), new.partition.bytes), (&["CUDA0".to_owned()][..], 2 << 30));
    assert_eq!((new.partition.priority, new.partition.guaranteed), (90, true));
    // What is not named stays.
    let after: Devices = scene.json(&["gpu", "partition", "set", "new", "--weight", "7"]).await;
    let new = after.partitions.iter().find(|one| one.partition.id.as_str() == "new").expect("there");
    assert_eq!((new.partition.bytes, new.partition.weight, new.partition.priority), (2 << 30, 7, 90));
    let report = scene.bad(2, &["gpu", "partition", "set", "other"], "").await;
    assert_eq!(report.code, "partition_incomplete");
    scene.good(&["gpu", "assign", "echo", "new"]).await;
    scene.good(&["gpu", "grant", "echo", "CUDA0"]).await;
    scene.good(&["gpu", "revoke", "echo"]).await;
    scene.good(&["gpu", "partition", "rm", "new"]).await;
    assert_eq!(scene.bad(2, &["gpu", "partition", "rm", "new"], "").await.code, "not_found");

    let plan = scene.good(&["model", "plan", "tiny", "--context", "8192"]).await;
    for words in ["128 KiB", "upper estimate", "model_too_large", "131072"] {
        assert!(plan.contains(words), "no {words:?} in\n{plan}");
    }
    let missing = scene.bad(2, &["model", "plan", "/nowhere/m.gguf"], "").await;
    assert_eq!(missing.code, "model_file_unreadable");
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("small.gguf");
    std::fs::write(&file, small_header()).expect("written");
    let plan: ModelPlan = scene.json(&["model", "plan", file.to_str().expect("a name")]).await;
    assert_eq!(plan.model, "small");
    assert_eq!(
        scene.fake.calls(),
        [
            "set partition new",
            "set partition new",
            "assign echo to new",
            "grant CUDA0 to echo",
            "grant nothing to echo",
            "remove partition new",
            "remove partition new",
            "plan tiny with 8192",
            "plan header llama of 2 blocks",
        ]
    );
}

/// As much of a GGUF file as a plan reads.
fn small_header() -> Vec<u8> {
    let text = |text: &str| [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(3u32.to_le_bytes());
    bytes.extend(1u64.to_le_bytes());
    bytes.extend(2u64.to_le_bytes());
    bytes.extend([text("general.architecture"), 8u32.to_le_bytes().to_vec(), text("llama")].concat());
    bytes.extend(
        [text("llama.block_count"), 4u32.to_le_bytes().to_vec(), 2u32.to_le_bytes().to_vec()].concat(),
    );
    bytes.extend(text("token_embd.weight"));
    bytes.extend(1u32.to_le_bytes());
    bytes.extend(8u64.to_le_bytes());
    bytes.extend(0u32.to_le_bytes());
    bytes.extend(0u64.to_le_bytes());
    bytes.resize(bytes.len().next_multiple_of(32) + 32, 0);
    bytes
}

const MEMORY: &str = "00000000-0000-7000-8000-000000000001";

#[tokio::test]
async fn a_memory_is_looked_into_and_put_right() {
    let scene = Scene::new().await;
    scene.claim().await;
    let listed = scene.good(&["memory", "ls", "echo"]).await;
    assert!(listed.contains("spirit") && listed.contains("my grandfather built a ship"), "{listed}");
    let found = scene.good(&["memory", "search", "echo", "ship"]).await;
    for words in ["0.875", "because", "meaning 0.750", "matched ship", "from web"] {
        assert!(found.contains(words), "{words}: {found}");
    }
    let found =
        scene.good(&["memory", "search", "echo", "built", "a", "ship", "--as-of", "2026-11-22"]).await;
    assert!(found.contains("grandfather"), "{found}");
    let shown = scene.good(&["memory", "show", "echo", MEMORY]).await;
    assert!(
        shown.contains("believed 20 of 100") && shown.contains("half of it is gone in 30 days"),
        "{shown}"
    );
    let new = scene.good(&["memory", "correct", "echo", MEMORY, "my uncle built", "a boat"]).await;
    let shown = scene.good(&["memory", "show", "echo", new.trim()]).await;
    assert!(shown.contains("my uncle built a boat") && shown.contains(MEMORY), "{shown}");
    for deed in ["pin", "unpin", "forget", "restore", "purge"] {
        scene.good(&["memory", deed, "echo", new.trim()]).await;
    }
    let journal = scene.good(&["memory", "journal", "echo"]).await;
    assert!(journal.contains("purged") && journal.contains("corrected"), "{journal}");
    assert_eq!(scene.bad(2, &["memory", "pin", "echo", new.trim()], "").await.code, "not_found");
    let doctor = scene.good(&["memory", "doctor"]).await;
    assert!(doctor.contains("echo: whole; 2 records"), "{doctor}");
    let listed: serde_json::Value = scene.json(&["memory", "ls", "echo", "--state", "superseded"]).await;
    assert_eq!(listed["records"][0]["id"], MEMORY);
}

#[tokio::test]
async fn knowledge_is_shared_by_grant() {
    let scene = Scene::new().await;
    scene.claim().await;
    scene.good(&["knowledge", "set", "house", "--bytes", "64M"]).await;
    let granted = scene.good(&["knowledge", "grant", "house", "echo", "--write"]).await;
    assert!(granted.contains("reads and writes") && granted.contains("64 MiB"), "{granted}");
    let folder = tempfile::tempdir().expect("a folder");
    let (good, bad) = (folder.path().join("manual.txt"), folder.path().join("manual.pdf"));
    fs::write(&good, "The boiler is serviced in March.").expect("written");
    fs::write(&bad, b"%PDF\xff\xfe").expect("written");
    let added = scene.good(&["knowledge", "add", "house", good.to_str().expect("a path")]).await;
    assert_eq!(added, "d in 3 parts\n");
    let refused = scene.bad(2, &["knowledge", "add", "house", bad.to_str().expect("a path")], "").await;
    assert_eq!(refused.code, "document_not_text");
    let listed = scene.good(&["knowledge", "rm-document", "house", "d"]).await;
    assert!(listed.contains("house  0"), "{listed}");
    assert!(scene.good(&["knowledge", "revoke", "house", "echo"]).await.contains("nobody"));
    assert!(!scene.good(&["knowledge", "rm", "house"]).await.contains("house"));
}

#[tokio::test]
async fn a_log_is_followed_until_the_reader_goes() {
    let scene = Scene::new().await;
    scene.claim().await;
    let mut child: Child =
        scene.command(&["agent", "logs", "-f", "echo", "--lines", "1"]).spawn().expect("started");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    let next = async |lines: &mut tokio::io::Lines<_>| {
        timeout(DEADLINE, lines.next_line()).await.expect("in time").expect("read").expect("a line")
    };
    let old: String = next(&mut lines).await;
    assert!(old.contains("<script>"), "{old}");
    scene.fake.say_in_log("something new\u{1b}[2J");
    let new: String = next(&mut lines).await;
    assert!(new.ends_with("out    something new\u{fffd}[2J"), "{new}");
    drop(lines);
    scene.fake.say_in_log("nobody reads this");
    let ended = timeout(DEADLINE, child.wait()).await.expect("ends with its reader").expect("waited for");
    assert!(ended.success());
}

#[tokio::test]
async fn chatting_with_an_argument_and_line_by_line() {
    let scene = Scene::new().await;
    scene.claim().await;
    let reply = scene.good(&["chat", "echo", "the key is blue"]).await;
    assert_eq!(
        reply,
        "\u{b7} stored as a memory\nI have kept that: \u{201c}the key is blue\u{201d}. Ask me by meaning and I will find it again.\n"
    );
    let lines = success(&["chat"], scene.run(&["chat", "echo"], "one\n\ntwo\n").await);
    assert_eq!(lines.matches("stored as a memory").count(), 2);
    let json = scene.good(&["chat", "echo", "three", "--json"]).await;
    let last: Value = serde_json::from_str(json.lines().last().expect("a line")).expect("JSON");
    assert_eq!(last["type"], "done");
    assert_eq!(scene.bad(2, &["chat", "scout", "hello"], "").await.code, "no_messages");
    assert_eq!(
        scene.fake.calls(),
        ["chat echo the key is blue", "chat echo one", "chat echo two", "chat echo three"]
    );
}

#[tokio::test]
async fn a_package_is_checked_here_and_packed_the_same_everywhere() {
    let scene = Scene::new().await;
    scene.claim().await;
    let (one, other) = (package(MANIFEST, true), package(MANIFEST, true));
    let first: Agent = scene.json(&["agent", "install", text(one.path())]).await;
    let second: Agent = scene.json(&["agent", "install", text(other.path())]).await;
    assert_eq!(first.digest, second.digest);
    let elsewhere = tempfile::tempdir().expect("a folder");
    let file = elsewhere.path().join("guest.agent");
    let output = scene.run(&["agent", "pack", text(one.path()), "--output", text(&file)], "").await;
    assert!(output.status.success(), "{output:?}");
    let third: Agent = scene.json(&["agent", "install", text(&file)]).await;
    assert_eq!(third.name, first.name);

    let calls = scene.fake.calls().len();
    let empty = package(MANIFEST, false);
    let report = scene.bad(2, &["agent", "install", text(empty.path())], "").await;
    assert_eq!(report.code, "program_missing");
    let broken = package("[agent]\nname = \"Guest!\"\nexec = []\ncolour = \"red\"\n", true);
    let output = scene.run(&["agent", "install", text(broken.path())], "").await;
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{error}");
    for key in ["name", "exec", "colour"] {
        assert!(error.contains(key), "no word of {key}:\n{error}");
    }
    let nowhere = scene.bad(2, &["agent", "install", "/nonexistent"], "").await;
    assert_eq!(nowhere.code, "manifest_unreadable");
    assert_eq!(scene.fake.calls().len(), calls, "nothing was sent");
}

#[tokio::test]
async fn a_plan_needs_no_appliance() {
    let scene = Scene::new().await;
    let folder = package(MANIFEST, true);
    let manifest = folder.path().join("agent.toml");
    let plan: agentd_domain::plan::SandboxPlan = scene.json(&["plan", text(&manifest)]).await;
    assert_eq!(plan.name.as_str(), "guest");
    assert!(plan.landlock.abi_min >= 6);
    let shown = scene.good(&["plan", text(&manifest)]).await;
    let again: agentd_domain::plan::SandboxPlan = toml::from_str(&shown).expect("the text is the whole plan");
    assert_eq!(again, plan);
    for (share, words) in [("8G", "at most 8.0 GiB of an accelerator"), ("whole", "a whole accelerator")] {
        let folder = package(&format!("{MANIFEST}\n[gpu]\nmemory = \"{share}\"\n"), true);
        let shown = scene.good(&["plan", text(&folder.path().join("agent.toml"))]).await;
        let again: agentd_domain::plan::SandboxPlan =
            toml::from_str(&shown).expect("the text is the whole plan");
        assert!(
            again.device.is_some_and(|device| device.given.is_none()) && shown.contains(words),
            "{shown}"
        );
    }
    assert_eq!(scene.bad(2, &["plan", text(&manifest), "--remote"], "").await.code, "not_signed_in");
    scene.claim().await;
    scene.json::<agentd_domain::plan::SandboxPlan>(&["plan", text(&manifest), "--remote"]).await;
}

#[tokio::test]
async fn a_difference_marks_what_is_wider() {
    let scene = Scene::new().await;
    let (before, after) =
        (package(MANIFEST, true), package(&format!("{MANIFEST}\n[memory]\nspirit = \"r\"\n"), true));
    let [before, after] = [before.path().join("agent.toml"), after.path().join("agent.toml")];
    let shown = scene.good(&["diff", text(&before), text(&after)]).await;
    assert_eq!(shown, "WIDER    api memory.recall\nWIDER    api memory.recall.spirit\n");
    assert_eq!(scene.good(&["diff", text(&before), text(&before)]).await, "the same is allowed\n");
    let difference: serde_json::Value = scene.json(&["diff", text(&after), text(&before)]).await;
    assert_eq!(difference["narrower"][1], "api memory.recall.spirit");
}

#[tokio::test]
async fn a_model_is_sent_piece_by_piece_and_foreign_files_are_not() {
    let scene = Scene::new().await;
    scene.claim().await;
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("My Model.gguf");
    let mut content = b"GGUF".to_vec();
    content.resize(20_000_000, 7);
    fs::write(&file, &content).expect("written");
    let added: Vec<Model> = scene.json(&["model", "add", text(&file)]).await;
    assert_eq!((added[0].name.as_str(), added[0].bytes), ("My-Model", 20_000_000));
    fs::write(&file, b"PK\x03\x04").expect("written");
    assert_eq!(scene.bad(2, &["model", "add", text(&file)], "").await.code, "model_file_foreign");
    fs::write(&file, b"GG").expect("written");
    assert_eq!(scene.bad(2, &["model", "add", text(&file)], "").await.code, "model_file_foreign");
}

#[tokio::test]
async fn exit_codes_say_whose_fault_it_is() {
    let scene = Scene::new().await;
    // Nobody listens here: the port was given and returned.
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let nowhere = format!("https://{}", listener.local_addr().expect("an address"));
    drop(listener);
    let pin = scene.authority.fingerprint();
    let arguments = ["login", "--host", &nowhere, "--password-stdin", "--fingerprint", pin];
    let report = scene.bad(3, &arguments, PASSWORD).await;
    assert_eq!(report.code, "appliance_unreachable");
    assert_eq!(scene.run(&["frobnicate"], "").await.status.code(), Some(2));
    fs::create_dir_all(scene.config().parent().expect("a folder")).expect("made");
    fs::write(scene.config(), "host = 1").expect("written");
    assert_eq!(scene.bad(3, &["status"], "").await.code, "config_unusable");
}

#[tokio::test]
async fn an_error_for_people_says_what_why_and_how_to_fix_it() {
    let scene = Scene::new().await;
    let output = scene.run(&["status"], "").await;
    let error = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<&str> = error.lines().collect();
    assert!(lines[0].starts_with("agentctl: nothing was sent"), "{error}");
    assert!(
        lines[1].starts_with("  why: ") && lines[2].starts_with("  fix: sign in with `agentctl login`"),
        "{error}"
    );
}

/// A log as agentd keeps it: so many records, a head behind every third and the last.
fn audit_log(key: u8, records: u64) -> (Signer, Vec<u8>) {
    let signer = Signer::from_seed(&[key; 32]).expect("32 bytes");
    let (mut hash, mut lines) = (genesis(), Vec::new());
    for seq in 0..=records {
        if seq > 0 {
            let record = Record {
                action: "api.use".into(),
                actor: Actor::Agent,
                agent_id: None,
                boot_ms: seq,
                count: 2,
                detail: "\u{1b}[2Jhello\tthere".into(),
                right: Some("models".into()),
                run_id: None,
                seq,
                unix_ms: NOW_UNIX_MS,
                v: VERSION,
                verdict: if seq == 2 { Verdict::Denied } else { Verdict::Allowed },
            };
            hash = link(&hash, &record);
            lines.extend(linked_line(&Linked { hash, record }));
            lines.push(b'\n');
        }
        if seq % 3 == 0 || seq == records {
            let (before, key) = (genesis(), signer.key());
            let head = Head { before, first_seq: 1, hash, key, seq, unix_ms: NOW_UNIX_MS, v: VERSION };
            lines.extend(signed_line(&signer.sign(head)));
            lines.push(b'\n');
        }
    }
    (signer, lines)
}

#[tokio::test]
async fn the_audit_log_is_listed_exported_and_verified_by_its_export() {
    let scene = Scene::new().await;
    scene.claim().await;
    // Three pages.
    let (signer, log) = audit_log(1, 2100);
    scene.fake.set_audit(&log);
    let listed = scene.good(&["audit", "ls", "--limit", "2"]).await;
    let rows: Vec<&str> = listed.lines().collect();
    assert_eq!(rows.len(), 3, "{listed}");
    assert!(rows[1].starts_with("2099 ") && rows[1].contains("\u{fffd}[2Jhello there"), "{listed}");
    let file = scene.home.path().join("log.jsonl");
    let exported = scene.good(&["audit", "export", text(&file)]).await;
    assert!(exported.starts_with("2100 records"), "{exported}");
    assert_eq!(fs::read(&file).expect("read"), log);
    // Nobody has said yet which key it must be.
    let verified: Value = scene.json(&["audit", "verify", text(&file)]).await;
    assert_eq!((&verified["last_seq"], &verified["key_from"]), (&2100.into(), &"file".into()));
    assert_eq!(
        (&verified["decisions"]["denied"], &verified["decisions"]["allowed"]),
        (&2.into(), &4198.into())
    );
    let key = signer.key().to_string();
    let given: Value = scene.json(&["audit", "verify", text(&file), "--key", &key]).await;
    assert_eq!(given["key_from"], "given");
    let wrong = "00".repeat(32);
    let report = scene.bad(3, &["audit", "verify", text(&file), "--key", &wrong], "").await;
    assert_eq!(report.code, "audit_broken");
}

#[tokio::test]
async fn a_corrupted_export_is_named_by_its_first_bad_record() {
    let scene = Scene::new().await;
    let (_, log) = audit_log(1, 9);
    let file = scene.home.path().join("log.jsonl");
    let lines: Vec<&[u8]> = log.split_inclusive(|&byte| byte == b'\n').collect();
    let line_of = |seq: u64| {
        let is = |line: &&[u8]| serde_json::from_slice::<Linked>(line).is_ok_and(|l| l.record.seq == seq);
        lines.iter().position(is).expect("there")
    };
    let changed = |change: &dyn Fn(&mut Vec<Vec<u8>>)| {
        let mut lines: Vec<Vec<u8>> = lines.iter().map(|line| line.to_vec()).collect();
        change(&mut lines);
        lines.concat()
    };
    let flipped = changed(&|lines| lines[line_of(5)][90] ^= 1);
    let dropped = changed(&|lines| drop(lines.remove(line_of(4))));
    let swapped = changed(&|lines| lines.swap(line_of(2), line_of(7)));
    let cut = changed(&|lines| drop(lines.drain(line_of(8)..=line_of(9))));
    for (export, seq) in [(flipped, 5), (dropped, 4), (swapped, 2), (cut, 8)] {
        fs::write(&file, export).expect("written");
        let report = scene.bad(3, &["audit", "verify", text(&file)], "").await;
        assert_eq!(report.code, "audit_broken");
        assert!(report.why.contains(&format!("record {seq} is the first bad one")), "{}", report.why);
        let output = scene.run(&["audit", "verify", text(&file), "--json"], "").await;
        let bad: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        assert_eq!(bad["at"]["seq"], seq);
    }
    let report = scene.bad(2, &["audit", "verify", "/none/there"], "").await;
    assert_eq!(report.code, "file_unusable");
}

#[tokio::test]
async fn a_log_that_was_verified_cannot_be_cut_back_or_signed_anew() {
    let scene = Scene::new().await;
    scene.claim().await;
    let (_, log) = audit_log(1, 9);
    scene.fake.set_audit(&log);
    let first: Value = scene.json(&["audit", "verify"]).await;
    assert_eq!((&first["key_from"], &first["signed_seq"]), (&"appliance".into(), &9.into()));
    let again: Value = scene.json(&["audit", "verify"]).await;
    assert_eq!(again["key_from"], "kept");
    // Whole by themselves, and not what was seen.
    scene.fake.set_audit(&audit_log(1, 6).1);
    let report = scene.bad(3, &["audit", "verify"], "").await;
    assert!(
        report.why.contains("record 7 is the first bad one") && report.why.contains("seen"),
        "{}",
        report.why
    );
    let (other, log) = audit_log(2, 12);
    scene.fake.set_audit(&log);
    let report = scene.bad(3, &["audit", "verify"], "").await;
    assert!(report.why.contains(&other.key().to_string()), "{}", report.why);
    // Unless the owner says that it is right, once.
    scene.good(&["audit", "verify", "--key", &other.key().to_string()]).await;
    let kept: Value = scene.json(&["audit", "verify"]).await;
    assert_eq!((&kept["key_from"], &kept["signed_seq"]), (&"kept".into(), &12.into()));
    // An earlier export is not a log that was cut back.
    let file = scene.home.path().join("earlier.jsonl");
    fs::write(&file, audit_log(2, 6).1).expect("written");
    let earlier: Value = scene.json(&["audit", "verify", text(&file)]).await;
    assert_eq!((&earlier["key_from"], &earlier["last_seq"]), (&"kept".into(), &6.into()));
}

#[tokio::test]
async fn a_row_that_is_no_record_is_exported_and_named() {
    let scene = Scene::new().await;
    scene.claim().await;
    let (_, log) = audit_log(1, 5);
    let lines: Vec<&[u8]> = log.split_inclusive(|&byte| byte == b'\n').collect();
    let mut spoiled: Vec<Vec<u8>> = lines.iter().map(|line| line.to_vec()).collect();
    spoiled[2] = b"{\"hash\":\"spoiled\"}\n".to_vec();
    scene.fake.set_audit(&spoiled.concat());
    let report = scene.bad(3, &["audit", "verify"], "").await;
    assert!(report.why.contains("record 2 is the first bad one"), "{}", report.why);
}

const AGENT: &str = "01900000-0000-7000-8000-000000000001";

/// A token of a key of our own, and that key's public half.
fn a_token(expires_unix_s: Option<i64>) -> (String, String) {
    let key = RootKey::from_secret(&[7; 32]).expect("a key");
    let manifest = format!("{MANIFEST}[model]\nuse = \"default\"\n[messages]\naccept = true\n");
    let rights = asked(&parse_manifest(&manifest).expect("a manifest"));
    let grant = Grant { holder: AGENT.parse().expect("an id"), rights, expires_unix_s };
    let token = mint(&key, &grant, &Fresh([1; 32])).expect("minted");
    (token, key.public().to_bytes().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// No appliance is known here at all.
#[tokio::test]
async fn a_token_is_read_narrowed_and_checked_offline() {
    let scene = Scene::new().await;
    let (token, key) = a_token(None);
    let file = scene.home.path().join("token");
    fs::write(&file, format!("{token}\n")).expect("written");
    let path = text(&file);
    let said = scene.good(&["token", "inspect", path]).await;
    for words in [AGENT, "expires    never", "messages models", "limit      memory.max 256 MiB", "block 0"] {
        assert!(said.contains(words), "{words}: {said}");
    }
    let less: Shown = scene
        .json(&[
            "token",
            "attenuate",
            path,
            "--api",
            "models",
            "--limit",
            "memory.max=64M",
            "--expires-in",
            "1h",
        ])
        .await;
    let narrow = scene.home.path().join("narrow");
    fs::write(&narrow, &less.token).expect("written");
    let verified: Verified = scene.json(&["token", "verify", text(&narrow), "--key", &key]).await;
    assert_eq!(verified.rights.api.iter().collect::<Vec<_>>(), ["models"]);
    assert!(verified.expires_unix_s.is_some() && verified.revocation_ids.len() == 2);
    let piped = scene.run(&["token", "verify", "-", "--key", &key, "--agent", AGENT], &less.token).await;
    assert!(success(&["token", "verify"], piped).starts_with("the token holds\n"));

    // Nobody can widen: what was taken away does not come back.
    let wide: Shown = scene
        .json(&["token", "attenuate", text(&narrow), "--api", "models,messages", "--limit", "pids=4096"])
        .await;
    assert_eq!(wide.says.rights.api, verified.rights.api);
    let before = |limit| verified.rights.limit(limit);
    assert_eq!(wide.says.rights.limit(Limit::Pids), before(Limit::Pids));
}

#[tokio::test]
async fn bad_tokens_are_refused_in_words() {
    let scene = Scene::new().await;
    let ((token, key), (old, _)) = (a_token(None), a_token(Some(1_000)));
    let write = |name: &str, content: &str| {
        let file = scene.home.path().join(name);
        fs::write(&file, content).expect("written");
        text(&file).to_owned()
    };
    let (good, expired) = (write("good", &token), write("expired", &old));
    let (cut, large) = (write("cut", &token[..token.len() / 2]), write("large", &"A".repeat(40_000)));
    let other = "11".repeat(32);
    let none = "01900000-0000-7000-8000-000000000002";
    let cases: [(&str, &[&str]); 8] = [
        ("token_unreadable", &["token", "inspect", &cut]),
        ("token_too_large", &["token", "inspect", &large]),
        ("token_expired", &["token", "verify", &expired, "--key", &key]),
        ("token_stolen", &["token", "verify", &good, "--key", &key, "--agent", none]),
        ("agent_id_needed", &["token", "verify", &good, "--key", &key, "--agent", "echo"]),
        ("limit_malformed", &["token", "attenuate", &good, "--limit", "pid=3"]),
        ("narrowing_refused", &["token", "attenuate", &good, "--limit", "pids=1"]),
        ("not_signed_in", &["token", "mint", "echo"]),
    ];
    for (code, arguments) in cases {
        let report = scene.bad(2, arguments, "").await;
        assert_eq!(report.code, code, "{arguments:?}: {report}");
        assert!(!report.fix.is_empty());
    }
    let foreign = scene.bad(2, &["token", "verify", &good, "--key", &other], "").await;
    assert!(["token_foreign", "token_key"].contains(&foreign.code.as_str()), "{foreign}");
}

#[tokio::test]
async fn the_appliance_is_asked_to_mint_and_revoke() {
    let scene = Scene::new().await;
    scene.claim().await;
    assert_eq!(scene.good(&["token", "key"]).await, format!("{}\n", "07".repeat(32)));
    let minted = scene.good(&["token", "mint", "echo", "--api", "", "--limit", "pids=16"]).await;
    assert_eq!(minted, "not-a-token\n");
    assert!(scene.good(&["token", "inspect", "--agent", "echo"]).await.contains("block 0"));
    let said = scene.good(&["token", "revoke", "--agent", "echo", "--why", "a test"]).await;
    assert!(said.contains("1 runs are ended"), "{said}");
    assert!(scene.good(&["token", "revoked"]).await.contains("it was lost"));
    let file = scene.home.path().join("token");
    fs::write(&file, "not-a-token").expect("written");
    scene.good(&["token", "verify", text(&file), "--agent", "echo"]).await;
    let calls = scene.fake.calls();
    for call in [
        "mint echo {\"api\":[],\"limits\":{\"pids\":16}}",
        "revoke Agent(\"echo\") a test",
        "verify not-a-token Some(\"echo\")",
    ] {
        assert!(calls.iter().any(|made| made == call), "{call}: {calls:?}");
    }
}
