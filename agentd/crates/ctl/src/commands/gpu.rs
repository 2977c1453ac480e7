//! Devices, partitions and who is in which.

use super::Session;
use crate::client::{self, Client};
use crate::{cli, show};
use agentd_domain::api::AgentKey;
use agentd_domain::fault::Report;
use agentd_domain::ledger::{Assign, Devices, GrantDevice, Partition};
use hyper::Method;
use serde::Serialize;

pub async fn run(session: &Session, command: cli::Gpu) -> Result<(), Report> {
    let client = session.client()?;
    match command {
        cli::Gpu::Ls => {
            let devices: Devices = client.get("/api/v1/devices").await?;
            session.show(&devices, show::devices);
        }
        cli::Gpu::Assign { agent, partition } => {
            let path = format!("/api/v1/agents/{agent}/partition");
            let devices = put(&client, &path, &Assign { partition }).await?;
            session.show(&devices, show::partitions);
        }
        cli::Gpu::Grant { agent, device } => give(session, &client, &agent, Some(device)).await?,
        cli::Gpu::Revoke { agent } => give(session, &client, &agent, None).await?,
        cli::Gpu::Partition(cli::Partition::Ls) => {
            let devices: Devices = client.get("/api/v1/devices").await?;
            session.show(&devices, show::partitions);
        }
        cli::Gpu::Partition(cli::Partition::Set(wish)) => {
            let now: Devices = client.get("/api/v1/devices").await?;
            let path = format!("/api/v1/partitions/{}", wish.id);
            let devices = put(&client, &path, &wished(wish, &now)?).await?;
            session.show(&devices, show::partitions);
        }
        cli::Gpu::Partition(cli::Partition::Rm { id }) => {
            let path = format!("/api/v1/partitions/{id}");
            let answer = client.send(Method::DELETE, &path, None, client::empty()).await?;
            let devices: Devices = client::parse(answer).await?;
            session.show(&devices, show::partitions);
        }
    }
    Ok(())
}

async fn give(
    session: &Session,
    client: &Client,
    agent: &AgentKey,
    device: Option<String>,
) -> Result<(), Report> {
    let path = format!("/api/v1/agents/{agent}/device");
    let devices = put(client, &path, &GrantDevice { device }).await?;
    session.show(&devices, show::devices);
    Ok(())
}

async fn put(client: &Client, path: &str, body: &impl Serialize) -> Result<Devices, Report> {
    // Our own types hold no maps with keys that are not text.
    let body = client::full(serde_json::to_vec(body).unwrap_or_default());
    client::parse(client.send(Method::PUT, path, Some("application/json"), body).await?).await
}

/// What was asked for over what there is.
fn wished(wish: cli::PartitionSet, now: &Devices) -> Result<Partition, Report> {
    let before = now.partitions.iter().map(|one| &one.partition).find(|one| one.id == wish.id).cloned();
    let missing = |what: &str, fix: &str| {
        let why = format!("there is no partition `{}` yet, and {what}", wish.id);
        Report::caller("partition_incomplete", "the partition was not set", why, fix)
    };
    let mut partition = match before {
        Some(before) => before,
        None => Partition {
            id: wish.id.clone(),
            bytes: wish
                .bytes
                .ok_or_else(|| missing("no bytes were named", "say how many with `--bytes 2G`"))?,
            devices: usual_device(now),
            priority: 50,
            weight: 100,
            sequences_most: 0,
            guaranteed: false,
        },
    };
    if !wish.devices.is_empty() {
        partition.devices = wish.devices;
    }
    partition.bytes = wish.bytes.unwrap_or(partition.bytes);
    partition.priority = wish.priority.unwrap_or(partition.priority);
    partition.weight = wish.weight.unwrap_or(partition.weight);
    partition.sequences_most = wish.sequences.unwrap_or(partition.sequences_most);
    partition.guaranteed = wish.guaranteed.unwrap_or(partition.guaranteed);
    Ok(partition)
}

/// The only GPU, or host memory.
fn usual_device(now: &Devices) -> Vec<String> {
    let mut gpus = now.devices.iter().filter(|device| device.kind != "cpu");
    let host = now.devices.iter().find(|device| device.kind == "cpu");
    match (gpus.next(), gpus.next()) {
        (Some(only), None) => vec![only.name.clone()],
        _ => host.map(|device| vec![device.name.clone()]).unwrap_or_default(),
    }
}
