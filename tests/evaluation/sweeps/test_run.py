"""Running sweeps: batches do not matter, nothing is done twice, and any callable is a method."""

from __future__ import annotations

import json
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from peft_hoe import Decoding, HoEWarning, PreferenceError, RowsError
from peft_hoe.errors import HoEError, RewardError
from peft_hoe.evaluation import HoEMethod, Sweep, sweep
from peft_hoe.generation import completer
from peft_hoe.objectives import RewardNormalizer, payoff_table

SHORT = Decoding(max_new_tokens=6)
GRID = [[1, 0], [0.25, 0.75], [0.5, 0.5], [0, 1]]


def run(policy: Any, tokenizer: Any, prompts: Any, toys: Any, **changes: Any) -> Sweep:
    settings: dict[str, Any] = {"preferences": GRID, "decoding": SHORT, "progress": False}
    return sweep(policy, tokenizer, prompts, toys.REWARDS, **{**settings, **changes})


@pytest.fixture(scope="module")
def swept(policy: Any, tokenizer: Any, prompts: list[str], toys: Any) -> Sweep:
    return run(policy, tokenizer, prompts, toys)


def one_by_one(policy: Any, tokenizer: Any, prompt: str, preference: Any) -> str:
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    answer = policy.generate(input_ids=ids, max_new_tokens=6, do_sample=False, preference=preference)
    return str(tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True))


def test_rows_are_what_one_prompt_at_one_preference_gives(swept, policy, tokenizer, prompts, toys):
    for k, preference in enumerate(GRID):
        for p, prompt in enumerate(prompts):
            text = one_by_one(policy, tokenizer, prompt, preference)
            assert swept.completions[0][k][p] == [text]
            expected = [toys.low([prompt], [text])[0], toys.high([prompt], [text])[0]]
            np.testing.assert_array_equal(swept.rewards[0, k, p, 0], expected)
    assert len({swept.completions[0][k][p][0] for k in range(4) for p in range(6)}) > 12  # texts do differ
    np.testing.assert_allclose(swept.points, swept.rewards[0, :, :, 0].mean(1))


@pytest.mark.parametrize("batch_size", [1, 5, 24])
def test_batch_neighbours_do_not_matter(swept, policy, tokenizer, prompts, toys, batch_size):
    again = run(policy, tokenizer, prompts, toys, batch_size=batch_size)
    assert again.completions == swept.completions


def test_own_corners_are_the_payoff_table_of_the_same_decoding(swept, policy, tokenizer, prompts, toys):
    table = payoff_table(policy, prompts, toys.REWARDS, processing_class=tokenizer, decoding=SHORT).payoff
    np.testing.assert_allclose(swept.normalizer.payoff, table)
    np.testing.assert_allclose(swept.normalizer.payoff, [swept.points[0], swept.points[3]])
    assert swept.payoff_source == "own corners"
    assert swept.normalizer.decoding == {"max_new_tokens": 6, "do_sample": False, "stop_tokens": [2]}
    assert swept.normalizer.measurement | {"prompts": 6, "texts": 1} == swept.normalizer.measurement
    assert Decoding.of(swept.normalizer.decoding) == Decoding(6, stop_tokens=(2,))


def test_held_out_prompts_give_the_scale(policy, tokenizer, prompts, toys):
    half = run(policy, tokenizer, prompts[:3], toys, preferences=[[0.5, 0.5]], payoff=prompts[3:])
    table = payoff_table(policy, prompts[3:], toys.REWARDS, processing_class=tokenizer, decoding=SHORT).payoff
    np.testing.assert_allclose(half.normalizer.payoff, table)
    assert half.payoff_source == "payoff prompts"


