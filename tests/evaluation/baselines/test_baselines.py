"""Baselines against the naive formula, on a tiny Llama and two policies of it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from peft_hoe.errors import ExpertError, HoEError
from peft_hoe.evaluation import sweep
from peft_hoe.evaluation.baselines import BASELINES
from peft_hoe.evaluation.baselines.adapters import load_base
from peft_hoe.experts.merging import check_merge, merge
from peft_hoe.objectives import RewardNormalizer
from peft_hoe.tuner.functional import use_preference

EXACT: dict[str, Any] = {"r": "full", "pruning": None, "rescale": None, "svd": "exact"}
IDS = torch.tensor([[1, 5, 6, 7, 9], [1, 10, 11, 12, 13]])
MIDDLE = np.array([0.3, 0.7])
SCALE = RewardNormalizer(np.eye(2), ("low", "high"))


@pytest.fixture(scope="module")
def base(toys: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("models") / "base"
    toys.make_base().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def policies(toys: Any, base: str) -> dict[str, str]:
    """Their linear weights differ from the base's, all else does not: experts at full rank hold everything."""
    found = {}
    for seed, name in enumerate(("low", "high")):
        model, generator = toys.make_base(), torch.Generator().manual_seed(seed)
        for key, weight in model.named_parameters():
            if "proj" in key:
                weight.data += 0.2 * torch.randn(weight.shape, generator=generator)
        found[name] = str(Path(base).with_name(name))
        model.save_pretrained(found[name])
    return found


@pytest.fixture
def make(base: str, policies: dict[str, str], tokenizer: Any, tmp_path: Path) -> Any:
    def method(name: str, **options: Any) -> Any:
        how = {"tokenizer": tokenizer, "folder": tmp_path, "decoding": {"max_new_tokens": 6}, **options}
        return BASELINES[name].make(base, policies, **how)

    return method


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def interpolated(base: str, policies: dict[str, str], shares: Any) -> torch.Tensor:
    model = load_base(base)
    states = [load_base(path).state_dict() for path in policies.values()]
    model.load_state_dict({key: sum(w * s[key] for w, s in zip(shares, states, strict=True)) for key in states[0]})
    return logits(model)


def merged(base: str, policies: dict[str, str], name: str, shares: Any) -> torch.Tensor:
    """Every module's task vectors merged, at full rank."""
    model, start = load_base(base), load_base(base).state_dict()
    states = [load_base(path).state_dict() for path in policies.values()]
    options = check_merge(name, None)
    for key in [key for key in start if "proj" in key]:
        start[key] = start[key] + merge([state[key] - start[key] for state in states], list(shares), name, options)
    model.load_state_dict(start)
    return logits(model)


# -- soups ---


def test_rs_is_the_interpolation_of_the_weights(make, base, policies, agree):
    """The policies differ by linear weights only, so that experts at full rank, dense soups and the naive sum agree."""
    experts, dense = make("rs", **EXACT), make("rs_dense")
    for shares in ([1.0, 0.0], [0.3, 0.7], [0.5, 0.5]):
        wanted = interpolated(base, policies, shares)
        with use_preference(experts.model, shares):
            agree(logits(experts.model), wanted)
        with dense.at(np.asarray(shares)) as model:
            agree(logits(model), wanted)
    assert (interpolated(base, policies, [1, 0]) - interpolated(base, policies, [0, 1])).abs().max() > 0.1


def test_dense_soups_of_lora_policies_are_the_sum_of_the_products(base, tokenizer, tmp_path, agree):
    """As with full policies: an adapter is merged into its base first."""
    paths, deltas = {}, []
    for seed, name in enumerate(("low", "high")):
        model = get_peft_model(load_base(base), LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]))
        generator = torch.Generator().manual_seed(seed)
        for key, weight in model.named_parameters():
            if "lora_" in key:
                weight.data = torch.randn(weight.shape, generator=generator)
        paths[name] = str(tmp_path / name)
        model.save_pretrained(paths[name])
        layers = model.base_model.model.model.layers
        deltas.append([2 * layer.self_attn.q_proj.lora_B.default.weight @ layer.self_attn.q_proj.lora_A.default.weight
                       for layer in layers])  # fmt: skip
    wanted = load_base(base)
    for layer, low, high in zip(wanted.model.layers, *deltas, strict=True):
        layer.self_attn.q_proj.weight.data += (0.3 * low + 0.7 * high).detach()
    dense = BASELINES["rs_dense"].make(base, paths, tokenizer=tokenizer)
    with dense.at(MIDDLE) as model:
        agree(logits(model), logits(wanted))


