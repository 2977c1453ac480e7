#!/usr/bin/env bash
# Does scripts/run lead from a bare Debian to a claim code, end by Ctrl-C, and start again in seconds?
#
#   tests/fresh/fresh.sh SUITE                 bookworm or trixie; an hour on two cores
#   tests/fresh/fresh.sh SUITE COMMAND...      runs a command in that Debian instead, to look around
#
# The Debian is a root folder of its own with git and nothing else that is not essential: no compiler, no Rust, no
# Python. It holds a clone of this checkout's commit and an empty cache. scripts/run is started there by root on a
# terminal of its own, so that Ctrl-C is the key. Of this machine it has the kernel, /dev, the network and what the
# administrator set for it: Debian's mirror, proxies, certificates, the registries of cargo and pip.
#
# All is kept in AGENTD_CACHE/fresh/SUITE. A run that came to its end without a failure removes the root, so the
# next one begins from nothing; one that was cut off is continued, and its RESULT says so. `rm -rf` of that folder
# begins from nothing in any case, with newer packages in the bare root.
#
# Prints RESULT: lines. Without root or mmdebstrap: SKIP: why.
set -euo pipefail

suite=${1:?usage: fresh.sh bookworm|trixie [COMMAND...]}
shift
# Until the three lines are there, and until a guest is off: emulation on a busy machine is slow.
first_limit_s=${AGENTD_FRESH_LIMIT_S:-9000}
second_limit_s=600
off_limit_s=180

source=$(cd "$(dirname "$0")/../.." && pwd)
work=${AGENTD_CACHE:-$HOME/.cache/agentd-os}/fresh/$suite
root=$work/root
home=$root/root
log=$work/screen.log
serial=$home/.cache/agentd-os/run/serial.log
machine=

skip() {
    echo "SKIP: $*"
    exit 0
}

fail() {
    [ ! -f "$log" ] || { echo "the last lines of $log:" && tail -40 "$log" | tr -d '\r'; } >&2
    echo "RESULT: $suite: $*"
    exit 1
}

# --- the bare Debian -----------------------------------------------------------------------------------------

# What apt here knows as Debian's archive, for the other suite.
debian_archive() {
    local own=${1:?}
    apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' 'ORIGIN: Debian' |
        sort -u | while read -r uri release component; do
            case $release in "$own" | "$own"-*) echo "deb $uri $suite${release#"$own"} $component" ;; esac
        done
}

# $work/base.tar: packed, because each run from nothing unpacks it.
make_base() {
    local own archive include=git
    [ ! -f "$work/base.tar" ] || return 0
    command -v mmdebstrap >/dev/null || skip "mmdebstrap is missing: apt-get install mmdebstrap"
    own=$(. /etc/os-release && echo "${VERSION_CODENAME-}")
    archive=$(debian_archive "$own")
    [ -n "$archive" ] || { apt-get update -qq && archive=$(debian_archive "$own"); }
    [ -n "$archive" ] || skip "apt on this machine knows no archive of Debian"
    # Debian's installer brings certificates when its mirror needs them.
    case $archive in *https://*) include=git,ca-certificates ;; esac
    echo "$archive" >"$work/sources.list"
    apt-config dump | grep -E '^Acquire::(http|https|Check-|Retries|ForceIPv)' >"$work/apt.conf" || true
    echo "base        with mmdebstrap from $suite"
    mmdebstrap --quiet --variant=minbase --include="$include" --aptopt="$work/apt.conf" \
        "$suite" "$work/base.partial.tar" "$work/sources.list" >"$work/mmdebstrap.log" 2>&1 ||
        { tail -20 "$work/mmdebstrap.log" >&2 && fail "mmdebstrap"; }
    mv "$work/base.partial.tar" "$work/base.tar"
}

# $root, from nothing or as an unfinished run left it, with this commit checked out.
make_root() {
    local commit
    begun="from nothing"
    if [ -e "$work/unfinished" ]; then
        begun="continued"
    else
        make_base
        rm -rf --one-file-system "$root"
        mkdir -p "$root"
        tar -xf "$work/base.tar" -C "$root"
        touch "$work/unfinished"
    fi
    settings_of_this_machine
    commit=$(git -c safe.directory='*' -C "$source" rev-parse HEAD)
    if [ "$(git -C "$home/agentd-os" rev-parse HEAD 2>/dev/null)" != "$commit" ]; then
        rm -rf "$home/agentd-os"
        git -c safe.directory='*' clone --quiet --no-hardlinks "$source" "$home/agentd-os"
        git -C "$home/agentd-os" -c advice.detachedHead=false checkout --quiet "$commit"
    fi
}

