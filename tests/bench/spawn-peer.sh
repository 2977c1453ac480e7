#!/bin/bash
# Builds the peer of `scripts/bench spawn`: a Debian with bubblewrap and crun, which is started with our kernel.
#
#   spawn-peer.sh OUTPUT_DIR      leaves root.img, root/ and inputs.txt there. Needs root.
#
# The guest runs one command, $DRIVER of the kernel's command line, with our programs from the third drive and a data
# file system with quotas on the second; both mounted as the appliance mounts its own.
set -euo pipefail
out=${1:?usage: spawn-peer.sh OUTPUT_DIR}
suite=${DEBIAN_PEER_SUITE:-$(. /etc/os-release && echo "${VERSION_CODENAME:-bookworm}")}
mkdir -p "$out"
[ -f "$out/inputs.txt" ] && { echo "spawn peer: cached in $out"; exit 0; }
for tool in mmdebstrap mke2fs; do
  command -v "$tool" >/dev/null || { echo "missing $tool: apt-get install mmdebstrap e2fsprogs" >&2; exit 3; }
done
rm -rf "$out/root"
mmdebstrap --quiet --variant=minbase --include=bubblewrap,crun,busybox-static "$suite" "$out/root" \
  >"$out/mmdebstrap.log" 2>&1 || { tail -20 "$out/mmdebstrap.log" >&2; exit 1; }
mkdir -p "$out/root/data" "$out/root/usr/lib/agentd" "$out/root/old"
cat >"$out/root/sbin/bench-init" <<'INIT'
#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp
mkdir -p /dev/shm /dev/pts
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t ext4 -o nosuid,nodev,noexec,usrquota /dev/vdb /data
mount -t ext4 -o ro,nosuid,nodev /dev/vdc /usr/lib/agentd
# Of the appliance's settings those that a start pays for. User namespaces stay: one of the peers wants them.
echo 2 >/proc/sys/net/core/bpf_jit_harden
$DRIVER
sync
umount /data
echo "bench: over"
busybox poweroff -f
INIT
chmod 755 "$out/root/sbin/bench-init"
rm -f "$out/root.img"
mke2fs -q -t ext4 -d "$out/root" "$out/root.img" 600M
{ echo "suite $suite"; chroot "$out/root" dpkg-query -W -f '${Package} ${Version}\n' bubblewrap crun libseccomp2; } >"$out/inputs.txt"
echo "spawn peer: built in $out"
