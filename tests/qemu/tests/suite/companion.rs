//! A real chat model, brought on a medium of its own as `scripts/run --model` does, speaks for echo.

use crate::first_day;
use agentd_domain::agent_api::ReplyPart;
use agentd_domain::api::Model;
use agentd_domain::engine::ModelKind;
use anyhow::{Context, Result, ensure};
use image::media;
use std::path::Path;
use std::time::Duration;
use tests_qemu::{Appliance, Start, setup};

/// A model of a hundred million weights reads some tens of tokens a minute where QEMU emulates.
const LOADED: Duration = Duration::from_secs(600);

/// `scripts/test long companion` fetches a model and says here where it is: no model of its size is in the image.
#[test]
fn a_chat_model_on_a_medium_speaks_for_echo() -> Result<()> {
    let Some(model) = std::env::var_os("AGENTD_CHAT_MODEL") else {
        println!("SKIP: a real chat model is fetched in the long run only");
        return Ok(());
    };
    let medium = media::ensure_model_medium(&setup().cache, Path::new(&model))?;
    let mut appliance = Appliance::new()?;
    appliance.boot(&Start { memory_mib: 2048, drives: vec![media::drive(&medium)], ..Start::default() })?;
    appliance.claim()?;
    let model = appliance.until("the model on the medium is loaded and the default", LOADED, |ctl| {
        let models: Vec<Model> = ctl.json(&["model", "ls"])?;
        Ok(models.into_iter().find(|model| {
            model.origin == "medium" && model.kind == ModelKind::Chat && model.default && model.loaded
        }))
    })?;
    // Small models end their answer to this one; after others they go round in circles for minutes here.
    first_day::chat(&appliance.ctl(), "My boss is called Ingrid Solberg.")?;
    let parts = first_day::reply(&appliance.ctl(), "What is the name of my boss?")?;
    let note = parts.iter().find_map(|part| match part {
        ReplyPart::Note { text } => text.strip_prefix("recalled: "),
        _ => None,
    });
    ensure!(note.context("nothing was recalled")?.contains("Ingrid"), "{parts:?}");
    let said: String = parts
        .iter()
        .filter_map(|part| match part {
            ReplyPart::Text { text } => Some(text.as_str()),
            _ => None,
        })
        .collect();
    // Without its model echo answers from memory alone, and says so in a note.
    let silent =
        |part: &ReplyPart| matches!(part, ReplyPart::Note { text } if text.contains("did not answer"));
    ensure!(!parts.iter().any(silent), "{parts:?}");
    // What so small a model makes of it is chance; tests/host/tests/engine/companion.rs counts over ten facts.
    ensure!(said.split_whitespace().count() > 2, "the model said nothing: {said:?}");
    println!("RESULT: in the guest {} said: {:?}", model.name, said.trim());
    Ok(())
}
