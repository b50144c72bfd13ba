#!/usr/bin/env bash
# Makes sure that the programs the tests use are there: installs them with apt as root, else says what is missing.
set -euo pipefail

# package:program
wanted=(
    busybox-static:busybox uidmap:newuidmap skopeo:skopeo umoci:umoci runc:runc podman:podman buildah:buildah
    mmdebstrap:mmdebstrap docker-registry:docker-registry zstd:zstd xz-utils:xz bzip2:bzip2 python3:python3 git:git
    curl:curl pigz:pigz openssl:openssl openssh-client:ssh-agent ca-certificates:update-ca-certificates
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
