"""The stages of a build: measure the policies, make the modules, each going on from what an earlier process has done."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..config import HoEConfig
from ..errors import CheckpointError
from ..output_directory import disk_errors
from ..unfinished import Unfinished
from .adapter_files import AdapterWriter
from .architecture import LinearModule
from .build_inputs import BuildInputs
from .devices import device_name
from .journal import Journal
from .module_tensors import ModuleResult
from .module_work import ModuleWork
from .options import BuildOptions
from .policy_statistics import PolicyMeasurement, PolicyStatistics
from .processes import Processes
from .report import ModuleReport

_CHUNK = 8  # modules that are measured as one task, after which the state is saved
# By whether a policy changed the module
_WHY_EMPTY = {True: "pruning dropped all of its changes", False: "it is the same in the base and in all policies"}


@dataclass
class Built:
    """The report's part on each module, notes on modules without an expert, and statistics of the policies."""

    statistics: PolicyStatistics
    modules: dict[str, dict[str, ModuleReport]]
    notes: list[str]


def work_key(inputs: BuildInputs, options: BuildOptions, config: HoEConfig) -> str:
    """Everything that decides the bytes of an adapter: settings, experts, files by size and time, versions."""
    files = sorted(
        (str(path), path.stat().st_size, path.stat().st_mtime_ns)
        for directory in inputs.directories
        for path in directory.iterdir()
        if path.suffix in (".json", ".safetensors", ".bin")
    )
    what = {
        "given": inputs.given, "options": options.to_dict(), "config": config.to_dict(), "files": files,
        "targets": [asdict(target) for target in inputs.architecture.targets],
        "versions": [metadata.version("peft-hoe"), torch.__version__, device_name(options.device)],
    }  # fmt: skip
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()


class Build:
    """One build, up to the tensors of the adapter.

    Args:
        inputs: base and policies.
        options: the settings.
        config: of the adapter; its targets and ranks are filled in.
        place: where it grows.
        output: how errors call that.
        bar: shows how many modules are done.
    """

    def __init__(
        self,
        inputs: BuildInputs,
        options: BuildOptions,
        config: HoEConfig,
        place: Unfinished,
        output: Path,
        bar: tqdm[Any],
    ) -> None:
        self._inputs, self._options, self._config, self._bar = inputs, options, config, bar
        self._files, self._output = place.files, output
        self._journal = Journal(place.state)
        self._targets = inputs.architecture.targets
        self._linear = len(inputs.architecture.linear)  # how many of them are measured, the first ones

    def run(self) -> Built:
        """Write all tensors of the adapter; fills in the config's targets and ranks.

        Raises:
            CheckpointError: something cannot be read or written, or the policies changed nothing.
        """
        state = self._journal.measurement()
        measurement = PolicyMeasurement(self._inputs, self._options.pruning, state)
        work = ModuleWork(self._inputs, self._options, self._config, measurement.goes_first)
        with Processes(work, self._options.num_processes) as processes:
            if measurement.goes_first:
                self._bar.reset(total=self._linear + len(self._targets))
                self._measure(measurement, processes)
            else:
                self._bar.reset(total=len(self._targets))
            return self._make(measurement, processes)

    def _measure(self, measurement: PolicyMeasurement, processes: Processes) -> None:
        if not measurement.inside:
            self._pass(measurement, processes, "count")
            measurement.end_pass()
            self._save(measurement)
        else:
            self._bar.update(self._linear)
        if measurement.again:
            self._bar.reset(total=2 * self._linear + len(self._targets))
            self._bar.update(self._linear)
            self._pass(measurement, processes, "count_inside")

    def _pass(self, measurement: PolicyMeasurement, processes: Processes, method: str) -> None:
        """Show all modules that were not yet seen to the measurement."""
        self._bar.update(measurement.counted)
        for run in self._inputs.runs(range(measurement.counted, self._linear)):
            self._inputs.bring(run[0])
            chunks = [run[i : i + _CHUNK] for i in range(0, len(run), _CHUNK)]
            tasks = ((chunk, measurement.empty_searches()) for chunk in chunks)
            for chunk, found in zip(chunks, processes.map(method, tasks), strict=True):
                measurement.add_counted(len(chunk), *found)
                self._save(measurement)
                self._bar.update(len(chunk))
            self._compare_what_is_here(measurement)

    def _compare_what_is_here(self, measurement: PolicyMeasurement) -> None:
        """Before a fetched file is deleted, take from it what no module needs."""
        if self._inputs.shards:
            measurement.compare_what_is_here()

    def _save(self, measurement: PolicyMeasurement) -> None:
        with disk_errors(self._output):
            self._journal.save_measurement(measurement.state())

    def _make(self, measurement: PolicyMeasurement, processes: Processes) -> Built:
        dtype = self._options.dtype or self._inputs.dtype
        made = _Made(self._config, measurement)
        with AdapterWriter(self._files, self._output, self._inputs, self._config, dtype) as writer:
            self._take_again(writer, made)
            done = len(made.records)
            self._bar.update(done)
            for run in self._inputs.runs(range(done, len(self._targets))):
                self._inputs.bring(run[0])
                tasks = ((index, measurement.thresholds) for index in run)
                for index, result in zip(run, processes.map("make", tasks), strict=True):
                    self._add(made, writer, self._targets[index], result)
                self._compare_what_is_here(measurement)
            apart = {target.name for target in self._targets if target.apart}
            linear = [name for name in made.adapted if name not in apart]
            if not linear:
                raise CheckpointError(
                    f"policies {list(self._inputs.policies)} equal the base in every weight in scope; nothing can be built",
                    argument="policies", value=list(self._inputs.policies),
                )  # fmt: skip
            writer.finish()
        self._config.modules_to_save = sorted(self._inputs.architecture.heads) or None
        self._config.target_modules = set(linear)
        self._config.target_embeddings = [name for name in made.adapted if name in apart] or None
        statistics = measurement.finish(made.dropped())
        return Built(statistics, made.modules, [*statistics.notes, *made.notes])

    def _add(self, made: _Made, writer: AdapterWriter, target: LinearModule, result: ModuleResult) -> None:
        record = made.add(target.name, result)
        written = writer.add_module(target, result) if result.tensors else None
        with disk_errors(self._output):
            self._journal.add({**record, "written": written})
        self._bar.update()

    def _take_again(self, writer: AdapterWriter, made: _Made) -> None:
        """Take the modules that an earlier process made, as far as the file holds them."""
        for record in self._journal.modules():
            if record["written"] is not None and not writer.add_again(record["written"]):
                break
            made.take(record)
        writer.go_on()
        with disk_errors(self._output):
            self._journal.keep(made.records)


