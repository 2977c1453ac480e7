//! How many bytes may a rule of an agent still move today, also after a restart?
//!
//! Owns:  a budget for each rule that has one, shared by all runs of the agent; the task that writes what was moved.
//! Always: a day is one of UTC. A clock that is set back does not begin a day anew: only a later day than the one on
//!         the disk refills. What was moved is written once a second and at agentd's end, so a power cut or a kill
//!         gives back what was moved in the last second at most. Who comes near a budget's end feels it (`agents::nerves`).
//! Never:  a byte without a reservation: `agentd_egress::budget` counts, this remembers.

use super::serve::ByRule;
use crate::agents::Nerves;
use crate::clock;
use crate::store::{Db, Moved};
use agentd_domain::health::BUDGET_NEAR_PERMILLE;
use agentd_domain::ids::AgentId;
use agentd_domain::net::EgressRules;
use agentd_egress::ByteBudget;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

const WRITE_EVERY: Duration = Duration::from_secs(1);
const DAY_MS: i64 = 24 * 3600 * 1000;

/// Cheap to clone.
#[derive(Clone)]
pub(super) struct Book(Arc<Shared>);

struct Shared {
    db: Db,
    nerves: Nerves,
    accounts: Mutex<HashMap<(AgentId, String), Account>>,
}

struct Account {
    limit: u64,
    budget: Arc<ByteBudget>,
    written: Moved,
    /// What of today's was moved before this agentd.
    before: u64,
    /// Told when it was last near the end.
    told: Option<u64>,
}

impl Book {
    /// Call it on the data plane's runtime.
    pub(super) fn start(db: Db, nerves: Nerves) -> Self {
        let book = Self(Arc::new(Shared { db, nerves, accounts: Mutex::default() }));
        let weak = Arc::downgrade(&book.0);
        tokio::spawn(keep_writing(weak));
        book
    }

    /// The budgets of an agent's rules, by their numbers; rules without a limit have none.
    pub(super) async fn of(&self, agent: AgentId, rules: &EgressRules, lines: &[String]) -> ByRule {
        let mut budgets = ByRule::new();
        for ((number, rule), line) in rules.as_slice().iter().enumerate().zip(lines) {
            if let Some(limit) = rule.bytes_per_day {
                budgets.insert(number, self.account(agent, line, limit).await);
            }
        }
        budgets
    }

    async fn account(&self, agent: AgentId, line: &str, limit: u64) -> Arc<ByteBudget> {
        let key = (agent, line.to_owned());
        if let Some(account) = self.accounts().get(&key) {
            return Arc::clone(&account.budget);
        }
        let rule = line.to_owned();
        let read = self.0.db.call(move |store| store.moved(agent, &rule)).await;
        let today = today();
        let written = match read {
            Ok(Some(moved)) if moved.day >= today => moved,
            Ok(_) => Moved { v: 1, day: today, bytes: 0 },
            Err(error) => {
                // What was moved is not known, so nothing more is.
                tracing::error!(agent_id = %agent, %error, "a byte budget was not read: it counts as spent");
                Moved { v: 1, day: today, bytes: limit }
            }
        };
        let budget = ByteBudget::new(limit.saturating_sub(written.bytes));
        let before = written.bytes.min(limit);
        let account = Account { limit, budget, written, before, told: None };
        // Another run of the agent may have been quicker.
        Arc::clone(&self.accounts().entry(key).or_insert(account).budget)
    }

    /// Lets agents feel what comes near its end, and what has been given anew.
    fn tell(&self) {
        for ((agent, line), account) in self.accounts().iter_mut() {
            let used = account.before.saturating_add(account.budget.spent());
            let near =
                u128::from(used) * 1000 >= u128::from(account.limit) * u128::from(BUDGET_NEAR_PERMILLE);
            let changed = match account.told {
                Some(told) => told != used,
                None => near,
            };
            if changed && self.0.nerves.spent(*agent, name_of(line), used, account.limit) {
                account.told = near.then_some(used);
            }
        }
    }

    /// Writes what has changed.
    pub(super) async fn write(&self) {
        let rows = self.changed(today());
        if rows.is_empty() {
            return;
        }
        let kept = rows.clone();
        match self.0.db.call(move |store| store.set_moved(&kept)).await {
            Ok(()) => {
                let mut accounts = self.accounts();
                for (agent, line, moved) in rows {
                    if let Some(account) = accounts.get_mut(&(agent, line)) {
                        account.written = moved;
                    }
                }
            }
            // The next time writes the same and more.
            Err(error) => tracing::warn!(%error, "what agents have moved was not written"),
        }
    }

    pub(super) async fn close(&self) {
        self.write().await;
    }

