//! How does a device that was chosen come into a run's plan?
//!
//! In:     a plan that wants a device, and what admission has chosen. Out: the whole plan, or why not.
//! Always: nothing else of the plan gets wider. The run's `/dev` is opened node by node and no more as a folder, so that
//!         a tool call, which gets no device, cannot open one that the run has.

use agentd_domain::fault::Report;
use agentd_domain::nodes::{Given, IOCTL_TYPES, IOCTLS};
use agentd_domain::plan::{FsAccess, LandlockRule, SandboxPlan};

/// What every run has in `/dev` (`agentd-sandbox`, jail/mounts.rs).
const ALWAYS: [&str; 7] =
    ["/dev/full", "/dev/null", "/dev/random", "/dev/shm", "/dev/tty", "/dev/urandom", "/dev/zero"];

pub fn give(mut plan: SandboxPlan, given: Given) -> Result<SandboxPlan, Report> {
    let refused = |why: &str| {
        let fix = "this is a bug of agentd's: report it with the output of `agentctl gpu ls`";
        Err(Report::bug("device_plan_refused", "no run is started", why, fix))
    };
    let Some(wish) = &mut plan.device else { return refused("it was given a device and wants none") };
    if let Some(why) = given.problem(wish.memory_bytes) {
        return refused(why);
    }
    let rule = |path: &str, access| LandlockRule { path: path.to_owned(), access };
    plan.landlock.rules.retain(|rule| rule.path != "/dev");
    plan.landlock.rules.extend(ALWAYS.map(|path| rule(path, FsAccess::ReadWrite)));
    plan.landlock.rules.extend(given.nodes.iter().map(|path| rule(path, FsAccess::Device)));
    plan.seccomp.ioctl_types = IOCTL_TYPES.to_vec();
    plan.seccomp.ioctls.extend(IOCTLS);
    if let Some(limit) = given.limit() {
        let variables = limit.by.variables(limit.bytes);
        plan.env.extend(variables.into_iter().map(|(name, value)| (name.to_owned(), value)));
        plan.env.sort();
    }
    wish.given = Some(given);
    Ok(plan)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Subject, compile, parse_manifest};
    use agentd_domain::enforcement::{DeviceLimit, LimitBy};
    use agentd_domain::nodes::Hold;

    fn plan(rest: &str) -> SandboxPlan {
        let text = format!("[agent]\nname = \"a\"\nexec = [\"/agent/run\"]\n{rest}");
        compile(&parse_manifest(&text).expect("a manifest"), &Subject::nobody())
    }

    fn instance() -> Given {
        let by = LimitBy::Mig { uuid: "MIG-1".to_owned() };
        Given {
            device: "CUDA0".to_owned(),
            hold: Hold::Share { limit: DeviceLimit { by, bytes: 4 << 30 } },
            nodes: ["/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia-caps/nvidia-cap21"]
                .map(str::to_owned)
                .into(),
        }
    }

    #[test]
    fn a_manifest_without_the_right_gets_no_device_whatever_was_chosen() {
        let bare = plan("");
        assert_eq!(bare.device, None);
        assert!(give(bare, instance()).is_err());
    }

    #[test]
    fn what_was_chosen_is_within_what_was_asked_for() {
        assert!(give(plan("[gpu]\nmemory = \"2G\"\n"), instance()).is_err(), "larger than asked");
        assert!(give(plan("[gpu]\nmemory = \"whole\"\n"), instance()).is_err(), "a share of another's");
        let asked = plan("[gpu]\nmemory = \"4G\"\n");
        assert_eq!(asked.device.as_ref().and_then(|device| device.memory_bytes), Some(4 << 30));
        assert!(
            asked.seccomp.ioctl_types.is_empty()
                && asked.landlock.rules.iter().any(|rule| rule.path == "/dev")
        );
        let got = give(asked.clone(), instance()).expect("given");
        assert!(got.env.contains(&("CUDA_VISIBLE_DEVICES".to_owned(), "MIG-1".to_owned())));
        let driven: Vec<&str> = got
            .landlock
            .rules
            .iter()
            .filter(|rule| rule.access == FsAccess::Device)
            .map(|rule| rule.path.as_str())
            .collect();
        assert_eq!(driven, ["/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia-caps/nvidia-cap21"]);
        // A tool call loses these rules, and no folder is left through which it would find the nodes.
        assert!(!got.landlock.rules.iter().any(|rule| rule.path == "/dev"));
        let back = SandboxPlan {
            device: asked.device.clone(),
            landlock: asked.landlock.clone(),
            seccomp: asked.seccomp.clone(),
            env: asked.env.clone(),
            ..got
        };
        assert_eq!(back, asked, "nothing else has changed");
    }
}
