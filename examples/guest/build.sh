#!/usr/bin/env bash
# Builds the examples' guest, a Linux that boots from its own disk in seconds:
#
#   .lab/guest/guest.qcow2   2 GiB, some 25 MiB used
#     sector 0      syslinux' MBR code, partition table
#     partition 1   FAT: syslinux, kernel, initramfs (busybox, qemu-ga, and the `init` beside this script)
#     partition 2   ext4: the guest's data, mounted at /mnt
#
# Kernel, busybox and guest agent come from the distribution's packages, downloaded and unpacked,
# never installed: this machine's own boot is not touched. The agent's libraries are this machine's. No root, mount or loop device is needed.
# The last line printed is the image's path. Built once; again when a file beside this script changes.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
# shellcheck source=examples/apt.sh
source "$root/examples/apt.sh"
PATH=$PATH:/usr/sbin:/sbin

lab=$root/.lab/guest
image=$lab/guest.qcow2
disk_mib=2048
boot_mib=48
modules=(virtio_pci virtio_blk nvme ext4 virtio_console) # what the kernel has built in is left out

say() { echo "guest: $*"; }

fail() {
    echo "guest: $*" >&2
    exit 1
}

fingerprint() { cat "$here/build.sh" "$here/init" | sha256sum; }

is_current() { [ -f "$image" ] && [ "$(cat "$lab/fingerprint" 2>/dev/null)" = "$(fingerprint)" ]; }

# available PACKAGE: whether apt knows it and could fetch it.
available() { [ -n "$(apt-cache show --no-all-versions "$1" 2>/dev/null)" ]; }

# The kernel's package, by way of the meta package that always depends on the newest.
kernel_package() {
    local meta
    for meta in linux-image-cloud-amd64 linux-image-virtual linux-image-generic linux-image-amd64; do
        if available "$meta"; then
            apt-cache show --no-all-versions "$meta" | sed -n 's/^Depends: //p' | tr ',| ' '\n' |
                grep -m 1 '^linux-image-[0-9]' && return
        fi
    done
    return 1
}

