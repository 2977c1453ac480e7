//! The programs are run by a small interpreter of classic BPF (bpf(4)), so that what is tested are the instructions
//! that the kernel gets and not the rules they were made of.

use super::*;

const X86_64: u32 = 0xc000_003e;

struct Call {
    number: i64,
    arch: u32,
    args: [u64; 6],
}

fn call(number: i64, args: &[u64]) -> Call {
    let mut all = [0; 6];
    all[..args.len()].copy_from_slice(args);
    Call { number, arch: audit_architecture().unwrap(), args: all }
}

fn run_one(program: &BpfProgram, call: &Call) -> u32 {
    let mut data = Vec::new();
    data.extend((call.number as u32).to_ne_bytes());
    data.extend(call.arch.to_ne_bytes());
    data.extend(0_u64.to_ne_bytes());
    call.args.iter().for_each(|arg| data.extend(arg.to_ne_bytes()));
    let (mut accumulator, mut at) = (0_u32, 0_usize);
    loop {
        let step = &program[at];
        let k = step.k;
        let branch = |yes: bool| at + 1 + usize::from(if yes { step.jt } else { step.jf });
        match u32::from(step.code) {
            0x20 => {
                let from = k as usize;
                accumulator = u32::from_ne_bytes(data[from..from + 4].try_into().unwrap());
                at += 1;
            }
            0x54 => {
                accumulator &= k;
                at += 1;
            }
            0x05 => at += 1 + k as usize,
            0x15 => at = branch(accumulator == k),
            0x25 => at = branch(accumulator > k),
            0x35 => at = branch(accumulator >= k),
            0x06 => return k,
            other => panic!("instruction {other:#x} at {at}"),
        }
    }
}

fn run(filter: &Filter, call: &Call) -> u32 {
    run_one(&filter.program, call)
}

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const KILL: u32 = libc::SECCOMP_RET_KILL_PROCESS;
const EPERM: u32 = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
const ENOSYS: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;

fn filters() -> Filter {
    let names = |list: &[&str]| list.iter().map(|name| (*name).to_owned()).collect();
    compile(&SeccompPlan {
        groups: Vec::new(),
        allow: names(&[
            "clone",
            "clone3",
            "ioctl",
            "personality",
            "prctl",
            "prlimit64",
            "read",
            "socket",
            "socketpair",
        ]),
        enosys: names(&["clone3"]),
        kill: names(&["open_by_handle_at", "reboot"]),
        ioctls: vec![0x5401, 0x541b],
        ioctl_types: Vec::new(),
        socket_families: vec![1, 2],
        datagram_families: Vec::new(),
        prctls: vec![15],
    })
    .unwrap()
}

#[test]
fn only_listed_calls_pass() {
    let filters = filters();
    assert_eq!(run(&filters, &call(libc::SYS_read, &[])), ALLOW);
    assert_eq!(run(&filters, &call(libc::SYS_mount, &[])), EPERM);
    assert_eq!(run(&filters, &call(libc::SYS_clone3, &[])), ENOSYS);
    assert_eq!(run(&filters, &call(libc::SYS_reboot, &[])), KILL);
    assert_eq!(run(&filters, &call(libc::SYS_open_by_handle_at, &[])), KILL);
}

#[test]
fn foreign_architectures_and_x32_end_the_process() {
    let filters = filters();
    let i386 = Call { arch: 0x4000_0003, ..call(libc::SYS_read, &[]) };
    assert_eq!(run(&filters, &i386), KILL);
    assert_eq!(run(&filters, &call(libc::SYS_read | 0x4000_0000, &[])), KILL);
    assert_eq!(run(&filters, &call(-1, &[])), KILL);
    if cfg!(target_arch = "x86_64") {
        assert_eq!(audit_architecture().unwrap(), X86_64);
    }
}

