//! The web console as a person uses it whose browser runs no scripts: pages, plain forms, a cookie.
//!
//! curl is the browser. It trusts the appliance's own authority and nothing else, after comparing its key with the
//! fingerprint on the serial line, as the owner is asked to. What the pages say of the machine is compared with what
//! the API says of it.

use agentd_domain::api::{Agent, ApplianceStatus, EngineState};
use agentd_domain::human;
use anyhow::{Context, Result, bail, ensure};
use std::cell::Cell;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use tests_qemu::{Appliance, BOOT, PASSWORD, Start};

const FACT: &str = "The spare key hangs behind the blue door.";
const QUESTION: &str = "Where is the spare key?";

/// For a whole answer of `echo` where QEMU emulates on a busy machine.
const REPLY: Duration = Duration::from_secs(600);

/// Every page that somebody who is signed in can look at.
const PAGES: [&str; 4] = ["/", "/agents", "/agents/echo", "/models"];

#[test]
fn an_owner_without_scripts_claims_looks_talks_and_leaves() -> Result<()> {
    let mut appliance = Appliance::new()?;
    appliance.boot(&Start::default())?;
    let code = appliance.said("claim code: ")?;
    let fingerprint = appliance.said("fingerprint: ")?;
    let browser = Browser::new(&mut appliance, "owner", &fingerprint)?;

    becomes_the_owner(&browser, &code)?;
    appliance.login()?;
    overview_says_how_the_machine_is(&mut appliance, &browser)?;
    agents_stand_with_state_and_limits(&mut appliance, &browser)?;
    echo_takes_a_message(&mut appliance, &browser)?;
    only_our_pages_steer(&mut appliance, &browser)?;
    nothing_is_shown_without_the_cookie(&mut appliance, &fingerprint)?;
    leaves_and_comes_back(&mut appliance, &browser)?;
    Ok(())
}

fn becomes_the_owner(browser: &Browser, code: &str) -> Result<()> {
    for page in ["/", "/sign-in", "/agents"] {
        browser.get(page)?.leads_to("/claim")?;
    }
    let page = browser.get("/claim")?.with_status(200)?;
    page.says(&["Claim this appliance", "name=\"code\"", "name=\"again\"", "10 characters or more"])?;

    let wrong = if code.starts_with('A') { "BBBB-BBBB-BBBB" } else { "AAAA-AAAA-AAAA" };
    let form =
        |code, again| browser.post("/claim", &[("code", code), ("password", PASSWORD), ("again", again)]);
    let refused = form(wrong, PASSWORD)?.with_status(400)?;
    refused.says(&["The claim code is wrong", "What to do", "serial line", "claim_code_wrong"])?;
    form(code, "something else")?.with_status(400)?.says(&["The two passwords differ", code])?;

    let claimed = form(code, PASSWORD)?.leads_to("/")?;
    let cookie = claimed.header("set-cookie");
    for words in ["__Host-", "Secure", "HttpOnly", "SameSite=Strict", "Path=/"] {
        ensure!(cookie.contains(words), "the cookie lacks {words}: {cookie}");
    }
    browser.get("/claim")?.leads_to("/sign-in").map(drop)
}

