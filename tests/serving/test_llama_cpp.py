from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch

from peft_hoe import HoEError, HoELayer, PreferenceError, StaticMergeError
from peft_hoe.serving.llama_cpp import complete, expert_scales, request_body


@pytest.fixture
def server():
    """A stand-in for llama-server that checks what it is asked, and repeats it."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            ids = [entry["id"] for entry in body["lora"]]
            # Each file once, and no state of other scales.
            safe = ids == list(range(3)) and body["cache_prompt"] is False
            answer = (
                b"nonsense"
                if body.get("prompt") == "say nonsense"
                else json.dumps({"path": self.path, **body}).encode()
            )
            self.send_response(200 if safe else 400)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()
        thread.join()


def test_without_norm_the_scales_are_the_votes(steerable, tmp_path):
    model = steerable()
    model.save_pretrained(tmp_path / "hoe")
    for source in (model, tmp_path / "hoe"):
        scales = expert_scales(source, [0.9, 0.1])
        assert scales.experts == ["low", "high", "centroid"]
        # 0.9 lies between low and the router at 0.75, which votes half and half before training.
        assert scales.scales == pytest.approx([0.8, 0.0, 0.2])
        assert (scales.factor, scales.lost) == (1, 0)
        assert scales.lora == [
            {"id": 0, "scale": scales.scales[0]},
            {"id": 1, "scale": 0.0},
            {"id": 2, "scale": scales.scales[2]},
        ]


def test_with_norm_the_best_common_factor_is_taken_and_its_loss_told(steerable):
    model = steerable(interpolation="norm")
    model.set_preference([0.6, 0.4])
    scales = expert_scales(model, [0.6, 0.4])
    wanted, plain = [], []
    votes = torch.tensor([0.2, 0.0, 0.8], dtype=torch.float64)  # of the preference
    for layer in model.modules():
        if isinstance(layer, HoELayer):
            a, b = layer.factors("default")
            wanted.append(layer.get_delta_weight("default").flatten())
            plain.append(((b * votes.repeat_interleave(4)) @ a).flatten())
    wanted, plain = torch.cat(wanted), torch.cat(plain)
    best = wanted @ plain / (plain @ plain)
    assert scales.factor == pytest.approx(float(best), rel=1e-6)
    assert scales.lost == pytest.approx(float((wanted - best * plain).norm() / wanted.norm()), rel=1e-4)
    assert 0 < scales.lost < 0.2
    assert scales.scales == pytest.approx((best * votes).tolist(), rel=1e-6)


def test_trained_routers_are_refused_or_taken_out(steerable):
    model = steerable(trained=("r0",))
    with pytest.raises(StaticMergeError, match=r"\['r0'\].*scales cannot"):
        expert_scales(model, [0.25, 0.75])
    assert expert_scales(model, [0.25, 0.75], routers="drop").scales == pytest.approx([0, 0.5, 0.5])
    with pytest.raises(PreferenceError, match="sums to"):
        expert_scales(model, [0.5, 0.75])


def test_requests_name_all_files_and_leave_the_prompt_cache_alone(steerable, server):
    scales = expert_scales(steerable(), [1, 0])
    answer = complete(server, scales, prompt="Once", n_predict=8)
    assert answer["path"] == "/completion"
    assert (answer["prompt"], answer["n_predict"]) == ("Once", 8)
    assert [entry["scale"] for entry in answer["lora"]] == [1, 0, 0]
    answer = complete(
        server, [0.1, 0.2, 0.7], path="/v1/chat/completions", messages=[{"role": "user", "content": "Hi"}]
    )
    assert answer["path"] == "/v1/chat/completions"
    assert [entry["scale"] for entry in answer["lora"]] == [0.1, 0.2, 0.7]


def test_what_would_make_a_request_unsafe_is_refused(server):
    with pytest.raises(HoEError, match="cache_prompt"):
        request_body([1, 0], prompt="Once", cache_prompt=True)
    with pytest.raises(HoEError, match="lora"):
        complete(server, [1, 0], prompt="Once", lora=[])
    with pytest.raises(HoEError, match="stream"):
        complete(server, [1, 0], prompt="Once", stream=True)
    with pytest.raises(HoEError, match="HTTP 400"):
        complete(server, [1, 0], prompt="two of three files")
    with pytest.raises(HoEError, match="not JSON"):
        complete(server, [1, 0, 0], prompt="say nonsense")
