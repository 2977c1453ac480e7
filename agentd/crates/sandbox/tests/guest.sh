#!/bin/sh
# Runs the tests of `tests/walls` in a guest with the appliance's own kernel, where every controller, quota and wall
# exists: nothing is skipped there.
#
#   tests/guest.sh KERNEL PROGRAMS WALLS [more kernel command line]
#
# KERNEL is a bzImage, PROGRAMS a folder with static agent-launcher and agent-jail, WALLS the static test program
# (`cargo test --no-run --test walls` with `-C target-feature=+crt-static` and `--target`). Needs qemu-system-x86,
# binutils, e2fsprogs and busybox-static; no root. The exit status is that of the tests; FILTER limits them by name.
set -eu
kernel=$1 programs=$2 walls=$3
shift 3
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$work/root
mkdir -p "$root/bin" "$root/dev" "$root/proc" "$root/sys" "$root/tmp" "$root/run" "$root/data" "$root/etc" \
    "$root/usr/lib/agentd"
cp /bin/busybox "$root/bin/busybox"
for name in sh mount umount mkdir ifconfig poweroff sleep chmod; do ln -s busybox "$root/bin/$name"; done
cp "$programs/agent-launcher" "$programs/agent-jail" "$root/usr/lib/agentd/"
cp "$walls" "$root/usr/lib/agentd/walls"
strip "$root/usr/lib/agentd/"*
echo 127.0.0.1 localhost > "$root/etc/hosts"
echo secret > "$root/etc/passwd"
cat > "$root/bin/init" <<'INIT'
#!/bin/sh
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run
mkdir -p /dev/shm
mount -t tmpfs tmpfs /dev/shm
chmod 1777 /tmp /dev/shm
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t ext4 -o nosuid,nodev,noexec,usrquota /dev/vdb /data
ifconfig lo up
export AGENTD_TEST_DATA=/data AGENTD_TEST_PROGRAMS=/usr/lib/agentd
/usr/lib/agentd/walls $FILTER
echo "walls ended with $?"
umount /data
poweroff -f
INIT
chmod 755 "$root/bin/init"
mke2fs -q -t ext4 -d "$root" "$work/root.img" 256M
mke2fs -q -t ext4 -O quota -E quotatype=usrquota "$work/data.img" 256M
timeout "${LIMIT_S:-900}" qemu-system-x86_64 -machine q35 -accel tcg,thread=single -cpu max -m 1024 -smp 2 -nographic -no-reboot -kernel "$kernel" \
    -drive "file=$work/root.img,format=raw,if=virtio" -drive "file=$work/data.img,format=raw,if=virtio" -nic none \
    -append "console=ttyS0 quiet root=/dev/vda rw init=/bin/init FILTER=${FILTER:-} $*" < /dev/null | tee "$work/log"
grep -q '^walls ended with 0' "$work/log"