fn overview_says_how_the_machine_is(appliance: &mut Appliance, browser: &Browser) -> Result<()> {
    // What settles last: both models are loaded. A confirmed clock is not waited for, some machines have no network.
    let status = appliance.until("the engine has both models", BOOT, |ctl| {
        let status: ApplianceStatus = ctl.json(&["status"])?;
        let ready = matches!(&status.engine, EngineState::Ready { models, .. } if models.len() >= 2);
        Ok((ready && !status.devices.is_empty() && !status.addresses.is_empty()).then_some(status))
    })?;
    let EngineState::Ready { backend, models, .. } = &status.engine else { bail!("{:?}", status.engine) };
    let page = appliance.until("the page says that the engine is ready", BOOT, |_| {
        let page = browser.get("/")?.with_status(200)?;
        Ok(page.body.contains(">Ready</span>").then_some(page))
    })?;

    page.fact("Version", &status.version)?;
    page.fact("Slot", "direct")?;
    page.fact("Clock", "UTC")?;
    let up = page.fact("Up for", "")?;
    ensure!(up.starts_with(|c: char| c.is_ascii_digit()), "up for {up:?}");
    for address in &status.addresses {
        page.fact("Addresses", address)?;
    }
    let variant = backend.trim_start_matches("libggml-").trim_end_matches(".so");
    page.fact("Back end", variant)?;
    let memory = format!(" of {}", human::bytes(status.memory_total_bytes));
    let data = format!(" of {}", human::bytes(status.data_total_bytes));
    page.says(&["Memory in use", &memory, "for agentd", "Data partition in use", &data])?;
    page.says(&["Engine", "/agents/echo", "Restart", "Shut down"])?;
    for device in &status.devices {
        page.says(&[&escaped(&device.name), &escaped(&device.description)])?;
    }
    for model in models {
        page.says(&[&escaped(&model.model), &escaped(&model.architecture)])?;
    }
    let clock = ["not confirmed", "from the network"];
    ensure!(clock.iter().any(|words| page.body.contains(words)), "the clock's state is not on the page");

    // What a page needs besides itself comes from us, and may be kept.
    for asset in page.body.split('"').filter(|part| part.starts_with("/assets/")) {
        let answer = browser.get(asset)?.with_status(200)?;
        ensure!(!answer.body.is_empty() && answer.header("cache-control").contains("immutable"), "{asset}");
    }
    browser.get("/models")?.with_status(200)?.says(&["Loaded", "the image", "default"])
}

fn agents_stand_with_state_and_limits(appliance: &mut Appliance, browser: &Browser) -> Result<()> {
    appliance.until("the list says that echo runs", BOOT, |_| {
        let page = browser.get("/agents")?.with_status(200)?;
        Ok([">Ready<", ">Busy<", ">Idle<"].iter().any(|state| page.body.contains(state)).then_some(()))
    })?;
    let list = browser.get("/agents")?;
    // The limits of rootfs/agents/echo/agent.toml.
    list.says(&["/agents/echo", " of 64 MiB", " of 16", "at most 50 % of one core"])?;
    let page = browser.get("/agents/echo")?.with_status(200)?;
    page.says(&["Use and limits", " of 64 MiB", " of 16", "at most 64 MiB, 1000 files", "at most 8.0 MiB"])?;
    page.fact("Version", "bundled")?;
    page.fact("Restarts", "0")?;
    appliance.until("echo's page shows its log", BOOT, |_| {
        let page = browser.get("/agents/echo")?;
        Ok(page.body.contains("echo is awake").then_some(()))
    })?;
    let missing = browser.get("/agents/nobody")?.with_status(404)?;
    missing.says(&["There is no agent", "What to do", "Back to the overview"])
}

fn echo_takes_a_message(appliance: &mut Appliance, browser: &Browser) -> Result<()> {
    say(browser, FACT)?.says(&["remembered: "])?;
    let answer = say(browser, QUESTION)?;
    answer.says(&[&format!("recalled: {FACT}")])?;
    // Reloading by address is no dead end.
    browser.get("/agents/echo/chat")?.leads_to("/agents/echo")?;
    appliance.until("the log tells of both answers", BOOT, |_| {
        let page = browser.get("/agents/echo")?;
        Ok((page.body.matches(" is answered").count() >= 2).then_some(()))
    })
}

/// Sends a message with the form of echo's page, then looks again with the page's own button until the reply is whole.
fn say(browser: &Browser, text: &str) -> Result<Page> {
    let form = browser.get("/agents/echo")?;
    let key = form.hidden("key")?;
    let deadline = Instant::now() + REPLY;
    loop {
        let page = browser.post("/agents/echo/chat", &[("key", &key), ("text", text)])?.with_status(200)?;
        page.says(&[&format!("<div class=\"bubble me\">{}</div>", escaped(text))])?;
        if !page.body.contains("Look again") {
            let talk = page.body.split_once("id=\"talk\"").context("no conversation")?.1;
            let talk = talk.split_once("<form").context("no form")?.0;
            ensure!(!talk.contains("class=\"problem"), "echo did not answer: {talk}");
            return Ok(page);
        }
        ensure!(page.hidden("key")? == key, "the button is for another message");
        ensure!(Instant::now() < deadline, "no whole answer to {text:?} in {} s: {page:?}", REPLY.as_secs());
    }
}

