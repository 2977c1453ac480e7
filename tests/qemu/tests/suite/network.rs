//! The way out: an agent with rules reaches what they name through every door and nothing else, and the log says who was
//! let out by which rule.

use crate::packages;
use crate::web::Browser;
use agentd_domain::api::Agent;
use agentd_domain::audit::{Linked, Verdict};
use agentd_domain::plan::{NetworkPlan, SandboxPlan};
use anyhow::{Context, Result, ensure};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use tests_qemu::{Appliance, BOOT, Ctl, PASSWORD, Start, put_on_boot_partition};

/// A secret of the owner that must be seen by the host and by nobody else.
const SECRET: &str = "canary-5b1e0c7d-secret";

/// Servers of this machine; the guest's network shows it as 10.0.2.2.
struct Hosts {
    clear: u16,
    tls: u16,
    bytes: u16,
    authority_pem: String,
    /// The first lines and the `authorization` fields that arrived.
    seen: Arc<Mutex<Vec<String>>>,
}

impl Hosts {
    fn start() -> Result<Self> {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (config, authority_pem) = certificate("api.example.org")?;
        let in_clear = Arc::clone(&seen);
        let clear = listen(move |mut stream| drop(answer(&mut stream, &in_clear)))?;
        let in_tls = Arc::clone(&seen);
        let tls = listen(move |stream| {
            if let Ok(connection) = ServerConnection::new(Arc::clone(&config)) {
                let mut stream = StreamOwned::new(connection, stream);
                let _ = answer(&mut stream, &in_tls);
                stream.conn.send_close_notify();
                let _ = stream.flush();
            }
        })?;
        let in_bytes = Arc::clone(&seen);
        let bytes = listen(move |stream| {
            let mut line = String::new();
            let _ = BufReader::new(&stream).read_line(&mut line);
            in_bytes.lock().unwrap().push(line.trim_end().to_owned());
            let _ = (&stream).write_all(line.as_bytes());
        })?;
        Ok(Self { clear, tls, bytes, authority_pem, seen })
    }

    fn saw(&self, words: &str) -> usize {
        self.seen.lock().unwrap().iter().filter(|line| line.contains(words)).count()
    }
}

pub(crate) fn listen(serve: impl Fn(TcpStream) + Send + 'static) -> Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let port = listener.local_addr()?.port();
    std::thread::spawn(move || listener.incoming().flatten().for_each(serve));
    Ok(port)
}

/// Gives the request's head back, the secret in it included: a host that echoes.
fn answer<S: Read + Write>(stream: &mut S, seen: &Mutex<Vec<String>>) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    let text = String::from_utf8_lossy(&head).into_owned();
    let told = text.lines().filter(|line| line.starts_with("GET") || line.starts_with("authorization"));
    seen.lock().unwrap().extend(told.map(str::to_owned));
    write!(stream, "HTTP/1.1 200 OK\r\nX-Echo: {}\r\nContent-Length: {}\r\n\r\n{text}", SECRET, text.len())?;
    stream.flush()
}

/// A server's certificate for this host, and the certificate of its authority.
pub(crate) fn certificate(host: &str) -> Result<(Arc<ServerConfig>, String)> {
    let authority_key = KeyPair::generate()?;
    let mut params = CertificateParams::new(Vec::<String>::new())?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = params.self_signed(&authority_key)?;
    let key = KeyPair::generate()?;
    let issuer = Issuer::from_ca_cert_der(authority.der(), &authority_key)?;
    let leaf = CertificateParams::new(vec![host.to_owned()])?.signed_by(&key, &issuer)?;
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialized_der().to_vec()));
    let config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(vec![leaf.der().clone()], key)?;
    Ok((Arc::new(config), authority.pem()))
}

