//! Is what is shared, swapped and brought back the same as what is computed alone?
//!
//! The tiny model at its own length has a cache in 32-bit numbers: there text must be equal. With more than 64 Ki cells the cache
//! is in 16-bit numbers and attention is llama.cpp's flash attention, as for real models: there logits agree within
//! [`F16_TOLERANCE`].

use crate::client::{Client, Engine, greedy};
use agentd_domain::engine::{Generate, ModelKind, ModelUsage, Prompt, Request, Share};

/// Logits of the tiny model have a standard deviation of 2.5. A batch of another shape adds up in another order.
const EXACT_TOLERANCE: f32 = 1e-4;
const F16_TOLERANCE: f32 = 0.02;
/// Cells with which the cache is in 16-bit numbers.
const F16_CONTEXT: u32 = 66_048;

pub fn tokens(seed: i32, length: i32) -> Vec<i32> {
    // Not the first three: they are the special ones.
    (0..length).map(|n| 3 + (seed.wrapping_mul(7919) + n * n + 31 * n).rem_euclid(250)).collect()
}

pub fn joined(first: &[i32], second: &[i32]) -> Vec<i32> {
    first.iter().chain(second).copied().collect()
}

pub fn asked(key: &str, prompt: &[i32], new: u32, share: Share) -> Generate {
    Generate { share, ..greedy(key, Prompt::Tokens(prompt.to_vec()), new) }
}

pub fn of(account: &str) -> Share {
    Share { account: account.to_owned(), salt: "owner".to_owned(), ..Share::default() }
}

pub fn with_tiny(arguments: &[&str], size: (u32, u32)) -> Option<(Engine, Client)> {
    let engine = Engine::start_with(arguments)?;
    let mut client = engine.connect();
    let loaded =
        client.load_sized("tiny", &engine.tiny(), ModelKind::Chat, size).expect("the tiny model loads");
    assert_eq!(loaded.sharing_refused, None);
    Some((engine, client))
}

fn largest_difference(left: &[f32], right: &[f32]) -> f32 {
    assert_eq!(left.len(), right.len());
    left.iter().zip(right).map(|(left, right)| (left - right).abs()).fold(0.0, f32::max)
}

fn whole(usage: &ModelUsage) {
    let cells = usage.cells_private + usage.cells_shared + usage.cells_free;
    assert_eq!(cells, usage.cells_total, "{usage:?}");
}

/// E12's count, as CI takes it, and E10 for shared prefixes.
#[test]
fn eight_at_once_compute_their_common_prompt_once_and_answer_as_alone() {
    let Some((_engine, mut client)) = with_tiny(&[], (0, 8)) else { return };
    let common = tokens(1, 1024);
    let prompts: Vec<Vec<i32>> = (0..8).map(|n| joined(&common, &tokens(50 + n, 64))).collect();
    let send = |client: &mut Client, n: usize, prompt: &[i32]| {
        let request = asked(&format!("together{n}"), prompt, 24, of(&format!("agent{n}")));
        client.send(Request::Generate(request))
    };
    let ids: Vec<u64> = prompts.iter().enumerate().map(|(n, prompt)| send(&mut client, n, prompt)).collect();
    let together = client.read_answers(&ids);
    let usage = client.usage();
    let whole_prompts = 8 * (1024 + 64);
    let share = usage.computed_prompt_tokens as f64 / f64::from(whole_prompts);
    println!("computed {} of {whole_prompts} prompt tokens: {share:.4}", usage.computed_prompt_tokens);
    assert!(share <= 0.18, "{usage:?}");
    let cached: u32 = together.iter().map(|answer| answer.end.as_ref().expect("an end").cached_tokens).sum();
    assert_eq!(u64::from(cached), usage.cached_prompt_tokens);
    assert_eq!(usage.computed_prompt_tokens + usage.cached_prompt_tokens, whole_prompts as u64);
    assert!(usage.preemptions == 0 && usage.recomputed_tokens == 0, "{usage:?}");
    whole(&usage);
    // Alone: each with a salt of its own, so that it finds nothing.
    for (n, prompt) in prompts.iter().enumerate() {
        let share = Share { salt: format!("salt{n}"), ..of("alone") };
        let alone = client.generate(asked(&format!("alone{n}"), prompt, 24, share));
        assert_eq!(alone.text, together[n].text, "request {n}");
        assert_eq!(alone.end.expect("an end").cached_tokens, 0, "another owner's prompt is not found");
    }
}

