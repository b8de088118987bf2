"""What every format becomes, and how large it usually is."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from polydelta.adapters_store.base_layout import MODEL, BaseLayout
from polydelta.adapters_store.delta import Adapter, Delta
from polydelta.adapters_store.delta_kinds import (
    BIAS,
    CIRCULANT,
    COLUMNS,
    DENSE,
    INVOCATION,
    KRONECKER,
    LOW_RANK,
    NORM_WEIGHT,
    NOT_SERVED,
    ONE_BIT,
    PREFIX,
    PROMPT,
    ROTATE,
    ROWS,
    SCALE,
    SPARSE,
    TOKEN_ROWS,
    TOP_K,
)
from polydelta.adapters_store.formats.usual_deltas import (
    Make,
    Place,
    bias,
    circulant,
    columns,
    dense,
    input_scale,
    invocation,
    kronecker,
    low_rank,
    norm_weight,
    one_bit,
    output_scale,
    prefix,
    prompt,
    rotate,
    rows,
    sparse,
    sparse_as_low_rank,
    token_rows,
    top_k,
)


@dataclass(frozen=True)
class Part:
    """Modules of a usual adapter that have deltas of the same kinds."""

    # The last words of their paths.
    modules: tuple[str, ...]
    makes: tuple[Make, ...]


def on(modules: tuple[str, ...], *makes: Make) -> Part:
    return Part(modules, makes)


@dataclass(frozen=True)
class FormatRow:
    """Formats that become the same."""

    # By `peft_type`; after a space, what its config says besides.
    formats: tuple[str, ...]
    # In the order of `delta_kinds.KINDS`.
    kinds: tuple[str, ...]
    # How true it is to the author's forward pass, in words.
    how: str
    # The usual size in words, and what it consists of: PEFT's default or, where there is none, what
    # the authors take.
    size: str
    usual: tuple[Part, ...]

    @property
    def served(self) -> bool:
        """Or else it must be converted."""
        return NOT_SERVED.isdisjoint(self.kinds)


_EXACT = "exact"
_WITH_BASE = "exact, with the base's weights"
_IMPORTED = "exact, after `adapters import`"
_CONVERTED = "converted: `adapters convert`"

_QV = ("q_proj", "v_proj")
_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_MODEL = (MODEL,)

FORMAT_ROWS = (
    FormatRow(
        ("LORA", "LORA use_rslora", "LORA use_qalora", "LORA use_bdlora"),
        (LOW_RANK,), _EXACT, "r=8 on q/v", (on(_QV, low_rank(8)),),
    ),
    FormatRow(
        ("ADALORA", "DELORA", "DYLORA", "POLY", "SORA"),
        (LOW_RANK,), _EXACT, "r=8 on q/v", (on(_QV, low_rank(8)),),
    ),
    FormatRow(
        ("DEFT", "HRA"),
        (LOW_RANK,), _WITH_BASE, "r=8 on q/v", (on(_QV, low_rank(8)),),
    ),
    FormatRow(
        ("LORA kasa_config",),
        (LOW_RANK,), "exact, with the base's weights, rank 2 r", "r=8 on q/v",
        (on(_QV, low_rank(16)),),
    ),
    FormatRow(
        ("PEANUT", "PSOFT"),
        (LOW_RANK,), _WITH_BASE, "r=32 on q/v", (on(_QV, low_rank(32)),),
    ),
    FormatRow(
        ("UNILORA", "VBLORA"),
        (LOW_RANK,), _EXACT, "r=4 on q/v", (on(_QV, low_rank(4)),),
    ),
    FormatRow(
        ("TINYLORA",),
        (LOW_RANK,), _EXACT, "r=2 on q/v", (on(_QV, low_rank(2)),),
    ),
    FormatRow(
        ("BONE", "MISS"),
        (LOW_RANK,), _EXACT, "r=64 on q/v", (on(_QV, low_rank(64)),),
    ),
    FormatRow(
        ("LOHA",),
        (LOW_RANK,), "exact, as a LoRA of rank r²", "r=8 on q/v", (on(_QV, low_rank(64)),),
    ),
    FormatRow(
        ("GRALORA",),
        (LOW_RANK,), "exact, as a LoRA of rank k r", "r=32, k=2 on q/v", (on(_QV, low_rank(64)),),
    ),
    FormatRow(
        ("PVERA", "VERA"),
        (LOW_RANK,), _EXACT, "r=256 on q/v", (on(_QV, low_rank(256)),),
    ),
    FormatRow(
        ("LORA_SB", "LORA_XS"),
        (LOW_RANK,), _EXACT, "r=64 on all linear layers", (on(_LINEAR, low_rank(64)),),
    ),
    FormatRow(
        ("LORA lora_bias",),
        (LOW_RANK, BIAS), _EXACT, "r=8 on q/v", (on(_QV, low_rank(8), bias),),
    ),
    FormatRow(
        ("LORA use_dora",),
        (LOW_RANK, SCALE), _WITH_BASE, "r=8 on q/v", (on(_QV, low_rank(8), output_scale),),
    ),
    FormatRow(
        ("GLORA config_A_B=vector",),
        (LOW_RANK, SCALE), _EXACT, "q/v", (on(_QV, low_rank(1), output_scale),),
    ),
    FormatRow(
        ("LORA alora_invocation_tokens",),
        (LOW_RANK, INVOCATION), _EXACT, "r=8 on q/v",
        (on(_QV, low_rank(8)), on(_MODEL, invocation(3))),
    ),
    FormatRow(
        ("SHIRA",),
        (SPARSE,), _EXACT, "r=32 on q/v", (on(_QV, sparse_as_low_rank(32)),),
    ),
    FormatRow(
        ("SUPERTUNING",),
        (SPARSE,), _EXACT, "1% of q/v", (on(_QV, sparse(0.01)),),
    ),
    FormatRow(
        # Of the default wavelet, each coefficient is spread over 2 x 2 entries.
        ("WAVEFT",),
        (SPARSE,), _EXACT, "2,592 coefficients on q/v", (on(_QV, sparse(4 * 2592)),),
    ),
    FormatRow(
        ("SFT",),
        (SPARSE,), _IMPORTED, "8% of all linear layers", (on(_LINEAR, sparse(0.08)),),
    ),
    FormatRow(
        ("PACA",),
        (COLUMNS,), _WITH_BASE, "r=8 on all linear layers", (on(_LINEAR, columns(8)),),
    ),
    FormatRow(
        ("S2FT",),
        (COLUMNS, ROWS), _IMPORTED, "2.6% of v/o, 1% of up/down",
        (
            on(("v_proj",), rows(0.026)), on(("o_proj",), columns(0.026)),
            on(("up_proj",), rows(0.01)), on(("down_proj",), columns(0.01)),
        ),
    ),
    FormatRow(
        ("BITDELTA",),
        (ONE_BIT,), _IMPORTED, "all linear layers", (on(_LINEAR, one_bit),),
    ),
    FormatRow(
        ("LOKR",),
        (KRONECKER,), _EXACT, "square factors on q/v", (on(_QV, kronecker),),
    ),
    FormatRow(
        ("C3A",),
        (CIRCULANT,), _EXACT, "blocks of up to 256 on q/v", (on(_QV, circulant(256)),),
    ),
    FormatRow(
        ("FLYLORA",),
        (TOP_K,), _EXACT, "r=32, k=8 on q/v", (on(_QV, top_k(32, 8)),),
    ),
    FormatRow(
        ("IA3",),
        (SCALE,), _EXACT, "k/v/down",
        (on(("k_proj", "v_proj"), output_scale), on(("down_proj",), input_scale)),
    ),
    FormatRow(
        ("ROAD",),
        (ROTATE,), _EXACT, "q/v", (on(_QV, rotate(64)),),
    ),
    FormatRow(
        ("BEFT", "BITFIT"),
        (BIAS,), _EXACT, "v", (on(("v_proj",), bias),),
    ),
    FormatRow(
        ("LN_TUNING",),
        (NORM_WEIGHT,), _EXACT, "all norms",
        (on(("input_layernorm", "post_attention_layernorm", "norm"), norm_weight),),
    ),
    FormatRow(
        ("LORA trainable_token_indices", "TRAINABLE_TOKENS"),
        (TOKEN_ROWS,), _EXACT, "16 tokens, embedding and head",
        (on(("embed_tokens", "lm_head"), token_rows(16)),),
    ),
    FormatRow(
        ("PREFIX_TUNING",),
        (PREFIX,), _EXACT, "20 tokens", (on(_MODEL, prefix(20)),),
    ),
    FormatRow(
        ("CARTRIDGE",),
        (PREFIX,), _EXACT, "2,048 tokens", (on(_MODEL, prefix(2048)),),
    ),
    FormatRow(
        ("CPT", "MULTITASK_PROMPT_TUNING", "PROMPT_TUNING", "P_TUNING"),
        (PROMPT,), _EXACT, "20 tokens", (on(_MODEL, prompt(20)),),
    ),
    FormatRow(
        (
            "BOFT", "BONE init_weights=bat", "FOURIERFT", "FROD", "GLORA", "HIRA",
            "MISS init_weights=bat", "OFT", "OSF", "RANDLORA",
        ),
        (DENSE,), _CONVERTED, "any", (on(_QV, dense),),
    ),
)  # fmt: skip


def usual_adapter(row: FormatRow, layout: BaseLayout, seed: int) -> Adapter:
    """One of the usual size, with small random numbers: adapters of different seeds differ."""
    generator = torch.Generator().manual_seed(seed)
    modules: dict[str, tuple[Delta, ...]] = {}
    for part in row.usual:
        for module in _named(part.modules, layout):
            place = Place(layout, module, generator)
            modules[module] = tuple(make(place) for make in part.makes)
    name = row.formats[0]
    digest = hashlib.sha256(f"{name} {seed}".encode()).hexdigest()
    return Adapter(name.replace(" ", "-").lower(), 1, digest, name.split()[0], modules)


def _named(ends: tuple[str, ...], layout: BaseLayout) -> Iterator[str]:
    for module in (*layout.target_shapes, *layout.norm_sizes, MODEL):
        if module.rpartition(".")[2] in ends:
            yield module
