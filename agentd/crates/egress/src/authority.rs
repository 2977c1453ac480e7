//! By whom are agents told that they speak with the host, where the egress has ended TLS?
//!
//! Owns:  the egress's own certificate authority: a key of its own, apart from the console's, trusted by the roots of
//!        agents that have rules for the network and by nobody else. Certificates for hosts, made when they are needed.
//! In:    the authority as it was stored. Out: a TLS configuration for exactly one host.
//! Always: a certificate names one host, the one that was decided on; HTTP/1.1 is all that is offered (RFC 7301).
//! Never:  a file. Whoever owns the authority keeps it where no agent can read it.
//!
//! Certificates live as long as the authority: a machine's clock may stand anywhere, and whoever has the key could
//! make new ones all the same. They are never stored, and die with the process.

use crate::name::Host;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType, date_time_ymd,
};
use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

/// Hosts whose configuration is kept. A rule with a star may mean any number; making one takes a millisecond.
const KEPT_MOST: usize = 256;
const FORMAT: u32 = 1;

/// As it lies on the disk. Holds the private key.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stored {
    format: u32,
    key_pkcs8_hex: String,
    certificate_hex: String,
}

pub struct Authority {
    key: KeyPair,
    certificate: CertificateDer<'static>,
    /// One for all hosts of this process.
    leaf_key: KeyPair,
    kept: Mutex<HashMap<Host, Arc<ServerConfig>>>,
}

#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    #[error("the egress's authority is damaged: {0}")]
    Damaged(String),
    #[error("a certificate could not be made: {0}")]
    Make(#[from] rcgen::Error),
    #[error("TLS does not take the certificate: {0}")]
    Tls(#[from] rustls::Error),
}

impl Stored {
    /// A new authority.
    pub fn fresh() -> Result<Self, AuthorityError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::new(Vec::<String>::new())?;
        // A part of the key, so that two appliances in one list differ.
        let public = key.subject_public_key_info();
        let short = hex::encode(public.get(public.len().saturating_sub(4)..).unwrap_or_default());
        params.distinguished_name = name(&format!("agentd OS egress authority {short}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.not_before = date_time_ymd(1970, 1, 1);
        params.not_after = date_time_ymd(9999, 12, 31);
        let certificate = params.self_signed(&key)?;
        Ok(Self {
            format: FORMAT,
            key_pkcs8_hex: hex::encode(key.serialized_der()),
            certificate_hex: hex::encode(certificate.der()),
        })
    }
}

impl Authority {
    pub fn open(stored: &Stored) -> Result<Self, AuthorityError> {
        let damaged = |why: String| AuthorityError::Damaged(why);
        if stored.format != FORMAT {
            return Err(damaged(format!("it has format {}, this version reads {FORMAT}", stored.format)));
        }
        let bytes = |text: &str| hex::decode(text).map_err(|error| damaged(error.to_string()));
        let key =
            KeyPair::try_from(bytes(&stored.key_pkcs8_hex)?).map_err(|error| damaged(error.to_string()))?;
        let certificate = CertificateDer::from(bytes(&stored.certificate_hex)?);
        // Reads the certificate, so that a damaged one shows now.
        Issuer::from_ca_cert_der(&certificate, &key).map_err(|error| damaged(error.to_string()))?;
        let leaf_key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        Ok(Self { key, certificate, leaf_key, kept: Mutex::default() })
    }

    /// For the bundle of those who shall trust it.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// Serves exactly this host.
    pub fn serving(&self, host: &Host) -> Result<Arc<ServerConfig>, AuthorityError> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(config) = kept.get(host) {
            return Ok(Arc::clone(config));
        }
        let config = Arc::new(self.make(host)?);
        if kept.len() >= KEPT_MOST {
            kept.clear();
        }
        kept.insert(host.clone(), Arc::clone(&config));
        Ok(config)
    }

    fn make(&self, host: &Host) -> Result<ServerConfig, AuthorityError> {
        let mut params = CertificateParams::new(Vec::<String>::new())?;
        params.subject_alt_names = vec![match host {
            Host::Name(name) => SanType::DnsName(name.as_str().try_into()?),
            Host::Address(address) => SanType::IpAddress(*address),
        }];
        // A name may be longer than a common name can be (64, RFC 5280), and nobody reads it.
        params.distinguished_name = DistinguishedName::new();
        params.not_before = date_time_ymd(1970, 1, 1);
        params.not_after = date_time_ymd(9999, 12, 31);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        let issuer = Issuer::from_ca_cert_der(&self.certificate, &self.key)?;
        let leaf = params.signed_by(&self.leaf_key, &issuer)?;
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.leaf_key.serialized_der().to_vec()));
        let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(vec![leaf.der().clone(), self.certificate.clone()], key)?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        // Nothing to resume: the key dies with the process.
        config.send_tls13_tickets = 0;
        Ok(config)
    }
}

fn name(text: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, text);
    name
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Authority")
    }
}

impl fmt::Debug for Stored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Stored")
    }
}
