use super::*;
use crate::testing::MemoryFiles;
use std::sync::atomic::Ordering;

const NOW: i64 = 1_790_000_000;

fn address(text: &str) -> IpAddr {
    text.parse().expect("address")
}

fn leaf(authority: &Authority) -> Vec<u8> {
    let served = authority.served.0.read().expect("lock");
    served.as_ref().expect("a certificate").cert[0].to_vec()
}

#[test]
fn made_once_and_the_same_after_every_boot() {
    let files = Arc::new(MemoryFiles::default());
    let first = Authority::open(files.clone()).expect("made");
    let second = Authority::open(files).expect("read");
    assert_eq!(first.fingerprint(), second.fingerprint());
    assert_eq!(first.certificate(), second.certificate());
    assert_eq!(first.fingerprint().len(), 64);
}

#[test]
fn two_appliances_have_two_authorities() {
    let one = Authority::open(Arc::new(MemoryFiles::default())).expect("made");
    let other = Authority::open(Arc::new(MemoryFiles::default())).expect("made");
    assert_ne!(one.fingerprint(), other.fingerprint());
}

#[test]
fn an_authority_that_cannot_be_stored_is_not_used() {
    let files = Arc::new(MemoryFiles::default());
    files.full.store(true, Ordering::SeqCst);
    assert!(matches!(Authority::open(files), Err(AuthorityError::Write { .. })));
}

#[test]
fn a_damaged_authority_is_an_error_and_never_replaced() {
    let files = Arc::new(MemoryFiles::default());
    Authority::open(files.clone()).expect("made");
    let other = Arc::new(MemoryFiles::default());
    Authority::open(other.clone()).expect("made");
    let mut mixed: AuthorityFile =
        serde_json::from_slice(&files.files.lock().expect("lock")[AUTHORITY_FILE]).expect("JSON");
    let foreign: AuthorityFile =
        serde_json::from_slice(&other.files.lock().expect("lock")[AUTHORITY_FILE]).expect("JSON");
    mixed.certificate_hex = foreign.certificate_hex;
    for content in [b"{".to_vec(), b"{}".to_vec(), vec![], serde_json::to_vec(&mixed).expect("JSON")] {
        files.write(AUTHORITY_FILE, &content).expect("written");
        assert!(matches!(Authority::open(files.clone()), Err(AuthorityError::Damaged { .. })));
        assert_eq!(files.read(AUTHORITY_FILE).expect("read"), Some(content));
    }
}

#[test]
fn issued_anew_only_for_a_reason() {
    let files = Arc::new(MemoryFiles::default());
    let authority = Authority::open(files.clone()).expect("made");
    let here = [address("10.0.2.15")];
    assert!(authority.refresh(&here, NOW).expect("issued"));
    let first = leaf(&authority);
    assert!(!authority.refresh(&here, NOW + DAY_S).expect("kept"));
    assert!(!authority.refresh(&[], NOW + DAY_S).expect("an address less is no reason"));
    assert_eq!(leaf(&authority), first);

    let rebooted = Authority::open(files).expect("read");
    assert!(!rebooted.refresh(&here, NOW + DAY_S).expect("kept over a boot"));
    assert_eq!(leaf(&rebooted), first);

    for (addresses, now, reason) in [
        (vec![here[0], address("fd00::1")], NOW, "a new address"),
        (here.to_vec(), NOW + (SERVER_LIFE_DAYS - RENEW_BEFORE_DAYS) * DAY_S, "its end is near"),
        (here.to_vec(), NOW, "the clock went back"),
        (here.to_vec(), 0, "a clock at 1970"),
        (here.to_vec(), 4_070_908_800, "a clock at 2099"),
        (here.to_vec(), NOW, "and right again"),
    ] {
        assert!(rebooted.refresh(&addresses, now).expect("issued"), "{reason}");
    }
}

#[test]
fn another_authoritys_server_certificate_is_not_served() {
    let files = Arc::new(MemoryFiles::default());
    Authority::open(files.clone()).expect("made").refresh(&[], NOW).expect("issued");
    let foreign = files.read(SERVER_FILE).expect("read").expect("there");
    let own = Arc::new(MemoryFiles::default());
    own.write(SERVER_FILE, &foreign).expect("written");
    let authority = Authority::open(own).expect("made");
    assert!(authority.refresh(&[], NOW).expect("issued"));
}

#[test]
fn a_full_state_partition_does_not_keep_the_owner_out() {
    let files = Arc::new(MemoryFiles::default());
    let authority = Authority::open(files.clone()).expect("made");
    files.full.store(true, Ordering::SeqCst);
    assert!(matches!(authority.refresh(&[], NOW), Err(AuthorityError::Write { .. })));
    assert!(!leaf(&authority).is_empty());
}

#[test]
fn a_damaged_server_certificate_is_issued_anew() {
    let files = Arc::new(MemoryFiles::default());
    let authority = Authority::open(files.clone()).expect("made");
    for content in [&b"no JSON"[..], b"{}", b""] {
        files.write(SERVER_FILE, content).expect("written");
        let again = Authority::open(files.clone()).expect("read");
        assert!(again.refresh(&[], NOW).expect("issued"));
        assert_eq!(again.fingerprint(), authority.fingerprint());
    }
}

#[test]
fn the_certificate_names_what_people_type() {
    let authority = Authority::open(Arc::new(MemoryFiles::default())).expect("made");
    authority.refresh(&[address("10.0.2.15"), address("0.0.0.0")], NOW).expect("issued");
    let der = leaf(&authority);
    let holds = |needle: &[u8]| der.windows(needle.len()).any(|window| window == needle);
    assert!(holds(HOST_NAME.as_bytes()) && holds(b"localhost"));
    assert!(holds(&[0x87, 4, 127, 0, 0, 1]) && holds(&[0x87, 4, 10, 0, 2, 15]));
    assert!(!holds(&[0x87, 4, 0, 0, 0, 0]), "an unspecified address is none");
}
