"""Checkpoints read lazily: one tensor, or some rows of one, in memory at a time; never a model.

Knows directories and Hub ids, safetensors (one file, or shards with an index), and pickled `.bin` files when asked.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from torch import Tensor

from ..errors import CheckpointError, HoEError
from ..files import ADAPTER_WEIGHTS, read_json
from .weight_files import FILE_ERRORS, SAFETENSORS, SAFETENSORS_FILE, WeightFile, open_file

PathOrHubId = str | os.PathLike[str]  # a directory, a Hub id, or `id@revision`

PEFT_PREFIX = "base_model.model."  # before the names of modules in the files of an adapter
_SAFETENSORS = (SAFETENSORS_FILE, ADAPTER_WEIGHTS)
_PICKLES = ("pytorch_model.bin", "adapter_model.bin")
_SETTINGS_PATTERNS = ["*.json", "README.md"]
_SAFETENSORS_PATTERNS = [SAFETENSORS_FILE, "model-*.safetensors", ADAPTER_WEIGHTS]
_PICKLE_PATTERNS = ["pytorch_model*.bin", "adapter_model.bin"]

# What can be subtracted as it stands. Integer and 8-bit float weights need the scales of their quantiser.
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def fetch(
    source: PathOrHubId,
    *,
    weights: bool,
    allow_pickle: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """The directory of a checkpoint: `source` itself, or a snapshot of the Hub repository of that name.

    Args:
        source: a directory, a Hub id, or `id@revision`.
        weights: whether the weights are needed, or only the JSON files.
        allow_pickle: whether `.bin` files may be fetched too.
        revision: branch, tag or commit, where `source` names none.
        token: the Hub's access token; default the one that is logged in.

    Raises:
        CheckpointError: `source` is neither a directory nor a repository that can be fetched.
    """
    if not isinstance(source, (str, os.PathLike)) or not os.fspath(
        source
    ):  # an empty path would be the current directory
        raise CheckpointError(
            f"the place of a model is {source!r}; give a checkpoint's directory or a Hub id", value=source
        )
    path = Path(source)
    if path.is_dir():
        return path
    if path.is_absolute() or path.exists() or str(source).startswith((".", "~")):
        raise CheckpointError(
            f"{str(source)!r} is not a directory; give a checkpoint's directory or a Hub id",
            value=str(source), path=source,
        )  # fmt: skip
    patterns = _SETTINGS_PATTERNS + (_SAFETENSORS_PATTERNS if weights else [])
    patterns += _PICKLE_PATTERNS if weights and allow_pickle else []
    name, _, own_revision = str(source).partition("@")
    try:
        return Path(snapshot_download(name, revision=own_revision or revision, token=token, allow_patterns=patterns))
    except Exception as error:  # the Hub client raises its own, the HTTP library's and the system's errors
        raise CheckpointError(
            f"{str(source)!r} is neither a directory nor a Hub repository that could be fetched "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'})",
            value=str(source),
        ) from error


class Checkpoint:
    """The tensors of one directory, by the names that its files give them.

    Args:
        directory: where the files are.
        label: how errors call this checkpoint, such as "policy 'rich'".
        allow_pickle: whether pickled files may be read (with `weights_only=True`): `.bin` files where there is no
            safetensors file, and whatever else than safetensors an index names.
        open_shard: how a file is opened by its place.

    Raises:
        CheckpointError: there are no weights, or a file is truncated, missing, of another format or elsewhere.
    """

    def __init__(
        self,
        directory: Path,
        label: str,
        *,
        allow_pickle: bool = False,
        open_shard: Callable[[Path], WeightFile] = open_file,
    ) -> None:
        self.directory, self.label = directory, label
        path, weight_map = _find_weights(directory, label, allow_pickle)
        shards = [path] if weight_map is None else sorted(set(weight_map.values()))
        self._files: dict[Path, WeightFile] = {shard: self._open(shard, open_shard) for shard in shards}
        found = {name: shard for shard, file in self._files.items() for name in file.names}
        self._where = {**found, **(weight_map or {})}
        self._check_index(path)

    def _check_index(self, index: Path) -> None:
        """Refuse an index that promises tensors which a shard does not have."""
        for shard, file in self._files.items():
            missing = {name for name, place in self._where.items() if place == shard} - set(file.names)
            if missing:
                raise CheckpointError(
                    f"{self.label}: {shard} lacks {len(missing)} of the tensors that {index} says it has, such as "
                    f"{min(missing)!r}; download or save the checkpoint again",
                    path=shard,
                    tensor=min(missing),
                )

    def _open(self, path: Path, open_shard: Callable[[Path], WeightFile]) -> WeightFile:
        try:
            return open_shard(path)
        except HoEError:
            raise
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{self.label}: {path} is missing, though the index of the shards names it", path=path
            ) from error
        except FILE_ERRORS as error:
            raise CheckpointError(
                f"{self.label}: {path} is not a readable {path.suffix} file ({error}); it may be truncated, or of "
                "another format. Download or save it again",
                path=path,
            ) from error

    @property
    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it."""
        return self._files[self._where[name]].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of one tensor, without reading it.

        Raises:
            CheckpointError: torch has no such type.
        """
        try:
            return self._files[self._where[name]].dtype(name)
        except ValueError as error:
            raise CheckpointError(f"{self.label}: {error}", path=self._where[name], tensor=name) from error

    def tensor(self, name: str) -> Tensor:
        """One tensor, read now; errors as for `rows`."""
        shape = self.shape(name)
        return self.rows(name, 0, shape[0] if shape else 1)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of the first dimension of one tensor, read now; a scalar is returned whole.

        Raises:
            CheckpointError: the file cannot be read, or ends before the tensor does.
        """
        try:
            return self._files[self._where[name]].rows(name, start, stop)
        except HoEError:
            raise
        except FILE_ERRORS as error:
            raise CheckpointError(
                f"{self.label}: tensor {name!r} cannot be read ({error})", path=self._where[name], tensor=name
            ) from error

    def expect(self, name: str) -> None:
        """Say that a tensor will be read soon."""
        self._files[self._where[name]].expect(name)

    def shard(self, name: str) -> str | None:
        """The file of a tensor where that is fetched to be read; None where it is on this disk to stay."""
        path = self._where[name]
        return path.name if self._files[path].remote else None

    def peek(self, name: str, start: int, stop: int) -> Tensor | None:
        """As `rows`, without fetching more than that; None where it cannot be done."""
        return self._files[self._where[name]].peek(name, start, stop)

    def here(self, name: str) -> bool:
        """Whether a tensor can be read without fetching."""
        return self._files[self._where[name]].here(name)

    def bring(self, name: str) -> None:
        """Have the file of a tensor on this disk."""
        self._files[self._where[name]].bring()


