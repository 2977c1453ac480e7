//! The tests. Each starts a launcher of its own and leaves nothing behind.

use crate::scene::{LIMIT, Scene, new_run, readable, until};
use crate::{Case, Outcome, calls, devices, engines};
use agentd_domain::launcher::{EngineSpec, ExitCause, Forbidden, Request, Response};
use agentd_domain::plan::{CgroupLimits, DiskQuota, FsAccess, LandlockRule, Mount, NetworkPlan};
use agentd_sandbox::client::LauncherError;
use agentd_sandbox::wire;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::process::Command;

pub(crate) const ALL: &[Case] = &[
    ("an_agent_finds_only_what_its_plan_gives", agent_finds_only_its_plan),
    ("no_escape_has_an_effect_and_each_has_a_control", escapes),
    ("a_missing_wall_keeps_every_run_from_starting", fails_closed),
    ("an_agent_that_exits_leaves_its_code", exit_code),
    ("a_forbidden_call_ends_the_run", forbidden_call),
    ("a_forbidden_call_of_a_child_shows_while_the_run_lives", forbidden_call_of_a_child),
    ("a_program_that_is_not_there_is_a_refusal_and_a_record", missing_program),
    ("an_agent_over_its_memory_limit_is_killed_and_named", out_of_memory),
    ("the_processor_s_share_holds_when_a_run_has_started", processor_share),
    ("a_fork_bomb_stops_at_its_limit", fork_bomb),
    ("a_volume_is_full_at_its_quota", disk_quota),
    ("frozen_agents_stand_still_and_thaw", freeze),
    ("sigterm_first_and_sigkill_after_the_grace_time", kill),
    ("an_agent_talks_to_agentd_and_to_the_next_one", handover),
    ("rules_for_the_network_open_the_egress_s_sockets_and_nothing_else", egress_sockets),
    ("the_launcher_s_death_ends_every_run", launcher_dies),
    ("the_launcher_stops_in_order", launcher_stops),
    ("only_agentd_s_uid_is_heard", wrong_uid),
    ("a_uid_belongs_to_one_agent", uids),
    ("an_oversized_message_is_refused_and_the_launcher_lives", oversized),
    ("a_plan_outside_the_rules_is_refused", bad_plans),
    ("a_data_disk_without_quotas_gets_no_agent", quota_is_required),
    ("removing_an_agent_follows_no_link", removal),
    ("limits_of_a_living_run_shrink_and_never_grow", change_limits),
    ("the_data_disk_s_rate_is_limited", disk_rate),
    ("an_engine_is_confined_and_started_again", engines::engine),
    ("an_engine_comes_after_one_that_still_ends", engines::engine_after_another),
    ("a_drivers_limit_is_asked_for_behind_walls", engines::engine_limits),
    ("a_run_sees_the_nodes_that_it_was_given_and_no_other", devices::given),
    ("a_call_has_no_device_of_its_run", devices::call_has_none),
    ("a_device_that_is_given_has_one_user", devices::one_user),
    ("a_call_has_its_run_s_walls_and_ends_with_its_word", calls::walls),
    ("a_call_gives_up_what_it_is_told_to", calls::narrower),
    ("a_call_that_eats_memory_takes_nothing_with_it", calls::out_of_memory),
    ("a_call_that_forks_stops_at_its_own_limit", calls::fork_bomb),
    ("a_call_ends_with_its_asker_and_with_its_run", calls::ends),
    ("a_call_wider_than_its_run_is_refused", calls::refused),
];

#[macro_export]
macro_rules! scene {
    () => {
        match Scene::new() {
            Ok(scene) => scene,
            Err(reason) => return Outcome::Skipped(reason),
        }
    };
}

#[macro_export]
macro_rules! needs {
    ($scene:expr, $feature:literal) => {
        if let Some(reason) = $scene.lacks($feature) {
            return Outcome::Skipped(reason);
        }
    };
}