#[test]
fn an_agent_gets_out_by_its_rules_and_by_nothing_else() -> Result<()> {
    let hosts = Hosts::start()?;
    let mut appliance = Appliance::new()?;
    let settings = appliance.file("agentd.toml");
    std::fs::write(
        &settings,
        format!(
            "[[egress.private]]\nhost = \"nas.example.org\"\naddresses = [\"10.0.2.2\"]\n\
             [[egress.private]]\nhost = \"self.example.org\"\naddresses = [\"10.0.2.15\"]\n\
             [[egress.private]]\nhost = \"api.example.org\"\naddresses = [\"10.0.2.2\"]\nauthority = '''\n{}'''\n",
            hosts.authority_pem
        ),
    )?;
    put_on_boot_partition(&appliance.disk(), &settings)?;
    appliance.boot(&Start::default())?;
    appliance.claim()?;

    let net = format!(
        "[[net.allow]]\nhost = \"nas.example.org\"\nprotocol = \"http\"\nports = [{}]\n\
         [[net.allow]]\nhost = \"nas.example.org\"\nprotocol = \"tcp\"\nports = [{}]\n\
         [[net.allow]]\nhost = \"self.example.org\"\nports = [8443]\n\
         [[net.allow]]\nhost = \"api.example.org\"\nports = [{}]\npaths = [\"/v1/*\"]\nsecret = \"mail\"\n",
        hosts.clear, hosts.bytes, hosts.tls
    );
    let ports = [hosts.clear, hosts.tls, hosts.bytes].map(|port| port.to_string());
    let folder = packages::caller(&appliance.file("packages"), &ports, &net)?;
    let ctl = appliance.ctl();
    let plan: SandboxPlan = ctl.json(&["plan", folder.join("agent.toml").to_str().context("path")?])?;
    let NetworkPlan::Egress { rules, .. } = &plan.network else { anyhow::bail!("{:?}", plan.network) };
    let http_rule = format!("http://nas.example.org:{}", hosts.clear);
    ensure!(rules.len() == 4 && rules.contains(&http_rule), "{rules:?}");

    let folder = folder.to_str().context("path")?.to_owned();
    let mut installed = Ok(());
    appliance.until("the agent is installed", BOOT, |ctl| {
        let answer = ctl.run(&["agent", "install", &folder])?;
        installed = answer.success().map(drop);
        Ok(installed.is_ok().then_some(()))
    })?;
    ctl.input(&["secret", "set", "mail", "--agent", "caller"], &format!("{SECRET}\n"))?.success()?;
    let listed = ctl.run(&["secret", "ls"])?.success()?;
    ensure!(listed.contains("mail") && !listed.contains(SECRET), "{listed}");
    ctl.run(&["agent", "start", "caller"])?.success()?;
    let log = appliance.until("the agent has tried everything", BOOT, |ctl| {
        let log = ctl.run(&["agent", "logs", "caller"])?.success()?;
        Ok(log.contains("the visit is over").then_some(log))
    })?;
    the_rules_hold(&hosts, &log)?;
    the_log_names_the_rules(&ctl, &hosts, &http_rule)?;
    the_page_shows_it(&mut appliance)?;
    the_next_agentd_goes_on(&mut appliance, &hosts)
}

fn the_rules_hold(hosts: &Hosts, log: &str) -> Result<()> {
    let said = |name: &str| -> Result<String> {
        let start = format!("{name}: ");
        let line = log.lines().find_map(|line| line.split_once(&start).map(|(_, rest)| rest.to_owned()));
        line.with_context(|| format!("the agent said nothing of `{name}`: {log}"))
    };
    ensure!(said("HTTP_PROXY")? == "http://127.0.0.1:7071", "{log}");
    for (name, words) in
        [("proxied", "GET /proxied HTTP/1.1"), ("socks", "over socks"), ("caught", "GET /caught HTTP/1.1")]
    {
        ensure!(said(name)?.contains(words), "{name}: {log}");
        ensure!(hosts.saw(words) == 1, "{name}: the host saw {:?}", hosts.seen.lock().unwrap());
    }
    ensure!(said("caught")?.starts_with("198.1"), "not a synthetic address: {log}");
    // The host got the owner's secret in the place of the agent's; the agent sees stars where the host repeats it.
    ensure!(hosts.saw(&format!("authorization: Bearer {SECRET}")) == 1, "{:?}", hosts.seen.lock().unwrap());
    let ended = said("ended")?;
    ensure!(ended.contains("200 OK") && ended.contains(&"*".repeat(SECRET.len())), "{ended}");
    let visit = log.split("the visit is over").next().unwrap_or_default();
    let of_tls: Vec<&str> = visit.lines().filter(|line| line.contains("ended")).collect();
    ensure!(!of_tls.is_empty() && of_tls.iter().all(|line| !line.contains("canary")), "{of_tls:?}");
    ensure!(said("ended other path")?.contains("403 Forbidden") && hosts.saw("/v2/") == 0, "{log}");
    for name in [
        "another host",
        "another port",
        "the host by its address",
        "metadata",
        "console on loopback",
        "console on the network",
        "the appliance by a granted name",
    ] {
        let words = said(name)?;
        // What a rule names is accepted before it is dialled; then it ends without a byte.
        let refused = words.starts_with("HTTP/1.1 403") || words.starts_with("HTTP/1.1 502");
        ensure!(refused, "{name}: {words}");
    }
    for address in
        [&format!("10.0.2.2:{}", hosts.clear), "10.0.2.15:8443", "127.0.0.1:8443", "169.254.169.254:80"]
    {
        let words = said(&format!("direct {address}"))?;
        ensure!(
            words.starts_with("error: ") || words == "closed without a word",
            "direct {address}: {words}"
        );
    }
    ensure!(said("another name")?.starts_with("error: "), "{log}");
    Ok(())
}