def _find_weights(directory: Path, label: str, allow_pickle: bool) -> tuple[Path, dict[str, Path] | None]:
    """The file of the weights; or the index of the shards, and the shard of each tensor."""
    for name in _SAFETENSORS if not allow_pickle else (*_SAFETENSORS, *_PICKLES):
        if (directory / name).is_file():
            return directory / name, None
        index = directory / f"{name}.index.json"
        if index.is_file():
            return index, read_index(index, label, allow_pickle)
    pickles = sorted(path.name for path in directory.glob("*.bin"))
    if pickles and not allow_pickle:
        raise CheckpointError(
            f"{label}: {directory} holds only pickled weights {pickles}; convert them to safetensors, or pass "
            "Loading(allow_pickle=True) (--allow-pickle) to read them with weights_only",
            path=directory,
        )
    raise CheckpointError(
        f"{label}: {directory} holds no weights; expected {' or '.join(_SAFETENSORS)} or shards", path=directory
    )


def read_index(index: Path, label: str, allow_pickle: bool) -> dict[str, Path]:
    """The shard of each tensor. An index may be a stranger's: it names files beside it only, and no pickle unasked."""
    weight_map = read_json(index).get("weight_map")
    if not weight_map or not isinstance(weight_map, dict) or not all(isinstance(s, str) for s in weight_map.values()):
        raise CheckpointError(
            f"{label}: {index} has no weight_map of tensors to files; download or save it again", path=index
        )
    for shard in sorted(set(weight_map.values())):
        # By the text alone: in the Hub's cache the files themselves are links that lead out of the folder.
        if not shard or {"/", "\\", ":"} & set(shard) or shard == "..":
            raise CheckpointError(
                f"{label}: {index} names the file {shard!r}, but an index may name files in its own folder only",
                path=index,
            )
        if not shard.endswith(SAFETENSORS) and not allow_pickle:
            raise CheckpointError(
                f"{label}: {index} names the file {shard!r}, which would be unpickled; convert it to safetensors, or "
                "pass Loading(allow_pickle=True) (--allow-pickle) to read it with weights_only",
                path=index,
            )
    return {name: index.parent / shard for name, shard in weight_map.items()}