fn agent_finds_only_its_plan() -> Outcome {
    let scene = scene!();
    let plan = scene.agent(&["scene"]);
    let mut run = scene.start(&plan);
    let uid = plan.uid.to_string();
    assert_eq!(run.says("Uid"), [uid.as_str(); 4].join(" "));
    assert_eq!(run.says("Gid"), [uid.as_str(); 4].join(" "));
    assert_eq!(run.says("Groups"), "");
    for set in ["CapEff", "CapPrm", "CapBnd", "CapAmb"] {
        assert_eq!(run.says(set), "0000000000000000", "{set}");
    }
    assert_eq!(run.says("NoNewPrivs"), "1");
    assert_eq!(run.says("Seccomp"), "2");
    assert_eq!(run.says("SigBlk"), "0000000000000000");
    assert_eq!(run.says("pid"), "2");
    assert_eq!(run.says("cwd"), "/work");
    assert_eq!(run.says("fds"), "0 1 2");
    let mut variables: Vec<String> = plan.env.iter().map(|(name, value)| format!("{name}={value}")).collect();
    variables.sort();
    assert_eq!(run.says("env"), variables.join(" "), "not the plan's environment and nothing else");
    assert_eq!(run.says("dev"), "fd full null random shm stderr stdin stdout tty urandom zero");
    assert_eq!(run.says("work"), "true");
    assert_eq!(run.says("tmp"), "true");
    assert!(run.says("hostname").contains("No such file"), "/proc/sys is visible");
    assert_eq!(scene.cause(&run), ExitCause::Exited { code: 0 });
    let note = scene.data.join("agents").join(plan.agent_id.to_string()).join("work/note");
    assert_eq!(std::fs::metadata(note).unwrap().uid(), plan.uid);
    Outcome::Passed
}

/// Everything the agent may attack, outside of its jail.
struct Victims {
    folder: tempfile::TempDir,
    process: std::process::Child,
    tcp: TcpListener,
    unix: UnixListener,
    abstract_name: String,
    abstract_socket: UnixListener,
}

impl Victims {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
        std::fs::write(folder.path().join("secret"), "the secret").unwrap();
        std::fs::write(folder.path().join("file"), "untouched").unwrap();
        std::fs::set_permissions(folder.path().join("file"), std::fs::Permissions::from_mode(0o666)).unwrap();
        let abstract_name =
            format!("agentd-test-{}-{:?}", std::process::id(), folder.path().file_name().unwrap());
        let address = std::os::unix::net::SocketAddr::from_abstract_name(&abstract_name).unwrap();
        let unix = UnixListener::bind(folder.path().join("socket")).unwrap();
        std::fs::set_permissions(folder.path().join("socket"), std::fs::Permissions::from_mode(0o777))
            .unwrap();
        let victims = Self {
            process: Command::new("sleep").arg("3600").spawn().unwrap(),
            tcp: TcpListener::bind("127.0.0.1:0").unwrap(),
            unix,
            abstract_socket: UnixListener::bind_addr(&address).unwrap(),
            abstract_name,
            folder,
        };
        victims.tcp.set_nonblocking(true).unwrap();
        victims.unix.set_nonblocking(true).unwrap();
        victims.abstract_socket.set_nonblocking(true).unwrap();
        victims
    }

    fn arguments(&self) -> Vec<String> {
        let path = |name: &str| self.folder.path().join(name).display().to_string();
        vec![
            path("secret"),
            path("file"),
            self.process.id().to_string(),
            self.tcp.local_addr().unwrap().port().to_string(),
            path("socket"),
            self.abstract_name.clone(),
        ]
    }

    /// Which attempts had an effect here.
    fn harmed(&mut self) -> Vec<&'static str> {
        let mut harmed = Vec::new();
        if std::fs::read_to_string(self.folder.path().join("file")).unwrap() != "untouched" {
            harmed.push("overwrite");
        }
        if self.tcp.accept().is_ok() {
            harmed.push("connect tcp");
        }
        if self.unix.accept().is_ok() {
            harmed.push("connect unix");
        }
        if self.abstract_socket.accept().is_ok() {
            harmed.push("connect abstract");
        }
        if self.process.try_wait().unwrap().is_some() {
            harmed.push("kill");
        }
        harmed
    }
}

