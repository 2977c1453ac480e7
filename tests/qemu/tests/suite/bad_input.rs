//! Tokens, manifests and packages that cannot be meant: a clear error each, and nothing of them is left.
//!
//! Packages are sent as files, which `agentctl` hands on as they are: what it would refuse itself must be refused by
//! the appliance as well.

use agentd_capability::token::{Fresh, Grant, RootKey, mint};
use agentd_domain::api::Agent;
use agentd_domain::audit::Linked;
use agentd_domain::marker;
use agentd_domain::token::Shown;
use anyhow::{Context, Result, ensure};
use image::layout;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use tests_qemu::{Appliance, Ctl, Start};

/// More than a package may hold, in a file of some ten kilobytes.
const BOMB_BYTES: u64 = 3 << 30;

#[test]
fn what_cannot_be_meant_is_refused_in_words_and_leaves_no_trace() -> Result<()> {
    let mut appliance = Appliance::new()?;
    appliance.boot(&Start::default())?;
    appliance.claim()?;
    let before = names(&appliance.ctl())?;
    tokens(&appliance)?;
    manifests(&appliance)?;
    packages(&appliance)?;
    ensure!(names(&appliance.ctl())? == before, "an agent was added");
    let known: Vec<Agent> = appliance.ctl().json(&["agent", "ls"])?;
    let records = appliance.ctl().run(&["audit", "ls", "--json", "--limit", "500"])?.success()?;
    let records = records.lines().filter_map(|line| serde_json::from_str::<Linked>(line).ok());
    let minted = records.filter(|linked| linked.record.action == "token.mint").count();
    ensure!(minted <= known.len(), "{minted} tokens were made for {} agents", known.len());
    appliance.power_off()?;
    on_disk(&appliance, &known)
}

fn names(ctl: &Ctl) -> Result<Vec<String>> {
    let agents: Vec<Agent> = ctl.json(&["agent", "ls"])?;
    Ok(agents.into_iter().map(|agent| agent.name.to_string()).collect())
}

/// Shown to the appliance, which says what is wrong with each and revokes nothing for it.
fn tokens(appliance: &Appliance) -> Result<()> {
    let ctl = appliance.ctl();
    let echo: Shown = ctl.json(&["token", "inspect", "--agent", "echo"])?;
    let good = echo.token.as_str();
    let grant = Grant { holder: echo.says.holder, rights: echo.says.rights.clone(), expires_unix_s: None };
    let foreign = RootKey::from_secret(&[9; 32]).and_then(|key| mint(&key, &grant, &Fresh([1; 32])));
    let foreign = foreign.map_err(|report| anyhow::anyhow!("{report}"))?;
    let whole = file(appliance, "whole.token", good.as_bytes())?;
    let brief: Shown = ctl.json(&["token", "attenuate", &whole, "--expires-in", "1s"])?;
    std::thread::sleep(std::time::Duration::from_secs(3));
    let flipped = flip(good)?;
    for (name, text, wanted) in [
        ("expired", brief.token.as_str(), "token_expired"),
        ("truncated", good.get(..good.len() / 2).context("half")?, "token_"),
        ("flipped", &flipped, "token_"),
        ("oversized", &good.repeat(40), "token_too_large"),
        ("foreign", &foreign, "token_foreign"),
        ("empty", "", "token_"),
    ] {
        let path = file(appliance, name, text.as_bytes())?;
        for order in ["verify", "revoke"] {
            // An owner may revoke what is over.
            if (order, name) == ("revoke", "expired") {
                continue;
            }
            let option: &[&str] = if order == "revoke" { &["--token"] } else { &[] };
            let report = ctl.refused(&[&["token", order], option, &[path.as_str()]].concat())?;
            ensure!(report.code.starts_with(wanted), "{order} {name}: {report}");
            ensure!(!report.why.is_empty() && !report.fix.is_empty(), "{order} {name}: {report}");
        }
    }
    let verified = ctl.run(&["token", "verify", &whole])?;
    verified.success().context("the good one holds still").map(drop)
}

/// In the middle of its last signature or key.
fn flip(token: &str) -> Result<String> {
    let at = token.len() - 40;
    let was = token.get(at..=at).context("a letter")?;
    let other = if was == "A" { "B" } else { "A" };
    Ok(format!("{}{other}{}", &token[..at], &token[at + 1..]))
}

fn manifests(appliance: &Appliance) -> Result<()> {
    for (name, manifest, word) in [
        ("traversal", agent("traversal", "[fs]\nread = [\"/usr/share/../../data\"]\n"), "fs.read"),
        ("twice", agent("twice", "[limits]\npids = 8\n[limits]\npids = 9\n"), "duplicate key"),
        ("look-alike", agent("еcho", ""), "name"),
        ("suffix", agent("suffix", "[[net.allow]]\nhost = \"*.co.uk\"\nports = [443]\n"), "co.uk"),
        ("greedy", agent("greedy", "[limits]\nmemory_max = \"900G\"\nmemory_high = \"900G\"\n"), "memory"),
        ("unknown", agent("unknown", "[limits]\nmemry_max = \"9M\"\n"), "memry_max"),
    ] {
        let path = file(appliance, &format!("{name}.tar"), &tar(&[("agent.toml", manifest.as_bytes())])?)?;
        let report = appliance.ctl().refused(&["agent", "install", &path])?;
        ensure!(format!("{report}").contains(word), "{name}: {report}");
        ensure!(!report.fix.is_empty(), "{name}: {report}");
    }
    Ok(())
}

