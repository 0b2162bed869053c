#!/usr/bin/env bash
# Sets this machine up for drsync's examples; with --dev for its tests, too:
#   system packages (apt; as root or through sudo; only those that are missing),
#   .venv with drsync installed from this tree.
# Can be run any number of times; when nothing is to be done it takes a second.
#
#   PYTHON=/path/to/python3.12 bash examples/setup.sh    another Python than the system's
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
# shellcheck source=examples/apt.sh
source examples/apt.sh

packages=(
    qemu-system-x86 qemu-utils qemu-block-extra seabios # the hypervisor, its tools
    python3 python3-venv
    python3-libvirt python3-libnbd # made for the system's Python: .venv sees them
    syslinux syslinux-common mtools dosfstools e2fsprogs fdisk cpio kmod xz-utils zstd # to build the guest
)
dev_packages=(
    shellcheck
    libvirt-daemon-system libvirt-clients # tests start libvirtds of their own
    swtpm swtpm-tools ovmf syslinux-efi   # domains with a TPM, and with UEFI
    xfsprogs btrfs-progs lvm2 ntfs-3g lz4 # guests' disks to look into
)
commands=(
    qemu-system-x86_64 qemu-storage-daemon qemu-img qemu-io qemu-nbd
    syslinux mcopy mkfs.vfat mkfs.ext4 sfdisk depmod
)
log=$root/.lab/setup.log
PATH=$PATH:/usr/sbin:/sbin # not on every user's path, but mkfs and depmod are there

say() { echo "setup: $*"; }

fail() {
    echo "setup: $*" >&2
    exit 1
}

# logged COMMAND...: run it with its output in the log, which is shown when it fails.
logged() {
    if ! { "$@"; } >"$log" 2>&1 </dev/null; then
        tail -n 20 "$log" >&2
        fail "failed: $* (the whole output: $log)"
    fi
}

# install_packages PACKAGE...: those that are missing.
install_packages() {
    command -v dpkg-query >/dev/null || fail "this is no Debian or Ubuntu; install by hand: $*"
    local missing
    read -ra missing <<<"$(apt_missing "$@")"
    if [ ${#missing[@]} -gt 0 ]; then
        say "installing system packages: ${missing[*]}"
        can_be_root || fail "this needs root: run it as root, or install sudo"
        logged apt_update
        logged apt_install "${missing[@]}"
    fi
    for name in "${commands[@]}"; do
        command -v "$name" >/dev/null || fail "there is no $name, although its package is installed"
    done
}

is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# The system's Python first: another one on the path may belong to some other project.
find_python() {
    local candidate
    for candidate in ${PYTHON:-/usr/bin/python3 python3 python3.14 python3.13 python3.12 python3.11}; do
        if command -v "$candidate" >/dev/null && is_new_enough "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    fail "drsync needs Python 3.11 or newer; ${PYTHON:-/usr/bin/python3} is $("${PYTHON:-/usr/bin/python3}" --version 2>&1)." \
        "Install one (Ubuntu 22.04: apt install python3.11 python3.11-venv), then: PYTHON=python3.11 bash $0"
}

# A virtual environment holds its own path: one that came along with a moved or copied tree is made anew, and so is one
# that does not see the system's packages.
make_environment() {
    if [ "$(cat .venv/.made-in 2>/dev/null)" = "$root" ] && is_new_enough .venv/bin/python &&
        grep -q '^include-system-site-packages = true' .venv/pyvenv.cfg; then
        return
    fi
    local python
    python=$(find_python)
    say "making .venv with $("$python" --version)"
    logged "$python" -m venv --clear --system-site-packages .venv
    echo "$root" >.venv/.made-in
}

# What was installed is remembered as the hash of pyproject.toml: it names every dependency.
install_drsync() {
    local what=$1 wanted
    wanted=$(sha256sum pyproject.toml)
    local stamps=(".venv/.installed$what")
    [ "$what" = "" ] && stamps+=(".venv/.installed[dev]") # holds all that users need
    for stamp in "${stamps[@]}"; do
        [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && return
    done
    say "installing drsync$what and what it depends on into .venv"
    # Into .venv whatever the system has: its versions are another distribution's business.
    logged .venv/bin/python -m pip install --quiet --ignore-installed --editable ".$what"
    echo "$wanted" >".venv/.installed$what"
}

main() {
    local extra=""
    case "${1:-}" in
        --dev)
            extra="[dev]"
            packages+=("${dev_packages[@]}")
            ;;
        "") ;;
        *) fail "usage: bash examples/setup.sh [--dev]" ;;
    esac
    [ "$(uname -sm)" = "Linux x86_64" ] || fail "the examples need Linux on x86-64; this is $(uname -sm)"
    mkdir -p .lab
    exec 9>.lab/setup.lock
    flock 9 # two at once: the second one finds all done
    install_packages "${packages[@]}"
    make_environment
    install_drsync "$extra"
    say "ready"
}

main "$@"
