"""Singular vectors as scikit-learn's `TruncatedSVD` estimates them (arXiv:0909.4061): a subspace
that starts random, from a given seed, and is turned towards the largest singular values.

Where singular values are close to each other the estimate has not settled after some iterations, so
an exact decomposition would give other vectors than those that an adapter was trained with.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.peft_config import KeyRules
from polydelta.adapters_store.reference import CONFIG_FILE

# More directions than are asked for, so that the last ones settle too.
_OVERSAMPLING = 10
# Twice LoRA-XS's default. One of a large layer may take a second.
_MAX_ITERATIONS = 20

# The authors' code overwrites `rank` by r.
_RULES = KeyRules(frozenset({"n_iter", "random_state"}), frozenset({"rank"}), refused={})


@dataclass(frozen=True)
class SvdOptions:
    """With LoRA-XS's defaults."""

    n_iter: int = 10
    random_state: int = 42

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> SvdOptions:
        """Raises InvalidAdapterError."""
        _RULES.check(config)
        return cls(
            _whole("n_iter", config.get("n_iter", cls.n_iter), _MAX_ITERATIONS),
            _whole("random_state", config.get("random_state", cls.random_state), (1 << 32) - 1),
        )


def left_singular_vectors(weight: Tensor, rank: int, options: SvdOptions) -> Tensor:
    """weight: [out, in] float32 -> [out, rank], as of `TruncatedSVD(rank).fit(weight.T)`.

    Signs are as in versions before 1.5, LoRA-XS's among them: the entry of a right singular vector
    of `weight` with the largest absolute value is positive.
    """
    transposed = weight.shape[0] > weight.shape[1]
    tall = weight if transposed else weight.T
    generator = np.random.RandomState(options.random_state)
    noise = generator.normal(size=(tall.shape[1], rank + _OVERSAMPLING))
    basis = torch.from_numpy(noise).to(weight.dtype)
    for _ in range(options.n_iter):
        basis = torch.linalg.qr(tall @ basis).Q
        basis = torch.linalg.qr(tall.T @ basis).Q
    basis = torch.linalg.qr(tall @ basis).Q
    left, _, right = torch.linalg.svd(basis.T @ tall, full_matrices=False)
    vectors = (basis @ left, right.T)
    of_outputs, of_inputs = vectors if transposed else vectors[::-1]
    largest = of_inputs.gather(0, of_inputs.abs().argmax(0, keepdim=True))
    signed: Tensor = of_outputs * largest.sign()
    return signed[:, :rank].contiguous()


def _whole(field: str, value: object, largest: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= largest:
        raise InvalidAdapterError(
            f"{CONFIG_FILE}: {field} of svd is {reprlib.repr(value)}, but must be a whole number "
            f"from 0 to {largest}."
        )
    return value
