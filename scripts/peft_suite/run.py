"""Run the tests of the installed PEFT with HoEConfig as the config class, and print the counts.

PEFT's source distribution ships its tests; pip fetches the installed version's into `.peft-suite`, where the models go too.
Arguments of your own go to pytest, such as `-k test_generate -x -n 0`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
WORK = HERE.parents[1] / ".peft-suite"
MODULES = [
    "test_config",
    "test_custom_models",
    "test_decoder_models",
    "test_encoder_decoder_models",
    "test_feature_extraction_models",
    "test_low_level_api",
    "test_seq_classifier",
    "test_token_classification_qa",
]


def fetch(version: str) -> Path:
    """The folder with the tests of that PEFT, unpacked and importable as a package."""
    root = WORK / f"peft-{version}"
    if not (root / "tests" / "__init__.py").exists():
        archive = WORK / f"peft-{version}.tar.gz"
        if not archive.exists():
            wanted = ["--no-deps", "--no-binary", "peft", f"peft=={version}"]
            subprocess.run([sys.executable, "-m", "pip", "download", "--dest", str(WORK), *wanted], check=True)
        with tarfile.open(archive) as file:
            file.extractall(WORK, filter="data")
        # The distribution leaves this one out, and the tests import each other relatively.
        (root / "tests" / "__init__.py").touch()
    return root


def main(arguments: list[str]) -> int:
    WORK.mkdir(exist_ok=True)
    root = fetch(metadata.version("peft"))
    cache = WORK / "hub"
    environment = os.environ | {
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1] / "src"), os.environ.get("PYTHONPATH", "")]),
        "TOKENIZERS_PARALLELISM": "false",
    }
    subprocess.run(
        [sys.executable, "-c", f"import zoo, pathlib; zoo.build(pathlib.Path({str(cache)!r}))"],
        env=environment,
        check=True,
    )
    modules = [f"tests/{name}.py" for name in MODULES if (root / "tests" / f"{name}.py").exists()]
    options = ["-p", "plugin", "-c", str(HERE / "pytest.ini"), "--rootdir", str(root), "-n", "2", "-q"]
    command = [sys.executable, "-m", "pytest", *options, *arguments, *modules]
    return subprocess.run(command, cwd=root, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
