"""Build llama.cpp from the source that llama-cpp-python carries; `make engines` runs it.

What is there already is not built again. Into the folder go the source, whose package `llama_cpp` is llama.cpp's C interface
in Python, and `build/bin` with the shared libraries and `llama-server`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

VERSION = "0.3.36"
# No network, no page, no tests; compiled quickly, since the models of the tests are small.
OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_C_FLAGS_RELEASE=-O2", "-DCMAKE_CXX_FLAGS_RELEASE=-O1", "-DBUILD_SHARED_LIBS=ON",
    "-DGGML_NATIVE=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_UI=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF", "-DLLAMA_OPENSSL=OFF",
)  # fmt: skip


def main() -> None:
    """Fetch and build what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for source and build")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at once (default one a core)")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    built = folder / f"built-{VERSION}"
    if built.is_file():
        print(f"llama.cpp of llama-cpp-python {VERSION} is in {folder}")
        return
    folder.mkdir(parents=True, exist_ok=True)
    source = fetch(folder)
    build(source / "vendor" / "llama.cpp", folder / "build", arguments.jobs)
    built.touch()


def fetch(folder: Path) -> Path:
    """The unpacked source distribution."""
    source = folder / f"llama_cpp_python-{VERSION}"
    if source.is_dir():
        return source
    with tempfile.TemporaryDirectory(dir=folder) as downloads:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=llama-cpp-python"]
        subprocess.run([*command, "--dest", downloads, f"llama-cpp-python=={VERSION}"], check=True)
        (archive,) = Path(downloads).glob("*.tar.gz")
        unpacked = Path(downloads) / "unpacked"
        with tarfile.open(archive) as tar:
            tar.extractall(unpacked, filter="data")
        (unpacked / source.name).rename(source)
    return source


def build(source: Path, folder: Path, jobs: int) -> None:
    """Compile the libraries and the server."""
    tools = Path(sys.executable).parent
    cmake = str(tools / "cmake") if (tools / "cmake").is_file() else "cmake"
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    for command in (
        [cmake, "-S", str(source), "-B", str(folder), "-G", "Ninja", *OPTIONS],
        [cmake, "--build", str(folder), "--target", "llama-server", "--parallel", str(jobs)],
    ):
        subprocess.run(command, check=True, env=environment)


if __name__ == "__main__":
    main()
