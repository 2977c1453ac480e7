//! Serves the console over the fake appliance of the tests, to look at the pages without a machine:
//! `cargo run -p agentd-console --example demo -- 8443`. Prints the claim code.

#[path = "../tests/fake/mod.rs"]
mod fake;

use agentd_console::{Auth, Authority, boot_clock, router, serve_tls};
use std::error::Error;
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let port: u16 = std::env::args().nth(1).map_or(Ok(8443), |text| text.parse())?;
    let files = Arc::new(fake::Files::default());
    let auth = Arc::new(Auth::open(files.clone(), boot_clock())?);
    let authority = Authority::open(files)?;
    authority.refresh(&[], fake::NOW_UNIX_MS / 1000)?;
    let listener = TcpListener::bind(("127.0.0.1", port)).await?;
    println!("console: https://{}", listener.local_addr()?);
    println!("fingerprint: {}", authority.fingerprint());
    println!("claim code: {}", auth.claim_code().unwrap_or_default());
    let router = router(Arc::new(fake::Fake::default()), auth);
    serve_tls(listener, authority.tls_config()?, router, CancellationToken::new()).await;
    Ok(())
}
