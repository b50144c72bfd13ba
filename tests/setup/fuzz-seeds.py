#!/usr/bin/env python3
"""Makes seed corpora for the fuzz targets of what is in testdata: fuzz-seeds.py REPOSITORY."""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import pathlib
import sys
import tarfile

root = pathlib.Path(sys.argv[1])
data = root / "testdata"


def vectors(name):
    return json.loads((data / "vectors" / f"{name}.json").read_text())


def seed(crate, target, content):
    if isinstance(content, str):
        content = content.encode(errors="surrogatepass")
    folder = root / crate / "fuzz" / "corpus" / f"seeds-{target}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / hashlib.sha256(content).hexdigest()[:16]).write_bytes(content)


for case in (data / "conformance" / "cases").iterdir():
    for path in case.rglob("*"):
        if "Dockerfile" in path.name and path.is_file() and not path.name.endswith(".dockerignore"):
            seed("frontend", "parse", path.read_bytes())
        if path.name.endswith(".dockerignore") and path.is_file():
            seed("solver", "ignore", path.read_bytes() + b"\0a/b.txt")
for one in vectors("parse")["vectors"]:
    seed("frontend", "parse", one["dockerfile"])
seed("frontend", "parse", "FROM a\n# \0COPY --from=b / /\0RUN <<E\nx\nE\n")

words = vectors("words")
values = "\0".join(["", *(pair.split("=", 1)[1] for pair in words["env"])])
for one in words["vectors"]:
    text = one["in"].replace("FOO", "A").replace("BAR", "B")
    for lexer in (0, 6, 24):
        seed("frontend", "words", bytes([lexer]) + (text + values).encode())
for name in ("chmod", "durations", "sizes", "signals", "references", "platforms"):
    for one in vectors(name)["vectors"]:
        first = next(value for value in one.values() if isinstance(value, str))
        seed("frontend", "words", "\0" + first)
for one in vectors("mounts")["vectors"]:
    seed("frontend", "mount", one["mount"])

for one in vectors("dockerignore")["vectors"]:
    for path in [*one.get("excluded", [])[:3], *one.get("kept", [])[:2]]:
        seed("solver", "ignore", f"{one['ignore']}\0{path}")
for one in vectors("match")["vectors"]:
    for name in [*one.get("match", [])[:3], *one.get("no", [])[:2], ""]:
        seed("solver", "glob", f"{one['pattern']}\0{name}")


def tar(form, members):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for name, kind, link, pax in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.pax_headers = kind, link, pax
            content = b"content" if kind == tarfile.REGTYPE else b""
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue().rstrip(b"\0") + bytes(1024)


REG, DIR, SYM, LNK = tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE
layers = [
    [("d/", DIR, "", {}), ("d/f", REG, "", {}), ("d/h", LNK, "d/f", {}), ("s", SYM, "d", {}), ("s/g", REG, "", {})],
    [("d/.wh.f", REG, "", {}), ("d/.wh..wh..opq", REG, "", {}), (".wh.gone", REG, "", {}), ("gone/x", REG, "", {})],
    [("../../up", REG, "", {}), ("a", SYM, "b", {}), ("b", SYM, "a", {}), ("p", tarfile.FIFOTYPE, "", {})],
    [("x" * 120, REG, "", {"SCHILY.xattr.user.a": "b", "mtime": "1.5"}), ("y", SYM, "z" * 120, {})],
    [("dev", tarfile.CHRTYPE, "", {}), ("dev", DIR, "", {}), ("dev/f", REG, "", {}), ("dev", REG, "", {})],
]
for members in layers:
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        try:
            plain = tar(form, members)
        except ValueError:
            continue  # a name that the old form cannot hold
        seed("solver", "read_tar", plain)
        for packed in (plain, gzip.compress(plain, 1, mtime=0), bz2.compress(plain, 1), lzma.compress(plain)):
            seed("solver", "archive", packed)
for path in data.rglob("*"):
    if path.is_file() and path.name.endswith((".tar", ".tgz", ".tar.gz", ".tar.zst")):
        seed("solver", "archive", path.read_bytes())

# Entries of an index: path shared and added, kind, mode, uid, gid, seconds, nanoseconds, and what the kind has.
seed("solver", "index", bytes([1, 0, 0, 1, 0xED, 3, 0, 0, 0, 0]))
seed("solver", "index", bytes([2, 0, 1, 97, 1, 0, 0, 0, 0, 0, 1, 2, 47, 98, 0x20, 0, 0, 0, 0, 0, 5]) + bytes(32))
seed("solver", "index", bytes([2, 0, 1, 97, 2, 0, 0, 0, 0, 0, 1, 98, 0, 1, 98, 4 | 0x40, 0, 0, 0, 0, 0, 1, 3, 1, 1, 99, 0]))
