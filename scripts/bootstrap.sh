# Sourced by the scripts: sees to it that what they need is on this machine.
#
# Debian 12 and 13: installs missing packages when it may (root, or sudo without a password), otherwise prints
# the exact commands and stops. Any other distribution: names what is missing and stops.
# Sets PATH so that `rustc` is new enough, and AGENTD_SOURCE. With agentd_window set, QEMU can also open a window; agentd_variant
# adds what that variant of the image needs.

agentd_rust_minimum=1.90

# Compilers and libraries for kernel and programs; tools that make the image; the machine that runs it.
agentd_packages=(
    bc bison build-essential ca-certificates cmake cpio flex git libclang-dev libelf-dev libssl-dev
    linux-source-6.12 openssl pkg-config python3 python3-numpy python3-pip python3-venv xz-utils zstd
    cryptsetup-bin dosfstools e2fsprogs erofs-utils gdisk mtools systemd-boot-efi
    ovmf qemu-system-x86 qemu-utils
)

# The same for a machine without apt: a program, a file, or a command that succeeds; and what it is for.
agentd_needs=(
    "bc|kernel" "bison|kernel" "flex|kernel" "gcc|kernel, engine" "g++|engine" "make|kernel" "cmake|engine"
    "openssl|kernel" "xz|kernel" "zstd|kernel" "perl|kernel" "/usr/include/libelf.h|kernel (libelf headers)"
    "/usr/include/openssl/opensslv.h|kernel (OpenSSL headers)" "git|version" "python3 -m pip --version|models (pip)"
    "ldconfig -p | grep libclang|engine (libclang, for bindgen)"
    "readelf|image" "objcopy|image" "veritysetup|image" "mkfs.vfat|image" "mcopy|image" "mke2fs|image"
    "mkfs.erofs|image" "/usr/lib/systemd/boot/efi/linuxx64.efi.stub|image (systemd's EFI stub)"
    "/usr/lib/systemd/boot/efi/systemd-bootx64.efi|image (boot loader)"
    "/usr/share/ca-certificates/mozilla|image (certificate authorities, file by file)"
    "/usr/share/OVMF/OVMF_CODE_4M.fd|--uefi" "qemu-system-x86_64|scripts/run"
)

# What a variant of the image takes from Debian beside that.
if [ "${agentd_variant-}" = vulkan ]; then
    agentd_packages+=(glslc libdrm-common libvulkan-dev mesa-vulkan-drivers spirv-headers)
    agentd_needs+=("glslc|engine on Vulkan" "/usr/include/vulkan/vulkan.h|engine on Vulkan (headers)"
        "/usr/share/vulkan/icd.d|Vulkan's drivers (Mesa)")
fi

# Debian packs QEMU's window apart, with a desktop's libraries.
if [ -n "${agentd_window-}" ]; then
    agentd_packages+=(qemu-system-gui)
    agentd_needs+=("qemu-system-x86_64 -display help | grep -w gtk|a window; or use --headless")
fi

agentd_stop() {
    printf '%s\n' "$@" >&2
    exit 1
}

agentd_rust_is_new_enough() {
    local version
    version=$("$1" --version 2>/dev/null | cut -d' ' -f2) || return 1
    [ -n "$version" ] && printf '%s\n' "$agentd_rust_minimum" "$version" | sort -C -V
}

# Debian's rustc-web is the toolchain that Debian keeps new for web browsers; plain rustc is too old.
agentd_find_rust() {
    if agentd_rust_is_new_enough rustc && command -v cargo >/dev/null; then return; fi
    if agentd_rust_is_new_enough /usr/bin/rustc && [ -x /usr/bin/cargo ]; then
        PATH=/usr/bin:$PATH
        return
    fi
    return 1
}

agentd_is_installed() {
    [ "$(dpkg-query -W -f='${db:Status-Abbrev}' "$1" 2>/dev/null | cut -c1-2)" = ii ]
}

