#!/usr/bin/env python3
"""Runs parser, checks and planner over Dockerfiles of other projects, from Debian source packages and npm packages.

    real-dockerfiles.py run DIR             fetch what testdata/real-dockerfiles.tsv lists into DIR, and compare
    real-dockerfiles.py update DIR          the same, and write the results down
    real-dockerfiles.py add DIR PACKAGE…    look for Dockerfiles in more packages (`npm:NAME` for npm) and write them down

The files themselves are not ours and stay out of the repository. Needs apt (any release; sources are Debian's), npm and
cargo. Only the package lists of a private apt configuration in DIR are touched.
"""

import collections
import hashlib
import pathlib
import re
import subprocess
import sys
import tarfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
TABLE = ROOT / "testdata" / "real-dockerfiles.tsv"
REPORT = ROOT / "testdata" / "real-dockerfiles.md"
RELEASE = "bookworm"
NAMED = re.compile(r"(^|/)([^/]*\.)?(Dockerfile|dockerfile|Containerfile)([.\-_][^/]*)?$")
# Templates, programs about Dockerfiles, and descriptions of their syntax for editors.
OTHERS = re.compile(
    r"(\.(go|py|sh|md|txt|html|js|json|ya?ml|vim|tmpl|tpl|template|in|j2|erb|ejs|rst|svg|png|rb|lang|el|c|h|"
    r"dockerignore|nanorc|tmLanguage|tmPreferences|sublime-\w+))$"
)
Row = collections.namedtuple("Row", "package version path sha256 lines outcome checks")


def run(*command, **options):
    return subprocess.run(command, check=True, text=True, **options)


