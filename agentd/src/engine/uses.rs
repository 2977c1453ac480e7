//! Who uses which model now, and since when does nobody?
//!
//! Owns:   one door for each model of the engine. Whoever uses a model has come in by it ([`Uses::enter`]) and goes out
//!         when its [`InUse`] is dropped.
//! Always: a model leaves only when nobody is inside, and from then on nobody comes in: so none is sent away with work,
//!         however requests and decisions fall together. An engine that died lets nobody in; who was inside goes out as
//!         its answer fails.
//! From:   any task; a lock, for a moment.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// All models' doors. Cheap to clone.
#[derive(Clone, Default)]
pub struct Uses(Arc<Mutex<BTreeMap<String, Door>>>);

#[derive(Debug, Default)]
struct Door {
    open: bool,
    inside: u32,
    last: Option<Instant>,
    last_unix_ms: Option<i64>,
    load: Duration,
}

/// How a model is used, for who decides and for who looks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Seen {
    pub inside: u32,
    /// Since the last went out, or since it came; nothing while somebody is inside.
    pub idle: Duration,
    /// When somebody came in or went out last, in this life of agentd.
    pub last_unix_ms: Option<i64>,
    /// What its last load took.
    pub load: Duration,
}

/// One use. The model stays while this lives.
#[derive(Debug)]
pub struct InUse {
    uses: Uses,
    model: String,
}

impl std::fmt::Debug for Uses {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Uses")
    }
}

impl Uses {
    /// `None` while the model is not there.
    pub fn enter(&self, model: &str) -> Option<InUse> {
        let mut doors = self.lock();
        let door = doors.get_mut(model).filter(|door| door.open)?;
        door.inside += 1;
        door.touch();
        Some(InUse { uses: self.clone(), model: model.to_owned() })
    }

    /// The engine has it. `load` is what that took, where it is known.
    pub fn came(&self, model: &str, load: Option<Duration>) {
        let mut doors = self.lock();
        let door = doors.entry(model.to_owned()).or_default();
        door.open = true;
        door.last = Some(Instant::now());
        door.load = load.unwrap_or(door.load);
    }

    /// Closes a model's door if nobody is inside; whether it is closed now.
    pub fn leave(&self, model: &str) -> bool {
        let mut doors = self.lock();
        let Some(door) = doors.get_mut(model) else { return true };
        if door.inside == 0 {
            door.open = false;
        }
        !door.open
    }

    /// Closes it whoever is inside: its file is gone or another.
    pub fn close(&self, model: &str) {
        if let Some(door) = self.lock().get_mut(model) {
            door.open = false;
        }
    }

    /// The engine is gone, and all of its models with it.
    pub fn close_all(&self) {
        self.lock().values_mut().for_each(|door| door.open = false);
    }

    pub fn seen(&self, model: &str) -> Seen {
        let doors = self.lock();
        let Some(door) = doors.get(model) else { return Seen::default() };
        let idle = match door.last {
            Some(last) if door.inside == 0 => last.elapsed(),
            _ => Duration::ZERO,
        };
        Seen { inside: door.inside, idle, last_unix_ms: door.last_unix_ms, load: door.load }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Door>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Door {
    fn touch(&mut self) {
        self.last = Some(Instant::now());
        self.last_unix_ms = Some(crate::clock::unix_ms());
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        if let Some(door) = self.uses.lock().get_mut(&self.model) {
            door.inside = door.inside.saturating_sub(1);
            door.touch();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_with_work_stays_and_one_that_leaves_lets_nobody_in() {
        let uses = Uses::default();
        assert!(uses.enter("m").is_none(), "it is not there");
        uses.came("m", Some(Duration::from_secs(2)));
        let inside = uses.enter("m").expect("it is there");
        assert!(!uses.leave("m"));
        let second = uses.enter("m").expect("it stays");
        assert_eq!((uses.seen("m").inside, uses.seen("m").idle), (2, Duration::ZERO));
        drop((inside, second));
        assert!(uses.seen("m").last_unix_ms.is_some());
        assert!(uses.leave("m"));
        assert!(uses.enter("m").is_none());
        assert_eq!(uses.seen("m").load, Duration::from_secs(2));
    }

    #[test]
    fn who_was_inside_a_lost_engine_goes_out_once() {
        let uses = Uses::default();
        uses.came("m", None);
        let before = uses.enter("m").expect("there");
        uses.close_all();
        assert!(uses.enter("m").is_none());
        uses.came("m", None);
        let after = uses.enter("m").expect("there again");
        drop(before);
        assert_eq!(uses.seen("m").inside, 1);
        drop(after);
        assert_eq!(uses.seen("m").inside, 0);
    }
}
