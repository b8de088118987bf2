"""PEFT's VeRA (arXiv:2310.11454) and PVeRA (arXiv:2512.07703): all modules share two random
matrices, of which each takes the top left corner, and have vectors of their own.

`y += lambda_b * (B (lambda_d * (A x)))`. PVeRA has twice as many rows in A and lambda_d: the first
half gives the mean of a normal distribution, which is what counts once it is trained, the second
its variance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.delta import LowRank
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft_config import Config, flag, key_rules, positive_int
from polydelta.adapters_store.formats.peft_format import ModuleShapes, ModuleTensors, PeftFormat
from polydelta.adapters_store.formats.peft_options import linear_layers, seed
from polydelta.adapters_store.formats.peft_tensors import Parameters
from polydelta.adapters_store.formats.ranks import reduced
from polydelta.adapters_store.reference import CONFIG_FILE


@dataclass(frozen=True)
class _Settings:
    rank: int
    seed: int
    # Whether the file has the shared matrices.
    saved: bool


def _settings(config: Config) -> _Settings:
    return _Settings(
        positive_int("r", config.get("r")),
        seed("projection_prng_key", config.get("projection_prng_key")),
        flag("save_projection", config.get("save_projection", True)),
    )


@dataclass(frozen=True)
class _Vera:
    # What its tensors' names begin with.
    prefix: str
    # How many times r are the rows of A.
    parts: int

    @property
    def shared_a(self) -> str:
        return f"base_model.{self.prefix}_A"

    @property
    def shared_b(self) -> str:
        return f"base_model.{self.prefix}_B"

    @property
    def lambda_b(self) -> str:
        return f"{self.prefix}_lambda_b"

    @property
    def lambda_d(self) -> str:
        return f"{self.prefix}_lambda_d"

    def outline(self, settings: _Settings, shapes: ModuleShapes) -> ModuleOutline:
        rank, a_rows = settings.rank, self.parts * settings.rank
        why = f"r = {rank} in {CONFIG_FILE}"
        shapes.check(self.lambda_d, (a_rows,), why)
        if settings.saved:
            shapes.need(self.shared_a, self.shared_b)
            _, inputs = shapes.dimensions(self.shared_a, 2)
            shapes.check(self.shared_a, (a_rows, inputs), why)
            shapes.check(self.shared_b, (*shapes[self.shared_b][:1], rank), why)
        elif shapes.num_shared:
            raise InvalidAdapterError(
                f"{CONFIG_FILE}: save_projection is false, but the file has {self.shared_a} or "
                f"{self.shared_b}: set it to true if the adapter was trained with these."
            )
        return ModuleOutline(LowRank.kind, rank)

    def regenerate(
        self, settings: _Settings, modules: Sequence[str], layout: BaseLayout
    ) -> dict[str, Tensor]:
        """In float32; PEFT rounds them to the base's dtype, in which they are served here, too."""
        if settings.saved or not modules:
            return {}
        shapes = [layout.target_shapes[module] for module in modules]
        max_out, max_in = max(out for out, _ in shapes), max(in_ for _, in_ in shapes)
        a, b = torch.empty(self.parts * settings.rank, max_in), torch.empty(max_out, settings.rank)
        generator = torch.Generator().manual_seed(settings.seed)
        for matrix in (a, b):
            torch.nn.init.kaiming_uniform_(matrix, generator=generator)
        return {self.shared_a: a, self.shared_b: b}

    def read(self, settings: _Settings, tensors: ModuleTensors) -> tuple[LowRank]:
        rank, out, in_ = settings.rank, tensors.out_features, tensors.in_features
        shared_a, shared_b = tensors[self.shared_a], tensors[self.shared_b]
        tensors.check(self.lambda_b, (out,))
        if shared_a.shape[1] < in_ or shared_b.shape[0] < out:
            raise InvalidAdapterError(
                f"{self.shared_a} and {self.shared_b} are for layers of up to shape "
                f"{[shared_b.shape[0], shared_a.shape[1]]}, but the base model's "
                f"{tensors.module!r} has {[out, in_]}: load it over the base that it was trained "
                "on."
            )
        scales = tensors[self.lambda_b].unsqueeze(1) * tensors[self.lambda_d][:rank]
        delta = LowRank(shared_a[:rank, :in_].contiguous(), shared_b[:out] * scales)
        return (reduced(delta),)

    def format(self, harmless: frozenset[str], refused: dict[str, str]) -> PeftFormat[_Settings]:
        return PeftFormat(
            rules=key_rules(
                honoured={"projection_prng_key", "r", "save_projection"},
                harmless={"d_initial", "init_weights", *harmless},
                refused=refused,
            ),
            parameters=Parameters(
                (self.lambda_b, self.lambda_d), shared=(self.shared_a, self.shared_b)
            ),
            outline_module=self.outline,
            read_module=self.read,
            targets=linear_layers,
            settings=_settings,
            regenerate=self.regenerate,
        )


FORMAT = _Vera("vera", 1).format(frozenset({"vera_dropout"}), {})
PVERA_FORMAT = _Vera("pvera", 2).format(
    frozenset({"generator_seed", "pvera_dropout"}),
    {
        "sample_at_inference": "drawing from the distribution for every token is not served: set "
        "it to false for the mean"
    },
)
