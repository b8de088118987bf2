"""PEFT's PSOFT: the principal part of W, of rank r, is rotated within itself.

With `W ~ U S V^T` cut to rank r the change is `U S (R - I) V^T` (`psoft_init`), or
`U sqrt(S) (R - I) sqrt(S) V^T` (`pissa_init`); alpha cancels out of both. R is r x r, orthogonal by
the Cayley map or free (`psoft_orth`), its rows and columns scaled by vectors.

The file has R alone. PEFT decomposes W anew whenever it loads the adapter, and so does this, by the
same routines on the CPU. A routine that gives other signs to singular vectors, such as one of a GPU
may, makes another model of the same file, in PEFT too.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from polydelta.adapters_store.delta import LowRank
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft.rotations import cayley, cayley_series, skew_symmetric
from polydelta.adapters_store.formats.peft_config import (
    Config,
    flag,
    key_rules,
    number,
    positive_int,
)
from polydelta.adapters_store.formats.peft_format import ModuleShapes, ModuleTensors, PeftFormat
from polydelta.adapters_store.formats.peft_options import (
    linear_layers,
    one_of,
    refuse_surplus,
    seed,
)
from polydelta.adapters_store.formats.peft_tensors import Parameters
from polydelta.adapters_store.reference import CONFIG_FILE

_R, _ROWS, _COLUMNS = "psoft_R.weight", "psoft_R.vector_b", "psoft_R.vector_a"
# By the option that says whether it is there.
_VECTORS = {"psoft_mag_b": _ROWS, "psoft_mag_a": _COLUMNS}
_INITS = ("psoft_init", "pissa_init")
# Of a basis or a sum of powers: twice PEFT's default. A step for a large layer may take a second.
_MAX_STEPS = 20

# Of the largest singular value: vectors of values closer than this are rounding error's choice.
_MIN_GAP = 1e-6


@dataclass(frozen=True)
class _Cayley:
    """How R is made of a skew-symmetric Q."""

    # Of the series that is summed instead of inverting; None: none is.
    terms: int | None
    # Q is scaled down to this norm; None: it is not.
    max_norm: float | None

    @classmethod
    def of(cls, config: Config) -> _Cayley:
        if not flag("use_cayley_neumann", config.get("use_cayley_neumann")):
            return cls(None, None)
        terms = _steps("num_cayley_neumann_terms", config.get("num_cayley_neumann_terms", 5))
        eps = config.get("cayley_neumann_eps")
        if eps is not None and not 0 < number("cayley_neumann_eps", eps) < 1:
            raise InvalidAdapterError(
                f"{CONFIG_FILE}: cayley_neumann_eps is {eps}, but must lie between 0 and 1."
            )
        return cls(terms, eps)

    def __call__(self, q: Tensor) -> Tensor:
        """`(I + Q) (I - Q)^-1`, or terms of its series `I + 2 Q + 2 Q^2 + ...`."""
        if self.terms is None:
            return cayley(-q)
        if self.max_norm is not None and (norm := torch.linalg.norm(q)) > self.max_norm:
            q = q * (self.max_norm / norm)
        return cayley_series(q, self.terms)


@dataclass(frozen=True)
class _Randomized:
    """How W is decomposed by subspace iteration."""

    iterations: int
    random_seed: int

    @classmethod
    def of(cls, config: Config) -> _Randomized:
        iterations = config.get("psoft_svd_lowrank_niter", 10)
        return cls(
            _steps("psoft_svd_lowrank_niter", iterations),
            seed("random_seed", config.get("random_seed", 0)),
        )

    def __call__(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """U, S and V^T as of `torch.svd_lowrank` (arXiv:0909.4061), step by step. That one draws
        from the process's generator, which threads share."""
        if weight.shape[0] < weight.shape[1]:
            u, s, vt = self(weight.T, rank)
            return vt.T, s, u.T
        generator = torch.Generator().manual_seed(self.random_seed)
        start = torch.randn(weight.shape[1], rank, generator=generator)
        basis = torch.linalg.qr(weight @ start).Q
        for _ in range(self.iterations):
            basis = torch.linalg.qr(weight.T @ basis).Q
            basis = torch.linalg.qr(weight @ basis).Q
        u, s, vt = torch.linalg.svd(basis.T @ weight, full_matrices=False)
        return basis @ u, s, vt


