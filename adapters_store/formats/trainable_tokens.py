"""Rows of the embedding and the head that PEFT trains by token: its trainable tokens, alone or by
LoRA's option `trainable_token_indices`.

A row replaces the base's, though its tensor is called a delta. Where the head is the embedding, it
follows the embedding unless it has rows of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from polydelta.adapters_store.base_layout import EMBEDDING, HEAD, BaseLayout
from polydelta.adapters_store.delta import Delta, TokenRows
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.files import Shape, to_float32
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft_config import Config, key_rules, token_ids
from polydelta.adapters_store.formats.peft_tensors import check_shape, group_by_module
from polydelta.adapters_store.reference import CONFIG_FILE, WEIGHTS_FILE

T = TypeVar("T")

# Module -> the ids of its rows, in the order of the file's rows; modules without are not there.
Ids = Mapping[str, list[int]]

KEY_RULES = key_rules(
    honoured={"token_indices"},
    # What the rows were started from.
    harmless={"init_weights"},
)

_PARAMETER = "trainable_tokens_delta"
_BESIDE = f"token_adapter.{_PARAMETER}"


def take_out(entries: Mapping[str, T]) -> tuple[dict[str, T], dict[str, T]]:
    """Of a file's tensors, or their shapes, by name: rows beside another tuner's, and the rest."""
    rows = {name: entry for name, entry in entries.items() if name.endswith(f".{_BESIDE}")}
    return rows, {name: entry for name, entry in entries.items() if name not in rows}


def outline(config: Config, shapes: Mapping[str, Shape]) -> dict[str, ModuleOutline]:
    """Of the format TRAINABLE_TOKENS. Raises InvalidAdapterError."""
    KEY_RULES.check(config)
    return _ALONE.outline(config, shapes)


def read(
    config: Config, tensors: Mapping[str, Tensor], layout: BaseLayout
) -> dict[str, tuple[Delta, ...]]:
    """Of the format TRAINABLE_TOKENS: module path -> its rows, float32.

    Raises InvalidAdapterError.
    """
    KEY_RULES.check(config)
    return _ALONE.read(config, tensors, layout)


def outline_beside(config: Config, shapes: Mapping[str, Shape]) -> dict[str, ModuleOutline]:
    """Of rows beside another tuner's. Raises InvalidAdapterError."""
    return _OPTION.outline(config, shapes)


def read_beside(
    config: Config, tensors: Mapping[str, Tensor], layout: BaseLayout
) -> dict[str, tuple[Delta, ...]]:
    """Of rows beside another tuner's: module path -> its rows, float32.

    Raises InvalidAdapterError.
    """
    return _OPTION.read(config, tensors, layout)


