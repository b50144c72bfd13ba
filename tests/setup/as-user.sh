#!/usr/bin/env bash
# Run by root: the tests that depend on who runs them, again as an ordinary user with subordinate IDs, and those of steps
# once more as a user without any who cannot start newuidmap. The users are made when they are missing. Run by anybody
# else, there is nothing left to do. With --users, only makes the users.
#
# The paths of the repository are compiled into the tests. Where the user may not enter them (a clone in /root, or in a
# private temporary directory), they are bound to the same place in a mount namespace in which the closed directory is
# covered by an empty one.
set -euo pipefail
rich=nacre-test
poor=nacre-plain

as_user() {
    setpriv --reuid="$user" --regid="$user" --init-groups --inh-caps=-all -- "$@"
}

# first_closed PATH: prints the first directory on the way to PATH, itself included, that the user may not enter.
first_closed() {
    local part at=
    local IFS=/
    for part in ${1#/}; do
        at=$at/$part
        if ! as_user test -x "$at"; then
            echo "$at"
            return
        fi
    done
}

# reveal PATH STAGE: makes PATH, which is also bound to STAGE, enterable.
reveal() {
    local closed child
    shopt -s nullglob
    while closed=$(first_closed "$1") && [ -n "$closed" ]; do
        if [ -d "$closed" ]; then
            mount -t tmpfs -o mode=755 tmpfs "$closed"
        fi
        if [ "$closed" = "$1" ] && [ -d "$closed" ]; then
            for child in "$2"/* "$2"/.[!.]*; do
                if [ -d "$child" ]; then mkdir "$1/${child##*/}"; else touch "$1/${child##*/}"; fi
                mount --bind "$child" "$1/${child##*/}"
            done
        else
            mkdir -p "$1"
            mount --bind "$2" "$1"
        fi
    done
}

inside() {
    local stage number program helper failed=()
    user=$1
    local repository=$2 target=$3
    shift 3
    mount --make-rprivate /
    if [ "$user" = "$poor" ]; then
        for helper in newuidmap newgidmap; do
            if helper=$(command -v "$helper"); then mount --bind /dev/null "$helper"; fi
        done
    fi
    # What is mounted here is only in this namespace.
    stage=/mnt
    mount -t tmpfs -o mode=755 tmpfs "$stage"
    # As on a machine whose users may have networks of their own; the other user is without.
    if [ "$user" = "$rich" ] && [ -c /dev/net/tun ]; then
        mknod -m 666 "$stage/tun" c 10 200
        mount --bind "$stage/tun" /dev/net/tun
    fi
    mkdir "$stage/repository" "$stage/target"
    mount --bind "$repository" "$stage/repository"
    mount --bind "$target" "$stage/target"
    reveal "$repository" "$stage/repository"
    reveal "$target" "$stage/target"
    cd "$repository"
    for program in "$@"; do
        echo "     Running $program (as $user)"
        as_user env -i HOME="$(getent passwd "$user" | cut -d: -f6)" USER="$user" LOGNAME="$user" CI="${CI:-}" \
            NACRE_CONFORMANCE_FILTER="${NACRE_CONFORMANCE_FILTER:-}" \
            PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$program" || failed+=("$program")
    done
    if [ ${#failed[@]} -gt 0 ]; then
        echo "failed as $user: ${failed[*]}" >&2
        exit 1
    fi
}

if [ "${1:-}" = --inside ]; then
    shift
    inside "$@"
    exit 0
fi
if [ "$(id -u)" -ne 0 ]; then
    exit 0
fi
cd "$(dirname "$(realpath "$0")")/../.."

for user in "$rich" "$poor"; do
    if ! id "$user" >/dev/null 2>&1; then
        useradd --create-home --shell /bin/bash "$user"
    fi
done
for kind in uid gid; do
    if ! grep -q "^$rich:" "/etc/sub$kind"; then
        usermod "--add-sub${kind}s" 500000-565535 "$rich"
    fi
    # useradd may have given some.
    sed -i "/^$poor:/d" "/etc/sub$kind"
done
if [ "${1:-}" = --users ]; then
    exit 0
fi

# Cargo names the test programs: `  Executable tests/it/main.rs (target/…/it-0123)`. The frontend's are pure.
programs=()
while read -r program; do
    programs+=("$(realpath "$program")")
done < <(cargo test --workspace --locked --no-run 2>&1 | sed -n 's/^ *Executable .*(\(.*\))$/\1/p' | grep -v '/nacre_frontend-')
if [ ${#programs[@]} -eq 0 ]; then
    echo "as-user: cargo names no test programs" >&2
    exit 1
fi
as() {
    unshare --mount bash tests/setup/as-user.sh --inside "$1" "$PWD" "$(realpath "${CARGO_TARGET_DIR:-target}")" "${@:2}"
}
as "$rich" "${programs[@]}"
echo "all tests passed as $rich too"
# Making the bases takes ids that this user has not.
uid=$(id -u "$poor")
for layout in "/var/tmp/nacre-test-bases-$(id -u "$rich")"/*/layout; do
    base=/var/tmp/nacre-test-bases-$uid/$(basename "$(dirname "$layout")")
    if [ -e "$layout/index.json" ] && [ ! -e "$base/layout" ]; then
        mkdir -p "$base"
        cp -r "$layout" "$base/"
        chown -R "$poor:" "/var/tmp/nacre-test-bases-$uid"
    fi
done
steps=()
for program in "${programs[@]}"; do
    case ${program##*/} in it-* | conformance-* | sandbox-* | real-*) steps+=("$program") ;; esac
done
as "$poor" "${steps[@]}"
echo "all tests of steps passed as $poor, who has no subordinate IDs, too"
