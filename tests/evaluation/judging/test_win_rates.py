"""Pairwise judges: both orders, ties, and servers."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from peft_hoe.errors import HoEError
from peft_hoe.evaluation import URLJudge, win_rates

LINE = [[1.0, 0.0], [0.0, 1.0]]


def longer(prompt, first, second):
    return "tie" if len(first) == len(second) else "A" if len(first) > len(second) else "B"


@pytest.fixture
def pair(make_sweep):
    """A's texts are longer at the first preference for prompts 0 and 1, else as long as B's, but for one that is shorter."""
    a, b = make_sweep(LINE), make_sweep(LINE, name="B")
    for sweep, lengths in ((a, [[3, 3, 2, 2], [2, 2, 2, 1]]), (b, [[2] * 4] * 2)):
        sweep.completions = [[[["x" * n] for n in row] for row in lengths]]
    return a, b


def test_wins_ties_and_losses(pair):
    found = win_rates(*pair, longer, progress=False)
    np.testing.assert_array_equal(found.scores, [[1, 1, 0.5, 0.5], [0.5, 0.5, 0.5, 0]])
    assert found.counts == {"wins": 2, "ties": 5, "losses": 1}
    assert float(found.interval(replicates=50).estimate) == pytest.approx((3 + 1.5) / 8)
    each = found.intervals(replicates=50)
    np.testing.assert_allclose(each.estimate, [0.75, 0.375])
    assert (each.low < each.estimate).all()
    assert not found.contradictions.any()
    lines = found.table().splitlines()
    assert lines[1].split()[:3] == ["1,", "0", "0.750"]
    assert lines[3].split()[-3:] == ["2", "5", "1"]
    assert "each of 8 pairs asked in both orders; 0 contradictions" in lines[4]


def test_a_coroutine_function_judges(pair):
    """Its coroutines were taken for answers that are no verdict, and every pair for a tie."""

    async def asked(prompt, first, second):
        return longer(prompt, first, second)

    np.testing.assert_array_equal(
        win_rates(*pair, asked, progress=False).scores, [[1, 1, 0.5, 0.5], [0.5, 0.5, 0.5, 0]]
    )


def test_a_judge_that_never_answers_is_told(pair):
    with pytest.raises(
        HoEError, match="none of the 16 answers of the judge is a verdict, such as 'None'; it must answer"
    ):
        win_rates(*pair, lambda prompt, first, second: None, progress=False)


def test_a_judge_that_likes_what_comes_first_ties(pair):
    found = win_rates(*pair, lambda prompt, first, second: "A", progress=False)
    assert (found.scores == 0.5).all()
    assert found.contradictions.all()


def test_a_win_in_one_order_and_a_tie_in_the_other_is_a_tie(pair):
    a, b = pair
    found = win_rates(a, b, lambda prompt, first, second: 1 if first == "xxx" else 0.5, progress=False)
    assert (found.scores == 0.5).all()
    assert not found.contradictions.any()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("A", 1), ("Reply A is kinder.\nVerdict: B", 0), ("**Tie**", 0.5), ("[[A]]", 1), (1, 1), (0.0, 0), ("", None),
     ("I like both", None), (0.7, None), (True, None)],
)  # fmt: skip
def test_how_verdicts_are_read(make_sweep, answer, expected):
    sweep = make_sweep(LINE[:1], prompts=1)
    sweep.completions = [[[["ours"]]]]
    other = {1: 0, 0: 1, 0.5: 0.5}.get(expected, "tie")
    found = win_rates(sweep, ["theirs"], lambda p, first, s: answer if first == "ours" else other, progress=False)
    assert found.scores.item() == (0.5 if expected is None else expected)
    assert found.unread == (1 if expected is None else 0)


def test_only_shared_preferences_are_judged(pair, make_sweep):
    a, _ = pair
    b = make_sweep([[0.0, 0.0], [0.0, 0.0]], name="B", preferences=[[0.0, 1.0], [0.5, 0.5]])
    b.completions[0][0][3][0] = None
    found = win_rates(a, b, longer, progress=False)
    np.testing.assert_array_equal(found.preferences, [[0, 1]])
    np.testing.assert_array_equal(found.scores, [[0, 0, 0, np.nan]])


def test_what_cannot_be_judged(pair, make_sweep):
    a, _ = pair
    with pytest.raises(HoEError, match="different prompts"):
        win_rates(a, make_sweep(LINE, prompts=5), longer)
    with pytest.raises(HoEError, match="share no preference"):
        win_rates(a, make_sweep(LINE, preferences=[[0.5, 0.5], [0.4, 0.6]]), longer)
    with pytest.raises(HoEError, match="3 texts are given for 4 prompts"):
        win_rates(a, ["x"] * 3, longer)


@pytest.fixture
def server(monkeypatch):
    """An OpenAI-compatible loopback server that answers as the test says."""
    monkeypatch.setenv("no_proxy", "*")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            httpd.received.append((self.path, self.headers.get("Authorization"), question))
            status, body = httpd.answer(question)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *args):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    httpd.received = []
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    httpd.url = f"http://127.0.0.1:{httpd.server_port}/v1"
    yield httpd
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def _said(text):
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}


def test_a_server_judges(server, pair):
    def answer(question):
        first, second = question["messages"][0]["content"].split("[Reply A]\n")[1].split("\n\n[Reply B]\n")
        return _said(longer("", first, second))

    server.answer = answer
    judge = URLJudge(server.url, "big", criterion="longer", headers={"Authorization": "Bearer key"})
    found = win_rates(*pair, judge, progress=False)
    np.testing.assert_array_equal(found.scores, [[1, 1, 0.5, 0.5], [0.5, 0.5, 0.5, 0]])
    assert len(server.received) == 16
    path, key, question = server.received[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer key")
    assert (question["model"], question["temperature"]) == ("big", 0)
    assert "which one is better: longer." in question["messages"][0]["content"]
    asked = [message["messages"][0]["content"] for _, _, message in server.received]
    assert sum("[Prompt]\nprompt 0\n" in text for text in asked) == 4  # two preferences, two orders
    assert "key" not in repr(judge)


def test_servers_that_recover_and_that_do_not(server):
    answers = [(503, {}), _said("B")]
    server.answer = lambda question: answers.pop(0)
    judge = URLJudge(server.url + "/chat/completions", "m", backoff=0.01)
    assert judge([{"role": "user", "content": "hi"}], "x", "y") == "B"
    assert "[Prompt]\nuser: hi\n" in server.received[1][2]["messages"][0]["content"]
    server.answer = lambda question: (401, {"error": "no key"})
    with pytest.raises(HoEError, match="HTTP 401"):
        judge("p", "x", "y")
    server.answer = lambda question: (200, {"text": "A"})
    with pytest.raises(HoEError, match="expected an OpenAI chat completion"):
        judge("p", "x", "y")


def test_bad_judges():
    with pytest.raises(HoEError, match="must begin with http"):
        URLJudge("localhost", "m")
    for wrong in ({"timeout": 0}, {"retries": -1}, {"backoff": -1}, {"max_tokens": 0}, {"workers": 0}):
        (name,) = wrong
        with pytest.raises(HoEError, match=f"the judge's {name} is .*; it must be"):
            URLJudge("http://x", "m", **wrong)
    with pytest.raises(HoEError, match="cannot be filled in"):
        URLJudge("http://x", "m", instruction="{question}")