#[test]
fn high_bits_do_not_smuggle_a_request_past_a_32_bit_argument() {
    let filters = filters();
    const TIOCSTI: u64 = 0x5412;
    for high in [0, 1 << 32, 0xffff_ffff << 32] {
        assert_eq!(run(&filters, &call(libc::SYS_ioctl, &[0, high | TIOCSTI])), EPERM);
        // The kernel ignores the high bits, so an allowed request stays allowed with them.
        assert_eq!(run(&filters, &call(libc::SYS_ioctl, &[0, high | 0x541b])), ALLOW);
        assert_eq!(run(&filters, &call(libc::SYS_socket, &[high | 16, 1])), EPERM);
        assert_eq!(run(&filters, &call(libc::SYS_prctl, &[high | 22])), EPERM);
    }
}

#[test]
fn sockets_are_streams_of_the_listed_families() {
    let filters = filters();
    let stream = (libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK) as u64;
    assert_eq!(run(&filters, &call(libc::SYS_socket, &[1, stream])), ALLOW);
    assert_eq!(run(&filters, &call(libc::SYS_socket, &[2, stream])), ALLOW);
    assert_eq!(run(&filters, &call(libc::SYS_socket, &[2, libc::SOCK_DGRAM as u64])), EPERM);
    assert_eq!(run(&filters, &call(libc::SYS_socket, &[2, libc::SOCK_RAW as u64])), EPERM);
    for family in [0, 10, 16, 17, 38, 40, 44] {
        assert_eq!(run(&filters, &call(libc::SYS_socket, &[family, stream])), EPERM, "{family}");
    }
    assert_eq!(run(&filters, &call(libc::SYS_socketpair, &[2, stream])), EPERM);
}

#[test]
fn a_clone_makes_threads_and_processes_but_no_namespaces() {
    let filters = filters();
    let thread =
        libc::CLONE_VM | libc::CLONE_FS | libc::CLONE_FILES | libc::CLONE_SIGHAND | libc::CLONE_THREAD;
    assert_eq!(run(&filters, &call(libc::SYS_clone, &[thread as u64])), ALLOW);
    assert_eq!(run(&filters, &call(libc::SYS_clone, &[libc::SIGCHLD as u64])), ALLOW);
    for bit in 0..32 {
        let flag = 1_u64 << bit;
        let expected = if flag & u64::from(new_namespaces()) == 0 { ALLOW } else { EPERM };
        assert_eq!(
            run(&filters, &call(libc::SYS_clone, &[flag | libc::SIGCHLD as u64])),
            expected,
            "bit {bit}"
        );
    }
}

#[test]
fn other_processes_limits_and_personas_stay_out_of_reach() {
    let filters = filters();
    assert_eq!(run(&filters, &call(libc::SYS_prlimit64, &[0])), ALLOW);
    assert_eq!(run(&filters, &call(libc::SYS_prlimit64, &[1])), EPERM);
    assert_eq!(run(&filters, &call(libc::SYS_personality, &[0xffff_ffff])), ALLOW);
    assert_eq!(run(&filters, &call(libc::SYS_personality, &[0x0040_0000])), EPERM);
}

#[test]
fn an_empty_list_of_arguments_allows_none() {
    let own = compile_own(&["ioctl", "read"], &[], Ioctl::None).unwrap();
    assert_eq!(run(&own, &call(libc::SYS_ioctl, &[0, 0x541b])), EPERM);
    assert_eq!(run(&own, &call(libc::SYS_read, &[])), ALLOW);
    let gpu = compile_own(&["ioctl"], &[], Ioctl::Any).unwrap();
    assert_eq!(run(&gpu, &call(libc::SYS_ioctl, &[0, 0x541b])), ALLOW);
}

#[test]
fn a_name_that_nobody_knows_is_an_error_and_not_a_gap() {
    let mut plan = SeccompPlan {
        groups: Vec::new(),
        allow: vec!["read".to_owned()],
        enosys: Vec::new(),
        kill: vec!["rebot".to_owned()],
        ioctls: Vec::new(),
        ioctl_types: Vec::new(),
        socket_families: Vec::new(),
        datagram_families: Vec::new(),
        prctls: Vec::new(),
    };
    assert!(matches!(compile(&plan), Err(SeccompError::UnknownCall { .. })));
    plan.kill.clear();
    assert!(compile(&plan).is_ok());
}