#[test]
fn logits_after_a_shared_prompt_are_those_of_an_unshared_one() {
    for (context, tolerance) in [(0, EXACT_TOLERANCE), (F16_CONTEXT, F16_TOLERANCE)] {
        let Some((_engine, mut client)) = with_tiny(&[], (context, 4)) else { return };
        let mut worst: f32 = 0.0;
        for (n, shared) in [40, 333, 700].into_iter().enumerate() {
            let n = n as i32;
            let common = tokens(n, shared);
            client.logits_with("tiny", &common, Some(of("first")));
            let prompt = joined(&common, &tokens(90 + n, 33));
            let before = client.usage();
            let after_shared = client.logits_with("tiny", &prompt, Some(of("second")));
            let usage = client.usage();
            let computed = usage.computed_prompt_tokens - before.computed_prompt_tokens;
            assert!(computed <= 34, "{computed} tokens were computed");
            let alone = client.logits("tiny", &prompt);
            worst = worst.max(largest_difference(&after_shared, &alone));
            assert!(alone.iter().any(|logit| logit.abs() > 0.5), "logits are not all zero");
        }
        println!("context {context}: largest difference of a logit {worst:e}");
        assert!(worst <= tolerance, "{worst} at {context}");
    }
}

/// A conversation whose part of the cache had to go comes back from memory or disk: the same numbers, without
/// computing.
#[test]
fn what_was_put_aside_comes_back_the_same() {
    let places: [&[&str]; 2] = [&[], &["--swap-memory-mib", "0", "--swap-dir", "FOLDER"]];
    for (place, arguments) in places.into_iter().enumerate() {
        for (context, tolerance) in [(2048, EXACT_TOLERANCE), (F16_CONTEXT, F16_TOLERANCE)] {
            let Some((engine, mut client)) = with_tiny(arguments, (context, 2)) else { return };
            let text = tokens(7, 900);
            let prompt = joined(&text, &[5]);
            let uninterrupted = client.logits_with("tiny", &prompt, Some(of("a")));
            let fresh = client.logits_with("tiny", &joined(&text, &[5, 6]), Some(of("a")));
            // Others come until it is gone.
            let mut seed = 100;
            while client.usage().swapped_out == 0 {
                seed += 1;
                client.logits_with("tiny", &tokens(seed, 1500), Some(of("b")));
                assert!(seed < 160, "nothing is ever put aside");
            }
            let before = client.usage();
            let files = std::fs::read_dir(engine.scratch("swap")).expect("the folder").count();
            assert_eq!((files > 0, before.swap_disk_bytes > 0), (place == 1, place == 1), "{before:?}");
            let restored = client.logits_with("tiny", &joined(&text, &[5, 6]), Some(of("a")));
            let usage = client.usage();
            assert_eq!(usage.swapped_in, before.swapped_in + 1, "{usage:?}");
            let computed = usage.computed_prompt_tokens - before.computed_prompt_tokens;
            assert!(computed <= 4, "{computed} tokens were computed again");
            let worst = largest_difference(&restored, &fresh);
            println!("place {place}, context {context}: largest difference of a logit {worst:e}");
            assert!(worst <= tolerance, "{worst}");
            assert!(largest_difference(&uninterrupted, &fresh) > 0.1, "another token, other logits");
            whole(&usage);
            client.ask(Request::Unload { model: "tiny".to_owned() });
            let left = std::fs::read_dir(engine.scratch("swap")).expect("the folder").count();
            assert_eq!(left, 0, "files stay behind");
        }
    }
}