@dataclass(frozen=True)
class _RowsFormat:
    # What a module's tensor is called.
    parameter: str
    # From the config and the modules in the file.
    ids: Callable[[Config, set[str]], Ids]

    def outline(self, config: Config, shapes: Mapping[str, Shape]) -> dict[str, ModuleOutline]:
        names = self._names(shapes)
        ids = self.ids(config, set(names))
        for module, name in names.items():
            rows = ids.get(module, ids.get(EMBEDDING))
            if rows is None:
                raise InvalidAdapterError(
                    f"Tensor {name[:200]!r} has rows of tokens that {CONFIG_FILE} does not name in "
                    "trainable_token_indices: take the config of the training."
                )
            check_shape(
                name, shapes[name], (len(rows), *shapes[name][1:2]), f"the ids in {CONFIG_FILE}"
            )
        return {module: ModuleOutline(TokenRows.kind, 0) for module in names}

    def read(
        self, config: Config, tensors: Mapping[str, Tensor], layout: BaseLayout
    ) -> dict[str, tuple[Delta, ...]]:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.outline(config, shapes)
        names = self._names(tensors)
        ids = self.ids(config, set(names))
        rows = {
            module: _token_rows(names[module], tensors[names[module]], of_module, layout)
            for module, of_module in ids.items()
            if module in names
        }
        _check_copy(names, tensors, ids)
        if layout.tied and EMBEDDING in rows and ids.get(HEAD, ids[EMBEDDING]) == ids[EMBEDDING]:
            rows.setdefault(HEAD, rows[EMBEDDING])
        for module in ids.keys() - rows.keys():
            raise InvalidAdapterError(
                f"{CONFIG_FILE} names trained tokens of {module!r}, but {WEIGHTS_FILE} does not "
                "have their rows: save the adapter again from the trained model."
            )
        return {module: (of_module,) for module, of_module in rows.items() if len(of_module.ids)}

    def _names(self, entries: Mapping[str, object]) -> dict[str, str]:
        """Module -> the name of its tensor."""
        modules = group_by_module(entries, (self.parameter,))
        for module in sorted(modules.keys() - {EMBEDDING, HEAD}):
            raise InvalidAdapterError(
                f"{WEIGHTS_FILE} has rows of tokens for {module[:200]!r}, but tokens have rows in "
                f"{EMBEDDING!r} and {HEAD!r} alone: load the adapter over the base that it was "
                "trained on."
            )
        return {module: tensors[self.parameter] for module, tensors in modules.items()}


def _ids_of_option(config: Config, _: set[str]) -> Ids:
    field = "trainable_token_indices"
    option = config.get(field)
    if not isinstance(option, dict):
        return {} if option is None else {EMBEDDING: token_ids(field, option)}
    ids: dict[str, list[int]] = {}
    for end, of_module in option.items():
        module = next((name for name in (EMBEDDING, HEAD) if name.endswith(end)), None)
        if module is None or module in ids:
            raise InvalidAdapterError(
                f"{CONFIG_FILE}: {field} names {end[:80]!r}, but tokens have rows in {EMBEDDING!r} "
                f"and {HEAD!r} alone, each named once: load the adapter over the base that it was "
                "trained on."
            )
        ids[module] = token_ids(f"{field}[{end!r}]", of_module)
    return ids


def _token_rows(name: str, tensor: Tensor, ids: list[int], layout: BaseLayout) -> TokenRows:
    check_shape(name, tuple(tensor.shape), (len(ids), layout.hidden_size), "the base model")
    beyond = [token for token in ids if token >= layout.vocab_size]
    if beyond:
        raise InvalidAdapterError(
            f"{CONFIG_FILE} names the token {beyond[0]}, but the base model has "
            f"{layout.vocab_size}: resize the base's embeddings as the training did, and serve "
            "that base."
        )
    if len(set(ids)) < len(ids):
        raise InvalidAdapterError(
            f"{CONFIG_FILE} names a token of {name!r} twice, so which row is its own is not "
            "certain: train again with each token named once."
        )
    ascending, order = torch.tensor(ids, dtype=torch.int64).sort()
    return TokenRows(ascending, to_float32(name, tensor)[order])


def _check_copy(names: Mapping[str, str], tensors: Mapping[str, Tensor], ids: Ids) -> None:
    """PEFT may save the rows of a head that follows the embedding a second time."""
    for module in names.keys() - ids.keys():
        both = [name for name in (names[module], names.get(EMBEDDING)) if name is not None]
        # In float32: tensors of different dtypes cannot always be compared.
        rows = [to_float32(name, tensors[name]) for name in both]
        if len(rows) < 2 or not torch.equal(*rows):
            raise InvalidAdapterError(
                f"Tensor {names[module]!r} has rows of tokens that {CONFIG_FILE} does not name for "
                "that module: take the config of the training."
            )


_ALONE = _RowsFormat(
    _PARAMETER,
    lambda config, modules: dict.fromkeys(
        sorted(modules), token_ids("token_indices", config.get("token_indices"))
    ),
)
_OPTION = _RowsFormat(_BESIDE, _ids_of_option)
