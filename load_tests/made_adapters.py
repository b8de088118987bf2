"""Random LoRA adapters for the default model, as PEFT folders that are kept between runs.

They are cut at random places out of one stretch of random numbers, which costs less than drawing
every number: 2,000 of ranks 1 to 8 (1.8 GB on the attention's layers, 4.7 GB on all) were written
in 6 and 14 s.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

# SmolLM2-135M's layers, and (out, in) of their linear ones.
LAYERS, HIDDEN, KV, FFN = 30, 576, 192, 1536
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (FFN, HIDDEN),
    "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
}
# What adapters may change.
MODULES = {
    "all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "qv": ("q_proj", "v_proj"),
}
# Out of git's sight.
FOLDER = Path(__file__).parents[1] / "build" / "load_tests" / "adapters"
# Largest values of A, and of B at rank 1: small enough to leave the text sane.
A_LIMIT, B_LIMIT = 0.02, 0.01
# Places at which a cut may begin.
SLACK = 1 << 20


@dataclass(frozen=True)
class AdapterSet:
    """So many adapters; number i has rank ranks[i mod len]."""

    count: int
    ranks: tuple[int, ...] = (8,)
    # A key of MODULES.
    modules: str = "attention"

    @property
    def name(self) -> str:
        return f"{self.count}-{self.modules}-r{'-'.join(map(str, self.ranks))}"

    def rank(self, number: int) -> int:
        return self.ranks[number % len(self.ranks)]


def adapter_name(number: int) -> str:
    return f"adapter-{number:05d}"


def make(
    wanted: AdapterSet, advance: Callable[[], None] = lambda: None, folder: Path = FOLDER
) -> Path:
    """The folder that has them, written unless it is there already. advance: called after each
    adapter that is written."""
    made = folder / wanted.name
    if not made.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        # Only a whole set gets its name.
        with TemporaryDirectory(dir=folder) as begun:
            (Path(begun) / wanted.name).mkdir()
            cutters = {rank: Cutter(rank, wanted.modules) for rank in set(wanted.ranks)}
            for number in range(wanted.count):
                cutters[wanted.rank(number)].write(
                    Path(begun) / wanted.name / adapter_name(number), seed=number
                )
                advance()
            (Path(begun) / wanted.name).rename(made)
    return made


class Cutter:
    """Writes adapters of one rank, which differ in their numbers alone."""

    def __init__(self, rank: int, modules: str) -> None:
        names = MODULES[modules]
        places = [
            (f"base_model.model.model.layers.{layer}.{name}", shape)
            for layer in range(LAYERS)
            for name, shape in SHAPES.items()
            if name.rpartition(".")[2] in names
        ]
        # All A first, then all B: two cuts are a file.
        a_shapes = [(f"{name}.lora_A.weight", (rank, size)) for name, (_, size) in places]
        b_shapes = [(f"{name}.lora_B.weight", (size, rank)) for name, (size, _) in places]
        self._head = _safetensors_head([*a_shapes, *b_shapes])
        self._a_count = sum(rows * columns for _, (rows, columns) in a_shapes)
        self._b_count = sum(rows * columns for _, (rows, columns) in b_shapes)
        self._a = _random_bfloat16(self._a_count + SLACK, A_LIMIT)
        self._b = _random_bfloat16(self._b_count + SLACK, B_LIMIT / rank**0.5)
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": names}
        self._config = json.dumps(config)

    def write(self, folder: Path, seed: int) -> None:
        a, b = np.random.RandomState(seed).randint(SLACK, size=2)
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(self._config)
        with (folder / "adapter_model.safetensors").open("wb") as file:
            file.write(self._head)
            file.write(self._a[a : a + self._a_count].tobytes())
            file.write(self._b[b : b + self._b_count].tobytes())


def _safetensors_head(shapes: Sequence[tuple[str, tuple[int, int]]]) -> bytes:
    """What stands before bfloat16 tensors that follow each other: where each one begins and ends,
    as JSON, and the JSON's length."""
    ends = np.cumsum([0, *(2 * rows * columns for _, (rows, columns) in shapes)]).tolist()
    head = json.dumps(
        {
            name: {"dtype": "BF16", "shape": shape, "data_offsets": ends[place : place + 2]}
            for place, (name, shape) in enumerate(shapes)
        }
    ).encode()
    # The tensors begin at a multiple of 8 bytes.
    head += b" " * (-len(head) % 8)
    return struct.pack("<Q", len(head)) + head


def _random_bfloat16(count: int, largest: float) -> NDArray[np.uint16]:
    """Uniform between -largest and largest; shape (count,)."""
    values = np.random.RandomState(0).uniform(-largest, largest, count).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16)
