"""A tokenizer from a GGUF file's metadata.

Byte-level BPE files name the way in which text is split before merging (`tokenizer.ggml.pre`); the
known ones are built here, which takes 0.1 s where transformers' own conversion parses the file
again and takes 5 s. Everything else goes through transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import PreTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from polydelta.engine.models.errors import ModelError
from polydelta.engine.models.gguf_file import GgufFile

# tokenizer.ggml.token_type
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4


def _byte_level() -> PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _single_digits() -> PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()])


def _split(pattern: str) -> Callable[[], PreTokenizer]:
    return lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _words(digits: str) -> str:
    """The pattern of the tiktoken family; its members differ in how many digits stay together."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_PRE_TOKENIZERS: Mapping[str, Callable[[], PreTokenizer]] = {
    "gpt-2": _byte_level,
    "smollm": _single_digits,
    "llama-bpe": _split(_words(r"\p{N}{1,3}")),
    "qwen2": _split(_words(r"\p{N}")),
}


def load_tokenizer(file: GgufFile) -> PreTrainedTokenizerBase:
    """Raises ModelError when the file holds no tokenizer."""
    if file.field("tokenizer.ggml.tokens") is None:
        raise ModelError(f"{file.path.name} holds no tokenizer (tokenizer.ggml.tokens).")
    try:
        return _build(file)
    except Exception as problem:  # whatever damaged metadata runs into, in two libraries
        raise ModelError(f"The tokenizer of {file.path.name} cannot be read: {problem}") from None


def _build(file: GgufFile) -> PreTrainedTokenizerBase:
    pre = str(file.field("tokenizer.ggml.pre", ""))
    if file.field("tokenizer.ggml.model") == "gpt2" and pre in _PRE_TOKENIZERS:
        return _byte_level_bpe(file, _PRE_TOKENIZERS[pre]())
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        file.path.parent, gguf_file=file.path.name
    )
    return tokenizer


def _byte_level_bpe(file: GgufFile, pre_tokenizer: PreTokenizer) -> PreTrainedTokenizerFast:
    tokens: list[str] = file.field("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in file.field("tokenizer.ggml.merges")]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    types: list[int] = file.field("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    for kind in (_CONTROL, _USER_DEFINED):
        added = [
            AddedToken(token, special=kind == _CONTROL, normalized=False)
            for token, token_type in zip(tokens, types, strict=True)
            if token_type == kind
        ]
        if kind == _CONTROL:
            tokenizer.add_special_tokens(added)
        else:
            tokenizer.add_tokens(added)

    def special(kind: str) -> str | None:
        token_id = file.field(f"tokenizer.ggml.{kind}_token_id")
        return None if token_id is None else tokens[int(token_id)]

    bos = special("bos")
    if bos is not None and file.field("tokenizer.ggml.add_bos_token", False):
        tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=None, special_tokens=[(bos, vocabulary[bos])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=special("eos"),
        pad_token=special("padding"),
        chat_template=file.field("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
    )
