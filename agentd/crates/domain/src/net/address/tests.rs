use super::*;
use proptest::prelude::*;

fn destination(host: &str) -> Destination {
    Destination::parse(host, std::num::NonZeroU16::new(443)).unwrap()
}

fn one(host: &str, address: &str, reach: Reach) -> Result<Vec<Vetted>, AddressError> {
    vet(&destination(host), &[address.parse().unwrap()], reach, &["198.41.0.4".parse().unwrap()])
}

/// (address, class, dialled for a granted name, dialled for a granted address)
const TABLE: &[(&str, Class, bool, bool)] = &[
    ("1.1.1.1", Class::Public, true, true),
    ("9.255.255.255", Class::Public, true, true),
    ("11.0.0.0", Class::Public, true, true),
    ("100.63.255.255", Class::Public, true, true),
    ("100.128.0.0", Class::Public, true, true),
    ("172.15.255.255", Class::Public, true, true),
    ("172.32.0.0", Class::Public, true, true),
    ("198.17.255.255", Class::Public, true, true),
    ("198.20.0.0", Class::Public, true, true),
    ("223.255.255.255", Class::Public, true, true),
    ("10.0.0.1", Class::Private, true, true),
    ("100.64.0.1", Class::Private, true, true),
    ("172.16.0.1", Class::Private, true, true),
    ("172.31.255.255", Class::Private, true, true),
    ("192.168.255.255", Class::Private, true, true),
    ("127.0.0.1", Class::Loopback, false, true),
    ("127.255.255.254", Class::Loopback, false, true),
    ("169.254.1.1", Class::LinkLocal, false, true),
    ("169.254.169.254", Class::Metadata, false, true),
    ("169.254.170.2", Class::Metadata, false, true),
    ("100.100.100.200", Class::Metadata, false, true),
    ("168.63.129.16", Class::Metadata, false, true),
    ("192.0.0.192", Class::Metadata, false, true),
    ("198.41.0.4", Class::Own, false, true),
    ("0.0.0.0", Class::Reserved, false, false),
    ("0.1.2.3", Class::Reserved, false, false),
    ("192.0.0.8", Class::Reserved, false, false),
    ("192.0.2.1", Class::Reserved, false, false),
    ("192.88.99.1", Class::Reserved, false, false),
    ("198.18.0.1", Class::Reserved, false, false),
    ("198.19.255.255", Class::Reserved, false, false),
    ("198.51.100.1", Class::Reserved, false, false),
    ("203.0.113.1", Class::Reserved, false, false),
    ("240.0.0.1", Class::Reserved, false, false),
    ("255.255.255.255", Class::Reserved, false, false),
    ("224.0.0.251", Class::Multicast, false, false),
    ("239.255.255.250", Class::Multicast, false, false),
    ("2606:4700:4700::1111", Class::Public, true, true),
    ("2a00::1", Class::Public, true, true),
    ("64:ff9b::101:101", Class::Public, true, true),
    ("fd12:3456::1", Class::Private, true, true),
    ("fec0::1", Class::Private, true, true),
    ("::1", Class::Loopback, false, true),
    ("fe80::1", Class::LinkLocal, false, true),
    ("febf::1", Class::LinkLocal, false, true),
    ("fd00:ec2::254", Class::Metadata, false, true),
    ("fd20:ce::254", Class::Metadata, false, true),
    ("64:ff9b::a9fe:a9fe", Class::Metadata, false, true),
    ("::", Class::Reserved, false, false),
    ("::127.0.0.1", Class::Translated, false, false),
    ("::2", Class::Translated, false, false),
    ("::ffff:127.0.0.1", Class::Translated, false, false),
    ("::ffff:1.1.1.1", Class::Translated, false, false),
    ("::ffff:0:1.1.1.1", Class::Translated, false, false),
    ("64:ff9b::a00:1", Class::Translated, false, false),
    ("64:ff9b::7f00:1", Class::Translated, false, false),
    ("64:ff9b:1::101:101", Class::Translated, false, false),
    ("2001:0:4136:e378:8000:63bf:3fff:fdd2", Class::Translated, false, false),
    ("2002:101:101::1", Class::Translated, false, false),
    ("2001:2::1", Class::Reserved, false, false),
    ("2001:10::1", Class::Reserved, false, false),
    ("2001:20::1", Class::Reserved, false, false),
    ("2001:db8::1", Class::Reserved, false, false),
    ("3fff::1", Class::Reserved, false, false),
    ("100::1", Class::Reserved, false, false),
    ("5f00::1", Class::Reserved, false, false),
    ("4000::1", Class::Reserved, false, false),
    ("ff02::1", Class::Multicast, false, false),
];

