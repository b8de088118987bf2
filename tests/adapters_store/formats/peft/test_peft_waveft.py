from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import WaveFTConfig
from peft.tuners.waveft.layer import WaveFTLinear
from torch import Tensor, nn

from polydelta.adapters_store.base_layout import BaseLayout, FusedLinear, LinearPart
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.peft.waveft import FORMAT
from polydelta.adapters_store.formats.peft.wavelets import FILTERS

CONFIG: dict[str, Any] = {"peft_type": "WAVEFT", "scaling": 25.0, "random_loc_seed": 777}
Q = "model.layers.0.self_attn.q_proj"
SPECTRUM = f"base_model.model.{Q}.waveft_spectrum"
EVERY_SIDE = ["q_proj", "k_proj", "up_proj", "down_proj"]


VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "another seed and scale": {"random_loc_seed": 5, "scaling": 3},
    "numbers that differ": {"n_frequency_pattern": {"k_proj": 7, "layers.1.mlp.up_proj": 1000}},
    "numbers by size": {"proportional_parameters": True},
    "all entries of k_proj": {"n_frequency": 12 * 36},
    "a longer wavelet": {"wavelet_family": "db3"},
    "a symlet": {"wavelet_family": "sym5"},
    "a coiflet": {"wavelet_family": "coif2"},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("use_idwt", [False, True])
@pytest.mark.parametrize("base", ["base_model", "biased_model"])
def test_deltas_equal_those_of_peft(
    base: str,
    use_idwt: bool,
    options: dict[str, Any],
    check_parity: Any,
    request: pytest.FixtureRequest,
) -> None:
    config = WaveFTConfig(**{"n_frequency": 50, **options}, use_idwt=use_idwt)
    config.target_modules = set(EVERY_SIDE)
    adapter = check_parity(config, request.getfixturevalue(base))
    assert (adapter.format, adapter.kinds, adapter.max_rank) == ("WAVEFT", ("Sparse",), 0)


@pytest.mark.parametrize("shape", [(21, 35), (22, 35), (21, 34), (6, 90), (1, 1)])
@pytest.mark.parametrize("wavelet", FILTERS)
def test_every_wavelet_is_peft_s_for_sizes_even_and_odd(
    wavelet: str, shape: tuple[int, int]
) -> None:
    rows, columns = shape
    count = (rows * columns + 1) // 2
    config = WaveFTConfig(n_frequency=count, wavelet_family=wavelet, init_weights=False)
    peft = WaveFTLinear(nn.Linear(columns, rows), "default", config, count)
    with torch.no_grad():
        expected = peft.get_delta_weight("default")
    layout = BaseLayout(
        "one", 1, (FusedLinear("q", columns, (LinearPart("self_attn.q_proj", rows),)),)
    )
    options = CONFIG | {"wavelet_family": wavelet}
    ((delta,),) = FORMAT.read(options, {SPECTRUM: peft.waveft_spectrum["default"]}, layout).values()
    torch.testing.assert_close(delta.dense(), expected, atol=1e-5, rtol=1e-5)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Tensor], str]] = {
    "no scale": ({"scaling": None}, {}, "scaling is None"),
    "an infinite scale": ({"scaling": 1e39}, {}, "beyond what float32 holds"),
    "no seed": ({"random_loc_seed": None}, {}, "random_loc_seed is None"),
    "a seed that is no number": ({"random_loc_seed": True}, {}, "random_loc_seed is True"),
    "a seed out of range": ({"random_loc_seed": 1 << 64}, {}, "must be a whole number of 64 bits"),
    "a word for a truth value": ({"use_idwt": "no"}, {}, "use_idwt is 'no'"),
    "an unknown wavelet": ({"wavelet_family": "bior1.1"}, {}, "wavelet_family is 'bior1.1'"),
    # PEFT takes their names, and then fails when it runs.
    "a wavelet without a filter": ({"wavelet_family": "db11"}, {}, "wavelet_family is 'db11'"),
    "one with too long a filter": ({"wavelet_family": "coif5"}, {}, "wavelet_family is 'coif5'"),
    "more numbers than entries": ({}, {SPECTRUM: torch.ones(1297)}, "1297 numbers, but .* 1296"),
    "a matrix": ({}, {SPECTRUM: torch.ones(2, 2)}, "must have 1 dimensions"),
    "a number": ({}, {SPECTRUM: torch.ones(())}, "must have 1 dimensions"),
    "an embedding": (
        {},
        {SPECTRUM.replace(Q, "model.embed_tokens"): torch.ones(3)},
        "no such module",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("config", "tensors", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_wrong_is_refused_by_name(
    config: dict[str, Any], tensors: dict[str, Tensor], message: str, layout: BaseLayout
) -> None:
    with pytest.raises(InvalidAdapterError, match=message):
        FORMAT.read(CONFIG | config, {SPECTRUM: torch.ones(50)} | tensors, layout)
