//! How many bytes may an agent still move today, by each rule and by all together, also after a restart?
//!
//! Owns:  a budget for each rule that has one and for each agent that has one, shared by all runs of the agent; the task
//!        that writes what was moved.
//! Always: a day is one of UTC. A clock that is set back does not begin a day anew: only a later day than the one on
//!         the disk refills. What was moved is written once a second and at agentd's end, so a power cut or a kill
//!         gives back what was moved in the last second at most. Who comes near a budget's end feels it (`agents::nerves`).
//!         What a child moves counts in the budgets of the agents above it too, so a family moves no more than its first
//!         agent may, however many agents it becomes.
//! Never:  a byte without a reservation: `agentd_egress::budget` counts, this remembers.

use crate::agents::Nerves;
use crate::clock;
use crate::store::{Db, Moved};
use agentd_domain::health::BUDGET_NEAR_PERMILLE;
use agentd_domain::ids::AgentId;
use agentd_domain::net::EgressRules;
use agentd_domain::rights::{Limit, Rights, UNLIMITED};
use agentd_egress::{Budgets, ByteBudget, Whose};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

const WRITE_EVERY: Duration = Duration::from_secs(1);
const DAY_MS: i64 = 24 * 3600 * 1000;
/// The budget of an agent as a whole, among those of its rules: as the right is called. No rule is written so.
const WHOLE: &str = "net.bytes";

/// Cheap to clone.
#[derive(Clone)]
pub(super) struct Book(Arc<Shared>);

struct Shared {
    db: Db,
    nerves: Nerves,
    accounts: Mutex<HashMap<(AgentId, String), Account>>,
}

