"""Sharded weights on the Hub, of which one file at a time is on this disk: fetched, used, and deleted before the next one.

Names, types and shapes are read from the headers alone, before anything is fetched. What a build looks at more than once is
small: some rows of every tensor, and norms. That is kept when its file goes, and so a pass over the weights fetches each once.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
from http import HTTPStatus
from pathlib import Path
from typing import Any, NoReturn

import torch
from huggingface_hub import HfApi, constants, get_session, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined, unused-ignore]
from safetensors.torch import save_file
from torch import Tensor

from ..base_sample import positions
from ..errors import CheckpointError
from ..unfinished import InterruptedWork
from .pieces import sampled
from .weight_files import FILE_ERRORS, Place, SafetensorsFile, WeightFile, fill, open_file

_FILES, _ROWS = "files", "rows"  # folders: a cache of the Hub client's, of one file; what is kept of all files
_GONE = (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError)
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


class HubShards:
    """The shards of one repository. Other processes, which get a copy, read them and fetch nothing.

    Args:
        name: of the repository.
        commit: the commit that all files are taken from.
        label: how errors call the model.
        token: for the Hub.
    """

    def __init__(self, name: str, commit: str, label: str, token: str | bool | None) -> None:
        self._name, self._commit, self._label, self._token = name, commit, label, token
        self._folder: Path | None = None
        self._fetches = True
        self._kept: tuple[str, SafetensorsFile] | None = None  # opened last

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_fetches": False, "_token": None, "_kept": None}

    def put_in(self, folder: Path) -> None:
        """Say where a shard, and what is kept of all, are put; what an earlier process left there is used."""
        self._folder = folder

    def open(self, path: Path) -> WeightFile:
        """A shard by its place in the Hub's cache: from there where the cache has it, else to be fetched when it is read.

        Raises:
            CheckpointError: its header cannot be fetched.
        """
        if path.is_file():
            return open_file(path)
        try:
            header = HfApi().parse_safetensors_file_metadata(
                self._name, path.name, revision=self._commit, token=self._token
            )
        except _GONE as error:
            self._refuse(path.name, error)
        except Exception as error:  # the Hub client raises its own, the HTTP library's and the system's errors
            raise CheckpointError(
                f"{self._label}: the header of {path.name} in {self._name!r} could not be fetched ({_short(error)})",
                path=path,
            ) from error
        places = {
            name: Place(str(info.dtype), tuple(info.shape), *info.data_offsets) for name, info in header.tensors.items()
        }
        return HubShard(self, path.name, places)

    def part(self, shard: str, start: int, count: int) -> bytes | None:
        """Some bytes of a shard from the Hub; None where it sends no parts of files, or nothing."""
        url = hf_hub_url(self._name, shard, revision=self._commit)
        headers = {**build_hf_headers(token=self._token), "range": f"bytes={start}-{start + count - 1}"}
        try:
            response = get_session().get(url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
        except Exception:  # of the HTTP library, which is another in older clients
            return None
        return response.content if response.status_code == HTTPStatus.PARTIAL_CONTENT else None

    def path(self, shard: str) -> Path | None:
        """Where a shard is; None where it is not on this disk."""
        if self._folder is None:
            return None
        repository = self._folder / _FILES / repo_folder_name(repo_id=self._name, repo_type="model")
        path = repository / "snapshots" / self._commit / shard
        return path if path.is_file() else None

    def bring(self, shard: str) -> None:
        """Have a shard on this disk, after the one before was deleted.

        Raises:
            CheckpointError: it is gone, damaged, or there is no room for it.
            InterruptedWork: the connection broke; the same build goes on.
        """
        if self._folder is None or not self._fetches:
            raise OSError(f"{shard} is not on this disk")
        if self.path(shard) is None:
            shutil.rmtree(self._folder / _FILES, ignore_errors=True)
            self._fetch(shard)
        if not (self._folder / _ROWS / shard).is_file():
            self._keep_rows(shard)

    def _fetch(self, shard: str) -> None:
        folder = Path(str(self._folder)) / _FILES
        try:
            hf_hub_download(self._name, shard, revision=self._commit, token=self._token, cache_dir=folder)
        except LocalEntryNotFoundError as error:  # the Hub could not be asked
            self._interrupt(shard, error)
        except _GONE as error:
            self._refuse(shard, error)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _DISK:
                raise CheckpointError(
                    f"{self._label}: {shard} cannot be put in {str(folder)!r}: {error}", path=folder / shard
                ) from error
            self._interrupt(shard, error)

    def _refuse(self, shard: str, error: Exception) -> NoReturn:
        raise CheckpointError(
            f"{self._label}: {shard} is missing in {self._name!r} at {self._commit[:8]}, though the index names it, "
            f"or it may not be read ({_short(error)})",
            path=Path(shard),
        ) from error

    def _interrupt(self, shard: str, error: Exception) -> NoReturn:
        raise InterruptedWork(
            f"{self._label}: {shard} of {self._name!r} could not be fetched ({_short(error)}); the same command goes on where "
            "this one stopped",
            argument=self._label,
            value=shard,
        ) from error

    def _keep_rows(self, shard: str) -> None:
        """Copy the rows that are looked at again."""
        folder, path = Path(str(self._folder)) / _ROWS, self.path(shard)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = SafetensorsFile(Path(str(path)))
            kept = {name: _rows(file, name) for name in file.names}
            save_file(kept, folder / f"{shard}.new")
        except FILE_ERRORS as error:
            raise CheckpointError(
                f"{self._label}: {shard} as it was fetched from {self._name!r} is damaged, or there is no room beside it "
                f"({error})",
                path=path,
            ) from error
        os.replace(folder / f"{shard}.new", folder / shard)

    def kept(self, shard: str) -> SafetensorsFile | None:
        """The rows of a shard that were kept; None where it was not here yet."""
        if self._kept is None or self._kept[0] != shard:
            path = None if self._folder is None else self._folder / _ROWS / shard
            if path is None or not path.is_file():
                return None
            self._kept = (shard, SafetensorsFile(path))
        return self._kept[1]


class HubShard(SafetensorsFile):
    """One shard. A read brings it here, unless what is read was kept."""

    remote = True

    def __init__(self, shards: HubShards, name: str, places: dict[str, Place]) -> None:
        self._shards, self._name, self._places = shards, name, places  # offsets from the end of the header

    def __getstate__(self) -> dict[str, Any]:
        """For another process."""
        return vars(self)

    def here(self, name: str) -> bool:
        """Whether a tensor can be read whole without fetching."""
        return self._shards.path(self._name) is not None or self._kept(name, 0, self._length(name)) is not None

    def bring(self) -> None:
        """Have the file on this disk."""
        self._shards.bring(self._name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows, read now."""
        if self._shards.path(self._name) is None:
            kept = self._kept(name, start, min(stop, self._length(name)))
            if kept is not None:
                return kept
            self.bring()
        return super().rows(name, start, stop)

    def expect(self, name: str) -> None:
        """Nothing is read ahead."""

    def peek(self, name: str, start: int, stop: int) -> Tensor | None:
        """Some rows from the Hub, by themselves."""
        length = self._shards.part(self._name, 0, 8)
        if length is None:
            return None
        shape, dtype = self.shape(name), self.dtype(name)
        rows, width = max(0, min(stop, shape[0]) - start), math.prod(shape[1:]) * dtype.itemsize
        begin = 8 + int.from_bytes(length, "little") + self._places[name].begin + start * width
        content = self._shards.part(self._name, begin, rows * width)
        if content is None or len(content) != rows * width:
            return None
        return torch.frombuffer(bytearray(content), dtype=dtype).reshape(rows, *shape[1:])

    def _length(self, name: str) -> int:
        shape = self.shape(name)
        return shape[0] if shape else 1

    def _kept(self, name: str, start: int, stop: int) -> Tensor | None:
        """Rows from what was kept; None where some were not."""
        kept, shape = self._shards.kept(self._name), self.shape(name)
        if kept is None:
            return None
        if len(shape) < 2:
            return kept.rows(name, start, stop)
        places = {row: i for i, row in enumerate(_kept_rows(shape))}
        if any(row not in places for row in range(start, stop)):
            return None
        return torch.cat([kept.rows(name, places[row], places[row] + 1) for row in range(start, stop)])

    def _read(self, target: Tensor, offset: int) -> None:
        """Fill `target` `(bytes,)`; the file is closed again, so that deleting it frees the disk."""
        with Path(str(self._shards.path(self._name))).open("rb", buffering=0) as file:
            file.seek(8 + int.from_bytes(file.read(8), "little") + offset)
            fill(target, file)


def _kept_rows(shape: tuple[int, ...]) -> list[int]:
    """The rows of a matrix that a build looks at more than once: those that are sampled and hashed, and the base's record."""
    known = [row for row, _ in positions(shape)]
    return sorted({*sampled(shape[0]), *known}) if shape[0] else []


def _rows(file: SafetensorsFile, name: str) -> Tensor:
    shape = file.shape(name)
    if len(shape) < 2:
        return file.rows(name, 0, shape[0] if shape else 1)
    rows = [file.rows(name, row, row + 1) for row in _kept_rows(shape)]
    return torch.cat(rows) if rows else file.rows(name, 0, 0)


def _short(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"
