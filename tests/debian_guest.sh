#!/usr/bin/env bash
# Builds a real Debian that does not boot in EC2: GRUB on an MBR disk, an initramfs for virtio only, fstab and root by
# device names, an interface's name of this machine. For tests/preflight/test_fix_real.py, which is not part of the
# suite: it needs debootstrap, libguestfs-tools, python3-guestfs, root, and half an hour where there is no KVM.
#
#   bash tests/debian_guest.sh IMAGE.raw
#   DRSYNC_TEST_DEBIAN=IMAGE.raw .venv/bin/pytest tests/preflight/test_fix_real.py
#
# libguestfs needs a kernel; where none is installed, SUPERMIN_KERNEL and SUPERMIN_MODULES name one (supermin(1)).
set -euo pipefail

image=$(realpath "$1")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$work/root
packages=linux-image-amd64,initramfs-tools,systemd-sysv,udev,ifupdown,isc-dhcp-client,openssh-server,grub-pc,zstd

debootstrap --variant=minbase --include="$packages" bookworm "$root"
sed -i 's/^MODULES=.*/MODULES=list/' "$root/etc/initramfs-tools/initramfs.conf"
printf 'virtio_blk\nvirtio_pci\next4\n' >"$root/etc/initramfs-tools/modules"
chroot "$root" update-initramfs -u -k all
printf '%s\n' 'auto lo' 'iface lo inet loopback' 'auto enp1s0' 'iface enp1s0 inet dhcp' >"$root/etc/network/interfaces"
echo '/dev/vda1 / ext4 defaults 0 1' >"$root/etc/fstab"
echo 'GRUB_DISABLE_LINUX_UUID=true' >>"$root/etc/default/grub"
echo drsync-guest >"$root/etc/hostname"

rm -f "$image"
truncate -s 3G "$image"
echo 'start=2048, type=83, bootable' | sfdisk --quiet "$image"
mkfs.ext4 -q -F -E offset=1048576 -d "$root" "$image" 3000000K
# In libguestfs' VM the disk is sda, in the guest vda.
guestfish --format=raw -a "$image" run : mount /dev/sda1 / : sh "
    grub-install --target=i386-pc --modules='part_msdos ext2' /dev/sda &&
    sed -i 's/GRUB_TIMEOUT=5/GRUB_TIMEOUT=0/' /etc/default/grub && update-grub &&
    sed -i 's,root=/dev/sda1,root=/dev/vda1,' /boot/grub/grub.cfg"
echo "$image"
