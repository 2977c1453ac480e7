//! Tool calls: another program in a living run.

use crate::Outcome;
use crate::scene::{LIMIT, Running, Scene, new_run, readable, until};
use crate::{needs, scene};
use agentd_domain::launcher::{CallEnd, CallLimits, CallSpec, ExitCause, SocketAccess, WorkAccess};
use agentd_domain::plan::SandboxPlan;
use agentd_sandbox::client::{CallHandles, LauncherError};
use rustix::io::Errno;
use std::os::fd::OwnedFd;

fn spec(words: &[&str]) -> CallSpec {
    CallSpec {
        exec: ["/agent/probe", "--agent"].iter().chain(words).map(|word| (*word).to_owned()).collect(),
        workdir: "/work".to_owned(),
        env: Vec::new(),
        limits: CallLimits::default(),
        work: WorkAccess::ReadWrite,
        sockets: SocketAccess::AsRun,
    }
}

fn waiting(scene: &Scene) -> (SandboxPlan, Running) {
    let plan = scene.agent(&["wait"]);
    let mut run = scene.start(&plan);
    run.says("ready");
    (plan, run)
}

fn begin(scene: &Scene, run: &Running, spec: CallSpec) -> CallHandles {
    scene.client().start_call(run.run_id, spec).unwrap_or_else(|error| panic!("{error}"))
}

/// What a call of the run prints, line by line.
pub(crate) fn ask(
    scene: &Scene,
    run: &Running,
    spec: CallSpec,
) -> std::collections::BTreeMap<String, String> {
    let call = begin(scene, run, spec);
    let text = all(&call.stdout);
    assert_eq!(end(&call).cause, ExitCause::Exited { code: 0 }, "{text} {}", all(&call.stderr));
    crate::cases::results(&text)
}

/// All that a descriptor brings until its end.
fn all(fd: &OwnedFd) -> String {
    let mut text = Vec::new();
    let mut bytes = [0; 4096];
    loop {
        assert!(readable(fd, LIMIT), "nothing comes: {}", String::from_utf8_lossy(&text));
        match rustix::io::read(fd, &mut bytes) {
            Ok(0) => return String::from_utf8(text).unwrap(),
            Ok(read) => text.extend(&bytes[..read]),
            Err(Errno::AGAIN) => {}
            Err(error) => panic!("{error}"),
        }
    }
}

fn said(text: &str, name: &str) -> String {
    let line = text.lines().find_map(|line| line.strip_prefix(&format!("{name}: ")));
    line.unwrap_or_else(|| panic!("no `{name}` in {text}")).to_owned()
}

fn end(call: &CallHandles) -> CallEnd {
    serde_json::from_str(&all(&call.ended)).unwrap()
}

fn lives(scene: &Scene, run: &Running) -> bool {
    scene.client().list().unwrap().runs.iter().any(|living| living.run_id == run.run_id)
}

pub(crate) fn walls() -> Outcome {
    let scene = scene!();
    let (plan, run) = waiting(&scene);
    let call = begin(&scene, &run, spec(&["scene"]));
    let text = all(&call.stdout);
    let uid = plan.uid.to_string();
    assert_eq!(said(&text, "Uid"), [uid.as_str(); 4].join(" "));
    for set in ["CapEff", "CapPrm", "CapBnd", "CapAmb"] {
        assert_eq!(said(&text, set), "0000000000000000", "{set}");
    }
    assert_eq!((said(&text, "NoNewPrivs"), said(&text, "Seccomp")), ("1".to_owned(), "2".to_owned()));
    assert_eq!((said(&text, "cwd"), said(&text, "fds")), ("/work".to_owned(), "0 1 2".to_owned()));
    // Born in the run's own pid namespace, after its first two.
    assert_eq!(said(&text, "pid"), "3");
    assert!(said(&text, "hostname").contains("No such file"), "/proc/sys is visible");
    assert_eq!(end(&call).cause, ExitCause::Exited { code: 0 });
    let call = begin(&scene, &run, spec(&["exit", "9"]));
    assert_eq!(end(&call).cause, ExitCause::Exited { code: 9 });
    let call = begin(&scene, &run, spec(&["forbidden-call"]));
    assert!(matches!(end(&call).cause, ExitCause::Seccomp { .. }));
    let call = begin(&scene, &run, spec(&["copy"]));
    rustix::io::write(&call.stdin, b"to be read").unwrap();
    let CallHandles { stdin, stdout, ended, .. } = call;
    drop(stdin);
    assert_eq!(said(&all(&stdout), "read"), "to be read");
    drop(ended);
    assert!(lives(&scene, &run), "the run ended with a call");
    let group = scene.cgroup_of(&plan, &run);
    until("the calls' groups are removed", || {
        std::fs::read_dir(&group)
            .unwrap()
            .flatten()
            .all(|entry| !entry.file_name().to_string_lossy().starts_with("call-"))
    });
    Outcome::Passed
}