def test_a_stop_string_ends_texts_everywhere_alike(swept, policy, tokenizer, prompts, toys):
    """In a sweep and in a payoff table, in batches of any size; rewards get the text before it."""
    string = swept.completions[0][0][0][0].split()[2]
    decoding = Decoding(6, stop_strings=[string])
    found = run(policy, tokenizer, prompts, toys, decoding=decoding, payoff=_unit())
    cut = [[[text.partition(string)[0] for text in texts] for texts in by_prompt] for by_prompt in swept.completions[0]]
    assert found.completions[0] == cut != swept.completions[0]
    assert run(policy, tokenizer, prompts, toys, decoding=decoding, payoff=_unit(), batch_size=5).completions[0] == cut
    assert found.rewards[0, 0, 0, 0, 0] == toys.low([], cut[0][0])[0]
    table = payoff_table(policy, prompts, toys.REWARDS, processing_class=tokenizer, decoding=decoding)
    np.testing.assert_allclose(table.payoff, [found.points[0], found.points[3]])
    assert table.decoding == found.runs[0]["decoding"]


def test_a_table_and_a_sweep_end_at_the_same_tokens(policy, tokenizer, prompts, toys, monkeypatch):
    """The table once ended at the tokenizer's stop token only, the sweep at the model's too: twins of one decoding."""
    base = policy.get_base_model()
    first = tokenizer(run(policy, tokenizer, prompts, toys).completions[0][0][0][0].split()[1])["input_ids"][0]
    monkeypatch.setattr(base, "generation_config", GenerationConfig(eos_token_id=[2, first]))
    table = payoff_table(policy, prompts, toys.REWARDS, processing_class=tokenizer, decoding=SHORT)
    assert table.decoding["stop_tokens"] == [2, first]
    found = run(policy, tokenizer, prompts, toys, payoff=table)
    np.testing.assert_allclose(found.points[[0, 3]], table.payoff)
    best = table.normalize(found.points[[0, 3]])
    np.testing.assert_allclose(best.max(0), 1)
    np.testing.assert_allclose(best.min(0), 0, atol=1e-12)


def test_a_given_normaliser_is_kept(policy, tokenizer, prompts, toys):
    scale = RewardNormalizer([[1.0, 0.0], [0.0, 1.0]], ["low", "high"])
    assert run(policy, tokenizer, prompts[:2], toys, payoff=scale).normalizer is scale


def test_a_normaliser_of_another_decoding_warns(policy, tokenizer, prompts, toys):
    """Compared as a whole: also what only one of them has, such as a stop token or a penalty."""
    like = Decoding(6, stop_tokens=(2,)).record
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(policy, tokenizer, prompts[:1], toys, payoff=RewardNormalizer(np.eye(2), ["low", "high"], like))
    for other, told in (
        (Decoding(6, do_sample=True, stop_tokens=(2,)), r"\(do_sample: True there, False here\)"),
        (Decoding(6, stop_tokens=(2, 5)), r"stop_tokens: \[2, 5\] there, \[2\] here"),
        (
            Decoding(6, stop_tokens=(2,), options={"repetition_penalty": 1.2}),
            "repetition_penalty: 1.2 there, None here",
        ),
        (Decoding(6, stop_tokens=(2,), stop_strings=["w9"]), r"stop_strings: \['w9'\] there, None here"),
    ):
        scale = RewardNormalizer(np.eye(2), ["low", "high"], other.record)
        with pytest.warns(HoEWarning, match=f"payoff table was measured with another decoding.*{told}"):
            run(policy, tokenizer, prompts[:1], toys, payoff=scale)
    unsaid = RewardNormalizer(np.eye(2), ["low", "high"], {"do_sample": False})  # of another engine
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(policy, tokenizer, prompts[:1], toys, payoff=unsaid)


def test_the_default_grid_is_the_papers(policy, tokenizer, prompts, toys):
    found = run(policy, tokenizer, prompts[:1], toys, preferences="grid", payoff=_unit())
    np.testing.assert_allclose(found.preferences[:, 0], np.arange(11) / 10)


