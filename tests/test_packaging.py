"""A wheel, an archive of the sources, and a wheel made from that archive hold every file of the library."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import nextscale

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("core", "tasks", "datasets", "evaluation")


def library_files() -> set[str]:
    """What an installation must hold: sources and the data beside them, as paths below its folder."""
    found = set()
    for directory, folders, names in os.walk(ROOT / "nextscale", followlinks=True):
        folders[:] = [name for name in folders if name != "__pycache__"]
        found |= {Path(directory, name).relative_to(ROOT).as_posix() for name in names}
    return {name for name in found if not name.endswith((".pyc", ".tmp"))}


def build(kind: str, project: Path, target: Path) -> Path:
    """Runs the build backend (`kind` is wheel or sdist) in a folder and returns the file it made."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(target)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return target / done.stdout.strip().splitlines()[-1]


def installed(wheel: Path, folder: Path) -> set[str]:
    """Unpacks a wheel, which is all that installing one does to the library, and returns the files."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
        return set(archive.namelist())


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the build reads, links kept: building writes beside the sources."""
    copy = tmp_path_factory.mktemp("project")
    unwanted = shutil.ignore_patterns("__pycache__", "*.tmp", "*.egg-info")
    for name in ("nextscale", *FOLDERS):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=unwanted)
    for name in ("pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff"):
        shutil.copy(ROOT / name, copy)
    return copy


def test_the_wheel_holds_the_library_and_imports(project: Path, tmp_path: Path) -> None:
    wheel = build("wheel", project, tmp_path)
    site = tmp_path / "site"
    files = installed(wheel, site)
    assert library_files() - files == set()
    assert {name.split("/")[0] for name in files if ".dist-info/" not in name} == {"nextscale"}
    modules = ["nextscale", *(f"nextscale.{folder}" for folder in FOLDERS)]
    code = f"import importlib; print([list(importlib.import_module(m).__path__)[0] for m in {modules}])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str([str(site / module.replace(".", "/")) for module in modules])


def test_the_source_archive_makes_the_same_wheel(project: Path, tmp_path: Path) -> None:
    archive = build("sdist", project, tmp_path)
    with tarfile.open(archive) as tar:
        assert not [member.name for member in tar if member.issym() or "/tests/" in member.name]
        tar.extractall(tmp_path, filter="data")
    unpacked = tmp_path / archive.name.removesuffix(".tar.gz")
    files = installed(build("wheel", unpacked, tmp_path), tmp_path / "site")
    assert library_files() - files == set()


def test_the_version_is_stated_once_and_the_same() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert nextscale.__version__ == declared == importlib.metadata.version("nextscale")
    assert f"## {declared}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {declared}\n" in (ROOT / "CITATION.cff").read_text()
