"""Full fine-tunes of the tiny model as one-bit deltas."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.delta import NormWeight, OneBit, TokenRows
from polydelta.adapters_store.distilling import distill
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats import read_adapter
from polydelta.adapters_store.formats.foreign import (
    bitdelta,
)
from polydelta.adapters_store.importing.new_adapter import NewAdapter
from polydelta.adapters_store.merged_weight import merge_into
from polydelta.adapters_store.reference import WEIGHTS_FILE, AdapterRef

DOWN = "model.layers.1.mlp.down_proj"

Layout = Callable[[LlamaForCausalLM], BaseLayout]


@pytest.fixture
def tuned(biased_model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Every parameter of the biased model has moved."""
    torch.manual_seed(4)
    tuned = copy.deepcopy(biased_model)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return tuned


def deltas(adapter: NewAdapter, layout: BaseLayout) -> dict[str, OneBit]:
    """As they are read from the file's tensors, which they must survive."""
    tensors = {
        f"base_model.model.{module}.{parameter}": tensor
        for module, parameters in adapter.modules.items()
        for parameter, tensor in parameters.items()
    }
    modules = bitdelta.FORMAT.read({"peft_type": "BITDELTA"}, tensors, layout)
    return {m: d for m, of_m in modules.items() for d in of_m if isinstance(d, OneBit)}


def test_every_layer_keeps_its_signs_and_the_scale_that_is_nearest(
    biased_model: LlamaForCausalLM, tuned: LlamaForCausalLM, layout_of: Layout
) -> None:
    base = layout_of(biased_model)
    distilled = distill(base, layout_of(tuned))
    ours = deltas(distilled.adapter, base)
    assert ours.keys() == base.module_shapes.keys() == distilled.errors.keys()
    for module, delta in ours.items():
        change = tuned.get_submodule(module).weight - biased_model.get_submodule(module).weight
        change = change.detach()
        assert torch.equal(delta.dense().sign(), torch.where(change < 0, -1.0, 1.0))
        error = float((change - delta.dense()).norm() / change.norm())
        assert distilled.errors[module] == pytest.approx(error, rel=1e-5)
        # One bit of normally distributed numbers leaves sqrt(1 - 2 / pi) of them.
        assert error == pytest.approx(math.sqrt(1 - 2 / math.pi), abs=0.03)
        for factor in (0.98, 1.02):
            assert float((change - factor * delta.dense()).norm()) > error * float(change.norm())
    mean = sum(distilled.errors.values()) / len(distilled.errors)
    assert distilled.mean_error == pytest.approx(mean)


def test_a_change_of_one_size_is_kept_exactly(
    biased_model: LlamaForCausalLM, layout_of: Layout
) -> None:
    tuned = copy.deepcopy(biased_model)
    step = torch.where(torch.rand(36, 52) < 0.5, 0.25, -0.25)
    with torch.no_grad():
        biased_model.get_submodule(DOWN).weight.mul_(64).round_().div_(64)
        tuned.get_submodule(DOWN).weight.copy_(biased_model.get_submodule(DOWN).weight + step)
    base = layout_of(biased_model)
    distilled = distill(base, layout_of(tuned))
    assert distilled.errors == {DOWN: 0.0}
    assert not distilled.adapter.replaced
    assert torch.equal(deltas(distilled.adapter, base)[DOWN].dense(), step)


def test_biases_norms_embedding_and_head_are_kept_whole(
    biased_model: LlamaForCausalLM, tuned: LlamaForCausalLM, layout_of: Layout
) -> None:
    base = layout_of(biased_model)
    adapter = distill(base, layout_of(tuned)).adapter
    for module in base.biased_modules:
        change = tuned.get_submodule(module).bias - biased_model.get_submodule(module).bias
        torch.testing.assert_close(adapter.modules[module]["bitdelta_bias"], change)
    assert adapter.replaced.keys() == {*base.norm_sizes, "model.embed_tokens", "lm_head"}
    for module, weight in adapter.replaced.items():
        theirs = tuned.get_submodule(module).weight
        dtype = torch.float32 if module in base.norm_sizes else torch.bfloat16
        assert weight.dtype == dtype
        assert torch.equal(weight, theirs.to(dtype))


def test_only_what_differs_is_kept(biased_model: LlamaForCausalLM, layout_of: Layout) -> None:
    tuned = copy.deepcopy(biased_model)
    with torch.no_grad():
        tuned.get_submodule(DOWN).weight[3, 5] += 1
        tuned.model.layers[2].self_attn.k_proj.bias[1] += 1
        tuned.model.norm.weight[0] += 1
    distilled = distill(layout_of(biased_model), layout_of(tuned), torch.float32)
    k2 = "model.layers.2.self_attn.k_proj"
    assert {m: set(parameters) for m, parameters in distilled.adapter.modules.items()} == {
        DOWN: {"bitdelta_bits", "bitdelta_scale"},
        k2: {"bitdelta_bias"},
    }
    assert distilled.errors.keys() == {DOWN}
    assert distilled.adapter.replaced.keys() == {"model.norm"}