# fetch PACKAGE...: download the packages and unpack them into the stage.
fetch() {
    local sandbox=()
    [ "$(id -u)" -eq 0 ] && sandbox=(-o APT::Sandbox::User=root) # apt's own user may not write here
    (cd "$stage/packages" && apt-get -qq "${sandbox[@]}" download "$@") || return 1
    local package
    for package in "$stage"/packages/*.deb; do
        dpkg-deb -x "$package" "$stage/system" || return 1
    done
}

fetch_system() {
    local kernel wanted
    kernel=$(kernel_package) || return 1
    wanted=("$kernel" busybox-static qemu-guest-agent)
    available "${kernel/linux-image-/linux-modules-}" && wanted+=("${kernel/linux-image-/linux-modules-}") # Ubuntu
    say "fetching ${wanted[*]}"
    fetch "${wanted[@]}"
}

# Copies the modules that are needed, in the order to load them, uncompressed: busybox' insmod takes them so.
copy_modules() {
    local version=$1 target=$2 verb file name
    [ -e "$stage/system/lib" ] || ln -s usr/lib "$stage/system/lib"
    depmod -b "$stage/system" "$version"
    mkdir -p "$target"
    : >"$target/order"
    for module in "${modules[@]}"; do
        # lines are "insmod /path/x.ko.zst [options]" or "builtin x"
        while read -r verb file _; do
            [ "$verb" = insmod ] || continue
            name=$(basename "$file")
            name=${name%%.ko*}.ko
            grep -qxF "$name" "$target/order" && continue
            case "$file" in
                *.xz) xz -dc "$file" >"$target/$name" ;;
                *.zst) zstd -qdc "$file" >"$target/$name" ;;
                *.gz) gzip -dc "$file" >"$target/$name" ;;
                *) cp "$file" "$target/$name" ;;
            esac
            echo "$name" >>"$target/order"
        done < <(modprobe -d "$stage/system" -S "$version" --show-depends "$module")
    done
}

# Copies the guest agent and the libraries that it is linked with, each to the path where it looks for them.
copy_agent() {
    local tree=$1 agent=$stage/system/usr/sbin/qemu-ga library
    install -D -m 755 "$agent" "$tree/usr/sbin/qemu-ga"
    if ldd "$agent" | grep 'not found' >&2; then
        fail "libraries of the guest agent are missing here; as root: apt-get install qemu-utils"
    fi
    # lines are "name => /path (address)" or "/path of the loader (address)"
    while read -r library; do
        install -D -m 755 "$library" "$tree$library"
    done < <(ldd "$agent" | grep -o '/[^ ]*')
}

make_initramfs() {
    local version=$1 tree=$stage/initramfs
    mkdir -p "$tree/bin"
    cp "$(find "$stage/system" -type f -name busybox -path '*bin/*' | head -n 1)" "$tree/bin/busybox"
    cp "$here/init" "$tree/init"
    chmod 755 "$tree/init" "$tree/bin/busybox"
    copy_agent "$tree"
    copy_modules "$version" "$tree/lib/modules"
    (cd "$tree" && find . | cpio --quiet -o -H newc -R 0:0 | gzip -1) >"$stage/initrd.gz"
}

make_boot_partition() {
    local kernel=$1 partition=$stage/boot.img
    # -h: the sectors before the partition; the boot sector reckons from the disk's start
    mkfs.vfat -C -n BOOT -h 2048 "$partition" $((boot_mib * 1024)) >/dev/null
    printf '%s\n' 'SERIAL 0 115200' 'DEFAULT linux' 'PROMPT 0' 'LABEL linux' ' KERNEL /vmlinuz' ' INITRD /initrd.gz' \
        ' APPEND console=ttyS0,115200 quiet panic=-1 no_timer_check' >"$stage/syslinux.cfg"
    mcopy -i "$partition" "$kernel" ::/vmlinuz
    mcopy -i "$partition" "$stage/initrd.gz" "$stage/syslinux.cfg" ::/
    syslinux --install "$partition"
}

make_data_partition() {
    mkdir -p "$stage/data"
    echo "This file system is the guest's own: what is written here, drsync protects." >"$stage/data/README"
    truncate -s $((disk_mib - boot_mib - 2))M "$stage/data.img"
    # Not lazy: else the kernel goes on writing inode tables after the mount, and every capture would carry some.
    mkfs.ext4 -q -L data -E lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0 -d "$stage/data" "$stage/data.img"
}

make_image() {
    local disk=$stage/disk.raw
    truncate -s ${disk_mib}M "$disk"
    printf '%s\n' "start=2048, size=${boot_mib}MiB, type=c, bootable" "size=$((disk_mib - boot_mib - 2))MiB, type=83" |
        sfdisk --quiet "$disk"
    dd if="$(mbr_code)" of="$disk" bs=440 count=1 conv=notrunc status=none
    dd if="$stage/boot.img" of="$disk" bs=1M seek=1 conv=notrunc,sparse status=none
    dd if="$stage/data.img" of="$disk" bs=1M seek=$((1 + boot_mib)) conv=notrunc,sparse status=none
    qemu-img convert -O qcow2 "$disk" "$stage/guest.qcow2"
}

mbr_code() {
    local file
    for file in /usr/lib/syslinux/mbr/mbr.bin /usr/lib/SYSLINUX/mbr.bin; do
        [ -f "$file" ] && echo "$file" && return
    done
    fail "no mbr.bin of syslinux; run: bash $root/examples/setup.sh"
}

build() {
    stage=$(mktemp -d "$lab/build.XXXXXX")
    trap 'rm -rf "$stage"' EXIT
    mkdir "$stage/packages" "$stage/system"
    if ! fetch_system; then
        can_be_root || fail "the package lists are missing or old; as root: apt-get update"
        say "fetching newer package lists first"
        apt_update
        fetch_system || fail "can't fetch a kernel and busybox from the distribution's packages"
    fi
    local kernel
    kernel=$(find "$stage/system" -name 'vmlinuz-*' | head -n 1)
    [ -n "$kernel" ] || fail "the kernel's package holds no vmlinuz"
    make_initramfs "$(basename "$kernel" | sed s/^vmlinuz-//)"
    make_boot_partition "$kernel"
    make_data_partition
    make_image
    mv "$stage/guest.qcow2" "$image"
    fingerprint >"$lab/fingerprint"
}

mkdir -p "$lab"
exec 9>"$lab/lock"
flock 9 # two test runs may want the guest at the same time
if ! is_current; then
    say "building the guest's disk (once)"
    build
fi
echo "$image"
