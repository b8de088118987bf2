from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.upload.contents import (
    HEAD_BYTES,
    Contents,
    archive_kind,
    is_pickle,
    split_name,
)
from polydelta.adapters_store.upload.limits import UploadLimits
from polydelta.adapters_store.upload.outline import check_outline

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def saved_by_torch(zipped: bool = True) -> bytes:
    content = io.BytesIO()
    torch.save({"a": torch.ones(2)}, content, _use_new_zipfile_serialization=zipped)
    return content.getvalue()


PICKLES = {f"protocol {n}": pickle.dumps({"a": 1}, protocol=n) for n in (2, 3, 4, 5)} | {
    "torch.save": saved_by_torch(),
    "torch.save of old": saved_by_torch(zipped=False),
}


@pytest.fixture
def contents(tmp_path: Path) -> Contents:
    return Contents(tmp_path)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_the_two_files_are_kept_under_names_of_ours(
    name: str, contents: Contents, tmp_path: Path
) -> None:
    assert contents.admit(f"any/folder/{name}", b"{}") == tmp_path / name
    assert contents.ignored == []


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "LICENSE",
        ".gitattributes",
        ".DS_Store",
        f"._{CONFIG}",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
        "trainer_state.json",
        "training_args.json",
        "all_results.json",
        "notes.txt",
    ],
)
def test_what_trainers_write_beside_an_adapter_is_ignored_by_name(
    name: str, contents: Contents
) -> None:
    assert contents.admit(name, b"{}") is None
    assert contents.ignored == [name]


@pytest.mark.parametrize(
    "name",
    [
        "training_args.bin",
        "optimizer.pt",
        "adapter_model.bin",
        "model.safetensors",
        "config.json",
        "adapter_config.json.bak",
        "Adapter_Config.json",
        "ADAPTER_MODEL.SAFETENSORS",
        "modeling.py",
        "x.md.exe",
        "adapter_config.json ",
        "аdapter_config.json",  # noqa: RUF001 - the first letter is Cyrillic
    ],
)
def test_everything_else_is_refused_by_name(name: str, contents: Contents) -> None:
    with pytest.raises(InvalidAdapterError) as error:
        contents.admit(name, b"{}")
    assert f"{name!r} is no file that an adapter is known to have" in str(error.value)
    assert CONFIG in str(error.value)


@pytest.mark.parametrize("content", PICKLES.values(), ids=PICKLES.keys())
@pytest.mark.parametrize(
    "name", [CONFIG, "README.md", "training_args.bin", "x/data.pkl", "__MACOSX/a"]
)
def test_a_pickle_is_refused_by_content_whatever_its_name(
    name: str, content: bytes, contents: Contents
) -> None:
    with pytest.raises(InvalidAdapterError, match=r"is a pickle, .*safe_serialization=True"):
        contents.admit(name, content[:HEAD_BYTES])


@pytest.mark.parametrize(
    "head", [b"", b"\x80", b"\x80\x01", b"\x80\x06", b"PK", b"PK notes", b"{}", b"\x81\x04"]
)
def test_what_only_resembles_a_pickle_is_none(head: bytes) -> None:
    assert not is_pickle(head)
    assert archive_kind(head) is None


def test_weights_may_begin_with_any_bytes(contents: Contents, tmp_path: Path) -> None:
    # A header of 640 bytes makes a file begin like a pickle of protocol 2.
    assert contents.admit(WEIGHTS, b"\x80\x02\0\0\0\0\0\0{") == tmp_path / WEIGHTS


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "./.",
        "..",
        "/",
        f"/{CONFIG}",
        f"../{CONFIG}",
        f"a/../{CONFIG}",
        f"a//{CONFIG}",
        "a/",
        f"..\\{CONFIG}",
        f"C:{CONFIG}",
        f"{CONFIG}\0.png",
        f"{CONFIG}\n",
        "\x1b[31mred.md",
        "\ud800.md",
        "\u202egnp.md",
        "a" * 256,
        f"{CONFIG}:stream",
    ],
)
def test_a_name_that_could_lead_anywhere_is_refused(name: str) -> None:
    with pytest.raises(InvalidAdapterError, match="is not accepted: use a plain name") as error:
        split_name(name)
    str(error.value).encode()


@pytest.mark.parametrize(
    ("name", "parts"),
    [("a", ("a",)), ("./a", ("a",)), ("a/./b", ("a", "b")), ("мой/…a", ("мой", "…a"))],
)
def test_a_plain_name_is_cut_at_slashes(name: str, parts: tuple[str, ...]) -> None:
    assert split_name(name) == parts


@pytest.mark.parametrize("missing", [CONFIG, WEIGHTS])
def test_both_files_must_come(missing: str, contents: Contents) -> None:
    contents.admit("README.md", b"")
    for name in {CONFIG, WEIGHTS} - {missing}:
        contents.admit(name, b"")
    with pytest.raises(InvalidAdapterError, match=f"^{missing} is missing: .*save_pretrained"):
        contents.check_complete()


def test_the_facts_of_a_lora_are_those_of_its_files(
    adapter_files: Any, make_lora_tensors: Callable[..., Mapping[str, torch.Tensor]]
) -> None:
    tensors = {
        **make_lora_tensors("model.layers.0.self_attn.q_proj"),
        **make_lora_tensors("model.layers.2.self_attn.o_proj", rank=7),
    }
    folder = adapter_files.write("mine", tensors, rank_pattern={"o_proj": 7})
    facts = check_outline(folder, UploadLimits(max_rank=7))
    assert (facts.format, facts.kinds, facts.rank, facts.modules) == ("LORA", ("LowRank",), 7, 2)
    assert facts.nbytes == sum(path.stat().st_size for path in folder.iterdir())
    with pytest.raises(InvalidAdapterError, match=r"has rank 7, but this server takes .* up to 6"):
        check_outline(folder, UploadLimits(max_rank=6))


def test_a_shira_has_no_rank(adapter_files: Any) -> None:
    facts = check_outline(adapter_files.shira(), UploadLimits(max_rank=1))
    assert (facts.format, facts.kinds, facts.rank, facts.modules) == ("SHIRA", ("Sparse",), 0, 1)


def test_what_no_base_could_serve_is_refused(adapter_files: Any) -> None:
    with pytest.raises(InvalidAdapterError, match="use_magic"):
        check_outline(adapter_files.lora(use_magic=True), UploadLimits())
