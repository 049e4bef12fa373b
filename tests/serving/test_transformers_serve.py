from __future__ import annotations

import json
import socket
import time

import pytest
import torch

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
serve = pytest.importorskip("transformers.cli.serve")
pytest.importorskip("transformers.cli.serving")  # transformers 4 had another one


@pytest.fixture
def folder(toys, tokenizer, tmp_path):
    """A folder with base and adapter together, as transformers loads them by one name."""
    model = toys.make_policy()
    model.mark_trained("r0")
    toys.make_base().save_pretrained(tmp_path / "served")
    tokenizer.save_pretrained(tmp_path / "served")
    model.save_pretrained(tmp_path / "hoe")
    for file in (tmp_path / "hoe").glob("adapter_*"):
        (tmp_path / "served" / file.name).symlink_to(file)
    return model, tmp_path / "served"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_each_request_brings_its_preference_in_its_generation_config(folder, tokenizer):
    model, path = folder
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = serve.Serve(
        force_model=str(path), host="127.0.0.1", port=port, non_blocking=True, device="cpu", dtype="float32",
        attn_implementation=None, quantization=None,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not running.server.started:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)
        how = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
        texts = []
        for preference in ([1, 0], [0.25, 0.75], [0, 1]):
            settings = json.dumps({**how, "preference": preference})
            answer = client.completions.create(
                model=str(path), prompt="w1 w2", extra_body={"generation_config": settings}
            )
            ids = torch.tensor([tokenizer("w1 w2")["input_ids"]])
            alone = model.generate(input_ids=ids, preference=preference, **how)
            texts.append(answer.choices[0].text)
            assert texts[-1] == tokenizer.decode(alone[0, 2:], skip_special_tokens=True)
        assert len(set(texts)) > 1
    finally:
        running.kill_server()
