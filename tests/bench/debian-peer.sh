#!/bin/bash
# Builds the peer of `scripts/bench boot`: the smallest Debian that serves a page, set up as a careful
# administrator would for a fast boot. Published so that anyone can say what would make it faster.
#
#   minbase with systemd and networkd (no wait-online), the cloud kernel (fewer drivers than the stock one),
#   an initrd with only the modules of this machine, `quiet`, masked timers and consoles that nobody uses,
#   and a socket-activated busybox httpd, so that the port answers as soon as systemd listens.
#
# Usage: debian-peer.sh OUTPUT_DIR      leaves disk.img, vmlinuz, initrd.img and inputs.txt there. Needs root.
set -euo pipefail
out=${1:?usage: debian-peer.sh OUTPUT_DIR}
suite=${DEBIAN_PEER_SUITE:-$(. /etc/os-release && echo "${VERSION_CODENAME:-bookworm}")}
mkdir -p "$out"
[ -f "$out/inputs.txt" ] && { echo "debian peer: cached in $out"; exit 0; }
for tool in mmdebstrap mkfs.ext4; do
  command -v "$tool" >/dev/null || { echo "missing $tool: apt-get install mmdebstrap e2fsprogs" >&2; exit 3; }
done
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT

cat >"$work/customize.sh" <<'HOOK'
set -eu
root=$1
echo peer >"$root/etc/hostname"
echo '/dev/vda / ext4 noatime,errors=remount-ro 0 1' >"$root/etc/fstab"
printf '[Match]\nName=e*\n[Network]\nDHCP=ipv4\nLinkLocalAddressing=no\n' >"$root/etc/systemd/network/10-wired.network"
mkdir -p "$root/srv/www" && echo 'hello' >"$root/srv/www/index.html"
mkdir -p "$root/srv/www/cgi-bin"
printf '#!/bin/sh\nprintf "Content-Type: text/plain\\r\\n\\r\\n"\ncat /proc/uptime\n' >"$root/srv/www/cgi-bin/uptime"
printf '#!/bin/sh\nprintf "Content-Type: text/plain\\r\\n\\r\\n"\nsystemctl poweroff\n' >"$root/srv/www/cgi-bin/off"
chmod 755 "$root/srv/www/cgi-bin/uptime" "$root/srv/www/cgi-bin/off"
printf '[Socket]\nListenStream=80\nAccept=yes\n[Install]\nWantedBy=sockets.target\n' >"$root/etc/systemd/system/httpd.socket"
printf '[Service]\nExecStart=-/usr/bin/busybox httpd -i -h /srv/www\nStandardInput=socket\n' >"$root/etc/systemd/system/httpd@.service"
printf 'MODULES=list\nBUSYBOX=n\nCOMPRESS=zstd\nRESUME=none\n' >"$root/etc/initramfs-tools/conf.d/peer.conf"
printf 'virtio_pci\nvirtio_blk\next4\n' >"$root/etc/initramfs-tools/modules"
chroot "$root" systemctl enable -q systemd-networkd httpd.socket
chroot "$root" systemctl disable -q systemd-networkd-wait-online.service 2>/dev/null || true
chroot "$root" systemctl mask -q systemd-networkd-wait-online.service apt-daily.timer apt-daily-upgrade.timer \
  dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service fstrim.timer getty@tty1.service \
  serial-getty@ttyS0.service systemd-timesyncd.service
chroot "$root" update-initramfs -u -k all >/dev/null
HOOK
chmod +x "$work/customize.sh"

mmdebstrap --quiet --variant=minbase \
  --include=systemd,systemd-sysv,udev,linux-image-cloud-amd64,initramfs-tools,zstd,busybox \
  --customize-hook="sh $work/customize.sh \"\$1\"" "$suite" "$work/root" >"$out/mmdebstrap.log" 2>&1 ||
  { tail -20 "$out/mmdebstrap.log" >&2; exit 1; }
cp "$work"/root/boot/vmlinuz-* "$out/vmlinuz"
cp "$work"/root/boot/initrd.img-* "$out/initrd.img"
truncate -s 2G "$out/disk.img"
mkfs.ext4 -q -d "$work/root" "$out/disk.img"
{ echo "suite $suite"; chroot "$work/root" dpkg-query -W -f '${Package} ${Version}\n' systemd linux-image-cloud-amd64 busybox; } >"$out/inputs.txt"
echo "debian peer: built in $out"
