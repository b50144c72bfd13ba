#!/usr/bin/env bash
# Makes sure that the programs the tests use are there: installs them with apt as root, else says what is missing.
set -euo pipefail

# package:program
wanted=(
    busybox-static:busybox uidmap:newuidmap skopeo:skopeo umoci:umoci runc:runc podman:podman buildah:buildah
    mmdebstrap:mmdebstrap docker-registry:docker-registry zstd:zstd xz-utils:xz bzip2:bzip2 python3:python3 git:git
    curl:curl pigz:pigz libdeflate-tools:libdeflate-gunzip p7zip-full:7z qemu-user-static:qemu-aarch64-static openssl:openssl openssh-client:ssh-agent ca-certificates:update-ca-certificates
    qemu-system-x86:qemu-system-x86_64 strace:strace passt:pasta iproute2:ip
)
PATH=$PATH:/usr/sbin:/sbin

missing=()
for pair in "${wanted[@]}"; do
    command -v "${pair#*:}" >/dev/null || missing+=("${pair%%:*}")
done
# The dynamic busybox has the same name; in an image without libraries it cannot run.
if command -v busybox >/dev/null && ldd "$(command -v busybox)" >/dev/null 2>&1; then
    missing+=(busybox-static)
fi
cache=/var/cache/nacre-tests

# fetched FILE WHAT COMMAND: runs COMMAND, which makes FILE, unless it is there.
fetched() {
    if [ -e "$1" ]; then
        return
    fi
    if [ "$(id -u)" -ne 0 ]; then
        echo "tests need $1: run tests/setup/packages.sh as root" >&2
        exit 1
    fi
    echo "fetching $2"
    mkdir -p "$cache"
    "$3"
}

# unpack PACKAGE DIR OPTION...: takes a package apart, without installing it. Lists that the options change are kept in DIR.
unpack() {
    local package=$1 dir=$2
    shift 2
    local options=(-o Acquire::Retries=5 -o APT::Sandbox::User= -o Acquire::Languages=none "$@")
    apt-get "${options[@]}" update -qq
    (cd "$dir" && apt-get "${options[@]}" download -qq "$package" && dpkg-deb -x ./*.deb unpacked)
}

# apart DIR: options for lists and a cache of their own.
apart() {
    mkdir -p "$1/lists/partial" "$1/cache/archives/partial"
    own=(-o "Dir::State::lists=$1/lists" -o "Dir::Cache=$1/cache" -o Dir::State::status=/dev/null)
}

# busybox for another processor. Taken out of its package: installing it would make that processor one of the system's.
fetch_arm64() {
    local dir own
    dir=$(mktemp -d)
    apart "$dir"
    unpack busybox-static "$dir" "${own[@]}" -o APT::Architecture=arm64 -o APT::Architectures=arm64
    install -m 755 "$dir/unpacked/bin/busybox" "$cache/busybox-arm64"
    rm -r "$dir"
}

# A kernel for tests that this machine's own cannot have, started in an emulator: taken out of its package, not installed.
fetch_linux() {
    local dir package
    dir=$(mktemp -d)
    apt-get update -qq
    package=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: \(linux-image-[0-9].*\)/\1/p')
    unpack "$package" "$dir"
    mkdir -p "$cache/linux"
    install -m 644 "$dir"/unpacked/lib/modules/*/kernel/fs/overlayfs/overlay.ko "$cache/linux/overlay.ko"
    install -m 644 "$dir"/unpacked/boot/vmlinuz-* "$cache/linux/vmlinuz"
    rm -r "$dir"
}

# A second registry, `crane registry serve`. Debian has it since after this release, and the program needs the C library only.
fetch_crane() {
    local dir mirror own
    dir=$(mktemp -d)
    apart "$dir"
    # Not all of these files are there.
    mirror=$({ cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null || true; } |
        sed -nE 's/^(URIs:|deb( \[[^]]*\])?) +([^ ]*).*/\3/p' | grep -v security | head -n 1)
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror sid main" >"$dir/sources.list"
    unpack crane "$dir" "${own[@]}" -o "Dir::Etc::sourcelist=$dir/sources.list" -o Dir::Etc::sourceparts=/dev/null \
        -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false
    install -m 755 "$dir/unpacked/usr/bin/crane" "$cache/crane"
    rm -r "$dir"
}

fetched "$cache/busybox-arm64" "busybox for arm64" fetch_arm64
fetched "$cache/linux/vmlinuz" "a kernel" fetch_linux
fetched "$cache/crane" "a second registry" fetch_crane
if [ ${#missing[@]} -eq 0 ]; then
    exit 0
fi
if [ "$(id -u)" -ne 0 ]; then
    echo "tests need packages that are not installed: ${missing[*]}" >&2
    echo "help: sudo apt-get install --no-install-recommends ${missing[*]}" >&2
    exit 1
fi
echo "installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
apt-get -o Acquire::Retries=5 update -qq
apt-get -o Acquire::Retries=5 install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
