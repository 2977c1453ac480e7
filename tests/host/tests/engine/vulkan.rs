//! Does the engine work on a back end that is only found at run time? (E9)
//!
//! Vulkan's, of the same llama.cpp, on Mesa's lavapipe: `scripts/test long vulkan` builds it and names the folder. Logits
//! are compared with the processor's own back end.

use crate::client::{Client, Engine, greedy};
use crate::sharing::{asked, joined, of, tokens};
use agentd_domain::engine::{ModelKind, Prompt, Request, Share};
use std::path::PathBuf;
use tests_models::{Layout, SMALL};

/// Of a logit of the tiny model, whose logits have a standard deviation of 2.5: Vulkan's shaders multiply in 16-bit
/// numbers and add up in another order.
const TOLERANCE: f32 = 0.05;
/// The root of the mean square of all differences, as a part of the logits' standard deviation, where weights are in 8 bits:
/// the processor rounds what it multiplies with them to 8 bits too, Vulkan does not.
pub const ROUNDED_TOLERANCE: f32 = 0.1;

/// The folder of back ends, if Vulkan's was built.
pub fn folder() -> Option<PathBuf> {
    let folder = std::env::var_os("AGENTD_VULKAN_BACKENDS").map(PathBuf::from);
    if folder.is_none() {
        println!("SKIP: vulkan: there is no such back end here; `scripts/test long vulkan` builds one");
    }
    folder
}

fn with_vulkan(arguments: &[&str]) -> Option<(Engine, Client)> {
    let folder = folder()?;
    let engine = Engine::start_on(&folder, |command, empty| {
        let empty = empty.to_str().expect("a plain path");
        // A device that computes on the processor is left out unless it is named.
        command.env("GGML_VK_VISIBLE_DEVICES", "0");
        command.args(arguments.iter().map(|argument| argument.replace("FOLDER", empty)));
    })?;
    let client = engine.connect();
    Some((engine, client))
}

/// Logits have a mean near zero, so of them this is the standard deviation.
pub fn root_mean_square(values: &[f32]) -> f32 {
    (values.iter().map(|value| value * value).sum::<f32>() / values.len() as f32).sqrt()
}

fn largest_difference(left: &[f32], right: &[f32]) -> f32 {
    assert_eq!(left.len(), right.len());
    left.iter().zip(right).map(|(left, right)| (left - right).abs()).fold(0.0, f32::max)
}

#[test]
fn on_vulkan_the_device_is_listed_and_answers_are_the_processors() {
    let Some((vulkan, mut on_vulkan)) = with_vulkan(&[]) else { return };
    let devices = on_vulkan.status().devices;
    let found = devices.iter().find(|device| device.name.starts_with("Vulkan"));
    println!("devices: {devices:?}");
    assert!(found.is_some_and(|device| device.memory_total_bytes > 0), "{devices:?}");
    let Some(processor) = Engine::start() else { return };
    let mut on_processor = processor.connect();
    let cache = tests_models::cache().expect("a cache");
    let small = tests_models::ensure(&cache, &SMALL, Layout::Q8_0).expect("a model");
    for (name, file) in [("tiny", vulkan.tiny()), ("small", small)] {
        for client in [&mut on_vulkan, &mut on_processor] {
            client.load_sized(name, &file, ModelKind::Chat, (2048, 4)).expect("it loads");
        }
        let (mut worst, mut part): (f32, f32) = (0.0, 0.0);
        for length in [1, 5, 64, 300] {
            let prompt = tokens(length, length);
            let (theirs, ours) = (on_processor.logits(name, &prompt), on_vulkan.logits(name, &prompt));
            assert!(ours.iter().any(|logit| logit.abs() > 0.5), "logits are not all zero");
            worst = worst.max(largest_difference(&ours, &theirs));
            let differences: Vec<f32> =
                ours.iter().zip(&theirs).map(|(ours, theirs)| ours - theirs).collect();
            part = part.max(root_mean_square(&differences) / root_mean_square(&theirs));
        }
        println!(
            "RESULT: {name}: a logit differs from the processor's by {worst:.4} at most, all of them by {:.2} % of their \
             standard deviation",
            part * 100.0
        );
        assert!(
            if name == "tiny" { worst <= TOLERANCE } else { part <= ROUNDED_TOLERANCE },
            "{name}: {worst}, {part}"
        );
    }
    let answer = |client: &mut Client, n: i32| {
        client.generate(greedy(&format!("k{n}"), Prompt::Tokens(tokens(n, 40)), 24))
    };
    let same = (0..4).filter(|n| {
        let (ours, theirs) = (answer(&mut on_vulkan, *n), answer(&mut on_processor, *n));
        assert_eq!(ours.end.expect("an end").completion_tokens, 24);
        ours.text == theirs.text
    });
    let same = same.count();
    println!("RESULT: greedy answers of 24 tokens that are the processor's: {same} of 4");
    assert!(same >= 3, "{same} of 4: only a near-tie may part them");
}

#[test]
fn on_vulkan_prefixes_are_shared_and_what_was_put_aside_comes_back() {
    let Some((engine, mut client)) = with_vulkan(&["--swap-memory-mib", "0", "--swap-dir", "FOLDER"]) else {
        return;
    };
    client.load_sized("tiny", &engine.tiny(), ModelKind::Chat, (2048, 2)).expect("the tiny model loads");
    let common = tokens(1, 600);
    client.logits_with("tiny", &common, Some(of("first")));
    let before = client.usage();
    let prompt = joined(&common, &tokens(9, 33));
    let shared = client.logits_with("tiny", &prompt, Some(of("second")));
    let usage = client.usage();
    assert!(usage.computed_prompt_tokens - before.computed_prompt_tokens <= 34, "{usage:?}");
    let alone = client.logits("tiny", &prompt);
    let worst = largest_difference(&shared, &alone);
    println!("RESULT: shared against unshared {worst:e}");
    assert!(worst <= TOLERANCE, "{worst}");
    // Others come until it is gone, to a file; then it comes back.
    let fresh = client.logits_with("tiny", &joined(&common, &[5, 6]), Some(of("first")));
    let mut seed = 100;
    while client.usage().swapped_out == 0 {
        seed += 1;
        client.generate(asked(
            &format!("k{seed}"),
            &tokens(seed, 1500),
            1,
            Share { salt: "b".to_owned(), ..of("b") },
        ));
        assert!(seed < 160, "nothing is ever put aside");
    }
    let before = client.usage();
    assert!(before.swap_disk_bytes > 0, "{before:?}");
    let restored = client.logits_with("tiny", &joined(&common, &[5, 6]), Some(of("first")));
    let usage = client.usage();
    assert!(usage.swapped_in > before.swapped_in, "{usage:?}");
    let worst = largest_difference(&restored, &fresh);
    println!("RESULT: brought back from a file {worst:e}");
    assert!(worst <= TOLERANCE, "{worst}");
    assert!(matches!(
        client.ask(Request::Unload { model: "tiny".to_owned() }),
        agentd_domain::engine::Event::Unloaded { .. }
    ));
}
