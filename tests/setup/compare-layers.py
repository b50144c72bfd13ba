#!/usr/bin/env python3
"""Compares images in OCI archives layer by layer: their digests and, where these differ, the entries.

compare-layers.py FIRST.tar OTHER.tar...
"""

import gzip
import hashlib
import io
import json
import os
import sys
import tarfile


class Image:
    def __init__(self, path):
        self.name = os.path.basename(os.path.dirname(os.path.abspath(path)))
        self.archive = tarfile.open(path)
        index = self.read("index.json")
        manifest = self.named(index["manifests"][0]["digest"])
        self.layers = [layer["digest"] for layer in manifest["layers"]]
        config = self.named(manifest["config"]["digest"])
        self.diff_ids = config["rootfs"]["diff_ids"]
        made = [step["created_by"] for step in config["history"] if not step.get("empty_layer")]
        self.made = made + [""] * (len(self.layers) - len(made))

    def bytes(self, name):
        return self.archive.extractfile(name).read()

    def read(self, name):
        return json.loads(self.bytes(name))

    def named(self, digest):
        return self.read("blobs/sha256/" + digest.split(":")[1])

    def entries(self, layer):
        blob = io.BytesIO(self.bytes("blobs/sha256/" + self.layers[layer].split(":")[1]))
        found = {}
        with tarfile.open(fileobj=gzip.GzipFile(fileobj=blob), mode="r|") as archive:
            for entry in archive:
                content = archive.extractfile(entry).read() if entry.isreg() else b""
                found[entry.name] = {
                    "type": entry.type, "mode": oct(entry.mode), "owner": (entry.uid, entry.gid), "time": entry.mtime,
                    "link": entry.linkname, "size": entry.size, "content": hashlib.sha256(content).hexdigest()[:12],
                    "attributes": sorted(entry.pax_headers.items()), "device": (entry.devmajor, entry.devminor),
                }
        return found


def main():
    first, *others = [Image(path) for path in sys.argv[1:]]
    equal = True
    for layer, digest in enumerate(first.layers):
        same = all(layer < len(other.layers) and other.layers[layer] == digest for other in others)
        print(digest[7:19], "same" if same else "DIFFERS", " ".join(first.made[layer].split())[:90])
        equal &= same
        for other in [] if same else others:
            one, two = first.entries(layer), other.entries(layer)
            paths = [path for path in sorted(one.keys() | two.keys()) if one.get(path) != two.get(path)]
            for path in paths[:40]:
                left, right = one.get(path), two.get(path)
                if left is None or right is None:
                    print(f"    only {other.name if left is None else first.name}: {path}")
                    continue
                what = [f"{key} {left[key]} / {right[key]}" for key in left if left[key] != right[key]]
                print(f"    {first.name} / {other.name}: {path}: {', '.join(what)}")
            if not paths:
                print(f"    {first.name} / {other.name}: the same entries")
    equal &= all(other.diff_ids == first.diff_ids for other in others)
    names = ", ".join(image.name for image in [first, *others])
    print(f"{len(first.layers)} layers {'are the same' if equal else 'DIFFER'}: {names}")
    sys.exit(0 if equal else 1)


main()