# agentd_has THING: of the three kinds in agentd_needs.
agentd_has() {
    case $1 in
        /*) [ -e "$1" ] ;;
        *' '*) (eval "$1") >/dev/null 2>&1 ;;
        # `command -v` also finds what may not be executed.
        *) [ -x "$(type -P "$1")" ] ;;
    esac
}

agentd_install() {
    local sudo=() update=(apt-get update) install=(apt-get install --no-install-recommends "$@")
    if [ "$(id -u)" -ne 0 ]; then
        # A Debian whose installer was given a password for root has no sudo.
        if ! agentd_has sudo; then
            agentd_stop "packages are missing; install them as root with" "    ${update[*]}" "    ${install[*]}"
        elif ! sudo -n true 2>/dev/null; then
            agentd_stop "packages are missing; install them with" "    sudo ${update[*]}" "    sudo ${install[*]}"
        fi
        sudo=(sudo)
    fi
    echo "installing  $*" >&2
    "${sudo[@]}" "${update[@]}" -qq >/dev/null || agentd_stop "${update[*]} failed"
    # A machine that was just started may be installing its updates: wait for its lock.
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive "${install[@]}" -qq -y -o DPkg::Lock::Timeout=600 >/dev/null ||
        agentd_stop "this failed:" "    ${install[*]}"
}

agentd_bootstrap_debian() {
    local package missing=()
    for package in "${agentd_packages[@]}"; do
        # A kernel source given by path stands in for Debian's.
        if [ "$package" = linux-source-6.12 ] && [ -n "${AGENTD_KERNEL_SOURCE-}" ]; then continue; fi
        agentd_is_installed "$package" || missing+=("$package")
    done
    agentd_find_rust || missing+=(rustc-web cargo-web)
    if [ ${#missing[@]} -gt 0 ]; then agentd_install "${missing[@]}"; fi
}

agentd_bootstrap_other() {
    local need thing missing=()
    for need in "${agentd_needs[@]}"; do
        thing=${need%|*}
        agentd_has "$thing" || missing+=("    $thing: ${need##*|}")
    done
    agentd_find_rust || missing+=("    rustc and cargo, $agentd_rust_minimum or newer: programs")
    [ -e "${AGENTD_KERNEL_SOURCE-}" ] ||
        missing+=("    AGENTD_KERNEL_SOURCE: the path of a tarball of Linux 6.12")
    if [ ${#missing[@]} -gt 0 ]; then
        agentd_stop "this is not Debian 12 or 13, so nothing was installed; missing:" "${missing[@]}"
    fi
}

agentd_bootstrap() {
    AGENTD_SOURCE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    export AGENTD_SOURCE
    # mkfs and veritysetup live where a user's PATH does not look on Debian.
    PATH=$PATH:/usr/sbin:/sbin
    export PATH
    # A newer Debian has another kernel's source and counts as another distribution.
    if (. /etc/os-release && [[ $ID-${VERSION_ID-} =~ ^debian-1[23]$ ]]) 2>/dev/null; then
        agentd_bootstrap_debian
    else
        agentd_bootstrap_other
    fi
    agentd_find_rust || agentd_stop "no rustc $agentd_rust_minimum or newer in PATH"
}

# All checkouts of a user share what is compiled, and cargo tells a changed source by its time alone: sources here that
# are older than what another checkout compiled last would pass for compiled. So they become new when that one was.
agentd_take_over_cache() {
    local mark=${AGENTD_CACHE:-$HOME/.cache/agentd-os}/checkout
    if [ "$(cat "$mark" 2>/dev/null)" = "$AGENTD_SOURCE" ]; then return; fi
    mkdir -p "${mark%/*}"
    if find "$AGENTD_SOURCE" \( -name target -o -name .git \) -prune -o -type f -exec touch -c {} +; then
        printf '%s\n' "$AGENTD_SOURCE" >"$mark"
    fi
}

# Compiles the image builder and leaves its path in agentd_image_tool. A line like those that it prints itself.
agentd_build_image_tool() {
    local target=${AGENTD_CACHE:-$HOME/.cache/agentd-os}/tool-target begin=$SECONDS
    agentd_take_over_cache
    printf '%-10s  ' tool >&2
    CARGO_TARGET_DIR=$target cargo build --quiet --release --locked -p image \
        --manifest-path "$AGENTD_SOURCE/Cargo.toml" || return
    agentd_image_tool=$target/release/image
    printf '%-6s %7s s  %s\n' ready $((SECONDS - begin)) "$agentd_image_tool" >&2
}

agentd_bootstrap