@dataclass(frozen=True)
class _Settings:
    rank: int
    # None: R is free.
    cayley: _Cayley | None
    # Whether vectors scale R's rows and columns, by option.
    vectors: Mapping[str, bool]
    # S is on both sides of R, not on U's alone.
    symmetric: bool
    # None: W is decomposed exactly.
    randomized: _Randomized | None


def _settings(config: Config) -> _Settings:
    if number("psoft_alpha", config.get("psoft_alpha")) <= 0:
        raise InvalidAdapterError(
            f"{CONFIG_FILE}: psoft_alpha is {reprlib.repr(config['psoft_alpha'])}, but must be "
            "above 0: PEFT divides by it."
        )
    init = one_of("ab_svd_init", config.get("ab_svd_init", _INITS[0]), _INITS)
    svd = one_of("psoft_svd", config.get("psoft_svd", "full"), ("full", "lowrank"))
    return _Settings(
        positive_int("r", config.get("r")),
        _Cayley.of(config) if flag("psoft_orth", config.get("psoft_orth", True)) else None,
        {option: flag(option, config.get(option, True)) for option in _VECTORS},
        init == "pissa_init",
        _Randomized.of(config) if svd == "lowrank" else None,
    )


def _steps(field: str, value: object) -> int:
    steps = positive_int(field, value)
    if steps > _MAX_STEPS:
        raise InvalidAdapterError(
            f"{CONFIG_FILE}: {field} is {reprlib.repr(steps)}, more than {_MAX_STEPS}: write a "
            "smaller number."
        )
    return steps


def _outline(settings: _Settings, shapes: ModuleShapes) -> ModuleOutline:
    rank, why = settings.rank, f"r = {settings.rank} in {CONFIG_FILE}"
    shapes.check(_R, (rank, rank) if settings.cayley is None else (rank * (rank - 1) // 2,), why)
    for option, vector in _VECTORS.items():
        if settings.vectors[option]:
            shapes.need(vector)
            shapes.check(vector, (rank,), why)
        else:
            refuse_surplus(shapes, vector, f"{option} is false")
    return ModuleOutline(LowRank.kind, rank)


def _read(settings: _Settings, module: ModuleTensors) -> tuple[LowRank]:
    rank = settings.rank
    if rank > min(module.out_features, module.in_features):
        raise InvalidAdapterError(
            f"{CONFIG_FILE}: r is {rank}, more than the smaller side of {module.module!r}: the "
            "adapter was trained on another base."
        )
    if settings.randomized is None:
        u, s, vt = torch.linalg.svd(module.weight(), full_matrices=False)
    else:
        u, s, vt = settings.randomized(module.weight(), rank)
    if (s[: rank + 1].diff() >= -_MIN_GAP * s[0]).any():
        raise InvalidAdapterError(
            f"The base's weight of {module.module!r} has singular values so close that their "
            "vectors are not certain, and PSOFT saves none: train another kind of adapter."
        )
    s = s[:rank]
    change = _rotation(settings, module) - torch.eye(rank)
    if settings.symmetric:
        change = s.sqrt().unsqueeze(1) * change * s.sqrt()
    else:
        change = s.unsqueeze(1) * change
    return (LowRank(vt[:rank].contiguous(), u[:, :rank] @ change),)


def _rotation(settings: _Settings, module: ModuleTensors) -> Tensor:
    """R, [rank, rank]."""
    rotation, rank = module[_R], settings.rank
    if settings.cayley is not None:
        rotation = settings.cayley(skew_symmetric(rotation, rank))
    if _ROWS in module:
        rotation = module[_ROWS].unsqueeze(1) * rotation
    if _COLUMNS in module:
        rotation = rotation * module[_COLUMNS]
    return rotation


FORMAT = PeftFormat(
    rules=key_rules(
        honoured={
            "ab_svd_init",
            "cayley_neumann_eps",
            "num_cayley_neumann_terms",
            "psoft_alpha",
            "psoft_mag_a",
            "psoft_mag_b",
            "psoft_orth",
            "psoft_svd",
            "psoft_svd_lowrank_niter",
            "r",
            "random_seed",
            "use_cayley_neumann",
        },
        harmless={"init_weights", "psoft_dropout"},
    ),
    parameters=Parameters((_R,), (_ROWS, _COLUMNS)),
    outline_module=_outline,
    read_module=_read,
    targets=linear_layers,
    settings=_settings,
)
