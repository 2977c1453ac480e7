//! Which name does an address in 198.18.0.0/15 stand for?
//!
//! A program that knows no proxy resolves a name and connects. Inside the agent's namespace it gets an address of
//! this pool ([`crate::dns`]); the connection to it is caught, and the name is what is decided on. No question
//! ever leaves the appliance for that, so a name carries no data out.
//!
//! Always: at most [`Pool::new`]'s `capacity` names; an address keeps its name while a connection holds a
//!         [`Lease`] on it and until the last answer's time to live has run out. Otherwise a program that still
//!         remembers the address would reach another name. The longest unused goes first.
//! Never:  a clock: `now` comes from the caller.
//! Source: RFC 2544 and RFC 6890: the range is for benchmarks and is never routed; [`crate::address`] refuses it.

use crate::name::Name;
use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// 198.18.0.0; the range's first and last address stay unused.
const FIRST: u32 = u32::from_be_bytes([198, 18, 0, 1]);
const LAST: u32 = u32::from_be_bytes([198, 19, 255, 254]);
/// What fits in the range.
pub const CAPACITY_MAX: usize = (LAST - FIRST + 1) as usize;
/// Long enough that programs do not ask all the time, short enough that a full pool recovers.
pub const TTL: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub struct Pool {
    capacity: usize,
    /// Which address of the range is the first.
    begins_at: usize,
    by_name: HashMap<Name, Ipv4Addr>,
    by_address: HashMap<Ipv4Addr, Entry>,
}

#[derive(Debug)]
struct Entry {
    name: Name,
    answered: Instant,
    /// More than one reference: connections hold leases.
    in_use: Arc<()>,
}

/// While it lives, the address keeps its name.
#[derive(Debug)]
pub struct Lease {
    pub name: Name,
    _in_use: Arc<()>,
}

/// Every address is in use, or was given out less than [`TTL`] ago.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("all synthetic addresses are in use")]
pub struct Full;

impl Pool {
    pub fn new(capacity: usize) -> Self {
        Self::beginning_at(capacity, 0)
    }

    /// Addresses from another part of the range: a pool that takes the place of one that was lost begins where chance
    /// says, so that an address that a program still remembers means no name, and not another one.
    pub fn beginning_at(capacity: usize, place: usize) -> Self {
        let capacity = capacity.clamp(1, CAPACITY_MAX);
        let begins_at = place % CAPACITY_MAX;
        Self { capacity, begins_at, by_name: HashMap::new(), by_address: HashMap::new() }
    }

    /// The address for a name, to be answered with [`TTL`].
    pub fn address(&mut self, name: &Name, now: Instant) -> Result<Ipv4Addr, Full> {
        if let Some(address) = self.by_name.get(name)
            && let Some(entry) = self.by_address.get_mut(address)
        {
            entry.answered = now;
            return Ok(*address);
        }
        let address = self.free_address(now)?;
        let entry = Entry { name: name.clone(), answered: now, in_use: Arc::new(()) };
        self.by_name.insert(name.clone(), address);
        self.by_address.insert(address, entry);
        Ok(address)
    }

    /// The name behind the address that a connection went to.
    pub fn lease(&self, address: Ipv4Addr) -> Option<Lease> {
        let entry = self.by_address.get(&address)?;
        Some(Lease { name: entry.name.clone(), _in_use: Arc::clone(&entry.in_use) })
    }

    fn free_address(&mut self, now: Instant) -> Result<Ipv4Addr, Full> {
        let used = self.by_address.len();
        if used < self.capacity {
            // Addresses are only ever taken over, never given back, so the first `used` are the ones in use.
            let place = (self.begins_at + used) % CAPACITY_MAX;
            return u32::try_from(place).map(|place| Ipv4Addr::from_bits(FIRST + place)).map_err(|_| Full);
        }
        // A scan of some thousand entries, and only when the pool is full.
        let oldest = self
            .by_address
            .iter()
            .filter(|(_, entry)| Arc::strong_count(&entry.in_use) == 1)
            .filter(|(_, entry)| now.saturating_duration_since(entry.answered) > TTL)
            .min_by_key(|(address, entry)| (entry.answered, **address))
            .map(|(address, _)| *address)
            .ok_or(Full)?;
        if let Some(entry) = self.by_address.remove(&oldest) {
            self.by_name.remove(&entry.name);
        }
        Ok(oldest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn name(number: usize) -> Name {
        Name::parse(&format!("n{number}.example.org")).unwrap()
    }

    #[test]
    fn the_longest_unused_goes_first_and_nothing_in_use_goes() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut pool = Pool::new(2);
        let first = pool.address(&name(1), at(0)).unwrap();
        let second = pool.address(&name(2), at(1)).unwrap();
        assert_eq!((first, second), (Ipv4Addr::new(198, 18, 0, 1), Ipv4Addr::new(198, 18, 0, 2)));
        // Both may still be remembered.
        assert_eq!(pool.address(&name(3), at(60)), Err(Full));
        let lease = pool.lease(first).unwrap();
        assert_eq!(lease.name, name(1));
        assert_eq!(pool.address(&name(3), at(100)), Ok(second));
        assert_eq!(pool.lease(second).unwrap().name, name(3));
        // The first is in use, the second was just given out.
        assert_eq!(pool.address(&name(2), at(130)), Err(Full));
        drop(lease);
        assert_eq!(pool.address(&name(2), at(130)), Ok(first));
        assert!(pool.lease(Ipv4Addr::new(198, 18, 0, 3)).is_none());
        assert!(pool.lease(Ipv4Addr::new(10, 0, 0, 1)).is_none());
    }

    proptest! {
        /// Names and addresses stay one to one, in the range, within the capacity; a leased or fresh address keeps
        /// its name.
        #[test]
        fn the_pool_never_confuses_names(
            steps in proptest::collection::vec((0usize..12, 0u64..50, any::<bool>()), 1..80),
            capacity in 1usize..6,
            place in prop_oneof![Just(0), CAPACITY_MAX - 3..CAPACITY_MAX + 3],
        ) {
            let mut now = Instant::now();
            let mut pool = Pool::beginning_at(capacity, place);
            let mut leases: Vec<(Ipv4Addr, Lease)> = Vec::new();
            let mut fresh: HashMap<Ipv4Addr, (Name, Instant)> = HashMap::new();
            for (number, wait, hold) in steps {
                now += Duration::from_secs(wait);
                if let Ok(address) = pool.address(&name(number), now) {
                    let [a, b, _, _] = address.octets();
                    prop_assert!(a == 198 && (b == 18 || b == 19));
                    if let Some((before, answered)) = fresh.insert(address, (name(number), now)) {
                        prop_assert!(before == name(number) || now - answered > TTL);
                    }
                    let lease = pool.lease(address).unwrap();
                    prop_assert_eq!(&lease.name, &name(number));
                    if hold { leases.push((address, lease)); }
                } else {
                    leases.pop();
                }
                for (address, lease) in &leases {
                    prop_assert_eq!(&pool.lease(*address).unwrap().name, &lease.name);
                }
                prop_assert!(pool.by_address.len() <= capacity);
                prop_assert_eq!(pool.by_name.len(), pool.by_address.len());
            }
        }
    }
}
