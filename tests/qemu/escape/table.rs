//! Which attempts are there, which wall must stop each, and where can the attempt succeed?
//!
//! The rows are those of the escape suite that the project keeps: a number names the class, several attempts may
//! belong to one. `primary` must stop it; `second` must when the primary is switched off.

/// One attempt.
pub struct Row {
    pub id: &'static str,
    pub what: &'static str,
    pub primary: &'static str,
    pub second: &'static str,
    pub control: Control,
}

/// Where the attempt must succeed, or it proves nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Control {
    /// In the same image with every wall lowered.
    WallsOff,
    /// The same, on a kernel that has what ours leaves out.
    TestKernel,
}

const fn row(id: &'static str, what: &'static str, primary: &'static str, second: &'static str) -> Row {
    Row { id, what, primary, second, control: Control::WallsOff }
}

const fn left_out(id: &'static str, what: &'static str, primary: &'static str, second: &'static str) -> Row {
    Row { id, what, primary, second, control: Control::TestKernel }
}

pub const ROWS: &[Row] = &[
    row("1-read", "read a file of the neighbour's", "root", "uid, Landlock"),
    row("1-write", "overwrite a file of the neighbour's", "root", "uid, Landlock"),
    row("1-data", "make a file beside agentd's stores", "root", "uid, Landlock"),
    row("1-state", "make a file on the state partition", "root", "uid, Landlock"),
    row("2-truncate", "truncate without opening", "root", "uid, Landlock"),
    row("2-chmod", "change the mode of the neighbour's file", "root", "uid"),
    row("2-utimes", "change the times of the neighbour's file", "root", "uid"),
    row("4-stat", "size and time of the neighbour's file", "root", "uid"),
    row("6-fd", "read through a descriptor left open", "close_range", "Landlock, uid"),
    row("7-root", "the neighbour's files through /proc/PID/root", "pid namespace", "hidepid, uid"),
    row("7-cwd", "the neighbour's files through /proc/PID/cwd", "pid namespace", "hidepid, uid"),
    row("9-link", "a hard link to the neighbour's file", "root", "uid, Landlock refer"),
    row("10-rename", "move a file out of the package", "read-only mount", "uid, Landlock refer"),
    left_out("11-handle", "a file by its handle", "FHANDLE=n, seccomp", "capabilities"),
    row("12-shm", "the neighbour's /dev/shm", "pid namespace, private tmpfs", "uid"),
    row("12-sysv", "shared memory of System V", "ipc namespace", "seccomp"),
    left_out("12-mqueue", "a POSIX message queue", "POSIX_MQUEUE=n", "ipc namespace, seccomp"),
    row("13-manifest", "change one's own manifest", "read-only mount", "uid, Landlock"),
    row("16-modprobe", "kernel.modprobe", "root: no /proc/sys", "uid"),
    left_out("16-core", "kernel.core_pattern", "COREDUMP=n", "root: no /proc/sys, uid"),
    row("17-kmsg", "write to the kernel's log", "six-node /dev", "uid, Landlock"),
    row("17-mknod", "make a device node", "capabilities", "seccomp, nodev"),
    row("17-disk", "write to the raw disk", "capabilities", "seccomp, nodev"),
    left_out("17-sysrq", "/proc/sysrq-trigger", "MAGIC_SYSRQ=n", "root: subset=pid, uid"),
    left_out("17-mem", "/dev/mem", "DEVMEM=n", "six-node /dev, uid"),
    row("18-dmesg", "read the kernel's log", "seccomp", "dmesg_restrict"),
    row("18-kallsyms", "addresses of the kernel", "root: subset=pid", "kptr_restrict"),
    left_out("18-kcore", "/proc/kcore", "PROC_KCORE=n", "root: subset=pid, uid"),
    row("19-memfd", "run a program from memory", "seccomp", ""),
    row("21-setuid", "become root by a set-uid program", "no_new_privs", "nosuid, capabilities"),
    row("22-copy", "run a program from /work", "noexec", "Landlock execute"),
    row("23-filter", "a filter of one's own that answers for others", "seccomp", ""),
    left_out("24-x32", "a call by its x32 number", "X86_X32_ABI=n", "seccomp"),
    left_out("24-ia32", "a call by the 32-bit gate", "IA32_EMULATION=n", "seccomp"),
    row("28-kill", "kill a process of the neighbour's", "pid namespace", "uid, Landlock scope"),
    row("29-ptrace", "read memory by ptrace", "seccomp", "pid namespace, uid, Yama"),
    row("30-mem", "read /proc/PID/mem", "pid namespace", "uid, Yama"),
    row("30-environ", "read /proc/PID/environ", "pid namespace", "uid, Yama"),
    left_out("31-vmread", "process_vm_readv", "CROSS_MEMORY_ATTACH=n", "seccomp, pid namespace, uid"),
    row("32-getfd", "take a descriptor by pidfd_getfd", "seccomp", "pid namespace, uid"),
    row("32-signal", "kill by pidfd", "seccomp", "pid namespace, uid"),
    row("33-setns", "enter the neighbour's mount namespace", "seccomp", "capabilities, pid namespace"),
    row("34-daemon", "live on after the stop", "cgroup.kill", "pid namespace"),
    left_out("36-core", "leave a core dump", "COREDUMP=n", "rlimits"),
    left_out("37-uring", "io_uring", "IO_URING=n", "seccomp"),
    left_out("38-uffd", "userfaultfd", "USERFAULTFD=n", "seccomp"),
    left_out("40-bpf", "bpf", "BPF_SYSCALL=n", "seccomp"),
    row("40-perf", "perf_event_open", "seccomp", "perf_event_paranoid"),
    row("41-userns", "a user namespace by unshare", "seccomp", "max_user_namespaces=0"),
    row("41-clone3", "a user namespace by clone3", "seccomp: ENOSYS", "max_user_namespaces=0"),
    row("42-mount", "mount(2)", "seccomp", "capabilities"),
    row("42-fsopen", "fsopen, fsmount, move_mount", "seccomp", "capabilities"),
    row("42-chroot", "chroot", "seccomp", "capabilities"),
    row("43-reboot", "reboot(2)", "seccomp", "capabilities"),
    row("43-time", "settimeofday", "seccomp", "capabilities"),
    left_out("43-kexec", "kexec_load", "KEXEC=n", "seccomp, capabilities"),
    left_out("43-iopl", "iopl and a byte to a port", "X86_IOPL_IOPERM=n", "seccomp, capabilities"),
    row("43-hostname", "the machine's host name", "uts namespace", "seccomp, capabilities"),
    row("44-packet", "AF_PACKET", "seccomp", "capabilities"),
    row("44-netlink", "AF_NETLINK", "seccomp", ""),
    left_out("44-alg", "AF_ALG", "CRYPTO_USER_API=n", "seccomp"),
    left_out("44-vsock", "AF_VSOCK", "VSOCKETS=n", "seccomp"),
    left_out("44-tipc", "AF_TIPC", "TIPC=n", "seccomp"),
    left_out("44-rds", "AF_RDS", "RDS=n", "seccomp"),
    left_out("44-key", "AF_KEY", "NET_KEY=n", "seccomp"),
    left_out("44-can", "AF_CAN", "CAN=n", "seccomp"),
    left_out("44-sctp", "SCTP", "IP_SCTP=n", "seccomp"),
    left_out("44-xdp", "AF_XDP", "XDP_SOCKETS=n", "seccomp, capabilities"),
    left_out("44-bluetooth", "AF_BLUETOOTH", "BT=n", "seccomp"),
    row("45-tiocsti", "type into a terminal", "six-node /dev", "seccomp, uid"),
    row("45-high", "the same with a high bit set", "six-node /dev", "seccomp, uid"),
    row("47-pids", "raise one's own pids.max", "root: no cgroupfs", "uid"),
    row("48-socket", "a socket of the host's", "root", "uid"),
    row("48-launcher", "the launcher's socket", "root", "peer's uid"),
    row("49-abstract", "an abstract socket", "net namespace", "Landlock scope"),
    row("51-replace", "remove a socket of the host's", "root", "uid, Landlock"),
    row("52-loopback", "the machine's own loopback", "net namespace", "Landlock TCP"),
    row("54-tcp", "TCP to the outside", "net namespace", "Landlock TCP"),
    row("54-udp", "UDP to the outside", "net namespace", "seccomp"),
    row("54-icmp", "raw ICMP to the outside", "net namespace", "seccomp, capabilities"),
    row("57-metadata", "the metadata address", "net namespace", "seccomp"),
    row("79-forks", "a fork bomb", "pids.max", ""),
    row("79-threads", "a thread bomb", "pids.max", ""),
    row("80-memory", "a memory bomb", "memory.max", ""),
    row("81-cpu", "more processor time than the share", "cpu.max", ""),
    row("81-fifo", "real-time priority", "seccomp", "capabilities, rlimits"),
    row("81-nice", "a better nice value", "seccomp", "capabilities, rlimits"),
    row("82-disk", "more bytes than the quota", "quota", ""),
    row("82-inodes", "more files than the quota", "quota", ""),
    row("82-chown", "files on the neighbour's account", "capabilities", "seccomp"),
];