def test_layers_that_cannot_mix_rows(swept, policy, tokenizer, prompts, toys, monkeypatch):
    steer, generate, sizes = completer.use_preference, completer.generate_responses, []

    def refuse_rows(model, preference, **others):
        sizes.append(np.ndim(preference["default"]))
        if sizes[-1] == 2:
            raise RowsError("rows are not samples here")
        return steer(model, preference, **others)

    def count_rows(model, batch, *others):
        sizes[-1] = (len(batch.ids), sizes[-1])
        return generate(model, batch, *others)

    monkeypatch.setattr(completer, "use_preference", refuse_rows)
    monkeypatch.setattr(completer, "generate_responses", count_rows)
    method = HoEMethod(policy, tokenizer, decoding=SHORT)
    again = sweep(None, None, prompts, toys.REWARDS, GRID, generate=method, batch_size=6, progress=False)
    assert again.completions == swept.completions
    # The first batch shows it, and is split; from then on batches are full again, of one preference each.
    assert sizes[0] == 2
    assert sorted(size for size, _ in sizes[1:5]) == [1, 1, 2, 2]
    assert max(size for size, _ in sizes[5:]) >= 4
    assert {dimensions for _, dimensions in sizes[1:]} == {1}


def test_dropped_routers_are_the_coarse_interpolation(policy, tokenizer, prompts, toys):
    kept = run(policy, tokenizer, prompts, toys, payoff=_unit())
    dropped = run(policy, tokenizer, prompts, toys, routers="drop", payoff=_unit())
    assert policy.peft_config["default"].routers[0].trained  # the mark is put back
    plain = toys.make_policy(routers=[])
    plain.load_state_dict(
        {name: tensor for name, tensor in policy.state_dict().items() if "hoe_router" not in name},
        strict=False,
    )
    coarse = run(plain, tokenizer, prompts, toys, payoff=_unit())
    assert dropped.completions == coarse.completions
    assert dropped.completions != kept.completions
    assert dropped.runs[0]["settings"] == {"routers": "drop"}


def test_only_stop_tokens_are_taken_from_the_models_own_settings(swept, policy, tokenizer, prompts, toys):
    base = policy.get_base_model()
    before = base.generation_config
    first = tokenizer(swept.completions[0][0][0][0].split()[2])["input_ids"][0]
    base.generation_config = GenerationConfig(repetition_penalty=5.0, min_new_tokens=6, eos_token_id=[2, first])
    try:
        found = run(policy, tokenizer, prompts, toys, payoff=_unit())
    finally:
        base.generation_config = before
    assert found.runs[0]["decoding"]["stop_tokens"] == [2, first]
    assert swept.completions[0][0][0][0].startswith(found.completions[0][0][0][0])  # stops earlier, is not penalised
    assert len(found.completions[0][0][0][0].split()) in (2, 3)


def test_sampling_repeats_and_leaves_everything_as_it_was(policy, tokenizer, prompts, toys):
    policy.train()
    policy.set_preference([0.3, 0.7])
    decoding = {"max_new_tokens": 6, "do_sample": True, "temperature": 1.5}
    settings = {"decoding": decoding, "texts": 3, "payoff": _unit()}
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = run(policy, tokenizer, prompts, toys, **settings)
    assert torch.equal(torch.rand(1), expected)
    assert policy.training
    assert policy.preference == {"low": 0.3, "high": 0.7}
    policy.eval()
    policy.set_preference([0.5, 0.5])
    assert run(policy, tokenizer, prompts, toys, **settings).completions == first.completions
    assert run(policy, tokenizer, prompts, toys, seed=1, **settings).completions != first.completions
    assert first.rewards.shape == (1, 4, 6, 3, 2)
    np.testing.assert_allclose(first.values[0], first.rewards[0].mean(2))
    assert first.runs[0]["decoding"]["temperature"] == 1.5
    assert first.runs[0]["drawing"] == {"texts": 3, "seed": 0, "batch_size": 128}


# -- interrupted sweeps ---


