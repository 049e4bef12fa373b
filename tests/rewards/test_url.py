from __future__ import annotations

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from peft_hoe.errors import RewardError
from peft_hoe.rewards import Rewards, URLReward

PROMPTS = ["w3 w4", "w5"]
TEXTS = [" w6", " w7 w8 w9"]


@pytest.fixture
def server(monkeypatch):
    """A loopback server that answers what the test put into `answers`, None with silence; the last answer is repeated."""
    monkeypatch.setenv("no_proxy", "*")
    received: list[dict] = []
    answers: list[object] = []
    ended = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            batch = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            received.append(batch)
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
            if answer is None:
                ended.wait()
                return
            status, body = answer(batch) if callable(answer) else answer
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode() if not isinstance(body, bytes) else body)

        def log_message(self, *args):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    httpd.received, httpd.answers = received, answers
    httpd.url = f"http://127.0.0.1:{httpd.server_port}/score"
    yield httpd
    ended.set()
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def _lengths(batch):
    return 200, {"rewards": [len(text) if text else None for text in batch["completions"]]}


def test_a_server_scores_batches(server):
    server.answers.append(_lengths)
    rewards = Rewards({"a": URLReward(server.url, batch_size=2)}, ["a"])
    table = rewards(["p", "q", "r"], ["x", "", "zzz"], {"label": [1, 2, 3]})
    np.testing.assert_array_equal(table, [[1], [np.nan], [3]])
    assert server.received == [
        {"prompts": ["p", "q"], "completions": ["x", ""], "columns": {"label": [1, 2]}},
        {"prompts": ["r"], "completions": ["zzz"], "columns": {"label": [3]}},
    ]


def test_a_server_scores_several_objectives(server):
    server.answers.append((200, [[1, 2], [3, None]]))
    np.testing.assert_array_equal(Rewards(URLReward(server.url), ["a", "b"])(PROMPTS, TEXTS), [[1, 2], [3, np.nan]])


def test_a_server_that_recovers(server):
    server.answers += [(503, b"busy"), (429, b"slow down"), _lengths]
    reward = URLReward(server.url, retries=2, backoff=0.01)
    assert reward(PROMPTS, TEXTS) == [3, 9]
    assert len(server.received) == 3


def test_a_server_that_stays_silent(server):
    server.answers.append(None)
    reward = URLReward(server.url, timeout=0.1, retries=1, backoff=0.01)
    with pytest.raises(
        RewardError, match=r"reward 'a': http.*/score gave no answer within 0\.1 s \(2 attempts\).*timeout="
    ) as refused:
        Rewards([reward], ["a"])(PROMPTS, TEXTS)
    assert (refused.value.argument, refused.value.value) == ("reward 'a'", None)


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        ((404, b"no such page"), r"answered with HTTP 404 Not Found: 'no such page'; check the URL"),
        ((500, b"broken"), r"HTTP 500 .*'broken' \(2 attempts\)"),
        ((200, b"<html>"), "'<html>', which is not JSON; expected"),
        ((200, {"scores": [1, 2]}), 'expected {"rewards": \\[...\\]} with 2 numbers'),
        ((200, [1]), "answered with 1 rewards"),
        ((200, ["good", 1]), "returned 'good' for completion 0"),
        ((200, [None, None]), "no number for any of 2"),
    ],
)
def test_bad_answers_of_a_server(server, answer, match):
    server.answers.append(answer)
    with pytest.raises(RewardError, match=f"reward 'a'.*{match}"):
        Rewards([URLReward(server.url, retries=1, backoff=0.01)], ["a"])(PROMPTS, TEXTS)


@pytest.mark.parametrize(
    ("answers", "status"), [([(404, b"")], 404), ([(503, b""), (500, b"")], 500), ([(503, b""), None], None)]
)
def test_errors_carry_the_status_of_the_last_answer(server, answers, status):
    server.answers.extend(answers)
    with pytest.raises(RewardError) as refused:
        URLReward(server.url, timeout=0.1, retries=1, backoff=0.01)(PROMPTS, TEXTS)
    assert (refused.value.argument, refused.value.value) == (server.url, status)


def test_the_status_goes_with_the_name_of_the_reward(server):
    server.answers.append((404, b""))
    with pytest.raises(RewardError) as refused:
        Rewards([URLReward(server.url)], ["a"])(PROMPTS, TEXTS)
    assert (refused.value.argument, refused.value.value) == ("reward 'a'", 404)


def test_urls_and_columns_that_cannot_be_sent(server):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(RewardError, match=r"cannot be reached: .*refused.* \(1 attempts\)"):
        URLReward(f"http://127.0.0.1:{port}/", retries=0)(PROMPTS, TEXTS)
    with pytest.raises(RewardError, match="must begin with http"):
        URLReward("file:///etc/passwd")
    with pytest.raises(RewardError, match="batch_size 0"):
        URLReward(server.url, batch_size=0)
    with pytest.raises(RewardError, match=r"columns \['picture'\] cannot all be written as JSON"):
        URLReward(server.url)(PROMPTS, TEXTS, picture=[object()] * 2)