/// Every call of a full plan, and every number around them, against the plan itself.
#[test]
fn the_search_by_halves_finds_what_the_plan_says() {
    let plan: agentd_domain::plan::SandboxPlan =
        serde_json::from_str(include_str!("../../tests/fixtures/plan.json")).unwrap();
    let plan = plan.seccomp;
    let filters = compile(&plan).unwrap();
    let numbers =
        |list: &[String]| -> Vec<i64> { list.iter().filter_map(|name| syscalls::number(name)).collect() };
    let (allowed, enosys, killed) = (numbers(&plan.allow), numbers(&plan.enosys), numbers(&plan.kill));
    let looked_into = argument_limits(ArgumentRules::Plan(&plan));
    for number in (0..1_000).chain([0x3fff_ffff]).filter(|number| !looked_into.contains_key(number)) {
        let expected = match number {
            number if killed.contains(&number) => KILL,
            number if enosys.contains(&number) => ENOSYS,
            number if allowed.contains(&number) => ALLOW,
            _ => EPERM,
        };
        assert_eq!(run(&filters, &call(number, &[])), expected, "call {number}");
    }
    let steps = filters.program.len();
    assert!(steps < 200, "a start pays for the square of the length: {steps}");
}

/// Longer than one conditional jump reaches, and with every kind of answer.
#[test]
fn a_program_of_any_length_leads_to_the_right_answer() {
    for count in [0, 1, 2, 3, 250, 1_500] {
        let one_of = (0..count).map(|value| vec![equal(0, value)]).collect::<Vec<_>>();
        let rules = Answer::If { one_of, then: ALLOW, otherwise: ENOSYS };
        let mut answers: BTreeMap<u32, Answer> =
            (0..count).map(|number| (number * 2, Answer::Always(libc::SECCOMP_RET_ERRNO | number))).collect();
        answers.insert(count * 2 + 4, rules);
        let program = assemble(&answers, KILL, None);
        for number in 0..count {
            let found = |number: u32| run_one(&program, &call(number.into(), &[]));
            assert_eq!(found(number * 2), libc::SECCOMP_RET_ERRNO | number);
            assert_eq!(found(number * 2 + 1), KILL);
        }
        let looked_into = |value: u32| run_one(&program, &call((count * 2 + 4).into(), &[value.into()]));
        (0..count).for_each(|value| assert_eq!(looked_into(value), ALLOW));
        assert_eq!(looked_into(count), ENOSYS);
        assert_eq!(run_one(&program, &call(-1, &[])), KILL);
    }
}

/// Kinds of requests of a device's driver, and no request of a terminal or a socket.
#[test]
fn a_run_with_a_device_speaks_to_its_driver_and_to_nothing_else_besides() {
    let plan: agentd_domain::plan::SandboxPlan =
        serde_json::from_str(include_str!("../../tests/fixtures/plan.json")).unwrap();
    let mut seccomp = plan.seccomp;
    let ioctl = |filter: &Filter, request: u64| run(filter, &call(libc::SYS_ioctl, &[3, request]));
    let nvidia = [0xc020_462a, 0x4600, 0xc008_64b2, 0x6400, 0x1, 0x4b, 0x3000_0001];
    let terminals = [0x5412, 0x541c, 0x5423, 0x5412 | 1 << 32, 0x8933, 0x4004_6602, 0x3000_0003, 0x1_0000];
    let without = compile(&seccomp).unwrap();
    for request in nvidia {
        assert_eq!(ioctl(&without, request), EPERM, "{request:x}");
    }
    seccomp.ioctl_types = agentd_domain::nodes::IOCTL_TYPES.to_vec();
    seccomp.ioctls.extend(agentd_domain::nodes::IOCTLS);
    let with = compile(&seccomp).unwrap();
    for request in nvidia {
        assert_eq!(ioctl(&with, request), ALLOW, "{request:x}");
    }
    for request in terminals {
        assert_eq!(ioctl(&with, request), EPERM, "{request:x}");
    }
}