fn records(ctl: &Ctl) -> Result<Vec<Linked>> {
    let text = ctl.run(&["audit", "ls", "--agent", "caller", "--limit", "200", "--json"])?.success()?;
    text.lines()
        .map(|line| serde_json::from_str(line).with_context(|| format!("no record: {line}")))
        .collect()
}

fn the_log_names_the_rules(ctl: &Ctl, hosts: &Hosts, http_rule: &str) -> Result<()> {
    let records = records(ctl)?;
    let find = |action: &str, verdict: Verdict, words: &str| {
        records.iter().map(|linked| &linked.record).find(|record| {
            record.action == action && record.verdict == verdict && record.detail.contains(words)
        })
    };
    let by = |right: &Option<String>, rule: &str| right.as_deref() == Some(&*format!("net {rule}"));
    let allowed = find("net.request", Verdict::Allowed, "proxy GET nas.example.org").context("proxied")?;
    ensure!(by(&allowed.right, http_rule), "{allowed:?}");
    ensure!(find("net.request", Verdict::Allowed, "caught GET nas.example.org").is_some(), "{records:#?}");
    let socks = find("net.connect", Verdict::Allowed, "SOCKS nas.example.org").context("socks")?;
    ensure!(by(&socks.right, &format!("tcp://nas.example.org:{}", hosts.bytes)), "{socks:?}");
    for (action, words) in [
        ("net.connect", "evil.example.org"),
        ("net.connect", "169.254.169.254:80"),
        ("net.connect", "127.0.0.1:8443"),
        ("net.connect", "10.0.2.15:8443"),
        ("net.end", "self.example.org:8443: 10.0.2.15 is this appliance itself"),
        ("net.request", "GET /v2/echo api.example.org"),
        ("net.resolve", "mzxw6ytboi.evil.example.org"),
    ] {
        // The words may stand in another order than here: each is looked for.
        let found = records.iter().map(|linked| &linked.record).any(|record| {
            record.action == action
                && record.verdict == Verdict::Denied
                && words.split(' ').all(|word| record.detail.contains(word.trim_end_matches(':')))
        });
        ensure!(found, "no denial of {words}: {records:#?}");
    }
    let text = format!("{records:?}");
    ensure!(!text.contains("canary"), "the log holds the secret");
    Ok(())
}

/// What its owner sees on the agent's page: whom it reached by which rule, and what was denied.
fn the_page_shows_it(appliance: &mut Appliance) -> Result<()> {
    let fingerprint = appliance.said("fingerprint: ")?;
    let browser = Browser::new(appliance, "owner", &fingerprint)?;
    browser.post("/sign-in", &[("password", PASSWORD)])?.leads_to("/")?;
    browser.get("/agents/caller")?.with_status(200)?.says(&["Audit trail", "net."])?;
    let page = browser.get("/audit?agent=caller")?.with_status(200)?;
    page.says(&["net.connect", "denied", "169.254.169.254:80", "net.request", "nas.example.org"])
}

/// The run's sockets are its own: a new agentd serves them by the rules that the run was started with.
fn the_next_agentd_goes_on(appliance: &mut Appliance, hosts: &Hosts) -> Result<()> {
    let living = |ctl: &Ctl| -> Result<Option<i32>> {
        let agents: Vec<Agent> = ctl.json(&["agent", "ls"])?;
        let caller = agents.into_iter().find(|agent| agent.name.as_str() == "caller");
        Ok(caller.and_then(|agent| agent.run).map(|run| run.pid))
    };
    let before = living(&appliance.ctl())?.context("the agent does not run")?;
    appliance.type_and_hear("a", "restart agentd now?")?;
    appliance.type_and_hear("y", "done")?;
    let fingerprint = appliance.said("fingerprint: ")?;
    appliance.until("the new agentd lets the owner in", BOOT, |ctl| {
        if ctl.run(&["status"])?.code == Some(0) {
            return Ok(None);
        }
        let arguments = ["login", "--fingerprint", &fingerprint, "--password-stdin"];
        ctl.input(&arguments, &format!("{PASSWORD}\n"))?.success().map(Some)
    })?;
    let after = appliance.until("the agent lives on", BOOT, living)?;
    ensure!(before == after, "the agent was started again");
    let seen = hosts.saw("/again");
    appliance.until("the agent gets out again", BOOT, |_| Ok((hosts.saw("/again") > seen + 1).then_some(())))
}
