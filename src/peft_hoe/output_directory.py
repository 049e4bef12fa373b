"""Directories that are written whole: which places will do, and files that appear there together or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import ModelCard
from safetensors import SafetensorError

from .errors import CheckpointError
from .files import ADAPTER_CONFIG, read_json
from .unfinished import PREFIX, RESUMABLE, Unfinished, undo_interrupted_moves

CARD = "README.md"
_IGNORED = (PREFIX, "lost+found")  # left by a killed build; the root of a volume has it


def check_output(
    output: Path,
    overwrite: bool | None,
    sources: Sequence[Path] = (),
    *,
    replaces: str = "HOE",
    names: Sequence[str] = (),
) -> None:
    """Refuse, before any work, a place where a directory cannot be written.

    A new directory, an empty one, a link to one and a mount point will do. One that holds something must hold an adapter
    of the right type, and is written only when told to; never where it is a source.

    Args:
        output: the directory.
        overwrite: whether an adapter may be replaced; None where nothing ever is, so that there is no such option.
        sources: directories that are read.
        replaces: PEFT's type of the adapter that may be replaced.
        names: of the files that will be written.

    Raises:
        CheckpointError: what is there, and how to go on.
    """
    real = resolved(output)
    try:
        if not real.exists():
            _check_parent(output, real)
            return
        if not real.is_dir():
            raise CheckpointError(f"output directory {str(output)!r} is a file; give another path", path=output)
        if not os.access(real, os.W_OK | os.X_OK):
            raise CheckpointError(
                f"output directory {str(output)!r} cannot be written to; give another path", path=output
            )
        undo_interrupted_moves(real)
        if all(entry.name.startswith(_IGNORED) for entry in real.iterdir()):
            return
        if any(real.samefile(source) for source in sources):
            raise CheckpointError(
                f"output directory {str(output)!r} is a source of this build; give another path", path=output
            )
    except OSError as error:
        raise CheckpointError(
            f"output directory {str(output)!r} cannot be used: {error}; give another path", path=output
        ) from error
    if overwrite is None:
        raise CheckpointError(f"output directory {str(output)!r} is not empty; give a new or an empty one", path=output)
    if not overwrite:
        raise CheckpointError(
            f"output directory {str(output)!r} is not empty; give another path, or pass overwrite=True (--overwrite)",
            argument="overwrite", value=False, path=output,
        )  # fmt: skip
    _check_replaceable(output, real, replaces, names)


def resolved(output: Path) -> Path:
    """The directory that a path means, through links, `.` and `..`; it need not exist.

    Raises:
        CheckpointError: the path leads nowhere, as a circle of links does.
    """
    try:
        return output.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: a circle of links before Python 3.13
        raise CheckpointError(
            f"output directory {str(output)!r} leads nowhere ({error}); give another path", path=output
        ) from error


def _check_parent(output: Path, real: Path) -> None:
    """Refuse a new directory whose nearest existing parent is a file, or cannot be written to."""
    parent = next(path for path in real.parents if path.exists())
    if not parent.is_dir():
        raise CheckpointError(
            f"output directory {str(output)!r} lies in the file {str(parent)!r}; give another path", path=output
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointError(
            f"output directory {str(output)!r} cannot be made: {str(parent)!r} is not writable; give another path",
            path=output,
        )


def _check_replaceable(output: Path, real: Path, replaces: str, names: Sequence[str]) -> None:
    """Refuse a directory without an adapter of the type, or in which a file to write cannot take its place."""
    kind = read_json(real / ADAPTER_CONFIG).get("peft_type") if (real / ADAPTER_CONFIG).is_file() else None
    if kind != replaces:
        held = f"an adapter of type {kind!r}, not {replaces!r}" if kind else "no adapter"
        raise CheckpointError(
            f"output directory {str(output)!r} holds {held}, so it will not be overwritten; give another path",
            value=kind, allowed=[replaces], path=output,
        )  # fmt: skip
    for name in names:
        if (real / name).is_dir():
            raise CheckpointError(
                f"output directory {str(output)!r} has a directory {name!r} where a file will be written; give another path",
                path=real / name,
            )
    if (real / CARD).is_file():
        try:
            ModelCard.load(real / CARD)
        except Exception as error:  # of the YAML library, of huggingface_hub, or of the text's encoding
            raise CheckpointError(
                f"{real / CARD} has a header that is no YAML ({error}); mend or remove it: it will be completed, not replaced",
                path=real / CARD,
            ) from error


@contextmanager
def complete_directory(output: Path) -> Iterator[Path]:
    """A directory to fill, whose files stand in `output` when the block ends well, and vanish when it does not.

    An output that does not exist yet appears in one step. In one that exists, only files of the names that were filled in
    are replaced, each with the old one kept until all are in place; the directory itself is never moved, so that it may
    be a mount point or the end of a link.

    Raises:
        CheckpointError: there is no room, or the place cannot be written to.
    """
    with resumable_directory(output, None) as building:
        yield building.files


@contextmanager
def resumable_directory(output: Path, key: str | None) -> Iterator[Unfinished]:
    """As `complete_directory`, but after a kill or an interruption the next call of the same key finds what was filled in.

    Args:
        output: the directory.
        key: says all that decides what is written.

    Raises:
        CheckpointError: as there; or another process is at the same work.
    """
    real = resolved(output)
    exists, building = real.is_dir(), _begun(output, real, key)
    interrupted = False
    try:
        if (real / CARD).is_file():
            shutil.copyfile(real / CARD, building.files / CARD)  # what else is written on it stays
        yield building
        with disk_errors(output):
            _open_to_others(building.files)
            if exists:
                building.move_in(real)
            else:
                building.rename(real)
    except BaseException as error:
        interrupted = key is not None and isinstance(error, RESUMABLE)
        raise
    finally:
        building.close(keep=interrupted)


@contextmanager
def scratch_directory(output: Path) -> Iterator[Path]:
    """A directory for work that comes before `output`, on its disk; after a kill the next work for that output removes it.

    Raises:
        CheckpointError: there is no room, or the place cannot be written to.
    """
    work = _begun(output, resolved(output), None)
    try:
        yield work.state
    finally:
        work.close()


def _begun(output: Path, real: Path, key: str | None) -> Unfinished:
    """A directory to fill, in `output` or beside it."""
    with disk_errors(output):
        if real.is_dir():
            return Unfinished(real, real.name, key)
        real.parent.mkdir(parents=True, exist_ok=True)
        return Unfinished(real.parent, real.name, key)


def _open_to_others(folder: Path) -> None:
    """Give files the permissions of new ones: temporary directories are private, and so are safetensors' files."""
    umask = os.umask(0)
    os.umask(umask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


@contextmanager
def disk_errors(output: Path) -> Iterator[None]:
    """What the system says about a full disk or a name that is too long, as an error of ours.

    Raises:
        CheckpointError: instead of an OSError or an error of safetensors.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"nothing can be written to {str(output)!r}: {error}", path=output) from error
