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
# busybox for another processor. Taken out of its package: installing it would make that processor one of the system's.
arm64=/var/cache/nacre-tests/busybox-arm64
fetch_arm64() {
    local dir options
    dir=$(mktemp -d)
    mkdir -p "$dir/lists/partial" "$dir/cache/archives/partial" "${arm64%/*}"
    options=(-o "Dir::State::lists=$dir/lists" -o "Dir::Cache=$dir/cache" -o Dir::State::status=/dev/null
        -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o APT::Sandbox::User=)
    apt-get "${options[@]}" update -qq
    (cd "$dir" && apt-get "${options[@]}" download -qq busybox-static)
    dpkg-deb --fsys-tarfile "$dir"/busybox-static_*_arm64.deb | tar -xO ./bin/busybox >"$dir/busybox"
    install -m 755 "$dir/busybox" "$arm64"
    rm -r "$dir"
}
if [ ! -x "$arm64" ] && [ "$(id -u)" -eq 0 ]; then
    echo "fetching busybox for arm64"
    fetch_arm64
elif [ ! -x "$arm64" ]; then
    echo "tests need $arm64: run tests/setup/packages.sh as root" >&2
    exit 1
fi
# A kernel for tests that this machine's own cannot have, started in an emulator: taken out of its package, not installed.
linux=/var/cache/nacre-tests/linux
fetch_linux() {
    local dir package
    dir=$(mktemp -d)
    mkdir -p "$linux"
    chmod 755 "$dir"
    apt-get update -qq
    package=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: \(linux-image-[0-9].*\)/\1/p')
    (cd "$dir" && apt-get -o APT::Sandbox::User= download -qq "$package" && dpkg-deb -x ./*.deb unpacked)
    install -m 644 "$dir"/unpacked/lib/modules/*/kernel/fs/overlayfs/overlay.ko "$linux/overlay.ko"
    install -m 644 "$dir"/unpacked/boot/vmlinuz-* "$linux/vmlinuz"
    rm -r "$dir"
}
if [ ! -e "$linux/vmlinuz" ] && [ "$(id -u)" -eq 0 ]; then
    echo "fetching a kernel"
    fetch_linux
elif [ ! -e "$linux/vmlinuz" ]; then
    echo "tests need $linux/vmlinuz: run tests/setup/packages.sh as root" >&2
    exit 1
fi
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
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
