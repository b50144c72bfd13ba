#!/usr/bin/env bash
# Installs moto's S3 server, from PyPI into a directory of its own, for the tests of `type=s3`. As root.
set -euo pipefail

place=/var/cache/nacre-tests/moto
if [ -x "$place/bin/moto_server" ]; then
    exit 0
fi
# Debian's python3 cannot make environments without this package.
if ! python3 -c 'import ensurepip' 2>/dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3-venv >/dev/null
fi
mkdir -p "${place%/*}"
python3 -m venv "$place"
"$place/bin/pip" install --quiet --disable-pip-version-check 'moto[s3,server]==5.2.5'