/// What limits one run.
pub(super) struct Asked<'a> {
    pub agent: AgentId,
    pub rules: &'a EgressRules,
    /// As the plan lists them.
    pub lines: &'a [String],
    pub bytes_per_day: Option<u64>,
    /// The agents above it, with what their tokens give.
    pub family: &'a [(AgentId, Rights)],
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

    /// All that a run's connections count against; rules and agents without a limit have no budget.
    pub(super) async fn of(&self, asked: Asked<'_>) -> Budgets {
        let mut budgets = Budgets::default();
        for ((number, rule), line) in asked.rules.as_slice().iter().enumerate().zip(asked.lines) {
            let Some(limit) = rule.bytes_per_day else { continue };
            let mut counted = vec![(Whose::Rule, self.account(asked.agent, line, limit).await)];
            // A child has its parent's rules or fewer, and none that reads otherwise.
            for (above, _) in asked.family {
                counted.push((Whose::Family, self.account(*above, line, limit).await));
            }
            budgets.by_rule.insert(number, counted);
        }
        if let Some(limit) = asked.bytes_per_day {
            budgets.agent.push((Whose::Agent, self.account(asked.agent, WHOLE, limit).await));
        }
        for (above, rights) in asked.family {
            let limit = rights.limit(Limit::NetBytes);
            if limit < UNLIMITED {
                budgets.agent.push((Whose::Family, self.account(*above, WHOLE, limit).await));
            }
        }
        budgets
    }

    async fn account(&self, agent: AgentId, line: &str, limit: u64) -> Arc<ByteBudget> {
        let key = (agent, line.to_owned());
        if let Some(account) = self.accounts().get_mut(&key) {
            return account.limited(limit);
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
        self.accounts().entry(key).or_insert(account).limited(limit)
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
                // What no run uses any more is on the disk; its agent may be gone for good.
                // What its agent feels of it has to be taken back one day.
                accounts.retain(|_, account| {
                    account.is_used() || account.told.is_some() || account.moved() != account.written.bytes
                });
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
            let moved = Moved { v: 1, day, bytes: account.moved() };
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

impl Account {
    /// The budget with this limit: an agent's may be another one with its next token.
    fn limited(&mut self, limit: u64) -> Arc<ByteBudget> {
        if self.limit != limit {
            self.budget.change(self.limit, limit);
            self.limit = limit;
            // Near the old one's end is not near this one's: it is told anew.
            self.told = self.told.map(|_| u64::MAX);
        }
        Arc::clone(&self.budget)
    }

    fn moved(&self) -> u64 {
        self.limit.saturating_sub(self.budget.left())
    }

    fn is_used(&self) -> bool {
        Arc::strong_count(&self.budget) > 1
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
    use agentd_egress::Purse;

    const LINE: &str = "https://api.example.org:443 bytes/day=1000";

    fn rules() -> (EgressRules, Vec<String>) {
        let lines = vec![LINE.to_owned(), "https://free.example.org:443".to_owned()];
        (EgressRules::from_lines(&lines).unwrap(), lines)
    }

    async fn budgets(
        book: &Book,
        agent: AgentId,
        bytes_per_day: Option<u64>,
        family: &[(AgentId, Rights)],
    ) -> Budgets {
        let (rules, lines) = rules();
        book.of(Asked { agent, rules: &rules, lines: &lines, bytes_per_day, family }).await
    }

    fn left(budgets: &[(Whose, Arc<ByteBudget>)]) -> Vec<u64> {
        budgets.iter().map(|(_, budget)| budget.left()).collect()
    }

    fn spend(budgets: &[(Whose, Arc<ByteBudget>)], bytes: u64) {
        Purse::new(budgets.iter().cloned()).reserve(bytes, bytes).unwrap().settle(bytes);
    }

    /// The task that writes may hold the file for one more moment.
    async fn opened(path: &std::path::Path) -> Store {
        let mut tries = 0;
        loop {
            match Store::open(path) {
                Ok(store) => return store,
                Err(error) if tries == 100 => panic!("{error}"),
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
            tries += 1;
        }
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
        let agent = AgentId(clock::fresh_id());
        let of = budgets(&book, agent, None, &[]).await;
        let held = Purse::new(of.by_rule[&0].iter().cloned()).reserve(1000, 1000).unwrap();
        book.tell();
        assert_eq!(felt(&mut feel), None, "what is only reserved is not spent");
        held.settle(799);
        book.tell();
        assert_eq!(felt(&mut feel), None);
        let told = |used| Some(("https://api.example.org:443, bytes a day".to_owned(), used, 1000));
        for spent in [1, 200] {
            spend(&of.by_rule[&0], spent);
            book.tell();
            assert_eq!(felt(&mut feel), told(1000 - left(&of.by_rule[&0])[0]));
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
        {
            let book = Book::start(Db::new(Store::open(&path).unwrap()), Nerves::new().0);
            let first = budgets(&book, agent, Some(5000), &[]).await;
            assert_eq!(
                first.by_rule.keys().collect::<Vec<_>>(),
                [&0],
                "only rules with a limit have a budget"
            );
            spend(&first.by_rule[&0], 600);
            spend(&first.agent, 600);
            // Another run of the same agent has the same budgets.
            let second = budgets(&book, agent, Some(5000), &[]).await;
            assert_eq!((left(&second.by_rule[&0]), left(&second.agent)), (vec![400], vec![4400]));
            // Another agent has its own.
            let other = budgets(&book, AgentId(clock::fresh_id()), Some(5000), &[]).await;
            assert_eq!((left(&other.by_rule[&0]), left(&other.agent)), (vec![1000], vec![5000]));
            book.close().await;
        }
        let book = Book::start(Db::new(opened(&path).await), Nerves::new().0);
        // As after a kill: another process, and a token that gives less.
        let again = budgets(&book, agent, Some(2000), &[]).await;
        assert_eq!((left(&again.by_rule[&0]), left(&again.agent)), (vec![400], vec![1400]));
        assert!(Purse::new(again.by_rule[&0].iter().cloned()).reserve(401, 500).is_err());
        // A larger one in the same life gives the difference and no more.
        assert_eq!(left(&budgets(&book, agent, Some(3000), &[]).await.agent), [2400]);
        // A clock that is set back gives nothing; a new day gives all.
        assert!(book.changed(today() - 5).is_empty());
        assert_eq!(left(&again.agent), [2400]);
        let rows = book.changed(today() + 1);
        assert!(rows.iter().all(|(_, _, moved)| (moved.day, moved.bytes) == (today() + 1, 0)), "{rows:?}");
        assert_eq!((rows.len(), left(&again.by_rule[&0]), left(&again.agent)), (2, vec![1000], vec![3000]));
    }

    #[tokio::test]
    async fn what_a_child_moves_counts_for_every_agent_above_it() {
        let folder = tempfile::tempdir().unwrap();
        let book =
            Book::start(Db::new(Store::open(&folder.path().join("system.redb")).unwrap()), Nerves::new().0);
        let [first, parent, child] = [(); 3].map(|()| AgentId(clock::fresh_id()));
        let rights = |bytes: u64| Rights {
            api: Default::default(),
            read: Default::default(),
            calls: Default::default(),
            net: Default::default(),
            limits: [(Limit::NetBytes, bytes)].into(),
        };
        let above = [(parent, rights(UNLIMITED)), (first, rights(700))];
        let of_child = budgets(&book, child, None, &above).await;
        let of_parent = budgets(&book, parent, None, &above[1..]).await;
        let of_first = budgets(&book, first, Some(700), &[]).await;
        // One of a rule for each agent; of an agent as a whole only where there is a limit.
        assert_eq!(
            of_child.by_rule[&0].iter().map(|(whose, _)| *whose).collect::<Vec<_>>(),
            [Whose::Rule, Whose::Family, Whose::Family]
        );
        assert_eq!(left(&of_child.agent), [700]);
        spend(&of_child.by_rule[&0], 300);
        spend(&of_child.agent, 300);
        assert_eq!((left(&of_parent.by_rule[&0]), left(&of_first.by_rule[&0])), (vec![700, 700], vec![700]));
        assert_eq!((left(&of_parent.agent), left(&of_first.agent)), (vec![400], vec![400]));
        // Ten children are no more than one: what is left of the first agent's is left for all of them.
        let sibling = budgets(&book, AgentId(clock::fresh_id()), None, &above).await;
        let refused = Purse::new(sibling.agent.iter().cloned()).reserve(401, 401);
        assert_eq!(refused.unwrap_err(), Whose::Family);
        // Whose runs are over needs no place in memory, and loses nothing.
        drop((of_child, sibling));
        book.write().await;
        assert!(!book.accounts().contains_key(&(child, LINE.to_owned())));
        assert_eq!(left(&budgets(&book, child, None, &above).await.by_rule[&0]), [700, 700, 700]);
    }
}
