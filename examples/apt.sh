# shellcheck shell=bash
# How the scripts of this project install system packages. Sourced, not run; needs bash.

# can_be_root: whether as_root has a way.
can_be_root() {
    [ "$(id -u)" -eq 0 ] || command -v sudo >/dev/null
}

# as_root COMMAND...: run it as root, through sudo for everybody else.
as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    else
        sudo "$@"
    fi
}

# apt_missing PACKAGE...: print those that are not installed, on one line.
apt_missing() {
    local installed package missing=()
    installed=" $(dpkg-query -W -f '${db:Status-Status}:${Package} ' "$@" 2>/dev/null || true)"
    for package in "$@"; do
        [[ $installed == *" installed:$package "* ]] || missing+=("$package")
    done
    echo "${missing[*]}"
}

# apt_update: fetch the package lists.
apt_update() {
    as_root apt-get -qq -o DPkg::Lock::Timeout=300 update
}

# apt_install PACKAGE...: install them, and nothing that is merely recommended.
apt_install() {
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=300 \
        -o Dpkg::Use-Pty=0 install --no-install-recommends "$@"
}
