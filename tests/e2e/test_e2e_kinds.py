"""Adapters of many kinds on one real server: uploaded, mixed, swapped, added up and refused."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import openai
import peft
import pytest
import torch
from peft import PeftConfig, get_peft_model
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from polydelta.engine.models.checkpoint import Checkpoint

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SOME = ["q_proj", "v_proj", "down_proj"]
ONE = {"target_modules": ["q_proj"], "layers_to_transform": [0]}
TASK: dict[str, Any] = {"task_type": "CAUSAL_LM"}
# Below the page's 16 tokens, so that the prefix cache has nothing of it.
PROMPT = "In the morning the river had taken the old"
PROMPT_TOKENS = 9
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
# " Answer briefly:"
INVOCATION = [19842, 13099, 42]
GREEDY: dict[str, Any] = {"temperature": 0, "extra_body": {"ignore_eos": True}}
LONG = 32
MAX_RANK = 64
# With an answer's first token, as --max-model-len has it.
WINDOW = 512

# How PEFT makes an adapter, and the kinds that become of it.
PEFT_KINDS: Mapping[str, tuple[Callable[[], PeftConfig], list[str]]] = {
    "lora": (lambda: peft.LoraConfig(r=4, target_modules=LINEARS, **TASK), ["LowRank"]),
    "dora": (
        lambda: peft.LoraConfig(r=3, use_dora=True, target_modules=SOME, **TASK),
        ["LowRank", "Scale"],
    ),
    "ia3": (
        lambda: peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"],
            feedforward_modules=["down_proj"],
            **TASK,
        ),
        ["Scale"],
    ),
    "shira": (lambda: peft.ShiraConfig(r=2, target_modules=SOME, **TASK), ["Sparse"]),
    "loha": (lambda: peft.LoHaConfig(r=3, target_modules=SOME, **TASK), ["LowRank"]),
    "prefix": (lambda: peft.PrefixTuningConfig(num_virtual_tokens=21, **TASK), ["Prefix"]),
    "prompt": (lambda: peft.PromptTuningConfig(num_virtual_tokens=9, **TASK), ["Prompt"]),
    # " the" and " old".
    "tokens": (lambda: peft.TrainableTokensConfig(token_indices=[260, 1573], **TASK), ["TokenRows"]),
    "norms": (
        lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "norm"], **TASK),
        ["NormWeight"],
    ),
    "alora": (
        lambda: peft.LoraConfig(
            r=4, alora_invocation_tokens=INVOCATION, target_modules=LINEARS, **TASK
        ),
        ["Invocation", "LowRank"],
    ),
}
# How much of it, so that the answers are others than the base's.
NOISE = {"loha": 0.3, "shira": 0.3, "tokens": 0.3}
KINDS = {
    **{name: kinds for name, (_, kinds) in PEFT_KINDS.items()},
    "s2ft": ["Columns", "Rows"],
    "bitdelta": ["OneBit"],
}


class Maker:
    """Adapter folders over the default model's own weights, with random numbers in them."""

    def __init__(self, checkpoint: Checkpoint, root: Path) -> None:
        self._root = root
        source, shape = checkpoint.tensors, checkpoint.config
        self._weights = {name: source.read(name).float() for name in source.names()}
        self._config = LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_kv_heads,
            tie_word_embeddings=True,
        )

    def of_peft(self, name: str, config: PeftConfig) -> Path:
        with torch.device("meta"):
            base = LlamaForCausalLM(self._config)
        base.load_state_dict(self._weights, strict=False, assign=True)
        base.tie_weights()
        base.requires_grad_(False)
        torch.manual_seed(len(name))
        made = get_peft_model(base, config)
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * NOISE.get(name, 0.05))
        made.save_pretrained(self._root / name)
        return self._root / name

    def changed(self, source: Path, name: str, **config: Any) -> Path:
        """The files of another adapter, with other settings."""
        settings = json.loads((source / "adapter_config.json").read_text())
        tensors = load_file(source / "adapter_model.safetensors")
        return self.write(name, settings | config, tensors)

    def write(self, name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
        folder = self._root / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file(dict(tensors), folder / "adapter_model.safetensors")
        return folder

    def s2ft(self) -> Path:
        torch.manual_seed(1)
        tensors: dict[str, Tensor] = {}
        for module, (rows, columns) in self._linears("up_proj", "down_proj"):
            part, size = ("rows", rows) if module.endswith("up_proj") else ("columns", columns)
            tensors[f"{module}.s2ft_indices"] = torch.randperm(size)[:5].sort().values.int()
            block = torch.randn((5, columns) if part == "rows" else (rows, 5))
            tensors[f"{module}.s2ft_{part}"] = block
        return self.write("s2ft", {"peft_type": "S2FT"}, tensors)

    def bitdelta(self) -> Path:
        torch.manual_seed(2)
        tensors: dict[str, Tensor] = {}
        for module, (rows, columns) in self._linears(*SOME):
            bits = torch.randint(256, (rows, columns // 8), dtype=torch.uint8)
            tensors[f"{module}.bitdelta_bits"] = bits
            tensors[f"{module}.bitdelta_scale"] = torch.tensor([0.02])
        return self.write("bitdelta", {"peft_type": "BITDELTA"}, tensors)

    def _linears(self, *targets: str) -> Iterator[tuple[str, tuple[int, int]]]:
        for name, weight in self._weights.items():
            module = name.removesuffix(".weight")
            if module.endswith(targets):
                yield f"base_model.model.{module}", (weight.shape[0], weight.shape[1])


@dataclass(frozen=True)
class Api:
    """What the tests ask of the server."""

    url: str
    client: openai.OpenAI

    def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        return httpx.request(method, f"{self.url}{path}", timeout=60, **options)

    def upload(self, adapter_id: str, folder: Path) -> httpx.Response:
        names = ("adapter_config.json", "adapter_model.safetensors")
        files = [("files", (name, (folder / name).read_bytes())) for name in names]
        return self.call("POST", "/v1/adapters", data={"id": adapter_id}, files=files)

    def complete(self, model: str, max_tokens: int = 6) -> Any:
        options = {"model": model, "prompt": PROMPT, "max_tokens": max_tokens}
        return self.client.completions.create(**options, **GREEDY)

    def chat(self, model: str) -> Any:
        options = {"model": model, "messages": QUESTION, "max_tokens": 6}
        return self.client.chat.completions.create(**options, **GREEDY)

    def sum(self, *parts: tuple[str, float]) -> httpx.Response:
        adapters = [{"id": adapter_id, "weight": weight} for adapter_id, weight in parts]
        body = {"model": self.base, "prompt": PROMPT, "adapters": adapters, "max_tokens": 6}
        return self.call("POST", "/v1/completions", json=body | {"temperature": 0})

    @property
    def base(self) -> str:
        return next(iter(self.client.models.list())).id

    def pages(self) -> dict[str, float]:
        """Of the pool, by who holds them."""
        families = text_string_to_metric_families(self.call("GET", "/metrics").text)
        samples = [sample for family in families for sample in family.samples]
        return {s.labels["owner"]: s.value for s in samples if s.name == "polydelta_pool_pages"}


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def api(launch: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Api:
    """Its pool holds all of these adapters: `pages` changes with what is in use alone."""
    none = tmp_path_factory.mktemp("none")
    options = ("--adapters", str(none), "--pool", "120MiB", "--max-adapter-rank", str(MAX_RANK))
    url = launch(*options).url
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
    return Api(url, client)


@pytest.fixture(scope="module")
def maker(default_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Maker:
    return Maker(default_checkpoint, tmp_path_factory.mktemp("kinds"))


@pytest.fixture(scope="module")
def folders(maker: Maker) -> dict[str, Path]:
    made = {name: maker.of_peft(name, config()) for name, (config, _) in PEFT_KINDS.items()}
    return made | {"s2ft": maker.s2ft(), "bitdelta": maker.bitdelta()}


@pytest.fixture(scope="module")
def uploaded(api: Api, folders: dict[str, Path]) -> dict[str, httpx.Response]:
    """The answers to the uploads of all, at once."""
    with ThreadPoolExecutor(len(folders)) as clients:
        answers = list(clients.map(api.upload, folders, folders.values()))
    return dict(zip(folders, answers, strict=True))


def test_uploads_of_all_kinds_at_once_are_taken_and_shown_by_their_kinds(
    api: Api, uploaded: dict[str, httpx.Response]
) -> None:
    listed = {model.id for model in api.client.models.list()}
    for name, answer in uploaded.items():
        assert answer.status_code == 201, answer.text
        assert answer.json()["kinds"] == KINDS[name]
        assert name in listed
        record = api.call("GET", f"/v1/adapters/{name}").json()
        assert (record["kinds"], record["state"]) == (KINDS[name], "ready")
    page = api.call("GET", "/v1/adapters", params={"kind": "Prefix"}).json()
    assert [record["id"] for record in page["data"]] == ["prefix"]


@pytest.mark.slow
def test_all_kinds_together_answer_as_each_alone(
    api: Api, uploaded: dict[str, httpx.Response]
) -> None:
    def ask(asked: tuple[Callable[[str], Any], str]) -> tuple[str, int]:
        route, name = asked
        done = route(name)
        choice = done.choices[0]
        text = choice.text if hasattr(choice, "text") else choice.message.content
        return text, done.usage.prompt_tokens

    names = [api.base, *uploaded]
    questions = [(route, name) for name in names for route in (api.complete, api.chat)]
    with ThreadPoolExecutor(len(questions)) as clients:
        together = list(clients.map(ask, questions))
    assert together == [ask(question) for question in questions]
    # Virtual tokens are not the client's.
    completions, chats = together[::2], together[1::2]
    assert {count for _, count in completions} == {PROMPT_TOKENS}
    assert len({count for _, count in chats}) == 1
    texts = dict(zip(names, [text for text, _ in completions], strict=True))
    silent = {name for name in uploaded if texts[name] == texts[api.base]}
    assert silent == {"alora"}, "adapters that do nothing"
    until(lambda: api.pages()["kv"] == 0)


@pytest.mark.usefixtures("uploaded")
def test_an_activated_lora_that_is_not_called_is_the_base(api: Api) -> None:
    assert api.chat("alora").choices == api.chat(api.base).choices
    answers = [api.complete(name, LONG).choices for name in (api.base, "alora")]
    assert answers[0] == answers[1]


@pytest.mark.slow
@pytest.mark.usefixtures("uploaded")
@pytest.mark.parametrize("base_first", [True, False])
def test_what_comes_before_an_invocation_is_shared_with_the_base(
    api: Api, base_first: bool
) -> None:
    # 50 tokens, of which three pages are full; nobody else has them.
    prompt = [*range(1000 + base_first, 1050 + base_first), *INVOCATION, 260, 1573]

    def ask(model: str) -> Any:
        options = {"model": model, "prompt": prompt, "max_tokens": 6, "logprobs": 1}
        return api.client.completions.create(**options, **GREEDY)

    names = [api.base, "alora"] if base_first else ["alora", api.base]
    first, second = map(ask, names)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens == 48
    assert first.usage.prompt_tokens == second.usage.prompt_tokens == len(prompt)
    assert first.choices[0].logprobs.token_logprobs != second.choices[0].logprobs.token_logprobs


class Stream:
    """A streamed request of its own thread, whose first token has come."""

    def __init__(self, api: Api, model: str) -> None:
        self._begun = threading.Event()
        self._reader = ThreadPoolExecutor(1)
        self._text = self._reader.submit(self._read, api, model)
        assert self._begun.wait(60)

    def text(self) -> str:
        with self._reader:
            return self._text.result(60)

    def _read(self, api: Api, model: str) -> str:
        pieces, reason = [], None
        options = {"model": model, "prompt": PROMPT, "max_tokens": LONG}
        for chunk in api.client.completions.create(stream=True, **options, **GREEDY):
            pieces.append(chunk.choices[0].text)
            reason = chunk.choices[0].finish_reason
            self._begun.set()
        assert reason == "length"
        return "".join(pieces)


@contextmanager
def traffic(api: Api, wanted: Mapping[str, str]) -> Iterator[None]:
    """Other requests, again and again, each compared with its own answer."""
    stop = threading.Event()

    def run() -> int:
        count = 0
        while not stop.is_set():
            for name, text in wanted.items():
                assert api.complete(name).choices[0].text == text, name
                count += 1
        return count

    with ThreadPoolExecutor(1) as client:
        counted = client.submit(run)
        try:
            yield
        finally:
            stop.set()
        assert counted.result() > 0


@pytest.mark.slow
def test_one_id_changes_its_kind_under_traffic(
    api: Api, folders: dict[str, Path], uploaded: dict[str, httpx.Response]
) -> None:
    order, in_flight = ["lora", "prefix", "bitdelta", "dora", "lora"], 0
    wanted = {name: api.complete(name, LONG).choices[0].text for name in order}
    assert len(set(wanted.values())) == 4
    others = {name: api.complete(name).choices[0].text for name in (api.base, "ia3", "alora")}
    before = api.pages()
    version = api.upload("bot", folders[order[0]]).json()["version"]
    with traffic(api, others):
        for old, new in pairwise(order):
            streams = [Stream(api, "bot"), Stream(api, f"bot@{version}")]
            record = api.upload("bot", folders[new]).json()
            in_flight += api.call("GET", f"/v1/adapters/bot@{version}").json()["active_requests"]
            assert (record["version"], record["kinds"]) == (version + 1, KINDS[new])
            assert api.complete("bot", LONG).choices[0].text == wanted[new]
            assert [stream.text() for stream in streams] == [wanted[old]] * 2
            version += 1
    # Or every upload came after its streams.
    assert in_flight > 0
    api.call("DELETE", "/v1/adapters/bot?in_use=defer")
    until(lambda: api.call("GET", "/v1/adapters/bot/versions").status_code == 404)
    until(lambda: api.pages() == before)


@pytest.mark.usefixtures("uploaded")
@pytest.mark.parametrize("name", ["ia3", "prefix", "dora", "alora"])
def test_what_does_not_add_up_is_served_alone_and_refused_in_a_sum(api: Api, name: str) -> None:
    alone = api.sum((name, 1.0))
    assert alone.status_code == 200, alone.text
    assert alone.json()["choices"][0]["text"] == api.complete(name).choices[0].text
    kinds = ", ".join(kind for kind in KINDS[name] if kind != "LowRank")
    refused = [api.sum((name, 0.5)), api.sum((name, 1.0), ("lora", 0.5))]
    for answer in refused:
        error = the_error(answer)
        assert error["param"] == "adapters"
        assert f"'{name}@1' has deltas of kind {kinds}, which cannot be added" in error["message"]
        assert "use it alone, by the field `model`" in error["message"]
    parts = [{"id": name}, {"id": "lora"}]
    saved = api.call("POST", "/v1/adapters", json={"id": "sum", "compose": parts})
    assert the_error(saved)["message"] == the_error(refused[1])["message"]


def the_error(answer: httpx.Response) -> dict[str, Any]:
    """Of a request that the client can mend."""
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert (error["type"], error["code"]) == ("BadRequestError", 400)
    return error


# What is uploaded, and what the answer says: the field at fault, and the remedy.
REFUSED: Mapping[str, tuple[Callable[[Maker, Path], Path], tuple[str, ...]]] = {
    "hira": (
        lambda maker, lora: maker.of_peft("hira", peft.HiraConfig(r=2, **ONE, **TASK)),
        ("HIRA", "polydelta adapters convert"),
    ),
    "oft": (
        lambda maker, lora: maker.of_peft("oft", peft.OFTConfig(oft_block_size=4, **ONE, **TASK)),
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
        ("bert.layer.0.q_lin",),
    ),
    "empty": (
        lambda maker, lora: maker.write(
            "empty", {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": []}, {}
        ),
        ("changes no module", "save the adapter again"),
    ),
    # 81 of the rank 9 that its config has.
    "rank": (
        lambda maker, lora: maker.of_peft("rank", peft.LoHaConfig(r=9, **ONE, **TASK)),
        ("rank 81", f"up to {MAX_RANK}", "a smaller r"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_upload_that_cannot_be_served_is_refused_with_field_and_remedy(
    name: str, api: Api, maker: Maker, folders: dict[str, Path]
) -> None:
    make, fragments = REFUSED[name]
    error = the_error(api.upload(name, make(maker, folders["lora"])))
    assert error["param"] == "files"
    for fragment in fragments:
        assert fragment in error["message"]
    assert api.call("GET", f"/v1/adapters/{name}").status_code == 404


@pytest.mark.slow
def test_a_prefix_that_leaves_no_place_in_the_window_is_an_error_with_the_numbers(
    api: Api, maker: Maker
) -> None:
    virtual = WINDOW - PROMPT_TOKENS
    folder = maker.of_peft("long", peft.PrefixTuningConfig(num_virtual_tokens=virtual, **TASK))
    assert api.upload("long", folder).status_code == 201
    before = api.pages()
    words = (f"{virtual} virtual tokens", f"the prompt's {PROMPT_TOKENS}", f"is {WINDOW} tokens")
    with pytest.raises(openai.BadRequestError) as whole:
        api.complete("long")
    with pytest.raises(openai.APIError) as streamed:
        Stream(api, "long")
    for error in (whole.value, streamed.value):
        assert error.param == "model"
        for fragment in (*words, "shorten the prompt"):
            assert fragment in error.message
    assert api.pages() == before
    # One token less, and the window holds the prompt and one token of the answer.
    short = api.client.completions.create(model="long", prompt=[504] * (PROMPT_TOKENS - 1), **GREEDY)
    assert short.choices[0].finish_reason == "length"
    assert short.usage.completion_tokens == 1
    assert short.usage.prompt_tokens == PROMPT_TOKENS - 1
