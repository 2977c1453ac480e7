//! Is this server the appliance?
//!
//! The appliance has an authority of its own, so no public root helps; what counts is the SHA-256 of that
//! authority's key, which its owner has seen on its screen. The server sends its certificate and the authority's.
//! The authority's key must be the pinned one, it must have signed the server's certificate, and the server must
//! prove that it holds that certificate's key.
//!
//! Not checked, on purpose: the name, because an appliance is reached through forwarded ports and changing
//! addresses, and its authority signs for no other machine; and the dates, because a clock that stands wrong,
//! here or there, must not lock the owner out.
//!
//! Source: RFC 7469, 2.4 (pins), RFC 5280.

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{WebPkiSupportedAlgorithms, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, DigitallySignedStruct, Error, OtherError, RootCertStore, SignatureScheme};
use sha2::{Digest, Sha256};
use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;

/// SHA-256 of the authority's SubjectPublicKeyInfo.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pin([u8; 32]);

impl FromStr for Pin {
    type Err = String;
    /// 64 hexadecimal digits in any case, with or without colons and spaces between them.
    fn from_str(text: &str) -> Result<Self, String> {
        let digits: String = text.chars().filter(|c| !c.is_whitespace() && *c != ':').collect();
        let mut bytes = [0; 32];
        hex::decode_to_slice(&digits, &mut bytes).map_err(|_| {
            "a fingerprint is 64 hexadecimal digits, as the appliance's screen shows".to_owned()
        })?;
        Ok(Self(bytes))
    }
}

impl fmt::Display for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

/// What to ask of the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Demand {
    /// The key of this authority.
    Authority(Pin),
    /// Any authority, to show its fingerprint to a person. Nothing secret may be sent.
    Any,
}

#[derive(Debug)]
pub struct Verifier {
    demand: Demand,
    algorithms: WebPkiSupportedAlgorithms,
    /// The authority that the server showed, right or wrong.
    seen: Mutex<Option<Pin>>,
}

#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("the server sent no authority")]
    NoAuthority,
    #[error("the server's authority is another one")]
    OtherAuthority,
    #[error("a certificate cannot be read")]
    Unreadable,
}

impl Verifier {
    pub fn new(demand: Demand) -> Arc<Self> {
        let algorithms = ring::default_provider().signature_verification_algorithms;
        Arc::new(Self { demand, algorithms, seen: Mutex::new(None) })
    }

    pub fn demand(&self) -> Demand {
        self.demand
    }

    pub fn seen(&self) -> Option<Pin> {
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The authority among what the server sent: the pinned one, or the last of the chain.
    fn authority<'a>(&self, chain: &'a [CertificateDer<'a>]) -> Result<&'a CertificateDer<'a>, Refused> {
        let last = chain.last().ok_or(Refused::NoAuthority)?;
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = Some(pin_of(last)?);
        match self.demand {
            Demand::Any => Ok(last),
            Demand::Authority(pin) => chain
                .iter()
                .find(|certificate| pin_of(certificate).is_ok_and(|own| own == pin))
                .ok_or(Refused::OtherAuthority),
        }
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let authority = self.authority(intermediates).map_err(refused)?;
        let mut roots = RootCertStore::empty();
        roots.add(authority.clone().into_owned())?;
        let parsed = ParsedCertificate::try_from(end_entity)?;
        let moment = within_life(end_entity, now).map_err(refused)?;
        verify_server_cert_signed_by_trust_anchor(&parsed, &roots, &[], moment, self.algorithms.all)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

fn pin_of(certificate: &CertificateDer<'_>) -> Result<Pin, Refused> {
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|_| Refused::Unreadable)?;
    Ok(Pin(Sha256::digest(parsed.tbs_certificate.subject_pki.raw).into()))
}

/// The moment closest to now at which the certificate was valid: its dates are not to count.
fn within_life(certificate: &CertificateDer<'_>, now: UnixTime) -> Result<UnixTime, Refused> {
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|_| Refused::Unreadable)?;
    let validity = parsed.validity();
    let seconds = |timestamp: i64| u64::try_from(timestamp).unwrap_or(0);
    let (first, last) = (seconds(validity.not_before.timestamp()), seconds(validity.not_after.timestamp()));
    let moment = now.as_secs().clamp(first, last.max(first));
    Ok(UnixTime::since_unix_epoch(Duration::from_secs(moment)))
}

fn refused(why: Refused) -> Error {
    Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(why))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_fingerprint_is_read_as_people_copy_it(bytes in any::<[u8; 32]>(), upper in any::<bool>(), colons in any::<bool>()) {
            let pin = Pin(bytes);
            let mut text = pin.to_string();
            if upper { text = text.to_uppercase(); }
            if colons {
                let pairs: Vec<&str> = text.as_bytes().chunks(2).map(|p| std::str::from_utf8(p).expect("ASCII")).collect();
                text = pairs.join(":");
            }
            prop_assert_eq!(format!(" {text}\n").parse(), Ok(pin));
        }

        #[test]
        fn anything_else_is_none(text in "\\PC{0,63}") {
            prop_assert!(text.parse::<Pin>().is_err());
        }
    }
}