@pytest.mark.parametrize("base_is_tied", [False, True])
@pytest.mark.parametrize("tuned_is_tied", [False, True])
def test_embedding_and_head_are_those_of_the_fine_tune_however_tied(
    base_is_tied: bool,
    tuned_is_tied: bool,
    base_model: LlamaForCausalLM,
    layout_of: Layout,
    tmp_path: Path,
) -> None:
    tuned = copy.deepcopy(base_model)
    with torch.no_grad():
        tuned.model.embed_tokens.weight[4] += 1
        tuned.lm_head.weight[7] += 1
    base = replace(layout_of(base_model), tied=base_is_tied)
    theirs = replace(layout_of(tuned), tied=tuned_is_tied)
    distill(base, theirs, torch.float32).adapter.write(tmp_path / "a", "b")
    adapter = read_adapter(AdapterRef("a", 1, tmp_path / "a"), base)
    for module in ("model.embed_tokens", "lm_head"):
        (rows,) = adapter.modules[module]
        assert isinstance(rows, TokenRows)
        weight = base.weight(module).clone()
        weight[rows.ids] = rows.rows
        assert torch.equal(weight, theirs.weight(module))
    stored = load_file(tmp_path / "a" / WEIGHTS_FILE)
    once = base_is_tied and tuned_is_tied
    assert ("base_model.model.lm_head.weight" in stored) == (not once)


def test_a_fine_tune_of_everything_is_read_back(
    biased_model: LlamaForCausalLM, tuned: LlamaForCausalLM, layout_of: Layout, tmp_path: Path
) -> None:
    base, theirs = layout_of(biased_model), layout_of(tuned)
    distilled = distill(base, theirs, torch.float32)
    distilled.adapter.write(tmp_path / "a", "some/base")
    adapter = read_adapter(AdapterRef("a", 1, tmp_path / "a"), base)
    assert adapter.kinds == ("Bias", "NormWeight", "OneBit", "TokenRows")
    for module, (norm,) in ((m, adapter.modules[m]) for m in base.norm_sizes):
        assert isinstance(norm, NormWeight)
        assert torch.equal(norm.weight, theirs.weight(module))
    for module, error in distilled.errors.items():
        weight, bias = merge_into(base.weight(module), base.bias(module), adapter.modules[module])
        change = theirs.weight(module) - base.weight(module)
        lost = (theirs.weight(module) - weight).norm() / change.norm()
        assert float(lost) == pytest.approx(error, rel=1e-4)
        torch.testing.assert_close(bias, theirs.bias(module))


def test_the_head_of_an_untied_fine_tune_leaves_a_tied_embedding_alone(
    base_model: LlamaForCausalLM, layout_of: Layout, tmp_path: Path
) -> None:
    base = replace(layout_of(base_model), tied=True)
    tuned = copy.deepcopy(base_model)
    with torch.no_grad():
        tuned.lm_head.weight.copy_(tuned.model.embed_tokens.weight)
        tuned.lm_head.weight[7] += 1
    distill(base, layout_of(tuned)).adapter.write(tmp_path / "a", "b")
    adapter = read_adapter(AdapterRef("a", 1, tmp_path / "a"), base)
    assert adapter.modules.keys() == {"lm_head"}


def test_progress_comes_after_each_layer(base_model: LlamaForCausalLM, layout_of: Layout) -> None:
    steps: list[tuple[int, int]] = []
    base = layout_of(base_model)
    distill(base, base, progress=lambda *step: steps.append(step))
    assert steps == [(done, 21) for done in range(1, 22)]


def test_the_file_takes_one_bit_for_each_weight(
    biased_model: LlamaForCausalLM, tuned: LlamaForCausalLM, layout_of: Layout, tmp_path: Path
) -> None:
    distill(layout_of(biased_model), layout_of(tuned)).adapter.write(tmp_path / "a", "b")
    tensors = load_file(tmp_path / "a" / WEIGHTS_FILE)
    bits = tensors[f"base_model.model.{DOWN}.bitdelta_bits"]
    assert (bits.dtype, bits.shape) == (torch.uint8, (36, 7))


def test_the_base_itself_gives_no_adapter(
    base_model: LlamaForCausalLM, layout_of: Layout, tmp_path: Path
) -> None:
    layout = layout_of(base_model)
    distilled = distill(layout, layout)
    assert distilled.mean_error == 0
    with pytest.raises(InvalidAdapterError, match="would change nothing"):
        distilled.adapter.write(tmp_path / "a", "b")
    assert list(tmp_path.iterdir()) == []


def test_models_of_different_sizes_are_refused(
    base_model: LlamaForCausalLM, biased_model: LlamaForCausalLM, layout_of: Layout
) -> None:
    base = layout_of(base_model)
    with pytest.raises(InvalidAdapterError, match=r"and 21 biases, the base has .* and no bias"):
        distill(base, layout_of(biased_model))
    with pytest.raises(InvalidAdapterError, match=r"has 44 tokens, the base has 40.*--cut-vocab"):
        distill(base, replace(base, vocab_size=44))
    with pytest.raises(InvalidAdapterError, match="has 32 tokens, the base has 40: give the base"):
        distill(base, replace(base, vocab_size=32), cut_vocabulary=True)


def test_a_diverged_fine_tune_is_refused(base_model: LlamaForCausalLM, layout_of: Layout) -> None:
    tuned = copy.deepcopy(base_model)
    with torch.no_grad():
        tuned.get_submodule(DOWN).weight[0, 0] = torch.nan
    with pytest.raises(InvalidAdapterError, match=f"{DOWN}' is not finite"):
        distill(layout_of(base_model), layout_of(tuned))