/// What the suite does not try, and why. Attacks on agentd itself are in `elsewhere.rs`. None of these counts as passed.
pub const NOT_TRIED: &[(&str, &str)] = &[
    (
        "8",
        "agentd opens no file of an agent's; the launcher's removal follows no link: tests/walls `removing_an_agent_follows_no_link`",
    ),
    (
        "14, 15",
        "open: feature absent; agentd starts no program and looks nothing up in PATH (its filter forbids execve)",
    ),
    ("27", "unproven: the root is a verified read-only image, so no control can succeed"),
    ("31 (kcmp, process_madvise)", "unproven: their effect is not seen from outside"),
    ("43 (modules, swap)", "unproven: the image carries no module, and the kernel no swap, to succeed with"),
    ("65 (of agentd itself)", "open: feature absent; agentd fetches nothing and follows no redirect"),
    ("66 and 76 (webhooks, MCP, A2A)", "open: feature absent"),
    ("74, 75, 87", "open: feature absent"),
    (
        "82 (project ids)",
        "unproven: the data file system is made without project quotas, so the ioctl cannot succeed as a control",
    ),
    ("84", "unproven: tests/walls `the_data_disk_s_rate_is_limited`"),
    ("85", "unproven: the test's machine has no such device; 17-mknod is the way to one"),
    ("89", "unproven: tests/qemu `agents_fall_ill`"),
    ("91", "unproven: agentd/src/agents/package.rs"),
];
