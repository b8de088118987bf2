"""How a page of the KV cache is divided: which bytes are codes, scales, bitmaps, bounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Bytes: a section begins at a multiple of so many, of its page and so of the pool.
ALIGNMENT = 64


@dataclass(frozen=True)
class Section:
    """One kind of numbers of a page."""

    name: str
    dtype: torch.dtype
    # Of one page. Where the first axis is the page's tokens, a row is known with its token.
    shape: tuple[int, ...]
    alignment: int = ALIGNMENT

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


# Sections of a page with so many tokens.
Sections = Callable[[int], Sequence[Section]]


@dataclass(frozen=True)
class PageLayout:
    """Sections one after the other, in one layer of one page."""

    # Of each page and layer; what the sections leave is not used.
    page_bytes: int
    # Tokens of a page.
    block_size: int
    sections: tuple[Section, ...]

    def offset(self, name: str) -> int:
        """Bytes from the beginning of a page to one of its sections."""
        return _offsets(self.sections)[name]

    def section(self, name: str) -> Section:
        return next(section for section in self.sections if section.name == name)

    def has(self, name: str) -> bool:
        return any(section.name == name for section in self.sections)

    def view(self, pages: Tensor, name: str) -> Tensor:
        """One section of all pages. pages: `[pages, page_bytes]` uint8, whose rows may lie apart
        -> `[pages, *section.shape]` of the section's dtype, the same memory."""
        section, at = self.section(name), self.offset(name)
        part = pages[:, at : at + section.nbytes]
        numbers: Tensor = part.view(section.dtype)
        return numbers.view(len(pages), *section.shape)


def page_layout(page_bytes: int, sections: Sections) -> PageLayout:
    """With as many tokens as fit a page; none where not even one does."""
    low, high = 0, page_bytes
    while low < high:
        middle = (low + high + 1) // 2
        taken = _end(sections(middle))
        low, high = (middle, high) if taken <= page_bytes else (low, middle - 1)
    return PageLayout(page_bytes, low, tuple(sections(low)))


def _offsets(sections: Sequence[Section]) -> dict[str, int]:
    """Where each begins, in bytes."""
    offsets: dict[str, int] = {}
    at = 0
    for section in sections:
        at = -(-at // section.alignment) * section.alignment
        offsets[section.name] = at
        at += section.nbytes
    return offsets


def _end(sections: Sequence[Section]) -> int:
    return _offsets(sections)[sections[-1].name] + sections[-1].nbytes
