"""Who may import whom, and what: the arrows between the package's folders."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Each folder, and the folders that it may import besides itself.
MAY_IMPORT = {
    "server": {"engine", "adapters_store"},
    "engine": {"kernels", "adapters_store"},
    "kernels": set[str](),
    "adapters_store": set[str](),
}
# Extra -> the one module that imports what it installs; it is loaded only when it is asked for, as
# tests/server/test_tracing.py shows.
EXTRAS = {"tracing": "server/spans.py"}
# Builds of torch for CUDA require these, builds for a CPU do not.
WITH_CUDA = {"triton"}
# Libraries of the HTTP front end and of the command line.
FRONT_END = {
    "fastapi",
    "prometheus_client",
    "pydantic",
    "pydantic_core",
    "pydantic_settings",
    "rich",
    "starlette",
    "typer",
    "uvicorn",
}
# Top-level name -> what installs it.
INSTALLED = packages_distributions()


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports(module: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that a module imports, wherever in it."""
    package = ("polydelta", *module.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            name = ".".join((*base, node.module) if node.module else base)
            # `from polydelta import engine` and `from .. import engine` name it after the import.
            if name == "polydelta":
                yield from ((node.lineno, f"{name}.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, name


def third_party(extra: str | None = None) -> set[str]:
    """Top-level names that an extra's module imports, or all others, and that are neither the
    package's own nor Python's."""
    apart = {ROOT / module for module in EXTRAS.values()}
    every = {module for folder in MAY_IMPORT for module in modules(folder)}
    asked = every - apart if extra is None else {ROOT / EXTRAS[extra]}
    names = {name.partition(".")[0] for module in asked for _, name in imports(module)}
    return names - sys.stdlib_module_names - {"polydelta"}


def distribution(requirement: str) -> str:
    """`pydantic-core!=2.41; extra == 'x'` -> `pydantic-core`"""
    name = re.match(r"[\w.-]+", requirement)
    assert name, requirement
    return re.sub(r"[-_.]+", "-", name[0]).lower()


def dependencies(extra: str | None = None) -> set[str]:
    """What the package requires, or one of its extras does besides."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    if extra is None:
        return {distribution(line) for line in project["dependencies"]}
    return {distribution(line) for line in project["optional-dependencies"][extra]}


def brought_by(names: set[str]) -> set[str]:
    """The distributions themselves, and what they require whatever the extras."""
    required = {
        distribution(line)
        for name in names
        for line in requires(name) or ()
        if "extra ==" not in line
    }
    return names | required


def distributions_of(module: str) -> set[str]:
    """What installs a top-level name; more than one if it is shared."""
    return {distribution(name) for name in INSTALLED.get(module, ())}


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_folder_imports_only_the_folders_below_it(folder: str) -> None:
    allowed = MAY_IMPORT[folder] | {folder}
    wrong = [
        f"{module.relative_to(ROOT)}:{line} imports {name}"
        for module in modules(folder)
        for line, name in imports(module)
        if name.startswith("polydelta") and name.split(".")[1] not in allowed
    ]
    assert wrong == []


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_folder_is_imported_by_its_installed_name_only(folder: str) -> None:
    wrong = [
        f"{module.relative_to(ROOT)}:{line} imports {name}"
        for module in modules(folder)
        for line, name in imports(module)
        if name.partition(".")[0] in MAY_IMPORT
    ]
    assert wrong == []


@pytest.mark.parametrize("folder", sorted(MAY_IMPORT.keys() - {"server"}))
def test_the_front_ends_libraries_are_imported_only_by_the_server(folder: str) -> None:
    wrong = [
        f"{module.relative_to(ROOT)}:{line} imports {name}"
        for module in modules(folder)
        for line, name in imports(module)
        if name.partition(".")[0] in FRONT_END
    ]
    assert wrong == []


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_an_init_file_hands_on_names_and_does_nothing_else(folder: str) -> None:
    wrong = [
        f"{module.relative_to(ROOT)}:{node.lineno}"
        for module in modules(folder)
        if module.name == "__init__.py"
        for node in ast.parse(module.read_text()).body
        if not hands_on_names(node)
    ]
    assert wrong == []


def hands_on_names(node: ast.stmt) -> bool:
    """A docstring, an import, or a plain list of strings called `__all__`."""
    match node:
        case ast.Expr(value=ast.Constant(value=str())) | ast.Import() | ast.ImportFrom():
            return True
        case ast.Assign(targets=[ast.Name(id="__all__")], value=ast.List(elts=names)):
            return all(isinstance(name, ast.Constant) for name in names)
    return False


def test_what_is_imported_is_a_dependency_or_required_by_one() -> None:
    known = brought_by(dependencies()) | WITH_CUDA
    assert {name for name in third_party() if not distributions_of(name) & known} == set()


@pytest.mark.parametrize("extra", EXTRAS)
def test_what_an_extras_module_imports_is_a_dependency_or_comes_with_the_extra(extra: str) -> None:
    known = brought_by(dependencies() | dependencies(extra))
    assert {name for name in third_party(extra) if not distributions_of(name) & known} == set()
    assert dependencies(extra) <= {
        name for module in third_party(extra) for name in distributions_of(module)
    }


def test_what_only_cuda_builds_of_torch_bring_is_imported_for_cuda_only() -> None:
    folder = ROOT / "kernels" / "triton"
    wrong = [
        f"{module.relative_to(ROOT)}:{line} imports {name}"
        for package in MAY_IMPORT
        for module in modules(package)
        if not module.is_relative_to(folder)
        for line, name in imports(module)
        if name.partition(".")[0] in WITH_CUDA
    ]
    assert wrong == []


def test_every_dependency_is_imported() -> None:
    used = {name for module in third_party() for name in distributions_of(module)}
    assert dependencies() - used == set()
