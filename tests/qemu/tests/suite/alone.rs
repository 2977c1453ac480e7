//! Machines that have only themselves: no network, no keyboard but the serial line, no disk, no idea of the time.

use agentd_domain::api::ApplianceStatus;
use agentd_domain::initctl::Clock;
use agentd_domain::marker;
use anyhow::{Context, Result, ensure};
use image::layout;
use std::net::{Ipv4Addr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tests_qemu::{Appliance, BOOT, Disk, Start, Uplink, patch, put_on_boot_partition};

/// Everything but the network works: agents run, and the owner sees and ends the machine from the serial line.
#[test]
fn without_a_network_everything_else_works() -> Result<()> {
    let mut appliance = Appliance::new()?;
    appliance.boot(&Start { uplink: Uplink::Absent, ..Start::default() })?;
    // Yellow: agents can run, and the one problem is the network.
    appliance.guest()?.wait_for("there is no network", BOOT)?;
    let serial = appliance.guest()?.serial_text();
    for words in ["console: no address yet", "claim code: ", "health: yellow"] {
        ensure!(serial.contains(words), "{words:?} is missing: {serial}");
    }
    appliance.type_and_hear("s", "addresses: none")?;
    // A static address is entered by hand; the kernel has no card for it, and the machine stays as it is.
    appliance.type_and_hear("n", "automatic (DHCP)")?;
    appliance.type_and_hear("s", "interface")?;
    appliance.type_and_hear("eth0\r10.1.2.3\r\r\r", "wrong: ")?;
    appliance.type_and_hear("\u{1b}", "left as it was")?;
    appliance.type_and_hear("p", "power off now?")?;
    appliance.type_and_hear("y", "reached power off")?;
    appliance.guest()?.wait_exit(BOOT)?;
    Ok(())
}

/// Settings that were put on the disk before it was first started, and a clock that a server sets.
#[test]
fn the_boot_partition_names_a_time_server_and_it_sets_the_clock() -> Result<()> {
    const AHEAD: Duration = Duration::from_secs(100 * 24 * 3600);
    // QEMU leads what the guest sends to 10.0.2.2 to this machine's loopback address.
    let server = match UdpSocket::bind((Ipv4Addr::LOCALHOST, 123)) {
        Ok(socket) => socket,
        Err(error) => {
            println!("SKIP: no time server can listen on port 123 here: {error}");
            return Ok(());
        }
    };
    let serving = TimeServer::start(server, AHEAD)?;
    let mut appliance = Appliance::new()?;
    let settings = appliance.file("agentd.toml");
    std::fs::write(&settings, "[time]\nservers = [\"10.0.2.2\"]\n")?;
    put_on_boot_partition(&appliance.disk(), &settings)?;
    appliance.boot(&Start::default())?;
    appliance.claim()?;
    let status = appliance.until("the clock is confirmed", BOOT, |ctl| {
        let status: ApplianceStatus = ctl.json(&["status"])?;
        Ok((status.clock == Clock::Sntp).then_some(status))
    })?;
    let expected = i64::try_from((SystemTime::now() + AHEAD).duration_since(UNIX_EPOCH)?.as_millis())?;
    let off_ms = (status.now_unix_ms - expected).abs();
    ensure!(off_ms < 60_000, "the clock is {off_ms} ms from what the server said");
    serving.stop();
    // It had its settings once: from now on the boot partition is not asked.
    appliance.power_off()?;
    std::fs::write(&settings, "[console]\nport = 70000\n")?;
    put_on_boot_partition(&appliance.disk(), &settings)?;
    appliance.boot(&Start::default())?;
    appliance.login()?;
    let status: ApplianceStatus = appliance.ctl().json(&["status"])?;
    ensure!(status.problems.iter().all(|problem| !problem.to_string().contains("port")), "{status:?}");
    // The time that was confirmed is the floor, although the machine's own clock knows nothing of it.
    ensure!(
        status.now_unix_ms > expected - 60_000,
        "the confirmed time was forgotten: {}",
        status.now_unix_ms
    );
    Ok(())
}

/// Answers SNTP questions (RFC 4330) with a time of its own.
struct TimeServer {
    over: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<()>,
}

impl TimeServer {
    fn start(socket: UdpSocket, ahead: Duration) -> Result<Self> {
        /// From 1900, where NTP begins, to 1970.
        const NTP_TO_UNIX_S: u64 = 2_208_988_800;
        socket.set_read_timeout(Some(Duration::from_millis(200)))?;
        let over = Arc::new(AtomicBool::new(false));
        let is_over = Arc::clone(&over);
        let thread = std::thread::spawn(move || {
            let mut question = [0; 48];
            while !is_over.load(Ordering::Relaxed) {
                let Ok((48, asker)) = socket.recv_from(&mut question) else { continue };
                let Ok(now) = (SystemTime::now() + ahead).duration_since(UNIX_EPOCH) else { continue };
                let fraction = (u64::from(now.subsec_nanos()) << 32) / 1_000_000_000;
                let stamp = (((now.as_secs() + NTP_TO_UNIX_S) << 32) | fraction).to_be_bytes();
                let mut answer = [0; 48];
                // No leap second, version 4, server; stratum 1; precision about a microsecond.
                answer[..4].copy_from_slice(&[0x24, 1, 6, 0xec]);
                answer[12..16].copy_from_slice(b"TEST");
                // Reference, receive and transmit time are now; the origin is what the asker sent.
                answer[16..24].copy_from_slice(&stamp);
                answer[24..32].copy_from_slice(&question[40..48]);
                answer[32..40].copy_from_slice(&stamp);
                answer[40..48].copy_from_slice(&stamp);
                // An asker that is gone asks again.
                socket.send_to(&answer, asker).ok();
            }
        });
        Ok(Self { over, thread })
    }

    fn stop(self) {
        self.over.store(true, Ordering::Relaxed);
        self.thread.join().ok();
    }
}

/// The kernel waits for its disk; the watchdog that runs from its start ends the wait, so that a slow disk is tried
/// again instead of a black screen for ever.
#[test]
fn without_a_disk_the_watchdog_ends_the_wait() -> Result<()> {
    let mut appliance = Appliance::new()?;
    appliance.boot(&Start { disk: Disk::Absent, ..Start::default() })?;
    let why = appliance.said("Kernel panic")?;
    ensure!(why.contains("Watchdog"), "{why}");
    appliance.guest()?.wait_exit(BOOT)?;
    Ok(())
}

/// A disk with a verified root and nothing else of ours: the console says what is missing and what to do.
#[test]
fn without_state_and_data_the_console_says_what_is_missing() -> Result<()> {
    let mut appliance = Appliance::new()?;
    for name in [marker::PARTITION_STATE, marker::PARTITION_DATA] {
        let partition = layout::partition(name).context("no such partition")?;
        // Zeros are not the marker: they may be somebody's.
        patch(&appliance.disk(), partition.start_bytes, &[0; marker::BLOCK_BYTES])?;
    }
    appliance.boot(&Start::default())?;
    for words in ["health: red", "state partition"] {
        appliance.guest()?.wait_for(words, BOOT)?;
    }
    appliance.type_and_hear("\r", "f format the state partition").map(drop)
}
