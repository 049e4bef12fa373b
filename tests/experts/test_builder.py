"""build_adapter from full fine-tunes: what the adapter holds, what is reported, what is refused, what is left behind."""

from __future__ import annotations

import json
import warnings
from collections import Counter

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_hoe import CheckpointError, ExpertError, ExpertSpec, HoEWarning, Merging, Pruning
from peft_hoe.experts import build_adapter, module_builder, policy_statistics, svd, weight_writer
from peft_hoe.experts.merging.ties import ties
from peft_hoe.experts.pruning import drop_below
from peft_hoe.experts.task_vectors import TaskVectorReader

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
QUIET = {"progress": False}
EXACT = {"r": "full", "pruning": None, "rescale": None, "progress": False}
UP = "model.layers.0.mlp.up_proj"


def raw(base, policy, name):
    return load_file(policy / "model.safetensors")[name] - load_file(base / "model.safetensors")[name]


def test_full_rank_without_pruning_is_the_policy_in_scope(llama, policies, tmp_path):
    build_adapter(llama, policies, tmp_path / "out", **EXACT)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "out").eval()
    tokens = torch.arange(3, 23).reshape(2, 10)
    for index, policy in enumerate(policies.values()):
        reference = AutoModelForCausalLM.from_pretrained(llama).eval()
        weights = load_file(policy / "model.safetensors")
        with torch.no_grad():
            for name, parameter in reference.named_parameters():
                if "_proj" in name:
                    parameter.copy_(weights[name])
            model.set_preference([1 - index, index])
            torch.testing.assert_close(model(tokens).logits, reference(tokens).logits, atol=1e-4, rtol=0)


def test_conv1d_in_full_rank_is_the_policy_in_scope(gpt2, tmp_path, tiny):
    policy = tiny.rewrite(gpt2, tmp_path / "kind", tiny.noisy(1))
    build_adapter(gpt2, {"kind": policy}, tmp_path / "out", **EXACT)
    for part in ("attn.c_attn", "mlp.c_proj"):
        expected = raw(gpt2, policy, f"transformer.h.0.{part}.weight").T
        torch.testing.assert_close(
            tiny.delta(tmp_path / "out", f"transformer.h.0.{part}", 0), expected, atol=1e-5, rtol=1e-4
        )


def test_the_middle_expert_is_the_merge_of_raw_task_vectors(llama, policies, tmp_path, tiny):
    build_adapter(
        llama, policies, tmp_path / "out", experts=[[0.3, 0.7]], merging=Merging("ties", {"density": 0.5}),
        **{**EXACT, "pruning": 0.6},
    )  # fmt: skip
    deltas = [raw(llama, policy, f"{UP}.weight") for policy in policies.values()]
    expected = ties(deltas, [0.3, 0.7], density=0.5)
    torch.testing.assert_close(tiny.delta(tmp_path / "out", UP, 2), expected, atol=1e-5, rtol=1e-4)


def test_experts_may_be_merged_each_in_its_way(llama, policies, tmp_path, tiny):
    merging = Merging("ties", {"density": 0.5}, experts={"middle": "linear", "far": Merging("ties", {"density": 0.2})})
    points = {"near": [0.7, 0.3], "middle": [0.5, 0.5], "far": [0.2, 0.8]}
    experts = [ExpertSpec(point, name=name) for name, point in points.items()]
    report = build_adapter(llama, policies, tmp_path / "out", experts=experts, merging=merging, **EXACT)
    deltas = [raw(llama, policy, f"{UP}.weight") for policy in policies.values()]
    expected = [
        ties(deltas, points["near"], density=0.5), (deltas[0] + deltas[1]) / 2, ties(deltas, points["far"], density=0.2),
    ]  # fmt: skip
    for index, delta in enumerate(expected, 2):
        torch.testing.assert_close(tiny.delta(tmp_path / "out", UP, index), delta, atol=1e-5, rtol=1e-4)
    assert Merging.of(report.options["merging"]) == merging


def test_a_merge_of_an_expert_that_is_none_is_refused(llama, policies, tmp_path):
    with pytest.raises(
        ExpertError, match=r"merging names the experts \['kind'\], but merges are \['centroid'\]"
    ) as caught:
        build_adapter(llama, policies, tmp_path / "out", merging=Merging(experts={"kind": "linear"}), **EXACT)
    assert caught.value.allowed == ["centroid"]
    with pytest.raises(ExpertError, match="names experts itself"):
        Merging(experts={"centroid": Merging(experts={"near": "linear"})})