def test_rs_norm_restores_the_mean_length_in_every_module(make, base, policies, agree):
    method = make("rs_norm", **EXACT)
    start, states = load_base(base).state_dict(), [load_base(path).state_dict() for path in policies.values()]
    layers = {name: module for name, module in method.model.named_modules() if hasattr(module, "hoe_layouts")}
    assert len(layers) == 14
    with use_preference(method.model, MIDDLE):
        for name, layer in layers.items():
            key = name.removeprefix("base_model.model.") + ".weight"
            taus = [state[key] - start[key] for state in states]
            plain = 0.3 * taus[0] + 0.7 * taus[1]
            wanted = plain * (0.3 * taus[0].norm() + 0.7 * taus[1].norm()) / plain.norm()
            agree(layer.get_delta_weight("default"), wanted)
    with use_preference(method.model, [1.0, 0.0]):  # nothing to restore
        agree(logits(method.model), interpolated(base, policies, [1, 0]))


def test_orthogonal_task_vectors_of_one_length_get_the_root_of_two(toys, base, tokenizer, tmp_path):
    paths = {}
    for i, name in enumerate(("low", "high")):
        model = toys.make_base()
        model.model.layers[0].self_attn.q_proj.weight.data[i, i] += 2.0
        paths[name] = str(tmp_path / name)
        model.save_pretrained(paths[name])
    method = BASELINES["rs_norm"].make(base, paths, tokenizer=tokenizer, folder=tmp_path / "adapters", **EXACT)
    lengths = method.model.model.model.layers[0].self_attn.q_proj.hoe_length["default"]
    votes = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    torch.testing.assert_close(lengths(votes), torch.tensor([[2**0.5], [1.0]]), rtol=0, atol=1e-6)


# -- merges ---


@pytest.mark.parametrize(("name", "method"), [("ta", "linear"), ("ties", "ties"), ("pcb", "pcb")])
def test_merges_are_made_anew_for_each_preference(make, base, policies, name, method, agree):
    found = make(name, **EXACT)
    for shares in ([0.3, 0.7], [0.5, 0.5]):
        with found.at(np.asarray(shares)) as model:
            agree(logits(model), merged(base, policies, method, shares))


@pytest.mark.parametrize("name", ["ta", "ties", "pcb"])
def test_a_one_hot_merge_is_the_policys_expert(make, name, agree):
    """At a rank and with pruning, as HoE has it."""
    settings = {"r": 4, "pruning": 0.4}
    experts, found = make("rs", **settings), make(name, **settings)
    for corner in ([1.0, 0.0], [0.0, 1.0]):
        with use_preference(experts.model, corner), found.at(np.asarray(corner)) as model:
            agree(logits(model), logits(experts.model))


def test_a_baseline_that_is_a_merge_takes_options_of_its_own_method_only(make):
    assert make("ties", merge_options={"density": 0.3}).merging.options == {"density": 0.3}
    with pytest.raises(
        HoEError, match=r"TIES merges by 'ties'; give its options as merge_options= instead of merging="
    ):
        make("ties", merging="linear")
    with pytest.raises(ExpertError, match=r"merge 'linear' has no option \['density'\]"):
        make("ta", merge_options={"density": 0.3})


