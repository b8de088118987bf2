"""Reads Dockerfiles and .dockerignore, as far as ours go."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Instruction:
    keyword: str
    # What starts with two dashes, without them.
    flags: tuple[str, ...]
    rest: str

    @property
    def words(self) -> list[str]:
        """Of the exec form, which is a JSON list, or of the plain one."""
        return json.loads(self.rest) if self.rest.startswith("[") else shlex.split(self.rest)

    def copies(self) -> Iterator[tuple[str, PurePosixPath]]:
        """Of a COPY out of the repository: each source, and its path in the image."""
        *sources, target = self.words
        for source in sources:
            is_folder = (ROOT / source).is_dir()
            yield source, PurePosixPath(target) / ("" if is_folder else PurePosixPath(source).name)


class Dockerfile:
    """The stage that installs, and the one that is the image."""

    def __init__(self, name: str) -> None:
        lines = (ROOT / "docker" / name).read_text().splitlines()
        text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
        written = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
        self.stages: list[list[Instruction]] = []
        for instruction in map(_instruction, written):
            if instruction.keyword == "FROM":
                self.stages.append([])
            if self.stages:  # an ARG may stand before the first one
                self.stages[-1].append(instruction)
        self.builder, self.runtime = self.stages[-2:]

    def last(self, keyword: str) -> Instruction:
        """The one that counts in the image."""
        return [found for found in self.runtime if found.keyword == keyword][-1]

    def copies(self, stage: list[Instruction]) -> Iterator[tuple[str, PurePosixPath]]:
        """What a stage takes out of the repository: each source, and its path in the image."""
        for found in stage:
            if found.keyword == "COPY" and not found.flags:
                yield from found.copies()

    @property
    def environment(self) -> dict[str, str]:
        words = [word for found in self.runtime if found.keyword == "ENV" for word in found.words]
        return dict(word.split("=", 1) for word in words)

    @property
    def volumes(self) -> list[str]:
        return self.last("VOLUME").words


def _instruction(line: str) -> Instruction:
    keyword, _, rest = line.strip().partition(" ")
    flags = []
    while match := re.match(r"\s*--(\S+)\s+", rest):
        flags.append(match[1])
        rest = rest[match.end() :]
    return Instruction(keyword, tuple(flags), " ".join(rest.split()))


def files_of(source: str) -> list[str]:
    """The files of a folder, or the one file; no caches, no hidden files. From the root on."""
    path = ROOT / source
    found = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    files = [each.relative_to(ROOT) for each in found]
    return [str(f) for f in files if not any(p[0] == "." or p == "__pycache__" for p in f.parts)]


@pytest.fixture(scope="session")
def dockerfile() -> Callable[[str], Dockerfile]:
    return Dockerfile


@pytest.fixture(scope="session")
def shipped() -> Callable[[str], list[str]]:
    return files_of


@pytest.fixture(scope="session")
def ignored() -> Callable[[str], bool]:
    """Whether .dockerignore keeps a file away from a build: the last of its patterns decides that
    matches the file or a folder that it is in."""
    lines = (ROOT / ".dockerignore").read_text().split("\n")
    rules = []
    for line in lines:
        if line and not line.startswith("#"):
            pattern = re.escape(line.lstrip("!")).replace(r"\*\*/", "(?:.*/)?")
            rules.append((re.compile(pattern.replace(r"\*", "[^/]*")), not line.startswith("!")))

    def check(path: str) -> bool:
        places = [path, *map(str, PurePosixPath(path).parents[:-1])]  # less the root itself
        verdicts = [out for rule, out in rules if any(map(rule.fullmatch, places))]
        return bool(verdicts) and verdicts[-1]

    return check
