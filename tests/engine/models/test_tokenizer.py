"""Tokenizers of other families than the default model's."""

from __future__ import annotations

from tokenizers import Tokenizer as Backend, decoders, models
from transformers import PreTrainedTokenizerFast

from polydelta.engine.models.tokenizer import Tokenizer


def byte_fallback_tokenizer() -> Tokenizer:
    """As SentencePiece models have it: what is no token of its own comes byte by byte."""
    tokens = ["<unk>", "</s>", "x", "<0x0A>", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"), (1,))


def test_bytes_that_never_become_a_character_do_not_end_the_stream() -> None:
    """A newline, the beginning of an emoji, and then a letter."""
    stream = byte_fallback_tokenizer().stream()
    text = "".join(stream.push(token) for token in (2, 3, 4, 2, 2, 2))
    assert text.startswith("x")
    assert text.endswith("x")


def test_a_character_in_bytes_comes_when_it_is_whole() -> None:
    stream = byte_fallback_tokenizer().stream()
    assert [stream.push(token) for token in (2, 4, 5, 6, 7, 2)][-1] == "x"
    assert "\N{GRINNING FACE}" in byte_fallback_tokenizer().decode([2, 4, 5, 6, 7, 2])
