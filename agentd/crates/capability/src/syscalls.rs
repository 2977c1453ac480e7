//! Which system calls does an honest program need, and which does only an attack make?
//!
//! Lists, not decisions: the compiler puts groups together, the sandbox turns names into numbers. What is in no
//! group fails with EPERM. Arguments that matter (`socket`, `ioctl`, `clone`, `prctl`, `prlimit64`, `personality`)
//! are limited further by the sandbox's filter.
//! Source: syscalls(2).

/// A named part of the allow list.
pub(crate) struct Group {
    pub name: &'static str,
    pub calls: &'static [&'static str],
}

pub(crate) const GROUPS: &[Group] = &[
    Group {
        name: "memory",
        calls: &["brk", "madvise", "membarrier", "mincore", "mmap", "mprotect", "mremap", "msync", "munmap"],
    },
    Group {
        name: "files",
        calls: &[
            "chdir",
            "close",
            "close_range",
            "copy_file_range",
            "dup",
            "dup3",
            "faccessat",
            "faccessat2",
            "fadvise64",
            "fallocate",
            "fchdir",
            "fchmod",
            "fchmodat",
            "fcntl",
            "fdatasync",
            "fgetxattr",
            "flistxattr",
            "flock",
            "fstat",
            "fstatfs",
            "fsync",
            "ftruncate",
            "getcwd",
            "getdents64",
            "getxattr",
            "inotify_add_watch",
            "inotify_init1",
            "inotify_rm_watch",
            "ioctl",
            "lgetxattr",
            "linkat",
            "listxattr",
            "llistxattr",
            "lseek",
            "mkdirat",
            "newfstatat",
            "openat",
            "openat2",
            "pread64",
            "preadv",
            "preadv2",
            "pwrite64",
            "pwritev",
            "pwritev2",
            "read",
            "readlinkat",
            "readv",
            "renameat2",
            "sendfile",
            "splice",
            "statfs",
            "statx",
            "symlinkat",
            "truncate",
            "umask",
            "unlinkat",
            "utimensat",
            "write",
            "writev",
        ],
    },
    Group {
        name: "waiting",
        calls: &[
            "epoll_create1",
            "epoll_ctl",
            "epoll_pwait",
            "epoll_pwait2",
            "eventfd2",
            "pipe2",
            "ppoll",
            "pselect6",
            "signalfd4",
            "timerfd_create",
            "timerfd_gettime",
            "timerfd_settime",
        ],
    },
    Group {
        name: "time",
        calls: &[
            "clock_getres",
            "clock_gettime",
            "clock_nanosleep",
            "getitimer",
            "gettimeofday",
            "nanosleep",
            "setitimer",
            "timer_create",
            "timer_delete",
            "timer_getoverrun",
            "timer_gettime",
            "timer_settime",
            "times",
        ],
    },
    Group {
        name: "processes",
        calls: &[
            "capget",
            "clone",
            "clone3",
            "execve",
            "exit",
            "exit_group",
            "futex",
            "futex_waitv",
            "get_robust_list",
            "getcpu",
            "getegid",
            "geteuid",
            "getgid",
            "getgroups",
            "getpgid",
            "getpid",
            "getppid",
            "getpriority",
            "getrandom",
            "getresgid",
            "getresuid",
            "getrusage",
            "getsid",
            "gettid",
            "getuid",
            "personality",
            "prctl",
            "prlimit64",
            "restart_syscall",
            "rseq",
            "sched_get_priority_max",
            "sched_get_priority_min",
            "sched_getaffinity",
            "sched_getparam",
            "sched_getscheduler",
            "sched_yield",
            "set_robust_list",
            "set_tid_address",
            "setpgid",
            "setsid",
            "sysinfo",
            "uname",
            "wait4",
            "waitid",
        ],
    },
    Group {
        name: "signals",
        calls: &[
            "kill",
            "rt_sigaction",
            "rt_sigpending",
            "rt_sigprocmask",
            "rt_sigreturn",
            "rt_sigsuspend",
            "rt_sigtimedwait",
            "sigaltstack",
            "tgkill",
            "tkill",
        ],
    },
    Group {
        name: "client-sockets",
        calls: &[
            "connect",
            "getpeername",
            "getsockname",
            "getsockopt",
            "recvfrom",
            "recvmmsg",
            "recvmsg",
            "sendmmsg",
            "sendmsg",
            "sendto",
            "setsockopt",
            "shutdown",
            "socket",
            "socketpair",
        ],
    },
    #[cfg(target_arch = "x86_64")]
    Group {
        // Names that newer architectures never had; older C libraries and Node's libuv still call them.
        name: "x86-64-legacy",
        calls: &[
            "access",
            "alarm",
            "arch_prctl",
            "chmod",
            "creat",
            "dup2",
            "epoll_create",
            "epoll_wait",
            "eventfd",
            "fork",
            "getdents",
            "getpgrp",
            "getrlimit",
            "inotify_init",
            "link",
            "lstat",
            "mkdir",
            "open",
            "pause",
            "pipe",
            "poll",
            "readlink",
            "rename",
            "renameat",
            "rmdir",
            "select",
            "stat",
            "symlink",
            "sync_file_range",
            "time",
            "unlink",
            "utime",
            "utimes",
            "vfork",
        ],
    },
];

/// `clone3` takes its flags in memory, where a filter cannot see them; ENOSYS makes libc use `clone`.
pub(crate) const ENOSYS: &[&str] = &["clone3"];

/// A program that makes one of these is attacking or badly lost: the run ends with SIGSYS.
pub(crate) const KILL: &[&str] = &[
    "acct",
    "delete_module",
    "finit_module",
    "init_module",
    "kexec_file_load",
    "kexec_load",
    "memfd_secret",
    "name_to_handle_at",
    "open_by_handle_at",
    "pidfd_getfd",
    "process_madvise",
    "process_vm_readv",
    "process_vm_writev",
    "quotactl",
    "quotactl_fd",
    "reboot",
    "settimeofday",
    "swapoff",
    "swapon",
    #[cfg(target_arch = "x86_64")]
    "ioperm",
    #[cfg(target_arch = "x86_64")]
    "iopl",
];

/// Request numbers of `ioctl` (asm-generic/ioctls.h). None of them changes anything outside the descriptor.
pub(crate) const IOCTLS: &[u32] = &[
    0x5401, // TCGETS: isatty(3)
    0x5413, // TIOCGWINSZ
    0x541B, // FIONREAD
    0x5421, // FIONBIO
    0x5450, // FIONCLEX
    0x5451, // FIOCLEX
];

/// AF_UNIX, AF_INET, AF_INET6 (linux/socket.h). The namespace has nothing but `lo`.
pub(crate) const SOCKET_FAMILIES: &[u32] = &[1, 2, 10];

/// Operations of `prctl` (linux/prctl.h) that touch the caller alone.
pub(crate) const PRCTLS: &[u32] = &[
    1,           // PR_SET_PDEATHSIG
    2,           // PR_GET_PDEATHSIG
    3,           // PR_GET_DUMPABLE
    4,           // PR_SET_DUMPABLE
    15,          // PR_SET_NAME
    16,          // PR_GET_NAME
    23,          // PR_CAPBSET_READ
    38,          // PR_SET_NO_NEW_PRIVS
    39,          // PR_GET_NO_NEW_PRIVS
    0x5356_4d41, // PR_SET_VMA
];
