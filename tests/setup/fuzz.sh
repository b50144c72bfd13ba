#!/usr/bin/env bash
# Runs fuzz targets, each for some time, one after the other. Needs `cargo install cargo-fuzz` and a C++ compiler; the
# stable compiler is enough. Corpora are made of the recorded cases in testdata and grow in frontend/fuzz and solver/fuzz.
#
#   tests/setup/fuzz.sh SECONDS [TARGET…]
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
seconds=${1:?seconds for each target}
shift
targets=("$@")
if [ ${#targets[@]} -eq 0 ]; then
    targets=(parse words mount ignore glob read_tar index archive)
fi
python3 "$root/tests/setup/fuzz-seeds.py" "$root"
# Sanitizer flags are for nightly compilers. Our code has no unsafe to sanitize; coverage is what is wanted here.
export RUSTC_BOOTSTRAP=1
for target in "${targets[@]}"; do
    case $target in
        parse | words | mount) crate=frontend ;;
        *) crate=solver ;;
    esac
    seeds=$root/$crate/fuzz/corpus/seeds-$target
    corpus=$root/$crate/fuzz/corpus/$target
    mkdir -p "$corpus"
    echo "fuzz $target for $seconds s"
    # The target is named so that the static flags of .cargo/config.toml do not reach the fuzzer's own runtime.
    (cd "$root/$crate" && nice cargo fuzz run --sanitizer none --target "$(rustc -vV | sed -n 's/^host: //p')" \
        "$target" "$corpus" "$seeds" -- -max_total_time="$seconds" -timeout=10 -rss_limit_mb=1024 -max_len=16384 \
        -print_final_stats=1)
done
