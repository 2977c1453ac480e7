//! How is TLS ended for an agent and begun anew to the host?
//!
//! In:     a connection whose handshake was found to name the host; a connection to the address that was vetted.
//! Out:    both without TLS, for [`crate::relay`] to read requests from one and write them to the other.
//! Always: the host is verified by its real name against the public authorities, or those that the owner has given for
//!         exactly this host; HTTP/1.1 is all that is offered to either side. A client that offers HTTP/2 as well gets
//!         HTTP/1.1 (ALPN, RFC 7301); one that offers HTTP/2 alone gets the alert `no_application_protocol`; one that
//!         begins with HTTP/2 unasked gets 505. A host that speaks HTTP/2 alone cannot be reached by a rule that looks
//!         inside TLS; by one that does not, whatever both sides speak passes.
//! Never:  a host that could not be verified: the agent's own check has been taken from it, so this one is the only.

use crate::authority::Authority;
use crate::name::Host;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use std::collections::HashMap;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_rustls::client::TlsStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// A stream of whatever kind. With one type for all ended streams a stream inside a stream stays one type.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}
pub(crate) type Ended = Box<dyn Stream>;

/// Both ends of TLS.
#[derive(Clone)]
pub struct Ending {
    authority: Arc<Authority>,
    public: TlsConnector,
    /// For hosts that the owner knows by a certificate.
    known: HashMap<Host, TlsConnector>,
}

impl Ending {
    /// `known`: certificates by which a host is verified besides the public authorities.
    pub fn new(
        authority: Arc<Authority>,
        public: &RootCertStore,
        known: Vec<(Host, Vec<CertificateDer<'static>>)>,
    ) -> Result<Self, rustls::Error> {
        let mut connectors = HashMap::new();
        for (host, certificates) in known {
            let mut roots = public.clone();
            for certificate in certificates {
                roots.add(certificate)?;
            }
            connectors.insert(host, connector(roots)?);
        }
        Ok(Self { authority, public: connector(public.clone())?, known: connectors })
    }

    /// Answers the agent's handshake as this host.
    pub(crate) async fn accept<S>(&self, stream: S, host: &Host) -> io::Result<Ended>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let config = self.authority.serving(host).map_err(io::Error::other)?;
        Ok(Box::new(TlsAcceptor::from(config).accept(stream).await?))
    }

    /// Begins TLS to this host, and no other.
    pub(crate) async fn connect<S>(&self, stream: S, host: &Host) -> io::Result<Ended>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        Ok(Box::new(self.client(stream, host).await?))
    }

    /// The same for a connection that is not a relay's.
    pub async fn client<S>(&self, stream: S, host: &Host) -> io::Result<TlsStream<S>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let name = match host {
            Host::Name(name) => ServerName::try_from(name.as_str().to_owned()).map_err(io::Error::other)?,
            Host::Address(address) => ServerName::from(*address),
        };
        let connector = self.known.get(host).unwrap_or(&self.public);
        connector.connect(name, stream).await
    }
}

fn connector(roots: RootCertStore) -> Result<TlsConnector, rustls::Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsConnector::from(Arc::new(config)))
}

/// A stream of which some bytes were read already.
pub(crate) struct Prefixed<S> {
    pub(crate) unread: Vec<u8>,
    pub(crate) stream: S,
}

impl<S: AsyncRead + Unpin> AsyncRead for Prefixed<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.unread.is_empty() {
            return Pin::new(&mut self.stream).poll_read(cx, buffer);
        }
        let count = self.unread.len().min(buffer.remaining());
        let taken: Vec<u8> = self.unread.drain(..count).collect();
        buffer.put_slice(&taken);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Prefixed<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
