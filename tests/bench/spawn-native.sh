#!/bin/bash
# Runs the driver of `scripts/bench spawn` on this machine's own kernel, in the peer's Debian.
#
#   spawn-native.sh ROOT PROGRAMS [the driver's arguments]      needs root; run it by `unshare --mount`
#
# All mounts are made in a mount namespace of its own and end with it.
set -euo pipefail
root=$1 programs=$2
shift 2
mount --make-rprivate /
mount --bind "$root" "$root"
mount --bind -o ro "$programs" "$root/usr/lib/agentd"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount -t tmpfs tmpfs "$root/run"
mount -t tmpfs tmpfs "$root/data"
mount -t sysfs sysfs "$root/sys"
mount -t cgroup2 none "$root/sys/fs/cgroup"
group=agentd-bench-$$
mkdir "$root/sys/fs/cgroup/$group"
cd "$root"
pivot_root . old
umount -l old
status=0
/usr/lib/agentd/spawn-driver --cgroup-root "/sys/fs/cgroup/$group" "$@" || status=$?
rmdir "/sys/fs/cgroup/$group/"{agents,engines} "/sys/fs/cgroup/$group" || true
exit $status
