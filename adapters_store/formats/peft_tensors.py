"""Which tensor of a PEFT file belongs to which module: `base_model.model.` + module path + `.` +
parameter name. A tensor that nobody claims is an error: left out, it would change the answer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.reference import WEIGHTS_FILE

_PREFIX = "base_model.model."
_EMBEDDINGS = ("embed_tokens", "lm_head")
_NO_EMBEDDINGS = (
    "changes of embeddings and lm_head are not served yet: train without them in target_modules, "
    "modules_to_save and trainable_token_indices, and save with save_embedding_layers=False"
)


def group_by_module(
    names: Iterable[str], required: Collection[str], ignored: Collection[str] = ()
) -> dict[str, dict[str, str]]:
    """Module path -> parameter -> tensor name, for the parameters that each module must have.

    `ignored` parameters may be there and mean nothing to a server. Raises InvalidAdapterError for
    a tensor that is neither, for a module without all of `required`, and when there is no module.
    """
    modules: dict[str, dict[str, str]] = {}
    for name in names:
        module, parameter = _split(name, (*required, *ignored))
        if parameter in required:
            modules.setdefault(module, {})[parameter] = name
    for module, tensors in modules.items():
        missing = [parameter for parameter in required if parameter not in tensors]
        if missing:
            raise InvalidAdapterError(
                f"Module {module!r} has {', '.join(tensors)} but no {' or '.join(missing)} in "
                f"{WEIGHTS_FILE}: save the adapter again from the trained model."
            )
    if not modules:
        raise InvalidAdapterError(
            f"{WEIGHTS_FILE} changes no module, so it would give the base model's answers: "
            "save the adapter again from the trained model."
        )
    return modules


def check_modules(modules: Collection[str], layout: BaseLayout) -> None:
    """Raises InvalidAdapterError for a module that the base model does not have."""
    shapes = layout.module_shapes
    foreign = [module for module in modules if module not in shapes]
    if not foreign:
        return
    for module in foreign:
        if module.endswith(_EMBEDDINGS):
            raise InvalidAdapterError(f"The adapter changes {module!r}, but {_NO_EMBEDDINGS}.")
    if len(foreign) == len(modules):
        raise InvalidAdapterError(
            f"None of the adapter's {len(modules)} modules is in the base model, so it would give "
            f"the base model's answers: it has {foreign[0][:200]!r}, the base has "
            f"{next(iter(shapes))!r}. Load it over the base that it was trained on."
        )
    raise InvalidAdapterError(
        f"The adapter changes {foreign[0][:200]!r}, but the base model has no such linear layer in "
        f"its {layout.num_layers} decoder layers: load it over the base that it was trained on."
    )


def check_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...], why: str) -> None:
    """why: where the expected shape comes from. Raises InvalidAdapterError when they differ."""
    if shape != expected:
        raise InvalidAdapterError(
            f"Tensor {name!r} has shape {list(shape)}, but {why} asks for {list(expected)}: the "
            "weights belong to another config or another base, or were not saved whole."
        )


def _split(name: str, parameters: Iterable[str]) -> tuple[str, str]:
    for parameter in parameters:
        if name.startswith(_PREFIX) and name.endswith(f".{parameter}"):
            return name[len(_PREFIX) : -len(parameter) - 1], parameter
    known = ", ".join(parameters)
    reason = (
        _NO_EMBEDDINGS
        if any(part in _EMBEDDINGS for part in name.split("."))
        else f"only tensors named {_PREFIX}<module>.<parameter> are understood, with the parameter "
        f"{known}: save the adapter again with these alone"
    )
    raise InvalidAdapterError(f"Tensor {name[:200]!r} cannot be served; {reason}.")
