"""The launch configurations of docs/launching.md."""

from __future__ import annotations

import re
from pathlib import Path

from accelerate.commands.config.config_args import ClusterConfig

DOCUMENT = Path(__file__).parents[3] / "docs" / "launching.md"


def test_accelerate_reads_the_documented_configurations(tmp_path: Path) -> None:
    """accelerate refuses keys that it does not know."""
    blocks = re.findall(r"```yaml\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 1
    file = tmp_path / "launch.yaml"
    file.write_text(blocks[0], encoding="utf-8")
    config = ClusterConfig.from_yaml_file(yaml_file=str(file))
    assert (config.distributed_type.value, config.num_processes, config.mixed_precision) == ("MULTI_GPU", 4, "no")
