"""Text to token ids and back, over a fast `tokenizers` backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from polydelta.engine.models.errors import ModelError


class Tokenizer:
    """The model's own tokenizer and chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_token_ids: Sequence[int]) -> None:
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ModelError("The model has no fast tokenizer (tokenizer.json); one is needed.")
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        ids = [*eos_token_ids]
        if not ids and tokenizer.eos_token_id is not None:
            ids = [tokenizer.eos_token_id]
        self.eos_token_ids: tuple[int, ...] = tuple(dict.fromkeys(ids))

    @property
    def vocab_size(self) -> int:
        return len(self._tokenizer)

    @property
    def bos_token_id(self) -> int | None:
        token_id: int | None = self._tokenizer.bos_token_id
        return token_id

    def save(self, folder: Path) -> None:
        """Writes what transformers needs to make it again, the chat template included."""
        self._tokenizer.save_pretrained(folder)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation, up to where the assistant's answer begins.

        Raises ValueError when the model has no chat template, or its template refuses.
        """
        if not self._tokenizer.chat_template:
            raise ValueError("The model has no chat template; use /v1/completions instead.")
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
        except TemplateError as refusal:
            raise ValueError(f"The model's chat template refused the messages: {refusal}") from None
        return self.encode(str(text), add_special_tokens=False)

    def token_text(self, token_id: int) -> str:
        """One token as text; a token that is part of a character shows as U+FFFD."""
        return self.decode([token_id], skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """One token as bytes, exact even when it is part of a character."""
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        mapped = [_BYTE_OF_CHARACTER.get(character) for character in token]
        if None in mapped or not self._is_byte_level:
            return self.token_text(token_id).encode()
        return bytes(byte for byte in mapped if byte is not None)

    @property
    def _is_byte_level(self) -> bool:
        return "ByteLevel" in str(self._backend.decoder)

    def stream(self, skip_special_tokens: bool = True) -> TokenStream:
        return TokenStream(self._backend, skip_special_tokens)


class TokenStream:
    """Text of a growing sequence of tokens, handed out as soon as it is whole characters."""

    def __init__(self, backend: Any, skip_special_tokens: bool) -> None:
        self._backend = backend
        self._skip_special_tokens = skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        try:
            return self._stream.step(self._backend, token_id) or ""
        except Exception:  # the library's own, and plain: bytes that never become a character
            self._stream = DecodeStream(skip_special_tokens=self._skip_special_tokens)
            return self._stream.step(self._backend, token_id) or ""


def _byte_level_alphabet() -> dict[str, int]:
    """The printable stand-in of each byte in byte-level BPE (GPT-2) -> the byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update({chr(256 + place): byte for place, byte in enumerate(others)})
    return alphabet


_BYTE_OF_CHARACTER: Mapping[str, int] = _byte_level_alphabet()
