from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from polydelta.adapters_store.base_layout import EMBEDDING, HEAD, BaseLayout
from polydelta.adapters_store.delta import TokenRows
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats import trainable_tokens
from polydelta.adapters_store.formats.outline import ModuleOutline

# Parity with PEFT is in test_modules.py, for tokens alone and beside another tuner.

PREFIX = "base_model.model."
Outline = Callable[[dict[str, Any], dict[str, tuple[int, ...]]], dict[str, ModuleOutline]]


def alone(module: str) -> str:
    return f"{PREFIX}{module}.trainable_tokens_delta"


def beside(module: str) -> str:
    return f"{PREFIX}{module}.token_adapter.trainable_tokens_delta"


def test_rows_are_sorted_by_token(layout: BaseLayout) -> None:
    rows = torch.randn(3, 36)
    deltas = trainable_tokens.read(
        {"token_indices": [31, 3, 7]}, {alone(EMBEDDING): rows.bfloat16()}, layout
    )
    ((delta,),) = deltas.values()
    assert isinstance(delta, TokenRows)
    assert (delta.ids.tolist(), delta.ids.dtype) == ([3, 7, 31], torch.int64)
    torch.testing.assert_close(delta.rows, rows[[1, 2, 0]].bfloat16().float(), atol=0, rtol=0)


def test_a_tied_head_follows_the_embedding_and_no_other_does(layout: BaseLayout) -> None:
    config, tensors = {"token_indices": [5]}, {alone(EMBEDDING): torch.ones(1, 36)}
    tied = replace(layout, tied=True)
    assert trainable_tokens.read(config, tensors, layout).keys() == {EMBEDDING}
    assert trainable_tokens.read(config, tensors, tied).keys() == {EMBEDDING, HEAD}


def test_the_embedding_does_not_follow_a_tied_head(layout: BaseLayout) -> None:
    tied = replace(layout, tied=True)
    deltas = trainable_tokens.read({"token_indices": [5]}, {alone(HEAD): torch.ones(1, 36)}, tied)
    assert deltas.keys() == {HEAD}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e4m3fn])
def test_a_copy_of_the_embeddings_rows_counts_once(dtype: torch.dtype, layout: BaseLayout) -> None:
    rows = torch.randint(-8, 8, (2, 36)).float()
    config = {"trainable_token_indices": [9, 4]}
    tensors = {beside(EMBEDDING): rows, beside(HEAD): rows.to(dtype)}
    assert trainable_tokens.read_beside(config, tensors, layout).keys() == {EMBEDDING}


def test_no_tokens_give_nothing(layout: BaseLayout) -> None:
    config = {"trainable_token_indices": []}
    tensors = {beside(EMBEDDING): torch.ones(0, 36)}
    assert trainable_tokens.read_beside(config, tensors, layout) == {}


def test_rows_beside_another_tuner_are_taken_out() -> None:
    entries = {beside(EMBEDDING): 1, alone(HEAD): 2, "prompt_embeddings": 3}
    rows, rest = trainable_tokens.take_out(entries)
    assert (rows.keys(), rest.keys()) == (
        {beside(EMBEDDING)},
        {alone(HEAD), "prompt_embeddings"},
    )


@pytest.mark.parametrize("end", ["embed_tokens", EMBEDDING])
def test_an_object_names_modules_by_their_ends(end: str) -> None:
    config = {"trainable_token_indices": {end: [1, 2], "lm_head": [0]}}
    shapes: dict[str, tuple[int, ...]] = {beside(EMBEDDING): (2, 36), beside(HEAD): (1, 36)}
    expected = ModuleOutline("TokenRows", 0)
    outline = trainable_tokens.outline_beside(config, shapes)
    assert outline == {EMBEDDING: expected, HEAD: expected}


WRONG: dict[str, tuple[object, dict[str, Tensor], str]] = {
    "no ids": (None, {beside(EMBEDDING): torch.ones(1, 36)}, "does not name in trainable_token"),
    "fewer ids than rows": (
        [3],
        {beside(EMBEDDING): torch.ones(2, 36)},
        r"shape \[2, 36\], but the ids in adapter_config.json asks for \[1, 36\]",
    ),
    "a vector": ([3], {beside(EMBEDDING): torch.ones(1)}, r"shape \[1\], but"),
    "another hidden size": (
        [3],
        {beside(EMBEDDING): torch.ones(1, 35)},
        r"shape \[1, 35\], but the base model asks for \[1, 36\]",
    ),
    "a token beyond the base's": (
        [3, 40],
        {beside(EMBEDDING): torch.ones(2, 36)},
        "names the token 40, but the base model has 40: resize",
    ),
    "a token twice": (
        [3, 5, 3],
        {beside(EMBEDDING): torch.ones(3, 36)},
        "names a token of '.*' twice",
    ),
    "a negative token": ([-1], {beside(EMBEDDING): torch.ones(1, 36)}, "must be a list of token"),
    "a number": (7, {beside(EMBEDDING): torch.ones(1, 36)}, "is 7, but must be a list of token"),
    "truth values": ([True], {beside(EMBEDDING): torch.ones(1, 36)}, "must be a list of token"),
    "another module": (
        {"wte": [3]},
        {beside(EMBEDDING): torch.ones(1, 36)},
        "names 'wte', but tokens have rows in 'model.embed_tokens' and 'lm_head' alone",
    ),
    "one module by two names": (
        {"embed_tokens": [3], "model.embed_tokens": [4]},
        {beside(EMBEDDING): torch.ones(1, 36)},
        "names 'model.embed_tokens', but .* each named once",
    ),
    "rows that are not there": (
        {"embed_tokens": [3], "lm_head": [4]},
        {beside(EMBEDDING): torch.ones(1, 36)},
        "names trained tokens of 'lm_head', but .* does not have their rows",
    ),
    "rows of the head that the config does not name": (
        [3],
        {beside(EMBEDDING): torch.ones(1, 36), beside(HEAD): torch.zeros(1, 36)},
        "'.*lm_head.*' has rows of tokens that adapter_config.json does not name for that module",
    ),
    "rows of a linear layer": (
        [3],
        {beside("model.layers.0.mlp.up_proj"): torch.ones(1, 36)},
        "has rows of tokens for 'model.layers.0.mlp.up_proj', but tokens have rows in",
    ),
    "NaN": ([3], {beside(EMBEDDING): torch.full((1, 36), torch.nan)}, "has NaN or infinite"),
}


@pytest.mark.parametrize(("indices", "tensors", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_tokens_are_refused_by_name(
    indices: object, tensors: dict[str, Tensor], message: str, layout: BaseLayout
) -> None:
    with pytest.raises(InvalidAdapterError, match=message):
        trainable_tokens.read_beside({"trainable_token_indices": indices}, tensors, layout)


def test_a_tied_head_with_other_tokens_needs_its_own_rows(layout: BaseLayout) -> None:
    config = {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [4]}}
    with pytest.raises(InvalidAdapterError, match="names trained tokens of 'lm_head'"):
        trainable_tokens.read_beside(
            config, {beside(EMBEDDING): torch.ones(1, 36)}, replace(layout, tied=True)
        )


def test_an_unknown_option_is_refused_by_name() -> None:
    with pytest.raises(InvalidAdapterError, match="use_magic is True"):
        trainable_tokens.outline({"token_indices": [1], "use_magic": True}, {})