fn packages(appliance: &Appliance) -> Result<()> {
    let manifest = agent("packaged", "");
    let toml = ("agent.toml", manifest.as_bytes());
    let mut link = tar::Builder::new(Vec::new());
    link.append(&header(toml.1.len() as u64, "agent.toml")?, toml.1)?;
    let mut out = header(0, "out")?;
    out.set_entry_type(tar::EntryType::Symlink);
    out.set_link_name("/etc/passwd")?;
    out.set_cksum();
    link.append(&out, std::io::empty())?;
    for (name, bytes, code) in [
        ("link", link.into_inner()?, "package_invalid"),
        ("above", tar(&[toml, ("../evil", b"x")])?, "package_invalid"),
        ("absolute", tar(&[toml, ("/etc/evil", b"x")])?, "package_invalid"),
        ("again", tar(&[toml, ("a", b"1"), ("./a", b"2")])?, "package_invalid"),
        ("cut", tar(&[toml, ("bin/run", &[7; 4096])])?[..3000].to_vec(), "package_invalid"),
        ("nothing", Vec::new(), "package_invalid"),
    ] {
        let path = file(appliance, &format!("{name}.tar"), &bytes)?;
        let report = appliance.ctl().refused(&["agent", "install", &path])?;
        ensure!(report.code == code && !report.fix.is_empty(), "{name}: {report}");
    }
    let path = bomb(appliance, toml)?;
    let report = appliance.ctl().refused(&["agent", "install", &path])?;
    ensure!(report.code == "too_large", "the bomb: {report}");
    Ok(())
}

/// A tar whose one file is zeros, compressed as it is made.
fn bomb(appliance: &Appliance, toml: (&str, &[u8])) -> Result<String> {
    let path = appliance.file("bomb.tar.zst");
    let mut zstd = Command::new("zstd");
    zstd.args(["-q", "-f", "-1", "-o"]).arg(&path).stdin(Stdio::piped());
    let mut zstd = zstd.spawn().context("cannot start zstd: install the package zstd")?;
    let mut builder = tar::Builder::new(zstd.stdin.take().context("a pipe")?);
    builder.append(&header(toml.1.len() as u64, toml.0)?, toml.1)?;
    builder.append(&header(BOMB_BYTES, "zeros")?, std::io::Read::take(std::io::repeat(0), BOMB_BYTES))?;
    builder.into_inner()?.flush()?;
    ensure!(zstd.wait()?.success(), "zstd failed");
    Ok(path.to_string_lossy().into_owned())
}

/// What the data partition has: the folders of agents that are installed, and nothing that was on its way in.
fn on_disk(appliance: &Appliance, known: &[Agent]) -> Result<()> {
    let data = layout::partition(marker::PARTITION_DATA).context("no data partition")?;
    let image = format!("{}?offset={}", appliance.disk().display(), data.start_bytes);
    let list = |folder: &str| -> Result<Vec<String>> {
        let output =
            Command::new("/usr/sbin/debugfs").args(["-R", &format!("ls -p {folder}"), &image]).output()?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let names = said.lines().filter_map(|line| line.split('/').nth(5)).map(str::to_owned);
        let names: Vec<String> = names.filter(|name| !name.is_empty()).collect();
        ensure!(
            names.contains(&".".to_owned()),
            "{folder}: {said}{}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(names.into_iter().filter(|name| !name.starts_with('.')).collect())
    };
    let mut folders = list("/agents")?;
    let mut wanted: Vec<String> = known.iter().map(|agent| agent.agent_id.to_string()).collect();
    folders.sort();
    wanted.sort();
    ensure!(folders == wanted, "on disk {folders:?}, installed {wanted:?}");
    let incoming = list("/incoming")?;
    ensure!(incoming.is_empty(), "still on its way in: {incoming:?}");
    Ok(())
}

fn agent(name: &str, more: &str) -> String {
    format!("[agent]\nname = \"{name}\"\nexec = [\"/agent/bin/run\"]\n\n{more}")
}

fn tar(files: &[(&str, &[u8])]) -> Result<Vec<u8>> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, content) in files {
        builder.append(&header(content.len() as u64, name)?, *content)?;
    }
    Ok(builder.into_inner()?)
}

/// With the name as it is: the crate's own way refuses one that leads out.
fn header(bytes: u64, name: &str) -> Result<tar::Header> {
    let mut header = tar::Header::new_gnu();
    header.set_size(bytes);
    header.set_mode(0o644);
    let place = header.as_old_mut().name.get_mut(..name.len()).context("a short name")?;
    place.copy_from_slice(name.as_bytes());
    header.set_cksum();
    Ok(header)
}

fn file(appliance: &Appliance, name: &str, bytes: &[u8]) -> Result<String> {
    let path: PathBuf = appliance.file(name);
    std::fs::write(&path, bytes)?;
    Ok(path.to_string_lossy().into_owned())
}