# What an administrator of this machine set to reach the network, at the same places.
settings_of_this_machine() {
    local file
    for file in /etc/resolv.conf /etc/hosts /usr/local/share/ca-certificates/*.crt /etc/pip.conf; do
        [ ! -f "$file" ] || install -D -m 644 "$file" "$root$file"
    done
    for file in .cargo/config.toml .config/pip/pip.conf .pip/pip.conf; do
        [ ! -f "$HOME/$file" ] || install -D -m 644 "$HOME/$file" "$home/$file"
    done
}

# `NAME=value` of the variables that do the same.
network_variables() {
    env -0 | grep -zE '^([a-zA-Z]+_proxy|[A-Z]+_PROXY|SSL_CERT_(FILE|DIR)|(CURL|REQUESTS)_CA_BUNDLE|GIT_SSL_CAINFO|PIP_(CERT|INDEX_URL|EXTRA_INDEX_URL|DEFAULT_TIMEOUT)|CARGO_(HTTP|NET|REGISTR|SOURCE)[A-Z_]*)='
}

# Becomes the command, run by root in the bare Debian, with mounts and processes of its own. All of them end with
# this script, however it ends.
become_inside() {
    local variables=()
    mapfile -d '' variables < <(network_variables)
    exec setpriv --pdeathsig KILL unshare --mount --pid --fork --kill-child sh -euc '
        root=$1
        shift
        mount -t proc proc "$root/proc"
        mount --rbind /dev "$root/dev"
        mount --rbind /sys "$root/sys"
        cd "$root"
        status=0
        chroot "$root" env -i --chdir=/root "$@" || status=$?
        exit $status' - \
        "$root" HOME=/root USER=root SHELL=/bin/bash LANG=C.UTF-8 TERM="${TERM:-linux}" \
        PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "${variables[@]}" "$@"
}

# --- what the user does and sees -----------------------------------------------------------------------------

# Starts scripts/run on a terminal; what is written to descriptor 3 is typed there.
start() {
    : >"$log"
    rm -f "$work/keys"
    mkfifo "$work/keys"
    exec 3<>"$work/keys"
    begin=$SECONDS
    (become_inside script --quiet --return --flush --command 'cd agentd-os && exec scripts/run --headless' \
        /dev/null <"$work/keys" >"$log" 2>&1 3>&-) &
    machine=$!
}

# screen REGEX: the lines on the screen that match.
screen() { tr -d '\r' <"$log" | grep -E "$1" || true; }

# wait_for REGEX LIMIT_S: seconds from the start to such a line, in `waited`.
wait_for() {
    while [ -z "$(screen "$1")" ]; do
        kill -0 "$machine" 2>/dev/null || fail "scripts/run ended before it said $1"
        [ $((SECONDS - begin)) -lt "$2" ] || fail "$2 s passed before scripts/run said $1"
        sleep 0.2
    done
    waited=$((SECONDS - begin))
}

wait_for_three_lines() {
    wait_for '^console: https://127\.0\.0\.1:[0-9]+$' "$1"
    wait_for '^fingerprint: [0-9a-f:]{64,}$' "$1"
    wait_for '^claim code: [A-Z0-9]{4}(-[A-Z0-9]{4})+$' "$1"
}

# Ctrl-C, and everything that must be true when scripts/run has ended; seconds in `waited`.
press_ctrl_c() {
    local status=0 pressed=$SECONDS
    printf '\003' >&3
    while kill -0 "$machine" 2>/dev/null; do
        [ $((SECONDS - pressed)) -lt "$off_limit_s" ] || fail "scripts/run still runs $off_limit_s s after Ctrl-C"
        sleep 0.2
    done
    wait "$machine" || status=$?
    machine=
    exec 3>&-
    waited=$((SECONDS - pressed))
    [ "$status" -eq 0 ] || fail "scripts/run ended with $status after Ctrl-C"
    [ -n "$(screen 'powering down; once more to pull the plug$')" ] || fail "Ctrl-C did not press the power button"
    [ -n "$(screen '^the machine is off$')" ] || fail "scripts/run did not see the machine's end"
    tr -d '\r' <"$serial" | grep -qF 'agentd-os: reached power off (everything is unmounted)' ||
        fail "the guest did not end in good order; see $serial"
}

# What scripts/run said it is doing.
progress() { screen '^(installing|tool|kernel|programs|models|root|disk|disk file|machine|booting) '; }

experiment() {
    local stage first fingerprint accelerator off until_boot
    make_root
    [ ! -e "$root/usr/bin/python3" ] || [ "$begun" = continued ] || fail "the bare root is not bare"

    echo "first run   $begun"
    start
    wait_for_three_lines "$first_limit_s"
    first=$waited
    progress
    for stage in tool kernel programs models root disk; do
        [ -n "$(screen "^$stage +[a-z]+ +[0-9.]+ s ")" ] || fail "scripts/run did not say that it did $stage"
    done
    accelerator=$(screen '^machine +(KVM|TCG \(emulation\)): ' | sed 's/^machine *//')
    [ -n "$accelerator" ] || fail "scripts/run did not say whether it uses KVM, and why"
    fingerprint=$(screen '^fingerprint: ')
    press_ctrl_c
    off=$waited
    echo "RESULT: $suite, $accelerator"
    echo "RESULT: first run, $begun: $first s to the three lines, Ctrl-C to the end $off s"

    echo "second run"
    start
    wait_for '^booting ' 120
    until_boot=$waited
    wait_for_three_lines "$second_limit_s"
    echo "RESULT: second run: $until_boot s to the start of QEMU, $waited s to the three lines"
    progress
    [ -z "$(screen '^installing |^[a-z ]+ (built|new) ')" ] || fail "the second run installed or built something"
    [ "$(screen '^fingerprint: ')" = "$fingerprint" ] || fail "the second run has another fingerprint"
    press_ctrl_c
    rm -f "$work/unfinished"
    rm -rf --one-file-system "$root"
}

[ "$(id -u)" -eq 0 ] || skip "a root folder with devices needs root"
unshare --mount --pid --fork true 2>/dev/null || skip "no namespaces for mounts and processes here"
mkdir -p "$work"
exec 9>"$work/lock"
flock --nonblock 9 || fail "another run works in $work"
# Waited for, so that the shell does not report the end.
trap '[ -z "$machine" ] || { kill -KILL "$machine" && wait "$machine"; } 2>/dev/null || true; rm -f "$work/keys"' EXIT
if [ $# -gt 0 ]; then
    make_root
    become_inside "$@"
else
    experiment
fi