pub(crate) fn narrower() -> Outcome {
    let scene = scene!();
    let (_, run) = waiting(&scene);
    // The agent itself is the second process of its namespace.
    let env = vec![("OTHER".to_owned(), "2".to_owned())];
    let call = begin(&scene, &run, CallSpec { env: env.clone(), ..spec(&["attempt"]) });
    let text = all(&call.stdout);
    assert_eq!((said(&text, "socket"), said(&text, "write")), ("connected".to_owned(), "written".to_owned()));
    // Landlock keeps signals in the call's own domain.
    assert!(said(&text, "kill").contains("not permitted"), "{text}");
    let less = CallSpec { work: WorkAccess::Read, sockets: SocketAccess::None, env, ..spec(&["attempt"]) };
    let call = begin(&scene, &run, less);
    let text = all(&call.stdout);
    assert!(said(&text, "socket").contains("not permitted"), "{text}");
    assert!(said(&text, "write").contains("denied"), "{text}");
    Outcome::Passed
}

pub(crate) fn out_of_memory() -> Outcome {
    let scene = scene!();
    needs!(scene, "memory");
    let (_, run) = waiting(&scene);
    let mut hungry = spec(&["eat-memory"]);
    hungry.limits.memory_max_bytes = Some(24 << 20);
    let end = end(&begin(&scene, &run, hungry));
    assert_eq!(end.cause, ExitCause::OutOfMemory);
    assert!((16 << 20..=24 << 20).contains(&end.memory_peak_bytes), "peak {}", end.memory_peak_bytes);
    assert!(lives(&scene, &run), "the run ended with its call");
    // What the memory killer took in the call is not held against the run.
    scene.client().kill(run.run_id, 0).unwrap();
    assert_eq!(scene.cause(&run), ExitCause::Stopped);
    Outcome::Passed
}

pub(crate) fn fork_bomb() -> Outcome {
    let scene = scene!();
    needs!(scene, "pids");
    let (plan, run) = waiting(&scene);
    let mut bomb = spec(&["fork-bomb"]);
    bomb.limits.pids_max = Some(12);
    let call = begin(&scene, &run, bomb);
    let mut text = String::new();
    let mut bytes = [0; 4096];
    until("the bomb has stopped", || {
        if let Ok(read) = rustix::io::read(&call.stdout, &mut bytes) {
            text.push_str(&String::from_utf8_lossy(&bytes[..read]));
        }
        text.contains("children: ")
    });
    // The process that waits for the call and the bomb itself count too.
    assert_eq!(said(&text, "children"), "10");
    drop(call);
    let group = scene.cgroup_of(&plan, &run);
    until("all of it is gone", || {
        std::fs::read_to_string(group.join("pids.current")).is_ok_and(|count| count.trim() == "2")
    });
    Outcome::Passed
}

pub(crate) fn ends() -> Outcome {
    let scene = scene!();
    let (plan, run) = waiting(&scene);
    let call = begin(&scene, &run, spec(&["ignore-term"]));
    let CallHandles { ended, stdout, .. } = call;
    assert!(readable(&stdout, LIMIT));
    drop(ended);
    // Its standard output ends with it.
    assert!(all(&stdout).starts_with("ready: "));
    let call = begin(&scene, &run, spec(&["wait"]));
    assert!(readable(&call.stdout, LIMIT));
    scene.client().kill(run.run_id, 0).unwrap();
    assert_eq!(scene.cause(&run), ExitCause::Stopped);
    assert_eq!(end(&call).cause, ExitCause::Signalled { signal: libc::SIGKILL });
    let error = scene.client().start_call(run.run_id, spec(&["wait"])).unwrap_err();
    assert!(matches!(&error, LauncherError::Refused(report) if report.code == "not_found"), "{error}");
    until("the run's group is removed", || !scene.cgroup_of(&plan, &run).exists());
    Outcome::Passed
}

pub(crate) fn refused() -> Outcome {
    let scene = scene!();
    let (plan, run) = waiting(&scene);
    let code = |spec: CallSpec| match scene.client().start_call(run.run_id, spec) {
        Err(LauncherError::Refused(report)) => report.code,
        other => panic!("{other:?}"),
    };
    let mut wider = spec(&["wait"]);
    wider.limits.pids_max = Some(plan.cgroup.pids_max + 1);
    assert_eq!(code(wider), "plan_refused");
    assert_eq!(code(CallSpec { workdir: "/etc".to_owned(), ..spec(&["wait"]) }), "plan_refused");
    assert_eq!(code(CallSpec { exec: vec!["/agent/nothing".to_owned()], ..spec(&[]) }), "exec_failed");
    let error = scene.client().start_call(new_run(), spec(&["wait"])).unwrap_err();
    assert!(matches!(&error, LauncherError::Refused(report) if report.code == "not_found"), "{error}");
    let calls: Vec<_> = (0..16).map(|_| begin(&scene, &run, spec(&["wait"]))).collect();
    assert_eq!(code(spec(&["wait"])), "too_many_calls");
    drop(calls);
    Outcome::Passed
}