class Interrupting:
    """A method that is interrupted in its third call."""

    name, objectives, decoding = "words", ("low", "high"), {"do_sample": False}

    def __init__(self, limit=2):
        self.calls, self.limit = 0, limit

    def __call__(self, prompts, preferences):
        if self.calls == self.limit:
            raise KeyboardInterrupt
        self.calls += 1
        return [f"w{round(10 * wanted[0])} {prompt}" for prompt, wanted in zip(prompts, preferences, strict=True)]


def test_an_interrupted_sweep_goes_on(toys, prompts, tmp_path):
    settings = {"batch_size": 5, "output_dir": tmp_path, "progress": False, "payoff": _unit()}
    with pytest.raises(KeyboardInterrupt):
        sweep(None, None, prompts, toys.REWARDS, GRID, generate=Interrupting(), **settings)
    log = tmp_path / "generations.jsonl"
    assert len(log.read_text().splitlines()) == 1 + 2 * 5
    log.write_text(log.read_text() + '{"preference": [0.5, 0')  # killed while it wrote
    rest = Interrupting(limit=99)
    found = sweep(None, None, prompts, toys.REWARDS, GRID, generate=rest, **settings)
    assert rest.calls == 3  # 14 rows of 24 were left
    whole = sweep(None, None, prompts, toys.REWARDS, GRID, generate=Interrupting(99), progress=False, payoff=_unit())
    assert found.completions == whole.completions
    assert len(log.read_text().splitlines()) == 1 + 24
    again = Interrupting(limit=0)
    assert sweep(None, None, prompts, toys.REWARDS, GRID, generate=again, **settings).completions == whole.completions
    assert Sweep.load(tmp_path).completions == whole.completions


def test_a_reward_that_fails_loses_no_completion(toys, prompts, tmp_path):
    def down(prompts, completions):
        raise ConnectionError("no server")

    settings = {"output_dir": tmp_path, "progress": False, "payoff": _unit()}
    with pytest.raises(RewardError, match="no server"):
        sweep(None, None, prompts, [toys.low, down], GRID, generate=Interrupting(99), **settings)
    found = sweep(None, None, prompts, toys.REWARDS, GRID, generate=Interrupting(0), **settings)
    assert found.completions[0][0][1] == [f"w10 {prompts[1]}"]


def test_a_resumed_sampled_sweep_draws_the_same_numbers(policy, tokenizer, prompts, toys, tmp_path):
    decoding = Decoding(6, do_sample=True)
    settings = {"decoding": decoding, "texts": 2, "batch_size": 7, "output_dir": tmp_path, "payoff": _unit()}
    whole = run(policy, tokenizer, prompts, toys, **settings)
    log = tmp_path / "generations.jsonl"
    log.write_text("".join(line + "\n" for line in log.read_text().splitlines()[:18]))  # the middle of a batch
    assert run(policy, tokenizer, prompts, toys, **settings).completions == whole.completions


def test_another_sweep_in_the_directory_is_refused(policy, tokenizer, prompts, toys, tmp_path):
    run(policy, tokenizer, prompts[:2], toys, output_dir=tmp_path)
    with pytest.raises(
        HoEError, match=r"begun by another sweep \(decoding.max_new_tokens: 6 there, 7 now\).*overwrite=True"
    ):
        run(policy, tokenizer, prompts[:2], toys, output_dir=tmp_path, decoding=Decoding(7))
    with pytest.raises(HoEError, match="prompts_sha256"):
        run(policy, tokenizer, prompts[:3], toys, output_dir=tmp_path)
    with pytest.raises(HoEError, match="preferences"):
        run(policy, tokenizer, prompts[:2], toys, output_dir=tmp_path, preferences=GRID[:2])
    changed = toys.make_policy(seed=1)
    with pytest.raises(HoEError, match="fingerprint"):
        run(changed, tokenizer, prompts[:2], toys, output_dir=tmp_path)
    assert len(json.loads((tmp_path / "sweep.json").read_text())["prompts"]) == 2
    run(policy, tokenizer, prompts[:2], toys, output_dir=tmp_path, decoding=Decoding(7), overwrite=True)


