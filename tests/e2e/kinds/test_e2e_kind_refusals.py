"""What a real server refuses: uploads, sums and prefixes, each with the field and the remedy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import openai
import peft
import pytest
import torch

pytestmark = pytest.mark.slow

ONE: dict[str, Any] = {
    "target_modules": ["q_proj"],
    "layers_to_transform": [0],
    "task_type": "CAUSAL_LM",
}


def the_error(answer: httpx.Response) -> dict[str, Any]:
    """Of a request that the client can mend."""
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("BadRequestError", 400)
    return error


# What is uploaded, and what the answer says: the field at fault, and the remedy.
REFUSED: Mapping[str, tuple[Callable[[Any, Path], Path], tuple[str, ...]]] = {
    "hira": (
        lambda maker, lora: maker.of_peft("hira", peft.HiraConfig(r=2, **ONE)),
        ("HIRA", "polydelta adapters convert"),
    ),
    "oft": (
        lambda maker, lora: maker.of_peft("oft", peft.OFTConfig(oft_block_size=4, **ONE)),
        ("OFT", "polydelta adapters convert"),
    ),
    "lily": (
        lambda maker, lora: maker.changed(lora, "lily", peft_type="LILY"),
        ("peft_type is 'LILY'", "averages over all tokens", "train a LoRA instead"),
    ),
    "adamss": (
        lambda maker, lora: maker.changed(lora, "adamss", peft_type="ADAMSS"),
        ("peft_type is 'ADAMSS'", "is not in the file", "polydelta adapters distill-delta"),
    ),
    "pissa": (
        lambda maker, lora: maker.changed(lora, "pissa", init_lora_weights="pissa_niter_4"),
        ("init_lora_weights is 'pissa_niter_4'", "path_initial_model_for_weight_conversion"),
    ),
    "unknown": (
        lambda maker, lora: maker.changed(lora, "unknown", warp_factor=9),
        ("warp_factor is 9", "not known here", "remove the key"),
    ),
    "elsewhere": (
        lambda maker, lora: maker.write(
            "elsewhere",
            {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_lin"]},
            {
                "base_model.model.bert.layer.0.q_lin.lora_A.weight": torch.ones(1, 576),
                "base_model.model.bert.layer.0.q_lin.lora_B.weight": torch.ones(576, 1),
            },
        ),
        ("has 'bert.layer.0.q_lin'", "the base that it was trained on"),
    ),
    "empty": (
        lambda maker, lora: maker.write(
            "empty", {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": []}, {}
        ),
        ("changes no module", "save the adapter again"),
    ),
    # 81 of the rank 9 that its config has.
    "rank": (
        lambda maker, lora: maker.of_peft("rank", peft.LoHaConfig(r=9, **ONE)),
        ("rank 81", "up to 64", "a smaller r"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_upload_that_cannot_be_served_is_refused_with_field_and_remedy(
    api, maker, folders, name
):
    make, fragments = REFUSED[name]
    error = the_error(api.upload(name, make(maker, folders["lora"])))
    assert error["param"] == "files"
    for fragment in fragments:
        assert fragment in error["message"]
    assert api.call("GET", f"/v1/adapters/{name}").status_code == 404


@pytest.mark.usefixtures("uploaded")
@pytest.mark.parametrize(
    ("name", "kind"),
    [("ia3", "Scale"), ("dora", "Scale"), ("prefix", "Prefix"), ("alora", "Invocation")],
)
def test_what_does_not_add_up_is_served_alone_and_refused_in_a_sum(api, name, kind):
    def part(name: str, weight: float) -> dict[str, Any]:
        return {"id": name, "weight": weight}

    assert api.text(api.base, adapters=[part(name, 1.0)]) == api.text(name)
    sums = ([part(name, 0.5)], [part(name, 1.0), part("lora", 0.5)])
    for parts in sums:
        body = {"model": api.base, "prompt": "Hi", "adapters": parts}
        asked = the_error(api.call("POST", "/v1/completions", json=body))
        saved = the_error(api.call("POST", "/v1/adapters", json={"id": "sum", "compose": parts}))
        assert (asked["param"], saved["param"]) == ("adapters", "compose")
        assert asked["message"] == saved["message"]
        assert f"'{name}@1' has deltas of kind {kind}, which can be neither" in asked["message"]
        assert "use it alone with weight 1, by the field `model`" in asked["message"]


def test_a_prefix_that_leaves_no_place_in_the_window_is_an_error_with_the_numbers(
    start_bare, tiny_file, maker
):
    """Over a model whose window is short: 512 tokens, of 3 layers with 2 heads of 10 each."""
    virtual, window = 505, 512
    config = {"num_virtual_tokens": virtual, "num_layers": 3, "num_attention_heads": 2}
    folder = maker.write(
        "long",
        {"peft_type": "PREFIX_TUNING", "token_dim": 20, **config},
        {"prompt_embeddings": torch.randn(virtual, 2 * 3 * 20)},
    )
    api = start_bare("--model", str(tiny_file))
    assert api.upload("long", folder).status_code == 201
    asked = {"model": "long", "prompt": [5] * 7, "max_tokens": 9}
    with pytest.raises(openai.BadRequestError) as whole:
        api.complete(**asked)
    with pytest.raises(openai.BadRequestError) as streamed:
        list(api.complete(**asked, stream=True))
    for error in (whole.value, streamed.value):
        assert error.param == "model"
        for words in (f"{virtual} virtual tokens", "the prompt's 7", f"window is {window} tokens"):
            assert words in error.message
    assert api.pages()["kv"] == 0
    # With a token less, one of the answer finds a place.
    done = api.complete(**asked | {"prompt": [5] * 6})
    assert done.choices[0].finish_reason == "length"
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (6, 1)
