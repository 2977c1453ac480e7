//! Who holds how much, as the engine tells it while they work.

use crate::sharing::{asked, joined, of, tokens, with_tiny};
use agentd_domain::engine::{Event, HolderUsage, ModelUsage, Request, Share};
use std::time::{Duration, Instant};

/// Every cell is somebody's, or may go.
fn whole(usage: &ModelUsage) {
    let held: u32 = usage.holders.iter().map(|one| one.cells).sum();
    assert_eq!(held + usage.cells_cached, usage.cells_private + usage.cells_shared, "{usage:?}");
}

fn named<'a>(usage: &'a ModelUsage, holder: &str) -> Option<&'a HolderUsage> {
    usage.holders.iter().find(|one| one.holder == holder)
}

/// Two agents of one partition, which is one account, with a common beginning; and one of another that fills the
/// cache, so that somebody has to step aside for a third.
#[test]
fn who_holds_how_much_is_told_while_they_work() {
    let Some((engine, mut client)) = with_tiny(&[], (12_000, 4)) else { return };
    let common = tokens(1, 512);
    let share = |holder: &str| Share { holder: holder.to_owned(), priority: 10, ..of("partition two") };
    let mut ids = Vec::new();
    for (n, holder) in ["first", "second"].into_iter().enumerate() {
        let prompt = joined(&common, &tokens(40 + n as i32, 64));
        ids.push(client.send(Request::Generate(asked(holder, &prompt, 3000, share(holder)))));
        // The first answers before the second comes, which has all of the beginning from it then.
        while n == 0 && !matches!(client.receive().body, Event::Piece { .. }) {}
    }
    let mut other = engine.connect();
    let deadline = Instant::now() + Duration::from_secs(60);
    let usage = loop {
        let usage = other.usage();
        // Beyond their first promises, so that together they hold more than the urgent one leaves.
        if usage.holders.len() == 2 && usage.holders.iter().all(|one| one.cells >= 700) {
            break usage;
        }
        assert!(Instant::now() < deadline, "{usage:?}");
    };
    for holder in ["first", "second"] {
        let one = named(&usage, holder).expect("it has a request");
        assert_eq!((one.running, one.waiting, one.cells_shared), (1, 0, 256), "{usage:?}");
        assert!(one.cells_promised > 0 && one.aside_tokens == 0, "{usage:?}");
    }
    // A request of who says nothing of its holder is its account's; it takes the place of the others.
    let urgent = Share { priority: 90, ..of("urgent") };
    let id = other.send(Request::Generate(asked("urgent", &tokens(9, 10_500), 200, urgent)));
    let mut third = engine.connect();
    let deadline = Instant::now() + Duration::from_secs(60);
    let usage = loop {
        let usage = third.usage();
        let urgent = named(&usage, "urgent").is_some_and(|one| one.running == 1 && one.cells > 100);
        if urgent && usage.holders.iter().any(|one| one.put_aside > 0) {
            break usage;
        }
        assert!(Instant::now() < deadline, "{usage:?}");
    };
    let aside: u32 = usage.holders.iter().map(|one| one.aside_tokens).sum();
    assert!(aside > 0, "{usage:?}");
    other.read_answer(id).end.expect("an end");
    for answer in client.read_answers(&ids) {
        answer.end.expect("an end");
    }
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let usage = third.usage();
        if usage.running == 0 && usage.waiting == 0 {
            assert_eq!(usage.holders, []);
            return whole(&usage);
        }
        assert!(Instant::now() < deadline, "{usage:?}");
    }
}