def test_fingerprints_see_weights_and_marks(policy, tokenizer, toys):
    before = HoEMethod(policy, tokenizer).fingerprint()
    policy.mark_trained("r1")
    marked = HoEMethod(policy, tokenizer).fingerprint()
    policy.mark_trained("r1", trained=False)
    assert HoEMethod(policy, tokenizer).fingerprint() == before != marked
    weight = next(parameter for name, parameter in policy.named_parameters() if "hoe_B" in name)
    with torch.no_grad():
        weight[-1, -1] += 1e-3
        assert HoEMethod(policy, tokenizer).fingerprint() != before
        weight[-1, -1] -= 1e-3


# -- any method, and input that is none ---


def test_a_function_is_a_method(prompts):
    def shout(texts, preferences):
        return [text.upper() if wanted[0] > 0.5 else text for text, wanted in zip(texts, preferences, strict=True)]

    rewards = {
        "loud": lambda prompts, completions: [float(text.isupper()) for text in completions],
        "same": lambda prompts, completions: [float(p == t) for p, t in zip(prompts, completions, strict=True)],
    }
    found = sweep(prompts=prompts, rewards=rewards, preferences=[[1, 0], [0, 1]], generate=shout, progress=False)
    np.testing.assert_array_equal(found.points, [[1, 0], [0, 1]])
    assert found.name == "shout"
    assert found.objectives == ("loud", "same")


def test_columns_follow_their_prompts(prompts):
    def echo(texts, preferences):
        return list(texts)

    def labelled(prompts, completions, label):
        return [float(want) for want in label]

    labels = [5, 1, 4, 2, 3, 0]
    rows = [{"prompt": prompt, "label": label} for prompt, label in zip(prompts, labels, strict=True)]
    found = sweep(
        prompts=rows, rewards={"a": labelled, "b": labelled}, preferences=[[1, 0], [0, 1]], generate=echo,
        payoff=RewardNormalizer(np.eye(2), ["a", "b"]), progress=False, batch_size=5,
    )  # fmt: skip
    assert found.prompts == prompts
    np.testing.assert_array_equal(found.values[0, 1, :, 0], [5, 1, 4, 2, 3, 0])


def test_constant_corners_lose_nothing(prompts):
    def echo(texts, preferences):
        return list(texts)

    flat = {
        "a": lambda prompts, completions: [1.0] * len(prompts),
        "b": lambda prompts, completions: [2.0] * len(prompts),
    }
    with pytest.warns(HoEWarning, match="not normalised: objective 'a' is constant"):
        found = sweep(prompts=prompts, rewards=flat, preferences="grid", generate=echo, progress=False)
    assert found.normalizer is None
    with pytest.raises(HoEError, match="not normalised"):
        found.metrics()
    found.reference_point = 0.5
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        measured = found.metrics(replicates=20)
    assert float(measured.values["hypervolume"].estimate) == pytest.approx(0.5 * 1.5)
    messages = [str(item.message) for item in told]
    assert any("rank correlation is undefined" in message for message in messages)
    assert len(messages) == len(set(messages))


