//! What do the configuration fragments ask for, and did Kconfig obey?
//!
//! Pure. A fragment's line is `CONFIG_X=value` or `# CONFIG_X is not set`; every such line follows a comment
//! with its reason.

use std::collections::BTreeMap;

/// One option as a fragment asks for it. `n` stands for "is not set".
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    pub symbol: String,
    pub value: String,
    pub reason: String,
}

/// Reads a fragment; the error lists every bad line.
pub fn parse(name: &str, text: &str) -> Result<Vec<Request>, Vec<String>> {
    let mut requests: Vec<Request> = Vec::new();
    let mut problems = Vec::new();
    let mut comment: Option<&str> = None;
    for (index, line) in text.lines().map(str::trim).enumerate() {
        let place = format!("{name}:{}", index + 1);
        if let Some((symbol, value)) = option(line) {
            match comment.take() {
                Some(reason) => {
                    requests.push(Request { symbol, value, reason: reason.to_owned() });
                }
                None => problems.push(format!("{place}: {symbol} has no reason on the line above")),
            }
        } else if line.is_empty() {
            comment = None;
        } else if let Some(words) = line.strip_prefix('#') {
            comment = Some(words.trim()).filter(|words| !words.is_empty());
        } else {
            problems.push(format!("{place}: neither an option nor a comment: {line:?}"));
        }
    }
    if problems.is_empty() { Ok(requests) } else { Err(problems) }
}

/// Options that stand in more than one place, as sentences.
pub fn duplicates(requests: &[Request]) -> Vec<String> {
    let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
    for request in requests {
        *seen.entry(&request.symbol).or_default() += 1;
    }
    seen.iter()
        .filter(|(_, count)| **count > 1)
        .map(|(symbol, count)| format!("{symbol} stands {count} times"))
        .collect()
}

/// What of `requests` the finished configuration does not hold, as sentences.
pub fn unmet(requests: &[Request], config: &str) -> Vec<String> {
    let got: BTreeMap<String, String> = config.lines().filter_map(|line| option(line.trim())).collect();
    requests
        .iter()
        .filter_map(|request| {
            let value = got.get(&request.symbol).map_or("n", String::as_str);
            (value != request.value)
                .then(|| format!("{}: asked for {}, got {value}", request.symbol, request.value))
        })
        .collect()
}

fn option(line: &str) -> Option<(String, String)> {
    if let Some(rest) = line.strip_prefix("# CONFIG_") {
        let symbol = rest.strip_suffix(" is not set")?;
        return is_symbol(symbol).then(|| (format!("CONFIG_{symbol}"), "n".to_owned()));
    }
    let (symbol, value) = line.strip_prefix("CONFIG_")?.split_once('=')?;
    is_symbol(symbol).then(|| (format!("CONFIG_{symbol}"), value.to_owned()))
}

fn is_symbol(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ours() -> Vec<Request> {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../kernel-config");
        let mut names: Vec<_> =
            std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        names.sort();
        names
            .iter()
            .filter(|path| path.extension().is_some_and(|extension| extension == "config"))
            .flat_map(|path| parse(&path.to_string_lossy(), &std::fs::read_to_string(path).unwrap()).unwrap())
            .collect()
    }

    #[test]
    fn every_option_of_ours_has_a_reason_and_stands_once() {
        let requests = ours();
        assert!(requests.len() > 200, "{}", requests.len());
        assert_eq!(duplicates(&requests), Vec::<String>::new());
    }

    #[test]
    fn what_the_appliance_promises_is_asked_for() {
        let requests = ours();
        let value = |symbol: &str| requests.iter().find(|r| r.symbol == symbol).map(|r| r.value.clone());
        for on in [
            "SECURITY_LANDLOCK",
            "SECCOMP_FILTER",
            "MEMCG",
            "CGROUP_PIDS",
            "CFS_BANDWIDTH",
            "BLK_CGROUP",
            "CPUSETS",
            "CGROUP_HUGETLB",
            "CGROUP_MISC",
            "USER_NS",
            "PSI",
            "DM_VERITY",
            "DM_INIT",
            "EROFS_FS",
            "EXT4_FS",
            "QFMT_V2",
            "EFI_STUB",
            "SOFT_WATCHDOG",
            "PSTORE",
            "CRYPTO_SHA256",
            "MODULE_SIG_FORCE",
        ] {
            assert_eq!(value(&format!("CONFIG_{on}")).as_deref(), Some("y"), "{on}");
        }
        for off in [
            "IO_URING",
            "KEXEC",
            "KEXEC_FILE",
            "IA32_EMULATION",
            "X86_X32_ABI",
            "LEGACY_TIOCSTI",
            "BPF_SYSCALL",
            "USERFAULTFD",
            "DEVMEM",
            "PROC_KCORE",
            "MAGIC_SYSRQ",
            "DEBUG_FS",
        ] {
            assert_eq!(value(&format!("CONFIG_{off}")).as_deref(), Some("n"), "{off}");
        }
    }

    #[test]
    fn an_option_without_a_reason_and_a_stray_line_are_named() {
        let problems = parse("x", "# why\nCONFIG_A=y\nCONFIG_B=y\n\nhello\n").unwrap_err();
        assert_eq!(problems.len(), 2);
        assert!(problems[0].starts_with("x:3: CONFIG_B"), "{problems:?}");
        assert!(problems[1].starts_with("x:5:"), "{problems:?}");
    }

    #[test]
    fn a_blank_line_parts_a_reason_from_an_option() {
        assert!(parse("x", "# about the file\n\nCONFIG_A=y\n").is_err());
    }

    #[test]
    fn unmet_requests_say_what_came_instead() {
        let text = "# r\nCONFIG_A=y\n# r\n# CONFIG_B is not set\n# r\nCONFIG_C=\"text\"\n# r\nCONFIG_D=7\n";
        let requests = parse("x", text).unwrap();
        assert_eq!(unmet(&requests, "CONFIG_A=y\nCONFIG_C=\"text\"\nCONFIG_D=7\n"), Vec::<String>::new());
        assert_eq!(
            unmet(&requests, "CONFIG_B=y\nCONFIG_C=\"other\"\nCONFIG_D=7\n"),
            [
                "CONFIG_A: asked for y, got n",
                "CONFIG_B: asked for n, got y",
                "CONFIG_C: asked for \"text\", got \"other\"",
            ]
        );
    }
}
