"""PEFT's MiSS (arXiv:2409.15371), and Bone, as PEFT called it at first.

`y += D^T S(x)`, where S adds up the input's shards of length r (the last one padded with zeros) and
D is the trained block: a LoRA whose A is r unit matrices side by side. In the variant `mini`, D is
a narrower block repeated over the outputs. In `bat`, `W' = W + W D + D` for each square block of W.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass

import torch

from polydelta.adapters_store.delta import Delta, Dense, LowRank
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft_config import Config, key_rules, positive_int
from polydelta.adapters_store.formats.peft_format import ModuleShapes, ModuleTensors, PeftFormat
from polydelta.adapters_store.formats.peft_options import linear_layers
from polydelta.adapters_store.formats.peft_tensors import Parameters
from polydelta.adapters_store.reference import CONFIG_FILE


@dataclass(frozen=True)
class _Settings:
    rank: int
    # "bat", "mini", or a truth value, which only says how the block was started.
    variant: str | bool
    mini_r: int


@dataclass(frozen=True)
class _Miss:
    # What its tensors are called.
    block: str
    variants: tuple[str, ...]

    def settings(self, config: Config) -> _Settings:
        variant = config.get("init_weights", True)
        if not isinstance(variant, bool) and variant not in self.variants:
            raise InvalidAdapterError(
                f"{CONFIG_FILE}: init_weights is {reprlib.repr(variant)}, but must be true, false "
                f"or one of {', '.join(self.variants)}."
            )
        return _Settings(
            positive_int("r", config.get("r")),
            variant,
            positive_int("mini_r", config.get("mini_r", 1)),
        )

    def outline(self, settings: _Settings, shapes: ModuleShapes) -> ModuleOutline:
        rank, shape = settings.rank, shapes[self.block]
        if settings.variant == "bat":
            shapes.check(self.block, (*shape[:1], rank, rank), f"r = {rank} in {CONFIG_FILE}")
            return ModuleOutline(Dense.kind, 0)
        if settings.variant == "mini":
            why = f"[r, mini_r] in {CONFIG_FILE}"
            shapes.check(self.block, (rank, settings.mini_r), why)
        else:
            shapes.check(self.block, (rank, *shape[1:2]), f"r = {rank} in {CONFIG_FILE}")
        return ModuleOutline(LowRank.kind, rank)

    def read(self, settings: _Settings, tensors: ModuleTensors) -> tuple[Delta]:
        out, in_ = tensors.out_features, tensors.in_features
        # What lies beyond the inputs meets the zeros of the padding.
        rank = min(settings.rank, in_)
        block = tensors[self.block]
        match settings.variant:
            case "bat":
                return (self._bat(settings, tensors),)
            case "mini":
                if out % settings.mini_r:
                    raise InvalidAdapterError(
                        f"{CONFIG_FILE}: mini_r is {settings.mini_r}, which does not divide the "
                        f"{out} outputs of {tensors.module!r}: load the adapter over the base that "
                        "it was trained on."
                    )
                block = block.repeat(1, out // settings.mini_r)
            case _:
                tensors.check(self.block, (settings.rank, out))
        block = block[:rank]
        a = torch.eye(rank).repeat(1, -(-in_ // rank))[:, :in_]
        return (LowRank(a.contiguous(), block.T.contiguous()),)

    def _bat(self, settings: _Settings, tensors: ModuleTensors) -> Dense:
        rank, out, in_ = settings.rank, tensors.out_features, tensors.in_features
        tensors.check_divides("r", rank)
        tensors.check(self.block, (out // rank, rank, rank))
        block = tensors[self.block]
        # [in / r, out / r, r, r]
        weight = tensors.weight().view(out // rank, rank, in_ // rank, rank).permute(2, 0, 1, 3)
        return Dense((weight @ block + block).permute(1, 2, 0, 3).reshape(out, in_))

    def format(self, honoured: frozenset[str], harmless: frozenset[str]) -> PeftFormat[_Settings]:
        return PeftFormat(
            rules=key_rules(
                honoured=honoured | {"init_weights", "r"},
                harmless=harmless,
            ),
            parameters=Parameters((self.block,)),
            outline_module=self.outline,
            read_module=self.read,
            targets=linear_layers,
            settings=self.settings,
        )


FORMAT = _Miss("miss_block", ("bat", "mini")).format(
    frozenset({"mini_r"}), frozenset({"miss_dropout"})
)
BONE_FORMAT = _Miss("bone_block", ("bat",)).format(frozenset(), frozenset())