impl Drop for Victims {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

pub(crate) fn results(text: &str) -> BTreeMap<String, String> {
    text.lines()
        .filter_map(|line| line.split_once(": "))
        .map(|(name, what)| (name.to_owned(), what.to_owned()))
        .collect()
}

fn escapes() -> Outcome {
    let scene = scene!();
    let mut victims = Victims::new();
    let words = victims.arguments();
    let words: Vec<&str> = ["escape"].into_iter().chain(words.iter().map(String::as_str)).collect();
    let mut run = scene.start(&scene.agent(&words));
    let inside = run.text_until("done");
    assert_eq!(victims.harmed(), [""; 0], "an escape had an effect:\n{inside}");
    for (name, what) in results(&inside) {
        assert!(what.starts_with("blocked") || name == "done", "{name}: {what}");
    }
    assert!(!inside.contains("the secret"), "the secret was read");

    // The control: the same program with the same arguments and no walls.
    let control =
        Command::new(std::env::current_exe().unwrap()).arg("--agent").args(&words).output().unwrap();
    let outside = results(&String::from_utf8_lossy(&control.stdout));
    let mut harmed = victims.harmed();
    harmed.sort_unstable();
    assert_eq!(harmed, ["connect abstract", "connect tcp", "connect unix", "kill", "overwrite"]);
    for name in [
        "read",
        "read through /proc/self/root",
        "socket netlink",
        "socket packet",
        "socket udp",
        "setuid 0",
        "memfd",
        "pidfd of pid 1",
        "namespace",
        "list all processes",
    ] {
        assert!(
            outside[name].starts_with("ESCAPED"),
            "the control `{name}` did not succeed: {}",
            outside[name]
        );
    }
    Outcome::Passed
}

/// On a kernel that lacks a wall; the test machines of cgroup v1 do, and the appliance's when it is started with
/// `cgroup_disable=memory` or without Landlock in `lsm=`.
fn fails_closed() -> Outcome {
    let scene = match Scene::without_excuses() {
        Ok(scene) => scene,
        Err(reason) => return Outcome::Skipped(reason),
    };
    let problems = scene.client().list().unwrap().problems;
    if problems.is_empty() {
        return Outcome::Skipped("this machine can raise every wall".to_owned());
    }
    let plan = crate::scene::fixture_plan();
    let run_id = new_run();
    let error = scene.client().start(run_id, plan).unwrap_err();
    assert!(matches!(&error, LauncherError::Refused(report) if report.code == "wall_missing"), "{error}");
    let spec = EngineSpec {
        set: "host".to_owned(),
        memory_max_bytes: 1 << 30,
        device_limits: Vec::new(),
        hidden: Vec::new(),
        software_devices: false,
    };
    assert_eq!(code_of(scene.client().start_engine(spec)), "wall_missing");
    let listing = scene.client().list().unwrap();
    assert!(listing.runs.is_empty() && listing.engines.is_empty() && listing.exits.is_empty());
    println!(
        "  missing here: {}",
        problems.iter().map(|problem| problem.why.as_str()).collect::<Vec<_>>().join("; ")
    );
    Outcome::Passed
}

/// A volume without a limit is a wall that is missing, too.
fn quota_is_required() -> Outcome {
    let scene = match Scene::without_excuses() {
        Ok(scene) => scene,
        Err(reason) => return Outcome::Skipped(reason),
    };
    if scene.lacks("quota").is_none() {
        return Outcome::Skipped("the data file system here has quotas".to_owned());
    }
    let plan = crate::scene::fixture_plan();
    let quota = DiskQuota { bytes: 1 << 20, inodes: 10 };
    assert_eq!(code_of(scene.client().prepare_agent(plan.agent_id, plan.uid, quota)), "quota_missing");
    let agent = scene.data.join("agents").join(plan.agent_id.to_string());
    assert_eq!(std::fs::metadata(agent.join("work")).unwrap().uid(), 0, "an unlimited volume was given away");
    Outcome::Passed
}

fn exit_code() -> Outcome {
    let scene = scene!();
    let plan = scene.agent(&["exit", "7"]);
    // Over and over: whether the launcher hears of the start or of the end first is a matter of chance.
    for _ in 0..10 {
        let run = scene.start(&plan);
        assert_eq!(scene.cause(&run), ExitCause::Exited { code: 7 });
        scene.client().forget_exit(run.run_id).unwrap();
    }
    let run = scene.start(&plan);
    let record = scene.record(&run);
    assert_eq!((record.cause, record.agent_id), (ExitCause::Exited { code: 7 }, plan.agent_id));
    let file = scene.run_dir().join("runs").join(format!("{}.json", run.run_id));
    assert!(file.exists(), "the record is not on disk");
    scene.client().forget_exit(run.run_id).unwrap();
    assert!(!file.exists() && scene.client().list().unwrap().exits.is_empty());
    until("the cgroup is removed", || !scene.cgroup_of(&plan, &run).exists());
    Outcome::Passed
}

fn forbidden_call() -> Outcome {
    let scene = scene!();
    let run = scene.start(&scene.agent(&["forbidden-call"]));
    assert!(matches!(scene.cause(&run), ExitCause::Seccomp { .. }));
    Outcome::Passed
}

fn forbidden_call_of_a_child() -> Outcome {
    // With auditing in the kernel each process has a login uid, and only then seccomp writes into its log.
    if !std::path::Path::new("/proc/self/loginuid").exists() || std::fs::File::open("/dev/kmsg").is_err() {
        return Outcome::Skipped("this kernel does not log what seccomp kills, or not to us".to_owned());
    }
    let scene = scene!();
    let plan = scene.agent(&["forbidden-call-of-a-child"]);
    let mut run = scene.start(&plan);
    let seen = || scene.client().list().unwrap().runs.remove(0).forbidden;
    assert_eq!(run.says("child"), "Some(31)");
    until("the launcher has read of it", || seen().is_some());
    let expected = Forbidden { processes: 1, syscall: "reboot".to_owned() };
    assert_eq!(seen(), Some(expected), "the run lives on");
    scene.client().kill(run.run_id, 0).unwrap();
    scene.record(&run);
    let next = scene.start(&scene.agent(&["wait"]));
    assert_eq!(seen(), None, "another agent's");
    drop(next);
    Outcome::Passed
}

fn missing_program() -> Outcome {
    let scene = scene!();
    let mut plan = scene.agent(&[]);
    plan.exec = vec!["/agent/nothing".to_owned()];
    let run_id = new_run();
    let error = scene.client().start(run_id, plan).unwrap_err();
    let LauncherError::Refused(report) = error else { panic!("{error}") };
    assert_eq!(report.code, "exec_failed");
    assert!(report.why.contains("/agent/nothing"), "{}", report.why);
    let record = scene.client().list().unwrap().exits.remove(0);
    assert!(matches!(record.cause, ExitCause::WallFailed { .. }) && record.run_id == run_id);
    Outcome::Passed
}

fn out_of_memory() -> Outcome {
    let scene = scene!();
    needs!(scene, "memory");
    let mut plan = scene.agent(&["eat-memory"]);
    plan.cgroup.memory_max_bytes = 48 << 20;
    plan.cgroup.memory_high_bytes = 48 << 20;
    let run = scene.start(&plan);
    let record = scene.record(&run);
    assert_eq!(record.cause, ExitCause::OutOfMemory);
    assert!(record.memory_peak_bytes > 40 << 20, "peak {}", record.memory_peak_bytes);
    Outcome::Passed
}

/// Written late, so that raising the walls is not limited by it, and before the agent's program begins.
fn processor_share() -> Outcome {
    let scene = scene!();
    needs!(scene, "cpu");
    let plan = scene.agent(&["wait"]);
    let run = scene.start(&plan);
    let share = std::fs::read_to_string(scene.cgroup_of(&plan, &run).join("cpu.max")).unwrap();
    assert_eq!(share.trim(), format!("{} {}", plan.cgroup.cpu_quota_us, plan.cgroup.cpu_period_us));
    Outcome::Passed
}

fn fork_bomb() -> Outcome {
    let scene = scene!();
    needs!(scene, "pids");
    let mut plan = scene.agent(&["fork-bomb"]);
    plan.cgroup.pids_max = 20;
    let mut run = scene.start(&plan);
    // The jail and the bomb itself count too.
    assert_eq!(run.says("children"), "18");
    scene.client().kill(run.run_id, 0).unwrap();
    assert_eq!(scene.cause(&run), ExitCause::Stopped);
    until("the cgroup is removed", || !scene.cgroup_of(&plan, &run).exists());
    Outcome::Passed
}

fn disk_quota() -> Outcome {
    let scene = scene!();
    needs!(scene, "quota");
    let mut run = scene.start(&scene.agent(&["fill-disk"]));
    let written: u64 = run.says("written").parse().unwrap();
    assert!((6 << 20..=8 << 20).contains(&written), "{written} bytes fitted into a quota of 8 MiB");
    assert_eq!(run.says("error"), libc::EDQUOT.to_string());
    let files: u64 = run.says("files").parse().unwrap();
    assert!((45..=50).contains(&files), "{files} files fitted into a quota of 50");
    Outcome::Passed
}

fn freeze() -> Outcome {
    let scene = scene!();
    let plan = scene.agent(&["wait"]);
    let mut run = scene.start(&plan);
    run.says("ready");
    let frozen = |wanted: &str| {
        let events = std::fs::read_to_string(scene.cgroup_of(&plan, &run).join("cgroup.events")).unwrap();
        events.lines().any(|line| line == wanted)
    };
    scene.client().freeze(run.run_id).unwrap();
    until("it is frozen", || frozen("frozen 1"));
    assert!(scene.client().list().unwrap().runs[0].frozen);
    scene.client().thaw(run.run_id).unwrap();
    until("it is thawed", || frozen("frozen 0"));
    // Frozen again: it is killed all the same, without waiting for the grace time.
    scene.client().freeze(run.run_id).unwrap();
    until("it is frozen again", || frozen("frozen 1"));
    scene.client().kill(run.run_id, 60_000).unwrap();
    assert_eq!(scene.cause(&run), ExitCause::Stopped);
    Outcome::Passed
}

fn kill() -> Outcome {
    let scene = scene!();
    let mut polite = scene.start(&scene.agent(&["wait"]));
    polite.says("ready");
    scene.client().kill(polite.run_id, 60_000).unwrap();
    // Far before the grace time: the agent took SIGTERM.
    assert_eq!(scene.cause(&polite), ExitCause::Stopped);
    let mut stubborn = scene.start(&scene.agent(&["ignore-term"]));
    stubborn.says("ready");
    scene.client().kill(stubborn.run_id, 50).unwrap();
    assert_eq!(scene.cause(&stubborn), ExitCause::Stopped);
    Outcome::Passed
}

/// One connection from a listener that came with a run; answers a line with `prefix` and that line.
fn answer<S: Read + Write>(mut stream: S, prefix: &str) {
    let mut line = String::new();
    BufReader::new(&mut stream).read_line(&mut line).unwrap();
    stream.write_all(format!("{prefix} {line}").as_bytes()).unwrap();
}

fn accept_tcp(listener: &OwnedFd) -> std::net::TcpStream {
    assert!(readable(listener, LIMIT), "no connection came");
    let listener = TcpListener::from(listener.try_clone().unwrap());
    let (stream, _) = listener.accept().unwrap();
    stream.set_nonblocking(false).unwrap();
    stream
}

fn accept_unix(listener: &OwnedFd) -> std::os::unix::net::UnixStream {
    assert!(readable(listener, LIMIT), "no connection came");
    let (stream, _) = UnixListener::from(listener.try_clone().unwrap()).accept().unwrap();
    stream.set_nonblocking(false).unwrap();
    stream
}

fn handover() -> Outcome {
    let scene = scene!();
    let mut run = scene.start(&scene.agent(&["talk"]));
    answer(accept_tcp(&run.handles.sockets.api_tcp), "first agentd heard");
    answer(accept_unix(&run.handles.sockets.api_unix), "first agentd heard");
    assert_eq!(run.says("tcp"), "first agentd heard over tcp");
    assert_eq!(run.says("unix"), "first agentd heard over unix");
    // The first agentd is gone with all its descriptors, while a connection waits.
    run.says("waiting");
    let run_id = run.run_id;
    drop(run);
    assert_eq!(scene.client().list().unwrap().runs.len(), 1);
    let handles = scene.client().handover(run_id).unwrap();
    let mut run = crate::scene::Running::adopted(run_id, handles);
    answer(accept_tcp(&run.handles.sockets.api_tcp), "second agentd heard");
    assert_eq!(run.says("later"), "second agentd heard to the next agentd");
    Outcome::Passed
}

fn egress_sockets() -> Outcome {
    let scene = scene!();
    let mut plan = scene.agent(&["network"]);
    assert!(scene.start(&plan).handles.sockets.egress.is_none(), "without rules there is none");
    plan = scene.agent(&["network"]);
    plan.network = NetworkPlan::Egress {
        rules: vec!["https://api.example.org:443,8443".to_owned()],
        capture_tcp: vec![443, 8443],
        bytes_per_day: Some(5_000_000),
    };
    plan.landlock.connect_tcp = vec![53, 443, 7070, 7071, 8443];
    plan.landlock.rules.push(LandlockRule { path: "/etc/resolv.conf".to_owned(), access: FsAccess::Read });
    plan.seccomp.datagram_families = vec![2];
    let text = "nameserver 127.0.0.1\n".to_owned();
    plan.mounts.push(Mount::Text { target: "/etc/resolv.conf".to_owned(), text });
    let mut run = scene.start(&plan);
    let first = run.handles.sockets.egress.take().unwrap();
    assert_eq!(first.rules, ["https://api.example.org:443,8443"]);
    assert_eq!(first.bytes_per_day, Some(5_000_000));
    drop(first);
    // They are the run's, and whoever adopts it gets them again.
    let handles = scene.client().handover(run.run_id).unwrap();
    let mut run = crate::scene::Running::adopted(run.run_id, handles);
    let sockets = run.handles.sockets.egress.take().unwrap();
    assert_eq!(run.says("resolv.conf"), "nameserver 127.0.0.1");
    let mut question = [0; 64];
    assert!(readable(&sockets.dns_udp, LIMIT), "no question came");
    let socket = std::net::UdpSocket::from(sockets.dns_udp);
    let (length, from) = socket.recv_from(&mut question).unwrap();
    socket.send_to(&question[..length], from).unwrap();
    assert_eq!(run.says("udp"), "a question");
    answer(accept_tcp(&sockets.dns_tcp), "name server heard");
    assert_eq!(run.says("tcp 127.0.0.1:53"), "name server heard hello");
    answer(accept_tcp(&sockets.proxy), "proxy heard");
    assert_eq!(run.says("tcp 127.0.0.1:7071"), "proxy heard hello");
    for ((port, listener), address) in sockets.captured.iter().zip(["198.18.7.9:443", "198.19.255.254:8443"])
    {
        let stream = accept_tcp(listener);
        // The address that the agent meant tells the name.
        assert_eq!(
            (stream.local_addr().unwrap().to_string(), *port),
            (address.to_owned(), stream.local_addr().unwrap().port())
        );
        answer(stream, "caught");
        assert_eq!(run.says(&format!("tcp {address}")), "caught hello");
    }
    // Landlock knows ports alone; that there is nothing but `lo` keeps the rest inside.
    let denied = |errno: i32| std::io::Error::from_raw_os_error(errno).to_string();
    assert_eq!(run.says("tcp 198.18.7.9:22"), denied(libc::EACCES));
    assert_eq!(run.says("tcp 93.184.216.34:443"), denied(libc::ENETUNREACH));
    assert_eq!(run.says("udp to 93.184.216.34:53"), denied(libc::ENETUNREACH));
    assert_eq!(run.says("listen"), denied(libc::EPERM));
    Outcome::Passed
}

fn launcher_dies() -> Outcome {
    let mut scene = scene!();
    let mut run = scene.start(&scene.agent(&["ignore-term"]));
    run.says("ready");
    scene.kill_launcher();
    assert!(readable(&run.handles.sockets.pidfd, LIMIT), "the run outlived its launcher");
    // Its end closes the pipe: nobody of the run is left.
    until("the agent's standard output ends", || {
        matches!(rustix::io::read(&run.handles.sockets.stdout, &mut [0; 64]), Ok(0))
    });
    scene.start_launcher();
    assert!(scene.client().list().unwrap().runs.is_empty());
    Outcome::Passed
}

fn launcher_stops() -> Outcome {
    let mut scene = scene!();
    let mut run = scene.start(&scene.agent(&["ignore-term"]));
    run.says("ready");
    assert!(scene.stop_launcher().success());
    assert!(readable(&run.handles.sockets.pidfd, LIMIT));
    let file = scene.run_dir().join("runs").join(format!("{}.json", run.run_id));
    assert!(std::fs::read_to_string(file).unwrap().contains("stopped"));
    // The next launcher still has the record, until agentd has stored it.
    scene.start_launcher();
    assert_eq!(scene.client().list().unwrap().exits.len(), 1);
    Outcome::Passed
}

fn wrong_uid() -> Outcome {
    // This test is root, which may open the socket, and is still not agentd.
    let scene = match Scene::with_agentd_uid(4_242) {
        Ok(scene) => scene,
        Err(reason) => return Outcome::Skipped(reason),
    };
    let error = scene.client().list().unwrap_err();
    assert!(matches!(&error, LauncherError::Refused(report) if report.code == "forbidden"), "{error}");
    let socket = std::fs::metadata(scene.socket()).unwrap();
    assert_eq!((socket.uid(), socket.gid(), socket.mode() & 0o777), (0, 4_242, 0o660));
    Outcome::Passed
}

pub(crate) fn code_of<T: std::fmt::Debug>(result: Result<T, LauncherError>) -> String {
    match result {
        Err(LauncherError::Refused(report)) => report.code,
        other => panic!("not refused: {other:?}"),
    }
}

fn uids() -> Outcome {
    let scene = scene!();
    let first = scene.agent(&["wait"]);
    let second = scene.agent(&["wait"]);
    let quota = DiskQuota { bytes: 1 << 20, inodes: 10 };
    assert_eq!(code_of(scene.client().prepare_agent(first.agent_id, second.uid, quota)), "uid_taken");
    assert_eq!(code_of(scene.client().prepare_agent(first.agent_id, 1_999_999, quota)), "uid_mismatch");
    assert_eq!(code_of(scene.client().prepare_agent(first.agent_id, 0, quota)), "plan_refused");
    scene.client().prepare_agent(first.agent_id, first.uid, quota).unwrap();
    let mut stolen = first.clone();
    stolen.uid = second.uid;
    assert_eq!(code_of(scene.client().start(new_run(), stolen)), "uid_mismatch");
    let folder = scene.data.join("agents").join(first.agent_id.to_string());
    let work = std::fs::symlink_metadata(folder.join("work")).unwrap();
    assert_eq!((work.uid(), work.gid(), work.mode() & 0o7777), (first.uid, first.uid, 0o700));
    assert_eq!(std::fs::metadata(&folder).unwrap().mode() & 0o7777, 0o1770);
    // What is not prepared does not start, and a link in its place does not count.
    let mut stranger = first.clone();
    stranger.agent_id = agentd_domain::ids::AgentId(uuid::Uuid::now_v7());
    for mount in &mut stranger.mounts {
        if let agentd_domain::plan::Mount::ReadOnly { source, .. } = mount {
            *source = source.replace(&first.agent_id.to_string(), &stranger.agent_id.to_string());
        }
    }
    assert_eq!(code_of(scene.client().start(new_run(), stranger.clone())), "not_prepared");
    std::os::unix::fs::symlink(&folder, scene.data.join("agents").join(stranger.agent_id.to_string()))
        .unwrap();
    assert_eq!(code_of(scene.client().start(new_run(), stranger)), "not_prepared");
    Outcome::Passed
}

fn oversized() -> Outcome {
    let scene = scene!();
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, send, socket_with};
    let open = || {
        let socket =
            socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        connect(&socket, &SocketAddrUnix::new(scene.socket()).unwrap()).unwrap();
        socket
    };
    for (message, code) in [
        (vec![b' '; 150_000], "too_large"),
        (b"{}".to_vec(), "message_malformed"),
        (b"{\"type\":\"run_as_root\"}".to_vec(), "message_malformed"),
        (vec![b'['; 100_000], "message_malformed"),
    ] {
        let socket = open();
        send(&socket, &message, rustix::net::SendFlags::empty()).unwrap();
        let (response, _): (Response, _) = wire::receive(socket.as_fd()).unwrap();
        assert!(matches!(&response, Response::Refused(report) if report.code == code), "{response:?}");
    }
    // Silent clients do not keep others from being served.
    let silent: Vec<OwnedFd> = (0..20).map(|_| open()).collect();
    let request = Request::List { after: None };
    wire::send(silent[19].as_fd(), &request, &[]).unwrap();
    let _: (Response, _) = wire::receive(silent[19].as_fd()).unwrap();
    assert!(scene.client().list().is_ok());
    Outcome::Passed
}