/// The browser is signed in, and still: what another site's page makes it send does nothing.
fn only_our_pages_steer(appliance: &mut Appliance, browser: &Browser) -> Result<()> {
    let foreign = ["Origin: https://elsewhere.example", "Sec-Fetch-Site: cross-site"];
    for path in ["/agents/echo/stop", "/poweroff", "/sign-out"] {
        let refused = browser.request(path, &foreign, Some(&[]))?.with_status(403)?;
        refused.says(&["page of another site"])?;
    }
    let agents: Vec<Agent> = appliance.ctl().json(&["agent", "ls"])?;
    ensure!(agents.iter().all(|agent| agent.wanted), "a foreign page stopped echo: {agents:?}");
    browser.get("/")?.with_status(200).map(drop)
}

fn nothing_is_shown_without_the_cookie(appliance: &mut Appliance, fingerprint: &str) -> Result<()> {
    let stranger = Browser::new(appliance, "stranger", fingerprint)?;
    for page in PAGES {
        stranger.get(page)?.leads_to("/sign-in")?;
    }
    for form in ["/agents/echo/stop", "/agents/echo/chat", "/reboot", "/poweroff", "/sign-out"] {
        stranger.post(form, &[("text", "hello")])?.leads_to("/sign-in")?;
    }
    let api = stranger.get("/api/v1/status")?.with_status(401)?;
    ensure!(!api.body.contains("10.0.2.15"), "{api:?}");
    Ok(())
}

fn leaves_and_comes_back(appliance: &mut Appliance, browser: &Browser) -> Result<()> {
    // Somebody who copied the cookie before its owner signed out.
    let thief = browser.copied(&appliance.file("thief.cookies"))?;
    thief.get("/")?.with_status(200)?;
    let out = browser.post("/sign-out", &[])?.leads_to("/sign-in")?;
    ensure!(out.header("set-cookie").contains("Max-Age=0"), "{out:?}");
    browser.get("/")?.leads_to("/sign-in")?;
    thief.get("/")?.leads_to("/sign-in")?;

    browser.get("/sign-in")?.with_status(200)?.says(&["name=\"password\""])?;
    let wrong = browser.post("/sign-in", &[("password", "not the password at all")])?.with_status(401)?;
    wrong.says(&["You were not signed in", "The password is wrong", "What to do"])?;
    browser.post("/sign-in", &[("password", PASSWORD)])?.leads_to("/")?;
    let back = browser.get("/")?.with_status(200)?;
    back.says(&["/agents/echo"])?;
    thief.get("/")?.leads_to("/sign-in").map(drop)
}

// --- The browser -----------------------------------------------------------------------------------------

/// A cookie jar and an authority that is trusted.
pub struct Browser {
    host: String,
    authority: PathBuf,
    jar: PathBuf,
    folder: PathBuf,
    requests: Cell<u32>,
}

impl Browser {
    /// Asks the appliance for its authority and trusts it if its key has this fingerprint.
    pub fn new(appliance: &mut Appliance, name: &str, fingerprint: &str) -> Result<Self> {
        let host = appliance.ctl().host().to_owned();
        let folder = appliance.file(&format!("browser-{name}"));
        fs::create_dir_all(&folder)?;
        let chain = appliance.until("the console shows its certificates", BOOT, |_| {
            let chain = certificates(&host)?;
            Ok((chain.len() == 2).then_some(chain))
        })?;
        let authority = chain.last().context("no authority")?;
        let own = key_hash(authority)?;
        let told: String = fingerprint.chars().filter(char::is_ascii_hexdigit).collect();
        ensure!(own == told.to_lowercase(), "the authority has {own}, the serial line says {fingerprint}");
        let file = folder.join("authority.pem");
        fs::write(&file, authority)?;
        let jar = folder.join("cookies");
        Ok(Self { host, authority: file, jar, folder, requests: Cell::new(0) })
    }

