//! Which system calls does an attacker make that no honest program does?
//!
//! Owns:  every `unsafe` block of the escape suite.
//! Always: pointers that go to the kernel come from slices that live over the call.
#![allow(unsafe_code)]

use std::io::{self, PipeReader, Read};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

/// One argument of a raw call.
pub enum Arg<'a> {
    N(i64),
    In(&'a [u8]),
    Out(&'a mut [u8]),
}

/// Any system call. The caller says with [`Arg`] what the kernel may read and write.
pub fn call<const N: usize>(number: i64, arguments: [Arg<'_>; N]) -> io::Result<i64> {
    let mut words = [0_i64; 6];
    for (word, argument) in words.iter_mut().zip(arguments) {
        *word = match argument {
            Arg::N(number) => number,
            Arg::In(bytes) => bytes.as_ptr() as i64,
            Arg::Out(bytes) => bytes.as_mut_ptr() as i64,
        };
    }
    let [a, b, c, d, e, f] = words;
    // SAFETY: what the kernel reads and writes lies in slices that the caller lends for this call (they are borrowed
    // by `arguments`, whose lifetime covers it); sizes are given as numbers by the callers beside each slice.
    let returned = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    if returned == -1 { Err(io::Error::last_os_error()) } else { Ok(returned) }
}

/// The same by the 32-bit gate, which has its own numbers.
#[cfg(target_arch = "x86_64")]
pub fn call_ia32(number: u32, path: &std::ffi::CStr, mode: u32) -> io::Result<i64> {
    // The gate takes 32-bit addresses, so the path goes to a page below 4 GiB.
    const MAP_32BIT: i32 = 0x40;
    // SAFETY: a fresh anonymous page of our own; nothing else refers to it.
    let page = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            4096,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | MAP_32BIT,
            -1,
            0,
        )
    };
    if page == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let bytes = path.to_bytes_with_nul();
    // SAFETY: the page has 4096 bytes and a path of ours is shorter.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), page.cast::<u8>(), bytes.len().min(4095)) };
    let mut returned: u64 = u64::from(number);
    // SAFETY: the gate keeps all registers but rax (and r8 to r11 on some kernels, named here); rbx is reserved by the
    // compiler, so it is exchanged around the instruction.
    unsafe {
        std::arch::asm!(
            "xchg rbx, {first}",
            "int 0x80",
            "xchg rbx, {first}",
            first = inout(reg) page as u64 => _,
            inout("rax") returned,
            in("rcx") u64::from(mode),
            in("rdx") 0_u64,
            out("r8") _, out("r9") _, out("r10") _, out("r11") _,
        );
    }
    match returned as i32 {
        error if error < 0 => Err(io::Error::from_raw_os_error(-error)),
        value => Ok(value.into()),
    }
}

/// A byte to an I/O port; without the right to it the processor ends this process.
#[cfg(target_arch = "x86_64")]
pub fn out_byte(port: u16, byte: u8) {
    // SAFETY: writes to a device's port and to no memory of this process.
    unsafe { std::arch::asm!("out dx, al", in("dx") port, in("al") byte) };
}

pub struct Child(libc::pid_t);

impl Child {
    /// The signal (or 0) that it ended by, if it has ended.
    pub fn ended(&self) -> Option<i32> {
        let mut status = 0;
        // SAFETY: `status` lives over the call; the pid is a child of this process.
        match unsafe { libc::waitpid(self.0, &raw mut status, libc::WNOHANG) } {
            0 => None,
            _ => Some(if libc::WIFSIGNALED(status) { libc::WTERMSIG(status) } else { 0 }),
        }
    }
}

/// `None` in the child.
pub fn fork() -> io::Result<Option<Child>> {
    // SAFETY: this program has one thread wherever it forks, so the child may use every library call.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(None),
        pid => Ok(Some(Child(pid))),
    }
}

pub fn exit_now(code: i32) -> ! {
    // SAFETY: ends the process without running what belongs to its parent.
    unsafe { libc::_exit(code) }
}

/// At most 15 characters of it are kept.
pub fn name_process(name: &str) {
    let mut bytes = [0_u8; 16];
    for (place, byte) in bytes.iter_mut().take(15).zip(name.bytes()) {
        *place = byte;
    }
    // SAFETY: PR_SET_NAME reads at most 16 bytes of a buffer that ends with a zero.
    unsafe { libc::prctl(libc::PR_SET_NAME, bytes.as_ptr()) };
}

/// Everything until the other end closes or has said something, or the time is over.
pub fn read_within(reader: &mut PipeReader, patience: Duration) -> String {
    let deadline = Instant::now() + patience;
    let mut text = Vec::new();
    loop {
        let left = deadline.saturating_duration_since(Instant::now()).as_millis();
        let mut waiting = libc::pollfd { fd: reader.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one entry that lives over the call.
        let ready = unsafe { libc::poll(&raw mut waiting, 1, i32::try_from(left).unwrap_or(0)) };
        let mut block = [0_u8; 4096];
        match ready {
            1 => match reader.read(&mut block) {
                // Whoever inherited the other end may keep it open; what is said ends with its line.
                Ok(read) if read > 0 => {
                    text.extend(block.iter().take(read));
                    if text.ends_with(b"\n") {
                        break;
                    }
                }
                _ => break,
            },
            _ => break,
        }
    }
    String::from_utf8_lossy(&text).into_owned()
}

pub fn user_id() -> u32 {
    // SAFETY: takes nothing and cannot fail.
    unsafe { libc::getuid() }
}

/// Bytes that stay in this process's memory, where another could find them.
pub fn keep_in_memory(text: &str) {
    std::hint::black_box(Box::leak(text.to_owned().into_boxed_str()));
}

/// Minutes west of Greenwich, as the kernel believes: nothing of ours uses it.
pub fn kernel_minutes_west() -> i32 {
    let mut zone = [0_u8; 8];
    let asked = call(libc::SYS_gettimeofday, [Arg::N(0), Arg::Out(&mut zone)]);
    let [a, b, c, d, ..] = zone;
    asked.map_or(0, |_| i32::from_ne_bytes([a, b, c, d]))
}

/// A shared memory segment of System V with this text, or the text of one that is there.
pub fn shared_memory(key: i32, text: Option<&str>) -> io::Result<Vec<u8>> {
    let flags = if text.is_some() { libc::IPC_CREAT | 0o666 } else { 0 };
    // SAFETY: makes or finds a segment, touches no memory of ours.
    let id = unsafe { libc::shmget(key, if text.is_some() { 4096 } else { 0 }, flags) };
    if id == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel chooses the place; the segment has 4096 bytes (made above with that size, by whoever made it).
    let place = unsafe { libc::shmat(id, std::ptr::null(), 0) };
    if place as isize == -1 {
        return Err(io::Error::last_os_error());
    }
    if let Some(text) = text {
        // SAFETY: 4096 bytes are mapped writable at `place`.
        unsafe { std::ptr::copy_nonoverlapping(text.as_ptr(), place.cast(), text.len().min(4095)) };
    }
    // SAFETY: as above; the bytes are plain data.
    Ok(unsafe { std::slice::from_raw_parts(place.cast::<u8>(), 4096) }.to_vec())
}

/// The kernel ends this process when the one that made it ends.
pub fn die_with_parent() {
    // SAFETY: PR_SET_PDEATHSIG takes a number.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
}
