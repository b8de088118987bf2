"""Which modules of the base a PEFT config means, for files that do not say it themselves."""

from __future__ import annotations

import reprlib

from polydelta.adapters_store.base_layout import HEAD, BaseLayout
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.peft_config import Config
from polydelta.adapters_store.formats.peft_patterns import ends_in
from polydelta.adapters_store.reference import CONFIG_FILE


class Targets:
    """Linear layers by the ends of their paths, `layers_to_transform` narrowing them down.

    A regular expression is refused: it comes with the adapter and may take any time.
    """

    def __init__(self, config: Config) -> None:
        """Raises InvalidAdapterError for what is not understood."""
        self.names = _names(config.get("target_modules"))
        self._layers = _layers(config.get("layers_to_transform"))
        pattern = config.get("layers_pattern") or "layers"
        if pattern not in ("layers", ["layers"]):
            raise InvalidAdapterError(
                f"{CONFIG_FILE}: layers_pattern is {reprlib.repr(pattern)}, but the base's decoder "
                "layers are under 'layers': leave it out."
            )

    def shapes(self, layout: BaseLayout) -> dict[str, tuple[int, int]]:
        """Full path -> weight shape `(out, in)`, in the base's order. Raises InvalidAdapterError
        when there is none."""
        full, endings = set(self.names), {f".{name}" for name in self.names}
        prefixes = tuple(
            layout.module_name(layer, "")
            for layer in range(layout.num_layers)
            if self._layers is None or layer in self._layers
        )
        targets = {
            module: layout.target_shapes[module]
            for module in (*layout.module_shapes, HEAD)
            # A full path counts whatever the layer.
            if module in full or (module.startswith(prefixes) and ends_in(module, endings))
        }
        if not targets:
            raise InvalidAdapterError(
                f"{CONFIG_FILE}: target_modules is {reprlib.repr(self.names)}, but the base has no "
                "such linear layers: load the adapter over the base that it was trained on."
            )
        return targets


def _names(value: object) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise InvalidAdapterError(
            f"{CONFIG_FILE}: target_modules is {reprlib.repr(value)}, but must be a list of the "
            "modules' names, as the file does not have them: write it as a list, or save the "
            "adapter again with save_indices=True."
        )
    return value


def _layers(value: object) -> set[int] | None:
    """None for all of them."""
    layers = [value] if isinstance(value, int) else value
    if layers is None or layers == []:
        return None
    if not isinstance(layers, list) or not all(
        isinstance(layer, int) and not isinstance(layer, bool) for layer in layers
    ):
        raise InvalidAdapterError(
            f"{CONFIG_FILE}: layers_to_transform is {reprlib.repr(value)}, but must be a number or "
            "a list of numbers."
        )
    return set(layers)