class _Made:
    """What is known of the modules that are made, in order; fills in the configuration's ranks."""

    def __init__(self, config: HoEConfig, measurement: PolicyMeasurement) -> None:
        self._measurement = measurement
        self._requested = [expert.r for expert in config.experts or []]
        self._pattern: dict[str, list[int]] = {}
        config.rank_pattern = self._pattern
        self.records: list[dict[str, Any]] = []
        self.modules: dict[str, dict[str, ModuleReport]] = {}
        self.notes: list[str] = []
        self.adapted: list[str] = []

    def add(self, module: str, result: ModuleResult) -> dict[str, Any]:
        """Take a result; returns the record of it, in JSON types."""
        rows = {name: asdict(row) for name, row in result.rows.items()}
        record: dict[str, Any] = {
            "module": module, "ranks": result.ranks, "rows": rows, "dropped": result.dropped,
            "comparison": result.comparison,
        }  # fmt: skip
        self.take(record)
        return record

    def take(self, record: dict[str, Any]) -> None:
        """Take a record."""
        module, ranks = record["module"], record["ranks"]
        self.records.append(record)
        if record["comparison"] is not None:
            self._measurement.add(record["comparison"])
        changed = any(row["tau_norm"] for row in record["rows"].values())
        if changed:
            self.modules[module] = {name: ModuleReport(**row) for name, row in record["rows"].items()}
        if not any(ranks):
            self.notes.append(f"{module} gets no expert: {_WHY_EMPTY[changed]}")
            return
        if ranks != self._requested:
            self._pattern[module] = ranks
        self.adapted.append(module)

    def dropped(self) -> dict[str, float]:
        """`{policy: share of its entries that pruning dropped}`."""
        totals: dict[str, list[int]] = {}
        for record in self.records:
            for policy, (lost, seen) in record["dropped"].items():
                before = totals.get(policy, [0, 0])
                totals[policy] = [before[0] + lost, before[1] + seen]
        return {policy: lost / seen for policy, (lost, seen) in totals.items()}
