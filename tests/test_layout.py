"""The house keeps its shape: imports point one way, links are relative, the face is thin and light."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("core", "tasks", "datasets", "evaluation")
FACE = "nextscale"

# What each folder may import of the library. The face, tests and benchmarks may import all of it.
ALLOWED = {
    "core": {"core"},
    "datasets": {"datasets"},
    "evaluation": {"evaluation"},
    "tasks": {"tasks", "core", "datasets", "evaluation"},
}
# They load only beside a build of torch that fits them, so nothing here may need them.
UNWANTED = {"torchvision", "timm", "lpips", "torch_fidelity"}


def imported_modules(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Line and full name of all that is imported; relative names are resolved from `package`.

    `from a import b` counts as `a.b`: whether b is a module or a value makes no difference to the rules, as
    the second part of the name tells the folder. Names given to `import_module` as plain text count too.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, *filter(None, [base])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            name = node.args[0].value
            if called in {"import_module", "__import__"} and isinstance(name, str):
                yield node.lineno, name


def violations(source: str, folder: str, package: str) -> list[str]:
    """The imports of a file of `folder` that break a rule, each as `line: name: why`."""
    found = []
    for line, name in imported_modules(ast.parse(source), package):
        first, _, rest = name.partition(".")
        if first in FOLDERS:
            found.append(f"{line}: {name}: write nextscale.{first}, the bare name may be another package")
        elif first == FACE and folder in ALLOWED:
            target = rest.partition(".")[0]
            if target not in ALLOWED[folder]:
                found.append(f"{line}: {name}: {folder} imports only {', '.join(sorted(ALLOWED[folder]))}")
        elif first in UNWANTED and folder in {*FOLDERS, FACE}:
            found.append(f"{line}: {name}: not a dependency")
        elif first in {"tests", "benchmarks"} and folder in {*FOLDERS, FACE}:
            found.append(f"{line}: {name}: the library does not import what examines it")
    return found


def sources(folder: str) -> list[Path]:
    """The Python files of a top-level folder; links to other folders are not followed."""
    return sorted(
        Path(directory, name)
        for directory, _, names in os.walk(ROOT / folder)
        for name in names
        if name.endswith(".py")
    )


@pytest.mark.parametrize("folder", [*FOLDERS, FACE, "tests", "benchmarks"])
def test_imports_point_one_way(folder: str) -> None:
    found = []
    for path in sources(folder):
        parts = path.relative_to(ROOT).with_suffix("").parts
        package = ".".join([FACE, *parts[:-1]] if folder in FOLDERS else parts[:-1])
        found += [f"{path.relative_to(ROOT)}:{v}" for v in violations(path.read_text(), folder, package)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("core", "import nextscale"),
        ("core", "import nextscale.tasks.generation.var"),
        ("core", "from nextscale import datasets"),
        ("core", "from nextscale import load"),
        ("core", "from ..evaluation import moments"),
        ("core", "def late():\n    from nextscale.tasks.generation import var"),
        ("core", "import importlib\nimportlib.import_module('nextscale.tasks.generation.var')"),
        ("datasets", "from nextscale.core.schedule import ScaleSchedule"),
        ("datasets", "from nextscale.evaluation import moments"),
        ("evaluation", "from nextscale.datasets import images"),
        ("evaluation", "import nextscale.tasks"),
        ("tasks", "from nextscale import load"),
        ("tasks", "from nextscale.cli import main"),
        ("tasks", "import core.schedule"),
        ("nextscale", "from datasets import images"),
        ("nextscale", "import torchvision.transforms"),
        ("tasks", "from timm.models import create_model"),
        ("tests", "from tasks.generation import var"),
        ("nextscale", "from tests.conftest import settings"),
    ],
)
def test_a_wrong_import_is_found(folder: str, source: str) -> None:
    package = f"{FACE}.{folder}" if folder in FOLDERS else folder
    assert len(violations(source, folder, package)) == 1


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        (
            "core",
            "from nextscale.core.schedule import ScaleSchedule\nfrom . import cache\nfrom .cache import Key",
        ),
        ("tasks", "from nextscale.core import sampling\nfrom nextscale.tasks.generation.var import VAR"),
        ("tasks", "from nextscale.datasets import images\nfrom nextscale.evaluation import moments"),
        ("nextscale", "from nextscale.tasks.generation import var\nfrom . import registry"),
        ("evaluation", "import torch, numpy\nfrom scipy import linalg"),
    ],
)
def test_a_right_import_is_left_alone(folder: str, source: str) -> None:
    assert violations(source, folder, f"{FACE}.{folder}" if folder in FOLDERS else folder) == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_face_links_to_the_folder(folder: str) -> None:
    link = ROOT / FACE / folder
    assert link.is_symlink()
    assert os.readlink(link) == f"../{folder}"
    assert not (ROOT / folder / "__init__.py").exists(), "an __init__.py would shadow a package of that name"


def run_python(code: str, cwd: Path, path: str = "") -> str:
    """What a fresh interpreter prints for `code`."""
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_package_named_datasets_wins_over_the_folder(tmp_path: Path) -> None:
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "__init__.py").write_text("who = 'another package'")
    assert run_python("import datasets; print(datasets.who)", ROOT, str(tmp_path)) == "another package"


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = {"torch", "kornia", "transformers", "matplotlib", "open3d", "skimage", "accelerate", "pyarrow"}
    code = f"import nextscale, sys; print(sorted(sys.modules.keys() & {heavy}))"
    assert run_python(code, ROOT) == "[]"