fn bad_plans() -> Outcome {
    let scene = scene!();
    let good = scene.agent(&["wait"]);
    let refused = |change: &dyn Fn(&mut agentd_domain::plan::SandboxPlan)| {
        let mut plan = good.clone();
        change(&mut plan);
        code_of(scene.client().start(new_run(), plan))
    };
    assert_eq!(refused(&|plan| plan.uid = 0), "plan_refused");
    assert_eq!(refused(&|plan| plan.workdir = "/etc".to_owned()), "plan_refused");
    assert_eq!(refused(&|plan| plan.seccomp.allow.push("mount".to_owned())), "plan_refused");
    assert_eq!(refused(&|plan| plan.cgroup.memory_max_bytes = u64::MAX), "plan_refused");
    assert_eq!(refused(&|plan| plan.landlock.abi_min = 1), "plan_refused");
    let run = scene.start(&good);
    assert_eq!(code_of(scene.client().start(run.run_id, good.clone())), "conflict");
    assert_eq!(code_of(scene.client().remove_agent(good.agent_id, good.uid)), "conflict");
    assert_eq!(code_of(scene.client().handover(new_run())), "not_found");
    Outcome::Passed
}

fn removal() -> Outcome {
    let mut scene = scene!();
    let plan = scene.agent(&["wait"]);
    let folder = scene.data.join("agents").join(plan.agent_id.to_string());
    let outside = scene.folder.path().join("outside");
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(outside.join("precious"), "x").unwrap();
    std::os::unix::fs::symlink(&outside, folder.join("work/link")).unwrap();
    std::fs::create_dir(folder.join("work/.moved-1")).unwrap();
    std::fs::write(folder.join("work/.moved-1/file"), "x").unwrap();
    // Deeper than any path can say.
    let mut at =
        rustix::fs::open(folder.join("work"), rustix::fs::OFlags::DIRECTORY, rustix::fs::Mode::empty())
            .unwrap();
    for _ in 0..12 {
        let name = "d".repeat(200);
        rustix::fs::mkdirat(&at, name.as_str(), rustix::fs::Mode::RWXU).unwrap();
        at = rustix::fs::openat(&at, name.as_str(), rustix::fs::OFlags::DIRECTORY, rustix::fs::Mode::empty())
            .unwrap();
    }
    for number in 0..20 {
        std::fs::write(folder.join(format!("work/f{number}")), "x").unwrap();
    }
    drop(at);
    assert_eq!(code_of(scene.client().remove_agent(plan.agent_id, plan.uid + 1)), "uid_mismatch");
    scene.client().remove_agent(plan.agent_id, plan.uid).unwrap();
    let left: Vec<_> = std::fs::read_dir(scene.data.join("agents"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert!(left.is_empty(), "{left:?}");
    assert!(outside.join("precious").exists(), "a link was followed");
    // What an earlier launcher had begun is finished by the next one.
    let unfinished = scene.data.join("agents").join(format!(".removed-{}", plan.agent_id));
    std::fs::create_dir_all(unfinished.join("work/a/b")).unwrap();
    scene.kill_launcher();
    scene.start_launcher();
    until("the unfinished removal is finished", || !unfinished.exists());
    // Removing what is gone is done.
    scene.client().remove_agent(plan.agent_id, plan.uid).unwrap();
    Outcome::Passed
}

fn change_limits() -> Outcome {
    let scene = scene!();
    let plan = scene.agent(&["wait"]);
    let mut run = scene.start(&plan);
    run.says("ready");
    let wider = CgroupLimits { memory_max_bytes: plan.cgroup.memory_max_bytes * 2, ..plan.cgroup.clone() };
    assert_eq!(code_of(scene.client().change_limits(run.run_id, wider)), "plan_refused");
    let narrower = CgroupLimits { pids_max: 5, ..plan.cgroup.clone() };
    scene.client().change_limits(run.run_id, narrower).unwrap();
    if scene.lacks("pids").is_none() {
        let value = std::fs::read_to_string(scene.cgroup_of(&plan, &run).join("pids.max")).unwrap();
        assert_eq!(value.trim(), "5");
    }
    scene.client().change_limits(run.run_id, plan.cgroup).unwrap();
    Outcome::Passed
}

fn disk_rate() -> Outcome {
    let scene = scene!();
    needs!(scene, "io");
    let mut plan = scene.agent(&["wait"]);
    plan.cgroup.io_bytes_per_second = Some(1 << 20);
    let run = scene.start(&plan);
    let value = std::fs::read_to_string(scene.cgroup_of(&plan, &run).join("io.max")).unwrap();
    assert!(value.contains("rbps=1048576 wbps=1048576"), "{value}");
    Outcome::Passed
}
