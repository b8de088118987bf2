"""What an upload may hold: an adapter's two files, and what trainers write beside them.

A file is judged by its name and by how it begins. Names are compared, never joined to a path:
what is kept gets a name of ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.reference import CONFIG_FILE, WEIGHTS_FILE

# How much of a file's start is looked at. The mark of a tar archive lies at byte 257.
HEAD_BYTES = 512

MAX_NAME_LENGTH = 255

KEPT = (CONFIG_FILE, WEIGHTS_FILE)

# A server has no use for them: the tokenizer and the chat template are the base model's.
COMPANIONS = (
    "*.jinja",
    "*.md",
    "*.txt",
    "._*",
    ".DS_Store",
    ".gitattributes",
    ".gitignore",
    "LICENSE",
    "added_tokens.json",
    "all_results.json",
    "chat_template.json",
    "eval_results.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer*.json",
    "tokenizer.model",
    "train_results.json",
    "trainer_state.json",
    "training_args.json",
    "vocab.json",
)
# macOS's archives keep its attributes of files in a folder of this name.
_MACOS_FOLDER = "__MACOSX"

_ZIP, _GZIP, _TAR = b"PK\x03\x04", b"\x1f\x8b", b"ustar"
_EMPTY_ZIP = b"PK\x05\x06"
_TAR_MARK_AT = 257
# Archives that are only recognised.
_OTHER_ARCHIVES: Mapping[bytes, str] = {
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"7z\xbc\xaf": "7z",
    b"Rar!": "rar",
    b"\x28\xb5\x2f\xfd": "zstd",
}

_NO_PICKLES = (
    "is a pickle, which can run code when read, and is never opened: leave it out, and save "
    "weights with `save_pretrained(..., safe_serialization=True)`"
)


class Contents:
    """Takes an upload's files one after the other, and says where each is kept, if at all."""

    def __init__(self, folder: Path) -> None:
        """folder: where the adapter's two files go; empty."""
        self._folder = folder
        self._common: str | None = None
        self._names: set[str] = set()
        self.ignored: list[str] = []

    def admit(self, name: str, head: bytes) -> Path | None:
        """Where to write the file, or None when it is not kept; it is in `ignored` then.

        name: the client's. head: the file's first HEAD_BYTES. Raises InvalidAdapterError.
        """
        parts = split_name(name)
        base = parts[-1]
        if base != WEIGHTS_FILE:  # its header is checked, and may begin with any bytes
            _check_head(name, head)
        if parts[0] == _MACOS_FOLDER:
            self.ignored.append(name)
            return None
        self._check_place(name, "/".join(parts[:-1]), base)
        if base in KEPT:
            return self._folder / KEPT[KEPT.index(base)]
        if not any(fnmatchcase(base, pattern) for pattern in COMPANIONS):
            raise InvalidAdapterError(
                f"{name!r} is no file that an adapter is known to have: leave it out, and send "
                f"{CONFIG_FILE} and {WEIGHTS_FILE}."
            )
        self.ignored.append(name)
        return None

    def check_complete(self) -> None:
        """Raises InvalidAdapterError when one of the two files has not come."""
        for name in KEPT:
            if name not in self._names:
                raise InvalidAdapterError(
                    f"{name} is missing: send it with the other files, as "
                    "`save_pretrained(..., safe_serialization=True)` writes it."
                )

    def _check_place(self, name: str, folder: str, base: str) -> None:
        if self._common is None:
            self._common = folder
        if folder != self._common:
            raise InvalidAdapterError(
                f"{name!r} lies in another folder than the files before it: send the files of one "
                "adapter, from one folder."
            )
        if base.casefold() in self._names:
            raise InvalidAdapterError(
                f"{name!r} is there twice (capitals do not count): send each file once."
            )
        self._names.add(base.casefold())


def split_name(name: str) -> tuple[str, ...]:
    """A client's name of a file, cut at the slashes. Raises InvalidAdapterError for a name that
    could lead anywhere, or that cannot be shown."""
    parts = tuple(part for part in name.split("/") if part != ".")
    if (
        len(name) > MAX_NAME_LENGTH
        or not name.isprintable()
        or any(sign in name for sign in "\\:")
        or any(part in ("", "..") for part in parts)
        or not parts
    ):
        raise InvalidAdapterError(
            f"The file name {name[:200]!r} is not accepted: use a plain name of up to "
            f"{MAX_NAME_LENGTH} characters, not absolute, without `..`, backslashes and colons."
        )
    return parts


def archive_kind(head: bytes) -> str | None:
    """What kind of archive begins like this: "zip", "gzip" and "tar" are unpacked, others are only
    recognised. None for what is no archive."""
    if head.startswith((_ZIP, _EMPTY_ZIP)):
        return "zip"
    if head.startswith(_GZIP):
        return "gzip"
    if head.startswith(_TAR, _TAR_MARK_AT):
        return "tar"
    return next((kind for mark, kind in _OTHER_ARCHIVES.items() if head.startswith(mark)), None)


def is_pickle(head: bytes) -> bool:
    """Whether a file begins as `pickle` or `torch.save` write it."""
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return True
    # torch.save writes a zip archive, its first file `<name>/data.pkl`.
    name_length = int.from_bytes(head[26:28], "little")
    return head.startswith(_ZIP) and head[30 : 30 + name_length].endswith(b"data.pkl")


def _check_head(name: str, head: bytes) -> None:
    if is_pickle(head):
        raise InvalidAdapterError(f"{name!r} {_NO_PICKLES}.")
    if (kind := archive_kind(head)) is not None:
        raise InvalidAdapterError(
            f"{name!r} is an archive ({kind}) among other files: send one .zip or .tar.gz with the "
            "adapter's files in it and nothing else, or the files themselves."
        )