    /// What is not on the disk as it is. Begins a new day where one has come.
    fn changed(&self, today: i64) -> Vec<(AgentId, String, Moved)> {
        let mut rows = Vec::new();
        for ((agent, line), account) in self.accounts().iter_mut() {
            let day = account.written.day.max(today);
            if day > account.written.day {
                account.budget.refill(account.limit);
                account.before = 0;
            }
            let bytes = account.limit.saturating_sub(account.budget.left());
            let moved = Moved { v: 1, day, bytes };
            if moved != account.written {
                rows.push((*agent, line.clone(), moved));
            }
        }
        rows
    }

    fn accounts(&self) -> std::sync::MutexGuard<'_, HashMap<(AgentId, String), Account>> {
        self.0.accounts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn keep_writing(shared: Weak<Shared>) {
    loop {
        tokio::time::sleep(WRITE_EVERY).await;
        let Some(shared) = shared.upgrade() else { return };
        let book = Book(shared);
        book.write().await;
        book.tell();
    }
}

/// Without its number of bytes, which is told anyway.
fn name_of(line: &str) -> String {
    format!("{}, bytes a day", line.split(' ').next().unwrap_or(line))
}

fn today() -> i64 {
    clock::unix_ms() / DAY_MS
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Store;

    const LINE: &str = "https://api.example.org:443 bytes/day=1000";

    fn rules() -> (EgressRules, Vec<String>) {
        let lines = vec![LINE.to_owned(), "https://free.example.org:443".to_owned()];
        (EgressRules::from_lines(&lines).unwrap(), lines)
    }

    /// What its agent was told of the budget: used, and of how much.
    fn felt(
        feel: &mut tokio::sync::mpsc::Receiver<crate::agents::nerves::Felt>,
    ) -> Option<(String, u64, u64)> {
        match feel.try_recv().ok()? {
            crate::agents::nerves::Felt::Spent { name, used, most, .. } => Some((name, used, most)),
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn the_end_of_a_budget_is_felt_and_so_is_the_next_day() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("system.redb")).unwrap();
        let (nerves, mut feel) = Nerves::new();
        let book = Book::start(Db::new(store), nerves);
        let (agent, (rules, lines)) = (AgentId(clock::fresh_id()), rules());
        let budget = Arc::clone(&book.of(agent, &rules, &lines).await[&0]);
        let held = budget.reserve(1000, 1000).unwrap();
        book.tell();
        assert_eq!(felt(&mut feel), None, "what is only reserved is not spent");
        held.settle(799);
        book.tell();
        assert_eq!(felt(&mut feel), None);
        let told = |used| Some(("https://api.example.org:443, bytes a day".to_owned(), used, 1000));
        for spent in [1, 200] {
            budget.reserve(spent, spent).unwrap().settle(spent);
            book.tell();
            assert_eq!(felt(&mut feel), told(1000 - budget.left()));
            book.tell();
            assert_eq!(felt(&mut feel), None, "nothing has changed");
        }
        book.changed(today() + 1);
        book.tell();
        assert_eq!(felt(&mut feel), told(0), "a new day");
        book.tell();
        assert_eq!(felt(&mut feel), None);
    }

    #[tokio::test]
    async fn what_was_moved_today_is_remembered_and_the_next_day_begins_anew() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("system.redb");
        let agent = AgentId(clock::fresh_id());
        let (rules, lines) = rules();
        {
            let book = Book::start(Db::new(Store::open(&path).unwrap()), Nerves::new().0);
            let budgets = book.of(agent, &rules, &lines).await;
            assert_eq!(
                budgets.keys().copied().collect::<Vec<_>>(),
                [0],
                "only rules with a limit have a budget"
            );
            budgets[&0].reserve(600, 600).unwrap().settle(600);
            // Another run of the same agent has the same budget.
            assert_eq!(book.of(agent, &rules, &lines).await[&0].left(), 400);
            // Another agent has its own.
            assert_eq!(book.of(AgentId(clock::fresh_id()), &rules, &lines).await[&0].left(), 1000);
            book.close().await;
        }
        let store = {
            // The task that writes may hold the file for one more moment.
            let mut tries = 0;
            loop {
                match Store::open(&path) {
                    Ok(store) => break store,
                    Err(error) if tries == 100 => panic!("{error}"),
                    Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
                }
                tries += 1;
            }
        };
        let book = Book::start(Db::new(store), Nerves::new().0);
        let budget = Arc::clone(&book.of(agent, &rules, &lines).await[&0]);
        assert_eq!(budget.left(), 400);
        assert!(budget.reserve(401, 500).is_none());
        // A clock that is set back gives nothing; a new day gives all.
        assert!(book.changed(today() - 5).is_empty());
        assert_eq!(budget.left(), 400);
        let rows = book.changed(today() + 1);
        assert_eq!((rows[0].2.day, rows[0].2.bytes, budget.left()), (today() + 1, 0, 1000));
    }
}