#[test]
fn every_class_and_what_a_grant_opens() {
    for &(address, class, granted_name, granted_address) in TABLE {
        let parsed: IpAddr = address.parse().unwrap();
        let refused = Err(AddressError::Refused { address: parsed, class });
        if class == Class::Own {
            assert_eq!(one("example.org", address, Reach::Public), refused, "{address}");
        } else {
            assert_eq!(classify(parsed), class, "{address}");
        }
        let expect = |open: bool| {
            if open { Ok(vec![Vetted(SocketAddr::new(parsed, 443))]) } else { refused.clone() }
        };
        assert_eq!(
            one("example.org", address, Reach::Public),
            expect(class == Class::Public),
            "{address} by name"
        );
        assert_eq!(
            one("example.org", address, Reach::Private),
            expect(granted_name),
            "{address} by granted name"
        );
        let literal = Destination { host: Host::Address(parsed), port: destination("a.b").port };
        let own = ["198.41.0.4".parse().unwrap()];
        assert_eq!(
            vet(&literal, &[parsed], Reach::Private, &own),
            expect(granted_address),
            "{address} granted itself"
        );
    }
}

#[test]
fn one_bad_address_spoils_the_answer() {
    let answer = ["1.1.1.1", "127.0.0.1"].map(|text| text.parse().unwrap());
    let refused = AddressError::Refused { address: answer[1], class: Class::Loopback };
    assert_eq!(vet(&destination("example.org"), &answer, Reach::Public, &[]), Err(refused));
    assert_eq!(vet(&destination("example.org"), &[], Reach::Private, &[]), Err(AddressError::NoAddress));
}

proptest! {
    /// The standard library knows some of these classes too; where it speaks, we agree or are stricter.
    #[test]
    fn never_laxer_than_the_standard_library(bits in any::<u32>()) {
        let address = Ipv4Addr::from_bits(bits);
        let special = address.is_private() || address.is_loopback() || address.is_link_local()
            || address.is_multicast() || address.is_broadcast() || address.is_documentation()
            || address.is_unspecified();
        prop_assert!(!special || classify(address.into()) != Class::Public);
        // Every way to write it as IPv6, but the one that counts by what is inside.
        for v6 in [address.to_ipv6_mapped(), address.to_ipv6_compatible()] {
            prop_assert_ne!(classify(v6.into()), Class::Public);
        }
        let [a, b, c, d] = address.octets().map(u16::from);
        let nat64 = Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, a << 8 | b, c << 8 | d);
        prop_assert_eq!(classify(nat64.into()) == Class::Public, classify(address.into()) == Class::Public);
        prop_assert!(carries_ipv4(nat64));
    }

    #[test]
    fn vetted_is_the_answer_and_nothing_else(bits in proptest::collection::vec(any::<u32>(), 0..5)) {
        let answer: Vec<IpAddr> = bits.iter().map(|b| Ipv4Addr::from_bits(*b).into()).collect();
        if let Ok(vetted) = vet(&destination("example.org"), &answer, Reach::Public, &[]) {
            for address in &vetted {
                prop_assert!(answer.contains(&address.socket().ip()));
                prop_assert_eq!(classify(address.socket().ip()), Class::Public);
                prop_assert_eq!(address.socket().port(), 443);
            }
        }
    }
}
