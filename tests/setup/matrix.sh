#!/usr/bin/env bash
# Run by root: builds testdata/matrix (apt-get, npm, pip, su, tar, cp, mv, USER, COPY --chown) as root, as a user with
# subordinate ids and as one without any who has no newuidmap, and compares the layers. What differs is listed by path.
# Run by anybody else, there is nothing to do. Needs the network, and the base that tests/real makes.
#
#   tests/setup/matrix.sh NACRE
set -euo pipefail
if [ "$(id -u)" -ne 0 ]; then
    exit 0
fi
nacre=$(realpath "${1:?the program}")
cd "$(dirname "$(realpath "$0")")/../.."
tests/setup/as-user.sh --users
base=${NACRE_TEST_BASES:-/var/tmp/nacre-test-bases-0}/node/layout
if [ ! -e "$base/index.json" ]; then
    echo "matrix: $base is missing: cargo test --test real makes it" >&2
    exit 1
fi
scratch=$(mktemp -d /var/tmp/nacre-matrix.XXXXXX)
trap 'rm -rf "$scratch"' EXIT
chmod 755 "$scratch"
cp -r "$base" "$scratch/base"
cp -r testdata/matrix "$scratch/context"
install -m 755 "$nacre" "$scratch/nacre"
# What Git leaves to the caller's umask.
chmod -R u=rwX,go=rX "$scratch/base" "$scratch/context"

# build NAME COMMAND…: one build, by whoever COMMAND makes of root. Nobody finds newuidmap but who may use it.
build() {
    local name=$1 start=$SECONDS
    shift
    mkdir "$scratch/$name"
    if [ "$name" != root ]; then chown "$name:" "$scratch/$name"; fi
    if ! "$@" "$scratch/nacre" build --progress plain --store "$scratch/$name/store" \
        --build-context "node=oci-layout://$scratch/base" --build-arg SOURCE_DATE_EPOCH=1700000000 \
        --output "type=oci,rewrite-timestamp=true,dest=$scratch/$name/image.tar" "$scratch/context" >"$scratch/$name/log" 2>&1; then
        echo "matrix: the build as $name failed" >&2
        tail -n 100 "$scratch/$name/log" >&2
        exit 1
    fi
    echo "built as $name in $((SECONDS - start)) s"
}
as() {
    local user=$1 path=$2
    shift 2
    setpriv --reuid="$user" --regid="$user" --init-groups --inh-caps=-all -- \
        env -i HOME="$(getent passwd "$user" | cut -d: -f6)" PATH="$path" "$@"
}
full=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
build root env -i HOME=/root PATH=$full
build nacre-test as nacre-test $full
build nacre-plain as nacre-plain /nonexistent
# One is as good as another only if all three ways were taken.
one='only one user id'
for name in root nacre-test; do
    if grep -q "$one" "$scratch/$name/log"; then echo "matrix: $name has one id only" >&2; exit 1; fi
done
grep -q "$one" "$scratch/nacre-plain/log" || { echo "matrix: nacre-plain has many ids" >&2; exit 1; }
python3 tests/setup/compare-layers.py "$scratch"/{root,nacre-test,nacre-plain}/image.tar