@pytest.mark.parametrize("scope", ["global", "module"])
def test_one_hot_experts_hold_the_pruned_task_vector(llama, policies, tmp_path, tiny, scope):
    report = build_adapter(llama, policies, tmp_path / "out", **{**EXACT, "pruning": Pruning(0.4, scope)})
    delta = raw(llama, policies["kind"], f"{UP}.weight")
    everything = [raw(llama, policies["kind"], f"{module}.weight").flatten() for module in report.modules]
    values = (torch.cat(everything) if scope == "global" else delta.flatten()).abs()
    threshold = values.sort().values[-(-len(values) * 4 // 10) - 1].item()  # the ceil(0.4 n)-th smallest
    torch.testing.assert_close(tiny.delta(tmp_path / "out", UP, 0), drop_below(delta, threshold), atol=1e-5, rtol=1e-4)
    assert report.policies["kind"].dropped == pytest.approx(0.4, abs=0.01)
    assert report.policies["kind"].prune_threshold == (threshold if scope == "global" else None)
    assert report.modules[UP]["kind"].kept == pytest.approx((delta.abs() >= threshold).float().mean().item())


def test_rescaling_gives_the_length_back(llama, policies, tmp_path, tiny):
    norms = {name: raw(llama, policy, f"{UP}.weight").norm().item() for name, policy in policies.items()}
    for rescale, expected in (("norm", None), ("policy_norm", (norms["kind"] + norms["brief"]) / 2)):
        report = build_adapter(llama, policies, tmp_path / rescale, r=4, rescale=rescale, merging="linear", **QUIET)
        assert tiny.delta(tmp_path / rescale, UP, 0).norm().item() == pytest.approx(norms["kind"], rel=1e-4)
        merged = report.modules[UP]["centroid"]
        assert merged.norm == pytest.approx(expected or merged.tau_norm, rel=1e-4)
        assert tiny.delta(tmp_path / rescale, UP, 2).norm().item() == pytest.approx(merged.norm, rel=1e-4)
    build_adapter(llama, policies, tmp_path / "two", r=4, rescale=2, **QUIET)
    build_adapter(llama, policies, tmp_path / "none", r=4, rescale=None, **QUIET)
    torch.testing.assert_close(tiny.delta(tmp_path / "two", UP, 0), 2 * tiny.delta(tmp_path / "none", UP, 0))


def test_layout_of_the_adapter(llama, policies, tmp_path, tiny):
    build_adapter(llama, policies, tmp_path / "out", experts=[[0.5, 0.5]], routers=[[0.25, 0.75]], r=3, **QUIET)
    config, tensors = tiny.config(tmp_path / "out"), tiny.tensors(tmp_path / "out")
    assert [expert["name"] for expert in config["experts"]] == ["kind", "brief", "centroid"]
    assert config["base_model_name_or_path"] == str(llama)
    assert config["inference_mode"] is True
    assert config["task_type"] == "CAUSAL_LM"
    assert len(config["target_modules"]) == 7
    assert len(tensors) == 7 * 5
    stem = f"base_model.model.{UP}"
    assert tensors[f"{stem}.hoe_A.weight"].shape == (9, 16)
    assert tensors[f"{stem}.hoe_B.weight"].shape == (24, 9)
    deltas = [
        tensors[f"{stem}.hoe_B.weight"][:, i : i + 3] @ tensors[f"{stem}.hoe_A.weight"][i : i + 3] for i in (0, 3, 6)
    ]
    products = torch.stack([torch.stack([(one * other).sum() for other in deltas]) for one in deltas])
    torch.testing.assert_close(tensors[f"{stem}.hoe_length.gram"], products / products.max(), rtol=1e-4, atol=1e-6)
    assert torch.equal(tensors[f"{stem}.hoe_router.weight"], torch.zeros(2, 16))
    # The router votes for brief and the centroid, half and half.
    torch.testing.assert_close(tensors[f"{stem}.hoe_router.bias"].softmax(0), torch.tensor([0.5, 0.5]))
    report = json.loads((tmp_path / "out" / "build_report.json").read_text())
    assert report["options"]["r"]["rank"] == 3
    assert "set_preference" in (tmp_path / "out" / "README.md").read_text()


def test_experts_by_default_and_ranks_of_their_own(llama, policies, tmp_path, tiny):
    one = build_adapter(llama, {"kind": policies["kind"]}, tmp_path / "one", r=2, **QUIET)
    assert [expert["name"] for expert in one.experts] == ["kind"]
    experts = [ExpertSpec([1, 0], name="warm", r=5), ExpertSpec([0.5, 0.5], r=1), [0.2, 0.8]]
    report = build_adapter(llama, policies, tmp_path / "two", r=2, experts=experts, **QUIET)
    assert [(expert["name"], expert["r"]) for expert in report.experts] == [
        ("warm", 5), ("brief", 2), ("centroid", 1), ("e3", 2),
    ]  # fmt: skip
    assert tiny.tensors(tmp_path / "two")[f"base_model.model.{UP}.hoe_A.weight"].shape == (10, 16)


def test_ranks_above_a_layers_are_clamped_and_recorded(llama, policies, tmp_path, tiny):
    build_adapter(llama, policies, tmp_path / "out", r=12, **QUIET)
    pattern = tiny.config(tmp_path / "out")["rank_pattern"]
    narrow = {f"model.layers.0.self_attn.{part}_proj": [8, 8, 8] for part in "kv"}
    assert pattern == narrow


def test_modules_that_no_policy_changed_get_no_expert(llama, tmp_path, tiny):
    noise = tiny.noisy(1)
    policy = tiny.rewrite(llama, tmp_path / "kind", lambda n, t: t if "up_proj" in n else noise(n, t))
    report = build_adapter(llama, {"kind": policy}, tmp_path / "out", **QUIET)
    assert UP not in tiny.config(tmp_path / "out")["target_modules"]
    assert f"{UP} gets no expert: it is the same in the base and in all policies" in report.notes
    same = tiny.rewrite(llama, tmp_path / "same", lambda _, t: t)
    with pytest.raises(CheckpointError, match="equal the base in every weight in scope"):
        build_adapter(llama, {"same": same}, tmp_path / "none", **QUIET)


def test_a_solver_that_fails_gives_way_to_another_and_the_report_says_so(llama, policies, tmp_path, tiny, monkeypatch):
    settings = {"r": 2, "experts": [], "progress": False}
    build_adapter(llama, policies, tmp_path / "exact", svd="exact", **settings)
    real, asked = svd.leading_triplets, []

    def fails(matrix, *arguments, **options):
        asked.append(matrix)
        if len(asked) == 3:
            raise torch.linalg.LinAlgError("did not converge")
        return real(matrix, *arguments, **options)

    monkeypatch.setattr(svd, "leading_triplets", fails)
    report = build_adapter(llama, policies, tmp_path / "out", **settings)
    (failed,) = [
        (module, expert)
        for module, rows in report.modules.items()
        for expert, row in rows.items()
        if row.solver == "exact (randomized failed)"
    ]
    where = f"{failed[0]} of {failed[1]} (exact (randomized failed))"
    note = f"a solver failed and another took its place in 1 of 14 decompositions: {where}"
    assert note in report.notes
    assert f"note: {note}" in report.table()
    index = list(policies).index(failed[1])
    torch.testing.assert_close(
        *(tiny.delta(tmp_path / name, failed[0], index) for name in ("out", "exact")), rtol=0, atol=1e-6
    )


def test_building_twice_gives_the_same_bytes(llama, policies, tmp_path):
    for name in ("first", "second"):
        build_adapter(llama, policies, tmp_path / name, r=2, **QUIET)
    first, second = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("first", "second"))
    assert first == second


def test_dtype_follows_the_base_unless_told(llama, policies, tmp_path, tiny):
    half = tiny.rewrite(llama, tmp_path / "half", lambda _, t: t.bfloat16())
    build_adapter(half, policies, tmp_path / "a", r=2, **QUIET)
    build_adapter(half, policies, tmp_path / "b", r=2, dtype="float32", **QUIET)
    written = {name: t.dtype for name, t in tiny.tensors(tmp_path / "a").items()}
    assert {dtype for name, dtype in written.items() if "hoe_length" not in name} == {torch.bfloat16}
    assert {dtype for name, dtype in written.items() if "hoe_length" in name} == {torch.float32}
    other = {t.dtype for name, t in tiny.tensors(tmp_path / "b").items()}
    assert other == {torch.float32}


def test_values_that_do_not_fit_the_dtype_are_refused(llama, tmp_path, tiny):
    policy = tiny.rewrite(llama, tmp_path / "kind", tiny.noisy(1, scale=1e13))
    with pytest.raises(CheckpointError, match=r"does not fit torch.float16; build with dtype=torch.float32"):
        build_adapter(llama, {"kind": policy}, tmp_path / "out", dtype="float16", **QUIET)


def test_what_experts_cannot_hold_is_reported(llama, policies, tmp_path):
    report = build_adapter(llama, policies, tmp_path / "out", **QUIET)
    policy = report.policies["kind"]
    squared = {
        kind: raw(llama, policies["kind"], name).square().sum().item()
        for kind, name in {"embeddings": "model.embed_tokens.weight", "norms": "model.norm.weight"}.items()
    }
    norms = [f"model.layers.0.{part}_layernorm.weight" for part in ("input", "post_attention")]
    squared["norms"] += sum(raw(llama, policies["kind"], name).square().sum().item() for name in norms)
    total = policy.in_scope_norm**2 + sum(squared.values())
    assert policy.not_captured == pytest.approx({kind: value / total for kind, value in squared.items()})
    assert "not captured of kind (share of the squared change): embeddings" in report.table()


@pytest.mark.filterwarnings("ignore:.*hardly a fine-tune")
def test_ties_among_entries_are_warned_about(llama, tmp_path, tiny):
    def coarse(name, tensor):
        if name.endswith("up_proj.weight"):
            return tensor + torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
        return tensor + 0.25 if name.endswith("proj.weight") else tensor

    policy = tiny.rewrite(llama, tmp_path / "kind", lambda n, t: coarse(n, t.bfloat16().float()))
    base = tiny.rewrite(llama, tmp_path / "rounded", lambda _, t: t.bfloat16().float())
    with pytest.warns(HoEWarning, match="pruning dropped .* of policy 'kind' instead of 40.0%"):
        build_adapter(base, {"kind": policy}, tmp_path / "out", pruning=0.4, **QUIET)


def test_modules_that_pruning_nearly_empties_are_warned_about(llama, tmp_path, tiny):
    noise = tiny.noisy(1)
    policy = tiny.rewrite(
        llama, tmp_path / "kind", lambda n, t: t + (noise(n, t) - t) * (1e-4 if "up_proj" in n else 1)
    )
    with pytest.warns(HoEWarning, match="kept less than 10% of 1 modules: model.layers.0.mlp.up_proj of kind"):
        report = build_adapter(llama, {"kind": policy}, tmp_path / "out", pruning=0.4, **QUIET)
    assert f"{UP} gets no expert: pruning dropped all of its changes" in report.notes
    assert UP not in tiny.config(tmp_path / "out")["target_modules"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_adapter(llama, {"kind": policy}, tmp_path / "b", pruning=Pruning(0.4, "module"), **QUIET)


@pytest.mark.parametrize("error", [RuntimeError, CheckpointError])
@pytest.mark.parametrize("where", ["compute", "write"])
def test_a_build_that_fails_leaves_nothing_and_keeps_the_old_adapter(
    llama, policies, tmp_path, monkeypatch, error, where
):
    build_adapter(llama, policies, tmp_path / "out", r=2, **QUIET)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    listing = sorted(path.name for path in tmp_path.iterdir())
    real = module_builder.ModuleBuilder.build
    calls = []

    def interrupt(*arguments):
        calls.append(arguments)
        if len(calls) > 3:
            raise error("stop")
        return real(*arguments)

    def fail(*arguments, **options):
        raise error("stop")

    if where == "compute":
        monkeypatch.setattr(module_builder.ModuleBuilder, "build", interrupt)
    else:
        monkeypatch.setattr(weight_writer.WeightWriter, "finish", fail)
    for target in ("out", "new"):
        calls.clear()
        with pytest.raises(error, match="stop"):
            build_adapter(llama, policies, tmp_path / target, overwrite=True, r=4, **QUIET)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == listing


def test_the_real_policies(shared_dir, tmp_path):
    models = shared_dir / "models"
    paths = {name: models / "policies" / f"stories260k-{name}" for name in ("positive", "rich", "dialog")}
    report = build_adapter(models / "stories260k", paths, tmp_path / "out", r=16, pruning=0.4, **QUIET)
    assert len(report.modules) == 35
    assert all(policy.dropped == pytest.approx(0.4, abs=1e-4) for policy in report.policies.values())
    assert all(abs(pair["cosine"]) < 0.2 for pair in report.pairs)
    assert all(0.6 < report.totals(name)["energy"] < 0.7 for name in paths)


@pytest.mark.parametrize(
    ("pruning", "reads"),
    [(0.4, 2), (None, 1), (Pruning(0.4, "module"), 1), (Pruning(0.0), 1)],
)
def test_weights_are_read_once_and_twice_only_for_a_threshold_over_all_of_them(
    llama, policies, tmp_path, monkeypatch, pruning, reads
):
    real, read = TaskVectorReader.read, Counter()

    def count(reader, target, names=None):
        read.update((target.name, name) for name in names or reader.policies)
        return real(reader, target, names)

    monkeypatch.setattr(TaskVectorReader, "read", count)
    report = build_adapter(llama, policies, tmp_path / "out", r=2, pruning=pruning, **QUIET)
    assert set(read.values()) == {reads}
    assert len(read) == 2 * len(report.modules)


def test_a_threshold_that_was_guessed_wrong_takes_one_more_look_and_is_the_same(llama, policies, tmp_path, monkeypatch):
    expected = build_adapter(llama, policies, tmp_path / "right", r=2, **QUIET)
    monkeypatch.setattr(policy_statistics, "_sample", lambda inputs, policy: torch.tensor([1e9]))
    found = build_adapter(llama, policies, tmp_path / "wrong", r=2, **QUIET)
    assert found.policies == expected.policies
    first, second = (tmp_path / name / "adapter_model.safetensors" for name in ("right", "wrong"))
    assert first.read_bytes() == second.read_bytes()
