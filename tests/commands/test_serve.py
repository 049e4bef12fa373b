from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest

from peft_hoe.cli import main

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")


@pytest.fixture
def saved(toys, tmp_path):
    """Directories of a base and of an adapter that names it."""
    toys.save_with_base(toys.make_policy(), tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--port", "99999"], "--port is 99999; it must be from 0, for a free one, to 65535"),
        (["--port", "-1"], "--port is -1"),
        (["--host", "no host", "--port", "0"], "cannot listen on no host, port 0"),
        (["--name", "a@b"], "--name is 'a@b'"),
        (["--name", ""], "--name is ''"),
        (["--max-body", "0"], "--max-body is 0; it must be at least 1"),
        (["--grace", "-5"], "--grace is -5; it must be at least 0"),
        (["--sweep", "front"], "--sweep is for the page"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_loaded(options, said, capsys):
    assert main(["serve", "./nothere", "--base", "./nothere", *options]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_port_that_somebody_has_is_told_before_the_model_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "./nothere", "--base", "./nothere", "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert f"cannot listen on 127.0.0.1, port {port}: " in error
    assert "give another --port (0 takes a free one)" in error


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_free_port_is_taken_and_an_interrupt_ends_the_server_well(saved):
    command = [sys.executable, "-m", "peft_hoe.cli", "serve", str(saved / "hoe"), "--port", "0", "--cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        try:
            found = None
            while found is None:
                line = server.stdout.readline()
                assert line, "it ended"
                found = re.search(r"running on (http://127.0.0.1:[1-9]\d*)", line)
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(f"{found[1]}/v1/models", timeout=60) as answer:
                assert json.load(answer)["data"][0]["objectives"] == ["low", "high"]
            server.send_signal(signal.SIGINT)
            assert server.wait(60) == 0
        finally:
            server.kill()
