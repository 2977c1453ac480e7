//! By what does a client know this appliance?
//!
//! Owns:  the appliance's own certificate authority, made at first boot and never changed, and the server
//!        certificate it issues. `agentctl` pins the authority's key; a person may import its certificate.
//! In:    the machine's addresses and the time. Out: a TLS configuration whose certificate follows them.
//!
//! Invariants: the authority's file is written once, before its fingerprint is shown to anybody. A damaged file is an
//! error: a new authority would look like an impostor to everyone who pinned the old one. The server certificate is
//! kept too, since browsers remember an exception per certificate; it is issued anew when an address is
//! missing, its end is near, or the clock stands outside its life.
//!
//! Sources: RFC 5280 (4.1.2.5: no end is 99991231235959Z; 4.2.1.6 and 4.2.1.9), RFC 7469, 2.4 (a pin is the
//! hash of the SubjectPublicKeyInfo).

use crate::state::StateFiles;
use agentd_domain::fault::Report;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType, date_time_ymd,
};
use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

pub const AUTHORITY_FILE: &str = "authority.json";
pub const SERVER_FILE: &str = "server.json";
/// The name under which the appliance is found on a local network.
pub const HOST_NAME: &str = "agentd-os.local";

const DAY_S: i64 = 24 * 3600;
/// Browsers refuse server certificates that live longer than 825 days, even from an authority that their owner
/// added (Apple, "Requirements for trusted certificates in iOS 13").
const SERVER_LIFE_DAYS: i64 = 800;
const RENEW_BEFORE_DAYS: i64 = 60;
/// Clients whose clock is a little late must not see a certificate from the future.
const BACKDATE_DAYS: i64 = 2;
/// A machine with more addresses than this is a router, and its certificate would outgrow the handshake.
const MOST_ADDRESSES: usize = 64;
const FORMAT: u32 = 1;

pub struct Authority {
    files: Arc<dyn StateFiles>,
    key: KeyPair,
    certificate: CertificateDer<'static>,
    fingerprint: String,
    /// What is being served, and for whom. Locked for the whole of a renewal, which blocks on the disk.
    server: Mutex<Option<ServerFile>>,
    served: Arc<Served>,
}

