"""What is installed is what is in the tree."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = ("server", "engine", "kernels", "adapters_store")
# What setuptools reads besides the folders.
BUILD_FILES = ("pyproject.toml", "README.md", "LICENSE")


def shipped_files() -> Iterator[Path]:
    """Every file of the package's folders, relative to the root; no caches, no hidden files."""
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            file = path.relative_to(ROOT)
            hidden = any(part.startswith(".") or part == "__pycache__" for part in file.parts)
            if path.is_file() and not hidden:
                yield file


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.Path:
    """A wheel built from a copy of the tree, so that the tree keeps clean."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for file in (*map(Path, BUILD_FILES), *shipped_files()):
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, source / file)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir", str(built), str(source)]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (file,) = built.glob("*.whl")
    return zipfile.Path(file)


def names_in(wheel: zipfile.Path) -> set[str]:
    return {name for name in wheel.root.namelist() if not name.endswith("/")}


def test_every_folder_with_python_files_is_in_the_list_of_packages() -> None:
    folders = {file.parent for file in shipped_files() if file.suffix == ".py"}
    expected = {".".join(("polydelta", *folder.parts)) for folder in folders}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == expected


def test_every_package_has_an_init_file() -> None:
    folders = {file.parent for file in shipped_files() if file.suffix == ".py"}
    assert [str(f) for f in sorted(folders) if not (ROOT / f / "__init__.py").is_file()] == []


def test_the_wheel_has_every_module_and_data_file_of_the_tree(wheel: zipfile.Path) -> None:
    expected = {f"polydelta/{file.as_posix()}" for file in shipped_files()}
    assert sorted(expected - names_in(wheel)) == []


def test_the_wheel_takes_no_other_name_than_polydelta(wheel: zipfile.Path) -> None:
    version = PROJECT["project"]["version"]
    top_level = {name.partition("/")[0] for name in names_in(wheel)}
    assert top_level == {"polydelta", f"polydelta-{version}.dist-info"}


def test_the_wheel_has_the_type_marker_of_every_package(wheel: zipfile.Path) -> None:
    markers = {f"polydelta/{folder}/py.typed" for folder in FOLDERS}
    assert sorted(markers - names_in(wheel)) == []


def test_the_wheel_has_the_licence_and_the_command(wheel: zipfile.Path) -> None:
    info = next(part for part in wheel.iterdir() if part.name.endswith(".dist-info"))
    assert "Apache License" in (info / "licenses" / "LICENSE").read_text()
    assert "polydelta = polydelta.server.cli:main" in (info / "entry_points.txt").read_text()
