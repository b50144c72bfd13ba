#!/usr/bin/env bash
# demo.sh NACRE: builds a small base image from busybox and a two-stage image on it, shows the result, and builds again.
set -euo pipefail
nacre=$1

say() { printf '\n== %s\n' "$*"; }
show() { printf '$ %s\n' "$*"; }

static_busybox() { command -v busybox && ! ldd "$(command -v busybox)" >/dev/null 2>&1; }
if ! static_busybox >/dev/null; then
    if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
        echo "installing busybox-static"
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq busybox-static >/dev/null
    else
        echo "the demo needs a static busybox: sudo apt-get install busybox-static" >&2
        exit 1
    fi
fi

work=$(mktemp -d "${TMPDIR:-/tmp}/nacre-demo.XXXXXX")
trap 'chmod -R u+rwX "$work" 2>/dev/null || true; rm -rf "$work" 2>/dev/null || unshare --map-auto --map-root-user rm -rf "$work"' EXIT
cd "$work"
export NACRE_STORE=$work/store

say "A base image: busybox on an empty file system"
mkdir base app
cp "$(command -v busybox)" base/busybox
cat > base/Dockerfile <<'END'
FROM scratch
COPY --chmod=755 busybox /bin/busybox
RUN ["/bin/busybox", "--install", "-s", "/bin"]
ENV PATH=/bin
CMD ["sh"]
END
show nacre build -t base base
"$nacre" build --progress=plain -t base base

say "An image in two stages; the result has no tools"
printf 'pear\napple\nfig\n' > app/fruit
echo '*.log' > app/.dockerignore
echo noise > app/build.log
cat > app/Dockerfile <<'END'
FROM base AS builder
WORKDIR /work
COPY . .
RUN echo "working hard" && sleep 2 && sort fruit > sorted

FROM base AS notes
RUN sleep 2 && date > /date

FROM scratch
COPY --from=builder /work/sorted /fruit
COPY --from=notes /date /date
LABEL org.opencontainers.image.title=demo
END
cat app/Dockerfile
show nacre build -t demo -o type=local,dest=result --load app
time "$nacre" build --progress=plain -t demo -o type=local,dest=result --load app

say "What came out"
(cd result && find . -type f | sort | while read -r file; do printf '%s\n' "$file"; sed 's/^/    /' "$file"; done)

say "The same again: nothing runs"
time "$nacre" build --progress=plain -t demo app

say "One line more in app/fruit: only what can see it runs, and says why"
echo banana >> app/fruit
time "$nacre" build --progress=plain -t demo app

say "The store"
show nacre images
"$nacre" images