    /// The same browser elsewhere, with the cookies of this moment.
    fn copied(&self, jar: &Path) -> Result<Self> {
        fs::copy(&self.jar, jar)?;
        let (host, authority, folder) = (self.host.clone(), self.authority.clone(), self.folder.clone());
        Ok(Self { host, authority, jar: jar.to_owned(), folder, requests: Cell::new(0) })
    }

    pub fn get(&self, path: &str) -> Result<Page> {
        self.request(path, &["Sec-Fetch-Site: none"], None)
    }

    /// A form of our own pages. They forbid a referrer, so a browser's `Origin` is `null`.
    pub fn post(&self, path: &str, fields: &[(&str, &str)]) -> Result<Page> {
        self.request(path, &["Origin: null", "Sec-Fetch-Site: same-origin"], Some(fields))
    }

    /// Checks what every answer must have, whatever it is.
    fn request(&self, path: &str, headers: &[&str], fields: Option<&[(&str, &str)]>) -> Result<Page> {
        self.requests.set(self.requests.get() + 1);
        let (head, body) = (self.folder.join("head"), self.folder.join("body"));
        let mut curl = Command::new("curl");
        // Over HTTP/2 Debian 12's curl (7.88) drops an answer that comes before its form was read: the server then
        // ends the stream with NO_ERROR, which a client must not take for a failure (RFC 9113, 8.1).
        curl.args(["--disable", "--silent", "--show-error", "--http1.1", "--max-time", "120"]);
        curl.arg("--cacert").arg(&self.authority);
        curl.arg("--cookie").arg(&self.jar).arg("--cookie-jar").arg(&self.jar);
        curl.arg("--dump-header").arg(&head).arg("--output").arg(&body);
        for header in headers {
            curl.args(["--header", header]);
        }
        if let Some(fields) = fields {
            curl.args(["--request", "POST"]);
            if fields.is_empty() {
                curl.args(["--data", ""]);
            }
            for (name, value) in fields {
                curl.args(["--data-urlencode", &format!("{name}={value}")]);
            }
        }
        curl.arg(format!("{}{path}", self.host));
        fs::write(&body, "")?;
        let output = curl.stdin(Stdio::null()).output().context("cannot start curl: apt-get install curl")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{path}, request {}: {}", self.requests.get(), said.trim());
        let page = Page {
            path: path.to_owned(),
            head: fs::read_to_string(&head)?,
            body: String::from_utf8_lossy(&fs::read(&body)?).into_owned(),
        };
        page.is_strict()?;
        Ok(page)
    }
}

#[derive(Debug)]
pub struct Page {
    path: String,
    head: String,
    body: String,
}

impl Page {
    fn status(&self) -> Result<u16> {
        let word = self.head.split_whitespace().nth(1).context("no status line")?;
        word.parse().with_context(|| self.head.clone())
    }

    /// Empty when it is not there.
    fn header(&self, name: &str) -> &str {
        let mut pairs = self.head.lines().filter_map(|line| line.split_once(':'));
        pairs.find(|(own, _)| own.eq_ignore_ascii_case(name)).map_or("", |(_, value)| value.trim())
    }

    pub fn with_status(self, status: u16) -> Result<Self> {
        ensure!(self.status()? == status, "not {status}: {self:?}");
        Ok(self)
    }

    pub fn leads_to(self, path: &str) -> Result<Self> {
        ensure!(
            self.status()? == 303 && self.header("location") == path,
            "does not lead to {path}: {self:?}"
        );
        Ok(self)
    }

    pub fn says(&self, words: &[&str]) -> Result<()> {
        for word in words {
            ensure!(self.body.contains(word), "{} does not say {word:?}:\n{}", self.path, self.body);
        }
        Ok(())
    }