#[test]
fn files_that_are_lost_or_broken_cost_time_and_nothing_else() {
    let arguments = ["--swap-memory-mib", "0", "--swap-dir", "FOLDER"];
    let Some((engine, mut client)) = with_tiny(&arguments, (2048, 2)) else { return };
    let prompts: Vec<Vec<i32>> = (0..6).map(|seed| tokens(seed, 800)).collect();
    let say = |client: &mut Client, round: u32, n: usize| {
        client.generate(asked(&format!("{round}-{n}"), &prompts[n], 10, of("a"))).text
    };
    let first: Vec<String> = (0..6).map(|n| say(&mut client, 1, n)).collect();
    for entry in std::fs::read_dir(engine.scratch("swap")).expect("the folder") {
        let path = entry.expect("an entry").path();
        let bytes = std::fs::read(&path).expect("a file");
        std::fs::write(&path, &bytes[..bytes.len() / 2]).expect("half a file");
    }
    let second: Vec<String> = (0..6).map(|n| say(&mut client, 2, n)).collect();
    assert_eq!(first, second);
    for entry in std::fs::read_dir(engine.scratch("swap")).expect("the folder") {
        std::fs::remove_file(entry.expect("an entry").path()).expect("removed");
    }
    let third: Vec<String> = (0..6).map(|n| say(&mut client, 3, n)).collect();
    assert_eq!(first, third);
    whole(&client.usage());
}

/// A disk without room for what has to step aside: it is computed again, everybody gets an answer.
#[test]
fn a_full_disk_costs_time_and_no_answer() {
    let Some(full) = SmallDisk::mount() else { return };
    let folder = full.0.path().to_str().expect("a plain path").to_owned();
    let arguments = ["--swap-memory-mib", "0", "--swap-dir", folder.as_str()];
    let Some((_engine, mut client)) = with_tiny(&arguments, (2048, 2)) else { return };
    let prompts: Vec<Vec<i32>> = (0..5).map(|seed| tokens(seed, 800)).collect();
    let mut texts = Vec::new();
    for round in 0..2 {
        for (n, prompt) in prompts.iter().enumerate() {
            let answer = client.generate(asked(&format!("{round}-{n}"), prompt, 10, of("a")));
            assert!(answer.end.is_ok(), "{:?}", answer.end);
            texts.push(answer.text);
        }
    }
    let (first, second) = texts.split_at(5);
    assert_eq!(first, second);
    let usage = client.usage();
    assert_eq!((usage.swap_disk_bytes, usage.swapped_in), (0, 0), "nothing fits: {usage:?}");
    assert_eq!(std::fs::read_dir(full.0.path()).expect("the folder").count(), 0, "half files stay behind");
    whole(&usage);
}

/// A file system of 64 KiB, in memory; unmounted when dropped.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount() -> Option<Self> {
        let folder = tempfile::tempdir().expect("a folder");
        let mut command = std::process::Command::new("mount");
        command.args(["-t", "tmpfs", "-o", "size=64k", "none"]).arg(folder.path());
        if command.status().is_ok_and(|status| status.success()) {
            return Some(Self(folder));
        }
        println!("SKIP: a full disk: this user mounts no file system");
        None
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("--lazy").arg(self.0.path()).status();
    }
}

/// Hundreds of different prompts: memory ends where it was said to.
#[test]
fn what_is_kept_is_bounded() {
    let Some((_engine, mut client)) = with_tiny(&["--swap-memory-mib", "2"], (4096, 8)) else { return };
    let round = |client: &mut Client, from: i32| {
        for seed in from..from + 30 {
            let answer = client.generate(asked(&format!("k{seed}"), &tokens(seed, 700), 4, of("a")));
            assert!(answer.end.is_ok());
        }
        client.status().rss_bytes
    };
    let after_some = round(&mut client, 0);
    let after_many = round(&mut client, 1000);
    let usage = client.usage();
    assert!(usage.swap_memory_bytes <= 2 * 1024 * 1024, "{usage:?}");
    assert!(usage.swapped_out > 20, "{usage:?}");
    assert!(after_many < after_some + 4 * 1024 * 1024, "{after_some} then {after_many}");
    whole(&usage);
}