def apt_config(folder):
    for name in ("apt/lists/partial", "apt/cache/archives/partial", "src"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    keys = "/usr/share/keyrings/debian-archive-keyring.gpg"
    (folder / "apt/sources.list").write_text(f"deb-src [signed-by={keys}] http://deb.debian.org/debian {RELEASE} main\n")
    config = folder / "apt/apt.conf"
    config.write_text(
        f'Dir::Etc::sourcelist "{folder}/apt/sources.list";\nDir::Etc::sourceparts "-";\n'
        f'Dir::State::lists "{folder}/apt/lists";\nDir::Cache "{folder}/apt/cache";\n'
        'APT::Sandbox::User "root";\n'
    )
    return {"APT_CONFIG": str(config), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}


def fetch(folder, packages):
    """Archives of packages, by name; a version pins one."""
    env = apt_config(folder)
    if not list((folder / "apt/lists").glob("*Sources*")):
        run("apt-get", "-q", "update", env=env)
    archives = {}
    for package, version in packages:
        place = folder / "src" / package.replace("/", "_").replace(":", "_")
        if not place.is_dir():
            place.mkdir()
            if package.startswith("npm:"):
                name = package.removeprefix("npm:") + (f"@{version}" if version else "")
                run("npm", "pack", "--silent", name, cwd=place)
            else:
                name = package + (f"={version}" if version else "")
                run("apt-get", "-q", "source", "--download-only", "--tar-only", name, cwd=place, env=env)
        archives[package] = sorted(place.glob("*.t*gz")) + sorted(place.glob("*.tar.[bxl]z*"))
    return archives


def dockerfiles(archive):
    with tarfile.open(archive) as members:
        for member in members:
            if member.isfile() and NAMED.search(member.name) and not OTHERS.search(member.name):
                yield member.name, members.extractfile(member).read()


def version_of(package, archive):
    if package.startswith("npm:"):
        return archive.name.removesuffix(".tgz").rsplit("-", 1)[1]
    return archive.name.split("_", 1)[1].split(".orig", 1)[0].removesuffix(".tar.xz").removesuffix(".tar.gz")


def find(folder, packages):
    """Rows without results; a file that several packages have counts once."""
    rows, seen = [], set()
    files = folder / "files"
    files.mkdir(exist_ok=True)
    for package, archives in fetch(folder, packages).items():
        for archive in archives:
            for path, content in dockerfiles(archive):
                digest = hashlib.sha256(content).hexdigest()
                if digest not in seen:
                    seen.add(digest)
                    (files / digest).write_bytes(content)
                    rows.append(Row(package, version_of(package, archive), path, digest, 0, "", ""))
    return rows


def judged(folder, rows):
    paths = [str(folder / "files" / row.sha256) for row in rows]
    command = ["cargo", "run", "-q", "-p", "nacre-frontend", "--example", "real_dockerfiles", "--", *paths]
    lines = run(*command, cwd=ROOT, stdout=subprocess.PIPE).stdout.splitlines()
    assert len(lines) == len(rows), "one line a file"
    results = (line.split("\t") for line in lines)
    return [row._replace(lines=int(lines), outcome=outcome, checks=checks)
            for row, (_, lines, outcome, checks) in zip(rows, results)]


def read():
    return [Row(*fields)._replace(lines=int(fields[4]))
            for fields in (line.split("\t") for line in TABLE.read_text().splitlines()[1:])]


def write(rows):
    rows = sorted(rows)
    TABLE.write_text("\n".join("\t".join(map(str, row)) for row in [Row(*Row._fields), *rows]) + "\n")
    totals, packages = collections.Counter(), {}
    for row in rows:
        found = collections.Counter()
        for check in row.checks.split():
            name, count = check.split("=")
            found[name] += int(count)
        totals += found
        package = packages.setdefault((row.package, row.version), [0, 0, 0, collections.Counter()])
        package[0] += 1
        package[1] += row.lines
        package[2] += row.outcome != "ok"
        package[3] += found
    refused = [row for row in rows if row.outcome != "ok"]
    lines = [
        "# Dockerfiles of other projects", "",
        f"{len(rows)} different files with {sum(row.lines for row in rows)} lines from {len(packages)} packages were "
        "parsed, printed, parsed again, checked and planned, all stages, without build args and on base images with "
        "nothing but PATH. Each file, its digest and its result are in `real-dockerfiles.tsv`; "
        "`tests/setup/real-dockerfiles.py` fetches them again and compares.", "",
        f"{len(rows) - len(refused)} files give a graph. Those that do not:", "",
        "| file | reason | who is right |", "|---|---|---|",
    ]
    for row in refused:
        reason = row.outcome.replace("|", "&#124;")
        lines.append(f"| {row.package} `{row.path}` | {reason} | {REASONS.get(row.sha256[:12], '')} |")
    lines += ["", "## What the checks found", "", "| rule | findings |", "|---|---|"]
    lines += [f"| {name} | {count} |" for name, count in totals.most_common()]
    lines += ["", "Variables that a real base image would set count as undefined here.", "", "## Packages", "",
              "| package | version | files | lines | refused | checks |", "|---|---|---|---|---|---|"]
    for (package, version), (files, count, bad, found) in sorted(packages.items()):
        checks = ", ".join(f"{name} {number}" for name, number in sorted(found.items()))
        lines.append(f"| {package} | {version} | {files} | {count} | {bad or ''} | {checks} |")
    REPORT.write_text("\n".join(lines) + "\n")


ARG = "as BuildKit: the base is named by a build arg without default"
NEGATIVE = "as BuildKit: the project keeps the file to see it refused"
# Verdicts on the files that are refused, by the start of their digest.
REASONS = {
    "b077e5e48750": ARG, "ccc8139e837e": ARG, "aae54e4ef4e0": ARG, "fc383accd173": ARG, "2f618e827215": ARG,
    "b26e16fb0df5": ARG, "8048aa7e9315": ARG, "832186fc1ae9": ARG, "a3ccf06bc1ae": ARG, "6090a99df825": ARG,
    "00ab8ff45599": ARG, "90e18e35f807": ARG + "; and `--from` takes no variables",
    "2707410ec92a": NEGATIVE, "eb0708ea41dc": NEGATIVE, "2b3d9ee4f381": NEGATIVE, "c6e650a6b302": NEGATIVE,
    "ddbeb4634ddb": NEGATIVE, "730f45e985e0": NEGATIVE, "925c0f3b8911": NEGATIVE,
    "ce26efa19bfd": "as BuildKit: stage names have no slash (buildah takes them)",
    "28339712f4fb": "as BuildKit: `z` is an option of buildah's",
    "c48fe3452eac": "as BuildKit: nothing can be escaped in single quotes, so the last one stays open",
    "de03431670ce": "as BuildKit: a template, although its name does not say so",
}


def main():
    action, folder, *packages = sys.argv[1:]
    folder = pathlib.Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if action == "add":
        known = read() if TABLE.exists() else []
        digests = {row.sha256 for row in known}
        rows = [row for row in find(folder, [(package, "") for package in packages]) if row.sha256 not in digests]
        return write(known + judged(folder, rows))
    known = read()
    wanted = {row.sha256 for row in known}
    rows = [row for row in find(folder, dict.fromkeys((row.package, "") for row in known)) if row.sha256 in wanted]
    missing = wanted - {row.sha256 for row in rows}
    if missing:
        print(f"{len(missing)} files are not in today's packages; they are left out", file=sys.stderr)
    rows = judged(folder, rows)
    if action == "update":
        return write(rows)
    before = {row.sha256: row for row in known}
    changed = [row for row in rows if row[4:] != before[row.sha256][4:]]
    for row in changed:
        print(f"{row.package} {row.path}: {row.outcome} {row.checks}, was {before[row.sha256][5:]}")
    sys.exit(1 if changed else 0)


main()