#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    #[error("{file} cannot be read: {source}")]
    Read { file: &'static str, source: io::Error },
    #[error("{file} cannot be written: {source}")]
    Write { file: &'static str, source: io::Error },
    #[error("{file} is damaged: {why}")]
    Damaged { file: &'static str, why: String },
    #[error("a certificate could not be made: {0}")]
    Make(#[from] rcgen::Error),
    #[error("TLS does not take the certificate: {0}")]
    Tls(#[from] rustls::Error),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct AuthorityFile {
    format: u32,
    key_pkcs8_hex: String,
    certificate_hex: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ServerFile {
    format: u32,
    /// Which authority signed it: another one's certificate is of no use.
    fingerprint: String,
    addresses: BTreeSet<IpAddr>,
    not_before_unix_s: i64,
    not_after_unix_s: i64,
    key_pkcs8_hex: String,
    certificate_hex: String,
}

impl Authority {
    /// Reads the authority, or makes it at first boot. Blocks for the file.
    pub fn open(files: Arc<dyn StateFiles>) -> Result<Self, AuthorityError> {
        let stored = read::<AuthorityFile>(&*files, AUTHORITY_FILE)?;
        let file = match stored {
            Some(file) => file,
            None => {
                let file = make_authority()?;
                write(&*files, AUTHORITY_FILE, &file)?;
                file
            }
        };
        let damaged = |why: String| AuthorityError::Damaged { file: AUTHORITY_FILE, why };
        if file.format != FORMAT {
            return Err(damaged(format!("it has format {}, and this version reads {FORMAT}", file.format)));
        }
        let key = parse_key(&file.key_pkcs8_hex).map_err(damaged)?;
        let certificate = CertificateDer::from(bytes_of(&file.certificate_hex).map_err(damaged)?);
        let fingerprint = hex::encode(Sha256::digest(key.subject_public_key_info()));
        check_pair(&key, &certificate).map_err(damaged)?;
        let served = Arc::new(Served::default());
        Ok(Self { files, key, certificate, fingerprint, server: Mutex::new(None), served })
    }

    /// SHA-256 of the authority's SubjectPublicKeyInfo, lower-case hex: what `agentctl` pins.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// DER; for people who want their browser to trust the appliance.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// Makes the server's certificate fit these addresses and this time; true when a new one was issued. Blocks
    /// for the file. Call it at start, when addresses change, when the clock is set, and once a day.
    ///
    /// A certificate that cannot be stored is served all the same: being reachable comes first.
    pub fn refresh(&self, addresses: &[IpAddr], now_unix_s: i64) -> Result<bool, AuthorityError> {
        let wanted = wanted_addresses(addresses);
        let mut server = self.server.lock().unwrap_or_else(PoisonError::into_inner);
        if server.is_none() {
            // A damaged server certificate costs nothing but a browser's exception: it is issued anew.
            *server = read::<ServerFile>(&*self.files, SERVER_FILE).ok().flatten();
        }
        if let Some(current) = server.as_ref().filter(|s| fits(s, &self.fingerprint, &wanted, now_unix_s))
            && self.serve(current).is_ok()
        {
            return Ok(false);
        }
        let issued = self.issue(wanted, now_unix_s)?;
        self.serve(&issued)?;
        let stored = write(&*self.files, SERVER_FILE, &issued);
        *server = Some(issued);
        stored.map(|()| true)
    }

    /// For [`crate::serve_tls`]: offers HTTP/2 and HTTP/1.1 over TLS 1.3, with whatever certificate
    /// [`Self::refresh`] last made. Before the first refresh handshakes fail.
    pub fn tls_config(&self) -> Result<Arc<ServerConfig>, AuthorityError> {
        let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_no_client_auth()
            .with_cert_resolver(Arc::clone(&self.served) as Arc<dyn ResolvesServerCert>);
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }

    fn issue(&self, addresses: BTreeSet<IpAddr>, now_unix_s: i64) -> Result<ServerFile, AuthorityError> {
        // Outside these years something is wrong with the clock; a certificate must be made all the same.
        let now = now_unix_s.clamp(0, 250_000_000_000);
        let not_before = (now - BACKDATE_DAYS * DAY_S).max(0);
        let not_after = now + SERVER_LIFE_DAYS * DAY_S;
        let mut params = CertificateParams::new(vec![HOST_NAME.to_owned(), "localhost".to_owned()])?;
        params.subject_alt_names.extend(addresses.iter().copied().map(SanType::IpAddress));
        params.distinguished_name = name(HOST_NAME);
        let epoch = date_time_ymd(1970, 1, 1);
        params.not_before = epoch + Duration::from_secs(not_before.unsigned_abs());
        params.not_after = epoch + Duration::from_secs(not_after.unsigned_abs());
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let issuer = Issuer::from_ca_cert_der(&self.certificate, &self.key)?;
        let certificate = params.signed_by(&key, &issuer)?;
        Ok(ServerFile {
            format: FORMAT,
            fingerprint: self.fingerprint.clone(),
            addresses,
            not_before_unix_s: not_before,
            not_after_unix_s: not_after,
            key_pkcs8_hex: hex::encode(key.serialized_der()),
            certificate_hex: hex::encode(certificate.der()),
        })
    }

    fn serve(&self, server: &ServerFile) -> Result<(), AuthorityError> {
        let damaged = |why: String| AuthorityError::Damaged { file: SERVER_FILE, why };
        let key = PrivatePkcs8KeyDer::from(bytes_of(&server.key_pkcs8_hex).map_err(damaged)?);
        let leaf = CertificateDer::from(bytes_of(&server.certificate_hex).map_err(damaged)?);
        // The authority travels along: a client that knows only its pin needs the certificate to check with.
        let chain = vec![leaf, self.certificate.clone()];
        let certified = CertifiedKey::from_der(chain, PrivateKeyDer::Pkcs8(key), &ring::default_provider())?;
        *self.served.0.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(certified));
        Ok(())
    }
}

impl AuthorityError {
    pub fn report(&self) -> Report {
        let what = "the console has no certificate of its own";
        match self {
            Self::Make(_) | Self::Tls(_) => {
                Report::bug("authority_broken", what, self.to_string(), "reboot the appliance")
            }
            Self::Read { .. } | Self::Write { .. } | Self::Damaged { .. } => Report::environment(
                "authority_unreadable",
                what,
                self.to_string(),
                "reboot; if it stays, the state partition is damaged: restore it, or set the appliance up anew with `scripts/flash`",
            ),
        }
    }
}

/// The certificate in use; replaced while connections go on.
#[derive(Debug, Default)]
struct Served(RwLock<Option<Arc<CertifiedKey>>>);

impl ResolvesServerCert for Served {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Whether a certificate can go on being served. Names that are no longer needed do no harm.
fn fits(server: &ServerFile, fingerprint: &str, wanted: &BTreeSet<IpAddr>, now_unix_s: i64) -> bool {
    server.format == FORMAT
        && server.fingerprint == fingerprint
        && wanted.is_subset(&server.addresses)
        && now_unix_s >= server.not_before_unix_s
        && now_unix_s < server.not_after_unix_s - RENEW_BEFORE_DAYS * DAY_S
}

fn wanted_addresses(addresses: &[IpAddr]) -> BTreeSet<IpAddr> {
    let own = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
    let reachable =
        addresses.iter().map(IpAddr::to_canonical).filter(|a| !a.is_unspecified() && !a.is_multicast());
    own.into_iter().chain(reachable).take(MOST_ADDRESSES).collect()
}

fn make_authority() -> Result<AuthorityFile, AuthorityError> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut params = CertificateParams::new(Vec::<String>::new())?;
    // The name carries a piece of the key's hash, so that two appliances in one browser's list differ.
    let short: String = hex::encode(Sha256::digest(key.subject_public_key_info())).chars().take(8).collect();
    params.distinguished_name = name(&format!("agentd OS appliance authority {short}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    // The clock of a new machine may stand anywhere, and the pin must never run out.
    params.not_before = date_time_ymd(1970, 1, 1);
    params.not_after = date_time_ymd(9999, 12, 31) + Duration::from_secs(24 * 3600 - 1);
    let certificate = params.self_signed(&key)?;
    Ok(AuthorityFile {
        format: FORMAT,
        key_pkcs8_hex: hex::encode(key.serialized_der()),
        certificate_hex: hex::encode(certificate.der()),
    })
}

/// A file whose halves do not belong together would be served as an authority nobody can check.
fn check_pair(key: &KeyPair, certificate: &CertificateDer<'static>) -> Result<(), String> {
    let signing = ring::default_provider()
        .key_provider
        .load_private_key(PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialized_der().to_vec())))
        .map_err(|e| e.to_string())?;
    CertifiedKey::new(vec![certificate.clone()], signing).keys_match().map_err(|e| e.to_string())
}

fn name(common: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common);
    name
}

fn parse_key(pkcs8_hex: &str) -> Result<KeyPair, String> {
    let der = PrivatePkcs8KeyDer::from(bytes_of(pkcs8_hex)?);
    KeyPair::from_pkcs8_der_and_sign_algo(&der, &PKCS_ECDSA_P256_SHA256).map_err(|e| e.to_string())
}

fn read<T: for<'de> Deserialize<'de>>(
    files: &dyn StateFiles,
    file: &'static str,
) -> Result<Option<T>, AuthorityError> {
    let bytes = files.read(file).map_err(|source| AuthorityError::Read { file, source })?;
    let parse = |bytes: Vec<u8>| serde_json::from_slice(&bytes);
    bytes.map(parse).transpose().map_err(|e| AuthorityError::Damaged { file, why: e.to_string() })
}

fn write<T: Serialize>(
    files: &dyn StateFiles,
    file: &'static str,
    content: &T,
) -> Result<(), AuthorityError> {
    let failed = |source| AuthorityError::Write { file, source };
    let bytes = serde_json::to_vec(content).map_err(|e| failed(e.into()))?;
    files.write(file, &bytes).map_err(failed)
}

fn bytes_of(hex_text: &str) -> Result<Vec<u8>, String> {
    hex::decode(hex_text).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests;