@pytest.mark.parametrize("name", ["rs", "rs_dense", "ta", "mod", "prompting"])
def test_a_stop_string_ends_the_texts_of_every_baseline(make, prompts, name):
    free = make(name)(prompts, np.tile(MIDDLE, (len(prompts), 1)))
    string = free[0].split()[2]
    found = make(name, decoding={"max_new_tokens": 6, "stop_strings": [string]})
    assert found(prompts, np.tile(MIDDLE, (len(prompts), 1))) == [text.partition(string)[0] for text in free]
    assert found.decoding["stop_strings"] == [string]


def test_logit_fusion_refuses_what_it_cannot_do(make):
    with pytest.raises(
        HoEError, match="the decoding has num_beams 2, but logit fusion chooses tokens greedily or draws"
    ):
        make("mod", decoding={"max_new_tokens": 6, "num_beams": 2})
    assert (
        make("mod", decoding={"max_new_tokens": 6, "do_sample": True, "top_k": 3, "top_p": 0.9}).decoding["top_k"] == 3
    )


def test_adapters_are_found_again_and_never_mixed_up(make, base, policies, tokenizer, tmp_path):
    path = make("ties", r=4).adapter(MIDDLE)
    file = path / "adapter_model.safetensors"
    written = file.stat().st_mtime_ns
    assert make("ties", r=4).adapter(MIDDLE) == path
    assert file.stat().st_mtime_ns == written
    with pytest.raises(HoEError, match="another options"):
        make("ties", r=2).adapter(MIDDLE)
    swapped = {"low": policies["high"], "high": policies["low"]}
    other = BASELINES["ties"].make(base, swapped, tokenizer=tokenizer, folder=tmp_path, r=4)
    with pytest.raises(HoEError, match="another policies"):
        other.adapter(MIDDLE)
    assert other.fingerprint() != make("ties", r=4).fingerprint() != make("ties", r=2).fingerprint()


# -- the others ---


