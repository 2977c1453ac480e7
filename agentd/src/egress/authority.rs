//! Where is the egress's authority, and who is told to trust it?
//!
//! Owns:  its file on the state partition, in two copies, made when agentd first starts; the bundle below `/run` that
//!        runs with rules for the network see in the place of the image's: the image's authorities and this one.
//! Always: the bundle is written anew at each start of agentd, before any agent is; an image's authorities may have
//!         changed. It holds certificates and no key.

use super::unusable;
use crate::places::Places;
use agentd_domain::config::PrivateHost;
use agentd_domain::fault::Report;
use agentd_domain::paths::inside;
use agentd_egress::Ending;
use agentd_egress::authority::{Authority, Stored};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use init_sys::twofile::TwoFile;
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;

const WHAT: &str = "the egress does not end TLS: rules with methods, paths or secrets let nothing out";

/// Blocks for the files. On failure nothing is ended.
pub(super) fn open(places: &Places, private: &[PrivateHost]) -> Result<Ending, Report> {
    let authority = Arc::new(authority(&places.egress_authority())?);
    // Without one there are no public authorities, and no public host can be verified.
    let image = fs::read(inside::CA_BUNDLE).unwrap_or_default();
    write_bundle(&places.egress_bundle(), &image, authority.certificate())
        .map_err(|error| unusable("egress_bundle", WHAT, error))?;
    let mut public = RootCertStore::empty();
    public.add_parsable_certificates(CertificateDer::pem_slice_iter(&image).flatten());
    let mut known = Vec::new();
    for host in private {
        let Some(pem) = &host.authority else { continue };
        let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
        match certificates {
            Ok(certificates) if !certificates.is_empty() => known.push((host.host.clone(), certificates)),
            _ => return Err(bad_authority(host)),
        }
    }
    Ending::new(authority, &public, known).map_err(|error| unusable("egress_roots", WHAT, error))
}

fn authority(path: &Path) -> Result<Authority, Report> {
    let failed = |why: String| unusable("egress_authority", WHAT, format!("{}: {why}", path.display()));
    let file = TwoFile::new(path);
    let stored = match file.read().map_err(|error| failed(error.to_string()))? {
        Some(bytes) => serde_json::from_slice(&bytes).map_err(|_| failed("it is damaged".to_owned()))?,
        None => {
            let fresh = Stored::fresh().map_err(|error| failed(error.to_string()))?;
            let bytes = serde_json::to_vec(&fresh).map_err(|error| failed(error.to_string()))?;
            file.write(&bytes).map_err(|error| failed(error.to_string()))?;
            fresh
        }
    };
    Authority::open(&stored).map_err(|error| failed(error.to_string()))
}

/// Put in place whole: a run that starts meanwhile sees the old one or the new one.
fn write_bundle(path: &Path, image: &[u8], own: &CertificateDer<'_>) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    if !folder.is_dir() {
        // On the appliance init has made it.
        fs::DirBuilder::new().recursive(true).mode(0o755).create(folder)?;
    }
    let fresh = path.with_extension("new");
    let mut file = fs::File::create(&fresh)?;
    file.set_permissions(fs::Permissions::from_mode(0o644))?;
    file.write_all(image)?;
    if !image.is_empty() && !image.ends_with(b"\n") {
        file.write_all(b"\n")?;
    }
    file.write_all(pem(own).as_bytes())?;
    drop(file);
    fs::rename(fresh, path)
}

/// RFC 7468, 5: lines of 64 characters.
pub(super) fn pem(certificate: &CertificateDer<'_>) -> String {
    let text = STANDARD.encode(certificate);
    let mut pem = "-----BEGIN CERTIFICATE-----\n".to_owned();
    for (index, letter) in text.chars().enumerate() {
        if index > 0 && index % 64 == 0 {
            pem.push('\n');
        }
        pem.push(letter);
    }
    pem + "\n-----END CERTIFICATE-----\n"
}

fn bad_authority(host: &PrivateHost) -> Report {
    Report::caller(
        "egress_host_authority",
        WHAT,
        format!("the `authority` of {} in agentd.toml is no certificate", host.host),
        "write the certificate as PEM text, from `-----BEGIN CERTIFICATE-----` on",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_authority_stays_the_same_and_its_bundle_holds_certificates_alone() {
        let root = tempfile::tempdir().unwrap();
        let places = Places::below(root.path());
        fs::create_dir_all(&places.state_agentd).unwrap();
        open(&places, &[]).unwrap();
        let first = fs::read_to_string(places.egress_bundle()).unwrap();
        open(&places, &[]).unwrap();
        assert_eq!(fs::read_to_string(places.egress_bundle()).unwrap(), first);
        assert!(!first.contains("PRIVATE"));
        let certificates: Vec<_> =
            CertificateDer::pem_slice_iter(first.as_bytes()).map(Result::unwrap).collect();
        let own = authority(&places.egress_authority()).unwrap();
        assert_eq!(certificates.last().unwrap(), own.certificate());
    }

    #[test]
    fn a_damaged_authority_is_said_and_not_replaced() {
        let root = tempfile::tempdir().unwrap();
        let places = Places::below(root.path());
        fs::create_dir_all(&places.state_agentd).unwrap();
        TwoFile::new(places.egress_authority()).write(b"{}").unwrap();
        let report = open(&places, &[]).err().unwrap();
        assert_eq!(report.code, "egress_authority");
        assert_eq!(TwoFile::new(places.egress_authority()).read().unwrap().unwrap(), b"{}");
    }
}