    /// The text of `<dt>name</dt><dd>text</dd>`, which must hold these words.
    fn fact(&self, name: &str, words: &str) -> Result<String> {
        let begin = format!("<dt>{name}</dt><dd>");
        let (_, after) = self.body.split_once(&begin).with_context(|| format!("no {name}: {}", self.body))?;
        let (markup, _) = after.split_once("</dd>").context("no end of a fact")?;
        let pieces = markup.split('<').map(|piece| piece.split_once('>').map_or(piece, |(_, text)| text));
        let text = pieces.collect::<Vec<_>>().concat();
        ensure!(!text.trim().is_empty() && text.contains(words), "{name} is {text:?}, without {words:?}");
        Ok(text)
    }

    /// The value of the page's first hidden field of this name.
    fn hidden(&self, name: &str) -> Result<String> {
        let begin = format!("name=\"{name}\" value=\"");
        let (_, after) = self.body.split_once(&begin).with_context(|| format!("no field {name}"))?;
        Ok(after.split_once('"').context("no end of a value")?.0.to_owned())
    }

    /// agentd/crates/console/src/headers.rs says why, and why there is no Strict-Transport-Security.
    fn is_strict(&self) -> Result<()> {
        let policy = self.header("content-security-policy");
        let good = policy.starts_with("default-src 'none'")
            && policy.contains("frame-ancestors 'none'")
            && policy.contains("form-action 'self'")
            && !policy.contains("unsafe");
        ensure!(good, "{}: its policy is {policy:?}", self.path);
        for (name, value) in [
            ("x-content-type-options", "nosniff"),
            ("x-frame-options", "DENY"),
            ("referrer-policy", "no-referrer"),
            ("cross-origin-opener-policy", "same-origin"),
            ("cross-origin-resource-policy", "same-origin"),
            ("cross-origin-embedder-policy", "require-corp"),
            ("strict-transport-security", ""),
        ] {
            ensure!(self.header(name) == value, "{}: {name} is {:?}", self.path, self.header(name));
        }
        if !self.path.starts_with("/assets/") {
            ensure!(self.header("cache-control") == "no-store", "{} may be kept", self.path);
        }
        for forbidden in ["<script>", " style=\"", " onclick=", "javascript:"] {
            ensure!(!self.body.contains(forbidden), "{} holds {forbidden}", self.path);
        }
        Ok(())
    }
}

/// As it stands in a page.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// The certificates that the appliance shows, leaf first, in PEM.
fn certificates(host: &str) -> Result<Vec<String>> {
    let address = host.trim_start_matches("https://");
    let said = openssl(&["s_client", "-showcerts", "-connect", address], b"")?;
    let text = String::from_utf8_lossy(&said).into_owned();
    let (begin, end) = ("-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----\n");
    let pieces = text.split(begin).skip(1).filter_map(|piece| piece.split_once(end));
    Ok(pieces.map(|(inside, _)| format!("{begin}{inside}{end}")).collect())
}

/// SHA-256 of a certificate's public key (SubjectPublicKeyInfo), as the serial line shows it.
fn key_hash(certificate: &str) -> Result<String> {
    let key = openssl(&["x509", "-noout", "-pubkey"], certificate.as_bytes())?;
    let der = openssl(&["pkey", "-pubin", "-outform", "DER"], &key)?;
    let hash = openssl(&["dgst", "-sha256", "-r"], &der)?;
    let text = String::from_utf8(hash)?;
    Ok(text.split_whitespace().next().context("no hash")?.to_owned())
}

fn openssl(arguments: &[&str], input: &[u8]) -> Result<Vec<u8>> {
    let mut child = Command::new("openssl")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot start openssl")?;
    // What is asked here is shorter than a pipe; closing it ends `s_client`.
    child.stdin.take().context("no standard input")?.write_all(input)?;
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "openssl {arguments:?}: {}", said.trim());
    Ok(output.stdout)
}