def test_mod_at_a_corner_is_the_policys_expert(make, prompts):
    experts, fused = make("rs", r=4), make("mod", r=4)
    corners = np.tile(np.eye(2), (len(prompts) // 2, 1))
    assert fused(prompts, corners) == experts(prompts, corners)
    middle = np.tile([0.5, 0.5], (len(prompts), 1))
    assert fused(prompts, middle) != experts(prompts, middle)  # logits are not weights


def test_prompting_states_the_preference(make):
    method = make("prompting", template="Be {preference}.\n")
    assert method.prompt("w1 w2", np.array([0.25, 0.75])) == "Be 25% low and 75% high.\nw1 w2"
    assert method.prompt("w1", np.array([0.0, 1.0])) == "Be 100% high.\nw1"
    user = {"role": "user", "content": "hello"}
    line = {"role": "system", "content": "Be 25% low and 75% high."}
    assert method.prompt([user], np.array([0.25, 0.75])) == [line, user]
    own = {"role": "system", "content": "You help."}
    together = {"role": "system", "content": "You help.\n\nBe 25% low and 75% high."}
    assert method.prompt([own, user], np.array([0.25, 0.75])) == [together, user]
    with pytest.raises(HoEError, match=r"it needs \{preference\}"):
        make("prompting", template="Be good.")


def test_prompting_completes_the_base_models_prompt(make, base, tokenizer):
    method = make("prompting", template="w3 {preference} ")
    text = method(["w1 w2"], np.array([[0.5, 0.5]]))[0]
    ids = tokenizer("w3 50% low and 50% high w1 w2", return_tensors="pt")["input_ids"]
    answer = load_base(base).generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    assert text == tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)


def test_morlhf_answers_at_its_own_preferences_only(base, policies, tokenizer, prompts, toys, agree):
    own = {(0.1, 0.9): policies["low"], (0.5, 0.5): policies["high"]}
    method = BASELINES["morlhf"].make(base, own, tokenizer=tokenizer, decoding={"max_new_tokens": 6})
    with method.at(np.array([0.1, 0.9])) as model:
        agree(logits(model), logits(load_base(policies["low"])))
    with pytest.raises(HoEError, match=r"no policy for the preference \[0.3, 0.7\].*\[0.1, 0.9\], \[0.5, 0.5\]"):
        method(prompts, np.tile([0.3, 0.7], (len(prompts), 1)))
    with pytest.raises(HoEError, match="every λ a tuple"):
        BASELINES["morlhf"].make(base, {}, tokenizer=tokenizer)
    found = sweep(
        prompts=prompts, rewards=toys.REWARDS, preferences=list(own), progress=False, generate=method, payoff=SCALE
    )
    texts = method(prompts, np.tile([0.5, 0.5], (len(prompts), 1)))
    assert [row[0] for row in found.completions[0][list(own).index((0.5, 0.5))]] == texts


def test_lora_moe_trains_once_and_writes_the_same_at_every_preference(make, base, policies, toys, prompts, tmp_path):
    with pytest.raises(HoEError, match="no trained mixture"):
        make("lora_moe", r=4)
    settings = {
        "max_steps": 1, "per_device_train_batch_size": 4, "response_length": 6, "learning_rate": 0.5, "report_to": [],
        "num_sample_generations": 0, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "stop_token": "eos",
    }  # fmt: skip
    method = make("lora_moe", r=4, rewards=toys.REWARDS, train_dataset=toys.PROMPTS, training=settings)
    again = make("lora_moe")
    assert again.fingerprint() == method.fingerprint()
    assert make("lora_moe", r=4, training={**settings, "disable_tqdm": False}).fingerprint() == method.fingerprint()
    for others, what in (({"r": 2}, "build options"), ({"training": {**settings, "max_steps": 2}}, "training")):
        with pytest.raises(HoEError, match=f"was trained with another {what} "):
            make("lora_moe", **others)
    with pytest.raises(HoEError, match="was trained with another policies "):
        BASELINES["lora_moe"].make(
            base, {"low": policies["high"], "high": policies["low"]}, tokenizer=None, folder=tmp_path
        )
    config = again.model.peft_config["default"]
    assert config.routers[0].trained
    assert len(config.experts) == 2
    preferences = np.linspace([0.0, 1.0], [1.0, 0.0], len(prompts))
    assert again(prompts, preferences) == again(prompts, preferences[::-1])
    assert again(prompts[:1] * 3, preferences[:3]) == again(prompts[:1], preferences[:1]) * 3
    found = sweep(
        prompts=prompts, rewards=toys.REWARDS, preferences=[[1, 0], [0.5, 0.5], [0, 1]], progress=False,
        generate=again, payoff=SCALE,
    )  # fmt: skip
    np.testing.assert_array_equal(found.rewards, found.rewards[:, :1].repeat(3, axis=1))


# -- in a sweep ---


@pytest.mark.parametrize("name", sorted(set(BASELINES) - {"morlhf", "lora_moe"}))
def test_a_sweep_of_each(make, toys, prompts, name):
    found = sweep(
        prompts=prompts, rewards=toys.REWARDS, preferences=[[1, 0], [0.5, 0.5], [0, 1]], progress=False,
        generate=make(name), payoff=SCALE,
    )  # fmt: skip
    assert found.rewards.shape == (1, 3, 6, 1, 2)
    assert found.runs[0]["fingerprint"]
    assert found.runs[0]["decoding"]["max_new_tokens"] == 6


def test_sampled_batches_of_methods_with_states_have_one_preference_each(toys, prompts):
    seen = []

    def method(rows: Any, preferences: Any) -> list[str]:
        seen.append(preferences)
        return ["w1"] * len(rows)

    method.decoding = {"do_sample": True}
    method.mixes_rows = False
    points = [[1, 0], [0.5, 0.5], [0, 1]]
    sweep(
        prompts=prompts, rewards=toys.REWARDS, preferences=points, generate=method, texts=2, batch_size=5,
        progress=False, payoff=SCALE,
    )  # fmt: skip
    assert all((batch == batch[0]).all() for batch in seen)
    assert [len(batch) for batch in seen] == [5, 5, 2] * 3
    assert len({tuple(batch[0]) for batch in seen}) == len(list(itertools.groupby(tuple(b[0]) for b in seen))) == 3
