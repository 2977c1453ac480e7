//! How does a person change partitions on the page?
//!
//! In:    forms of the page Devices. Out: the same orders as the API's, then the page again.
//! Always: what was typed is checked as the configuration's entries are, and a refusal says how to write it.

use super::{Done, Page};
use crate::answer::{Failure, SHORT, within};
use crate::api::{Machine, key, partition_id};
use crate::input::{Fields, Name};
use agentd_domain::fault::Report;
use agentd_domain::human;
use agentd_domain::ledger::Partition;
use axum::extract::State;
use axum::response::Redirect;
use serde::Deserialize;

const WHAT: &str = "the partition was not set";

/// As a browser sends it: an empty field is there, a box that is not ticked is not.
#[derive(Debug, Default, Deserialize)]
pub struct Typed {
    name: String,
    devices: String,
    bytes: String,
    #[serde(default)]
    priority: String,
    #[serde(default)]
    weight: String,
    #[serde(default)]
    sequences_most: String,
    #[serde(default)]
    guaranteed: Option<String>,
}

#[derive(Deserialize)]
pub struct Assigning {
    agent: String,
    partition: String,
}

#[derive(Deserialize)]
pub struct Granting {
    agent: String,
    /// Empty takes it back.
    #[serde(default)]
    device: String,
}

pub async fn set(State(appliance): Machine, typed: Result<Fields<Typed>, Failure>) -> Done {
    let Fields(typed) = typed?;
    within(SHORT, appliance.set_partition(typed.partition()?)).await?;
    Ok(back())
}

pub async fn remove(State(appliance): Machine, Name(name): Name) -> Done {
    within(SHORT, appliance.remove_partition(partition_id(&name)?)).await?;
    Ok(back())
}

pub async fn assign(State(appliance): Machine, order: Result<Fields<Assigning>, Failure>) -> Done {
    let Fields(order) = order?;
    let (agent, to) = (key(&order.agent)?, partition_id(&order.partition)?);
    within(SHORT, appliance.assign_partition(agent, to)).await?;
    Ok(back())
}

pub async fn grant(State(appliance): Machine, order: Result<Fields<Granting>, Failure>) -> Done {
    let Fields(order) = order?;
    let device = Some(order.device).filter(|name| !name.is_empty());
    within(SHORT, appliance.grant_device(key(&order.agent)?, device)).await?;
    Ok(back())
}

fn back() -> Redirect {
    Redirect::to("/devices")
}

impl Typed {
    fn partition(&self) -> Result<Partition, Page> {
        let id = partition_id(self.name.trim())?;
        let devices =
            self.devices.split([',', ' ']).filter(|name| !name.is_empty()).map(str::to_owned).collect();
        let bytes = human::parse_bytes(self.bytes.trim())
            .map_err(|why| Report::caller("partition_bytes", WHAT, why, "write a size such as `2G`"))?;
        Ok(Partition {
            id,
            devices,
            bytes,
            priority: number(&self.priority, "priority", 50)?,
            weight: number(&self.weight, "weight", 100)?,
            sequences_most: number(&self.sequences_most, "most sequences", 0)?,
            guaranteed: self.guaranteed.is_some(),
        })
    }
}

/// A number, or the usual one where nothing was typed. Its range is the ledger's to judge.
fn number<T: std::str::FromStr>(text: &str, name: &str, usual: T) -> Result<T, Report> {
    let text = text.trim();
    if text.is_empty() {
        return Ok(usual);
    }
    text.parse().map_err(|_| {
        let why = format!("its {name}, `{}`, is no number that can be", text.escape_debug());
        Report::caller("number_malformed", WHAT, why, "write a whole number, or leave the field empty")
    })
}

/// As it is typed: the largest unit without a remainder.
pub fn typed_bytes(bytes: u64) -> String {
    let units = [(1_u64 << 40, "T"), (1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K")];
    let unit = units.into_iter().find(|(size, _)| bytes >= *size && bytes.is_multiple_of(*size));
    unit.map_or_else(|| bytes.to_string(), |(size, letter)| format!("{}{letter}", bytes / size))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn typed(bytes: &str, priority: &str) -> Typed {
        Typed {
            name: " chat ".to_owned(),
            devices: "CUDA0, CUDA1".to_owned(),
            bytes: bytes.to_owned(),
            priority: priority.to_owned(),
            ..Typed::default()
        }
    }

    #[test]
    fn empty_fields_are_the_usual_numbers() {
        let partition = typed("2G", "").partition().ok().expect("good");
        assert_eq!((partition.id.as_str(), partition.bytes), ("chat", 2 << 30));
        assert_eq!(partition.devices, ["CUDA0", "CUDA1"]);
        assert_eq!((partition.priority, partition.weight, partition.sequences_most), (50, 100, 0));
        assert!(!partition.guaranteed);
        assert!(typed("many", "").partition().is_err() && typed("2G", "-1").partition().is_err());
    }

    proptest! {
        #[test]
        fn what_the_page_writes_it_reads(bytes in any::<u64>(), power in 0u32..41) {
            let bytes = bytes >> power << power;
            prop_assert_eq!(human::parse_bytes(&typed_bytes(bytes)), Ok(bytes));
        }
    }
}
