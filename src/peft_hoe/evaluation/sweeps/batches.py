"""Completing every prompt at every preference with one method, batch by batch, so that nothing is done twice.

Shapes: K preferences, P prompts, T texts for each prompt, N objectives.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ...errors import HoEError
from ...generation.settings import seeded
from ...preference import FloatArray
from ...rewards.calls import settled
from .generations import GenerationLog, Row, row_key

Texts = list[list[list[str | None]]]  # (K, P, T), None where there is no completion


@dataclass
class BatchedMethod:
    """A method that completes prompts batch by batch, with everything else that decides what it writes.

    Attributes:
        method: see `evaluation.methods`.
        name: of the method, in logs and bars.
        texts: T.
        seed: of sampling.
        batch_size: rows of a call.
        progress: show a bar.
        overwrite: begin anew where a log holds another sweep's texts.
        decoding: the method's, plain JSON.
        drawing: what sampled texts depend on besides, plain JSON.
        settings: what else the method says that its texts depend on, plain JSON.
    """

    method: Any
    name: str
    texts: int
    seed: int
    batch_size: int
    progress: bool
    overwrite: bool

    def __post_init__(self) -> None:
        if self.texts < 1 or self.batch_size < 1:
            raise HoEError(
                f"texts is {self.texts} and batch_size {self.batch_size}; both must be at least 1",
                argument="texts" if self.texts < 1 else "batch_size",
                value=self.texts if self.texts < 1 else self.batch_size,
                allowed="at least 1",
            )
        self.decoding = dict(getattr(self.method, "decoding", {}))
        self.sampled = bool(self.decoding.get("do_sample", False))
        if self.texts > 1 and self.decoding.get("do_sample") is False:
            raise HoEError(
                f"texts is {self.texts}, but greedy texts are all the same; sample (Decoding(do_sample=True)), or texts=1",
                argument="texts", value=self.texts, allowed=1,
            )  # fmt: skip
        self.drawing = {"texts": self.texts}
        if self.sampled:
            self.drawing |= {"seed": self.seed, "batch_size": self.batch_size}
        self.settings = dict(getattr(self.method, "settings", {}))
        tell = getattr(self.method, "fingerprint", None)
        self.fingerprint = tell() if callable(tell) else None

    def complete(self, prompts: list[Any], points: FloatArray, objectives: Sequence[str], path: Path | None) -> Texts:
        """Texts `(K, P, T)`."""
        if not prompts:
            raise HoEError(
                "there are no prompts to complete; give at least one",
                argument="prompts", value=prompts, allowed="at least one",
            )  # fmt: skip
        digest = hashlib.sha256(json.dumps(prompts, default=str).encode()).hexdigest()
        header = {
            "name": self.name, "fingerprint": self.fingerprint, "decoding": self.decoding, "drawing": self.drawing,
            "settings": self.settings, "objectives": list(objectives),
            "preferences": points.tolist(), "prompts_sha256": digest, "prompts": prompts,
        }  # fmt: skip
        log = None if path is None else GenerationLog(path, header, overwrite=self.overwrite)
        done = {} if log is None else dict(log.done)
        rows = [
            {"preference": point, "prompt_id": p, "text": text, "run": 0}
            for p in _by_length(prompts)  # neighbours of like length need little padding
            for text in range(self.texts)
            for point in points.tolist()
        ]
        found = sum(row_key(row) in done for row in rows)
        with tqdm(total=len(rows), initial=found, desc=f"sweep {self.name}", disable=not self.progress) as bar:
            for number, batch in self._batches(rows, done):
                with seeded(self.seed + 1_000_003 * number):
                    completed = self._call(batch, prompts)
                for row, completion in zip(batch, completed, strict=True):
                    row["completion"] = completion
                if log is not None:
                    log.append([row for row in batch if row_key(row) not in done])
                done |= {row_key(row): row["completion"] for row in batch if row_key(row) not in done}
                bar.update(len(done) - bar.n)

        def text_of(point: list[float], p: int, text: int) -> str:
            return done[row_key({"preference": point, "prompt_id": p, "text": text, "run": 0})]

        places = range(len(prompts))
        return [[[text_of(point, p, t) for t in range(self.texts)] for p in places] for point in points.tolist()]

    def _batches(self, rows: list[Row], done: Mapping[Any, str]) -> Iterator[tuple[int, list[Row]]]:
        """Numbered batches. Sampled ones are cut the same in every run, so that resuming changes no random number."""
        if self.sampled:
            if not getattr(self.method, "mixes_rows", True):
                rows = sorted(rows, key=lambda row: row["preference"])
                groups = [list(group) for _, group in itertools.groupby(rows, key=lambda row: row["preference"])]
            else:
                groups = [rows]
            cut = [
                group[start : start + self.batch_size]
                for group in groups
                for start in range(0, len(group), self.batch_size)
            ]
            yield from ((i, batch) for i, batch in enumerate(cut) if any(row_key(row) not in done for row in batch))
            return
        left, number = [row for row in rows if row_key(row) not in done], 0
        while left:
            batch = left[: self.batch_size]
            if not getattr(self.method, "mixes_rows", True):
                batch = [row for row in left if row["preference"] == left[0]["preference"]][: self.batch_size]
            yield number, batch
            taken = set(map(id, batch))
            left, number = [row for row in left if id(row) not in taken], number + 1

    def _call(self, batch: list[Row], prompts: list[Any]) -> list[str]:
        texts = settled(
            self.method([prompts[row["prompt_id"]] for row in batch], np.asarray([row["preference"] for row in batch]))
        )
        listed = isinstance(texts, Sequence) and not isinstance(texts, str)
        if not listed or len(texts) != len(batch) or not all(isinstance(text, str) for text in texts):
            raise HoEError(
                f"the method {self.name!r} returned {str(texts)[:100]!r} for {len(batch)} prompts; it must return "
                f"{len(batch)} texts",
                argument="method", value=texts, allowed=f"{len(batch)} texts",
            )  # fmt: skip
        return list(texts)


def _by_length(prompts: list[Any]) -> list[int]:
    return sorted(range(len(prompts)), key=lambda p: len(str(prompts[p])), reverse=True)