def test_plain_strings_for_a_chat_model_warn(policy, toys, prompts):
    chat = toys.make_tokenizer()
    chat.chat_template = (
        "{% for m in messages %}<s> {{ m['content'] }}{% endfor %}{% if add_generation_prompt %} w0{% endif %}"
    )
    messages = [{"role": "user", "content": prompts[0]}]
    for some in (prompts[:1], [messages, prompts[0]]):
        with pytest.warns(HoEWarning, match="chat template"):
            run(policy, chat, some, toys, payoff=_unit())
    talk = run(policy, chat, [messages], toys, payoff=_unit())
    plain = toys.make_tokenizer()
    assert talk.completions[0][0][0] == [one_by_one(policy, plain, f"<s> {prompts[0]} w0", GRID[0])]


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"prompts": []}, HoEError, "no prompts"),
        ({"prompts": ["w3", 5]}, HoEError, r"number 1 of the prompts is 5 \(int\)"),
        ({"prompts": ["w3"], "payoff": [[]]}, HoEError, r"number 0 of the payoff prompts is \[\] \(list\); give text"),
        ({"preferences": [[0.9, 0.9]]}, PreferenceError, "sums to 1.8"),
        ({"preferences": [[1, 0], [0.5, 0.5], [1, 0]]}, PreferenceError, r"\[1, 0\] is given twice"),
        ({"preferences": "all"}, PreferenceError, 'use "grid"'),
        ({"rewards": None}, RewardError, "no rewards"),
        ({"rewards": {"low": len}}, RewardError, "missing"),
        ({"texts": 2}, HoEError, "greedy texts are all the same"),
        ({"batch_size": 0}, HoEError, "batch_size 0"),
        ({"decoding": {"max_new_tokens": 0}}, HoEError, "max_new_tokens is 0"),
        ({"routers": "some"}, HoEError, "routers is 'some'"),
        ({"generate": print}, HoEError, "both a model and generate="),
        ({"prompts": [{"prompt": "w3", "label": 1}, "w4"]}, HoEError, "number 1 of the prompts has no column 'label'"),
        ({"prompts": 5}, HoEError, r"the prompts are 5 \(int\); give a list"),
        ({"prompts": {"prompt": ["w3"]}}, HoEError, r"the prompts are \{'prompt': \['w3'\]\} \(dict\)"),
        ({"objectives": ["a", "b"]}, HoEError, "the method's are"),
    ],
)
def test_bad_input(policy, tokenizer, prompts, toys, changes, error, match):
    given = {"prompts": prompts, "rewards": toys.REWARDS, "progress": False, **changes}
    with pytest.raises(error, match=match):
        sweep(policy, tokenizer, **given)


def test_a_disabled_adapter_is_refused(policy, tokenizer, prompts, toys):
    """Its base was swept at every preference."""
    policy.base_model.disable_adapter_layers()
    try:
        with pytest.raises(PreferenceError, match="adapter 'default' is disabled, so that the model is its base"):
            sweep(policy, tokenizer, prompts, toys.REWARDS, [[1, 0], [0, 1]], progress=False)
        with pytest.raises(PreferenceError, match="adapter 'default' is disabled"):
            payoff_table(policy, prompts, toys.REWARDS, processing_class=tokenizer)
    finally:
        policy.base_model.enable_adapter_layers()


def test_methods_must_return_texts(prompts, toys):
    def short(prompts, preferences):
        return ["one"]

    def nothing(prompts, preferences):
        return None

    for method in (short, nothing):
        with pytest.raises(HoEError, match=rf"'{method.__name__}' returned .* it must return 12 texts"):
            sweep(prompts=prompts, rewards=toys.REWARDS, preferences=[[1, 0], [0, 1]], generate=method, progress=False)


def test_a_method_may_be_a_coroutine_function(prompts, toys):
    async def written(prompts, preferences):
        return ["w1"] * len(prompts)

    found = sweep(
        prompts=prompts, rewards=toys.REWARDS, preferences=[[1, 0], [0, 1]], generate=written, progress=False, payoff=_unit()
    )  # fmt: skip
    assert found.completions[0][0][0] == ["w1"]


def test_modules_that_read_tokens_are_refused(policy, tokenizer, prompts):
    from transformers import GPT2Config, GPT2ForSequenceClassification

    module = GPT2ForSequenceClassification(
        GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=32, n_positions=32, num_labels=2, pad_token_id=0)
    )
    with pytest.raises(RewardError, match="ClassifierReward"):
        sweep(policy, tokenizer, prompts, module, progress=False)


def _unit() -> RewardNormalizer:
    return RewardNormalizer(np.eye(2), ["low", "high"])
