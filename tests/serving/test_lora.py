from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForSequenceClassification

import peft_hoe
from peft_hoe import (
    CheckpointError,
    ExpertError,
    HoEConfig,
    HoEError,
    HoELayer,
    PreferenceError,
    RouterSpec,
    StaticMergeError,
)
from peft_hoe.serving import export_lora

EXACT = {"atol": 1e-11, "rtol": 0}
GRID = [[1.0, 0.0], [0.6, 0.4], [0.3, 0.7]]

WITHOUT_US = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
ids = torch.load(sys.argv[1])
for lora in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(lora + "/../base", dtype=torch.float64)
    model = PeftModel.from_pretrained(model, lora, autocast_adapter_dtype=False).double()
    with torch.no_grad():
        torch.save(model(input_ids=ids).logits, lora + "/logits.pt")
assert "peft_hoe" not in sys.modules
"""


@pytest.mark.slow
def test_it_loads_without_this_package_and_gives_the_same_logits(steerable, toys, ids, tmp_path):
    torch.save(ids, tmp_path / "ids.pt")
    wanted = {}
    everywhere = {"target_embeddings": ["embed_tokens", "lm_head"], "target_norms": ["input_layernorm", "norm"]}
    kinds = {
        "linear": {},
        "norm": {"interpolation": "norm"},
        "everywhere": everywhere,
        "tied": {**everywhere, "tied": True},
    }
    for kind, settings in kinds.items():
        model = steerable(**settings)
        toys.make_base(tied=kind == "tied").double().save_pretrained(tmp_path / kind / "base")
        for number, preference in enumerate(GRID):
            folder = str(tmp_path / kind / str(number))
            assert model.export_lora(preference, folder).lost == 0
            with torch.no_grad():
                wanted[folder] = model(input_ids=ids, preference=preference).logits
    subprocess.run(
        [sys.executable, "-c", WITHOUT_US, str(tmp_path / "ids.pt"), *wanted], check=True, capture_output=True
    )
    for folder, expected in wanted.items():
        torch.testing.assert_close(torch.load(f"{folder}/logits.pt"), expected, **EXACT)


def test_files_and_model_export_the_same(steerable, tmp_path):
    model = steerable(interpolation="norm")
    model.save_pretrained(tmp_path / "hoe")
    model.export_lora({"low": 0.6, "high": 0.4}, tmp_path / "a")
    report = peft_hoe.export_lora(tmp_path / "hoe", [0.6, 0.4], tmp_path / "b")
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert json.loads((tmp_path / "b" / "export_report.json").read_text()) == report.to_dict()
    assert report.preference == {"low": 0.6, "high": 0.4}
    assert sum(report.experts.values()) == pytest.approx(1)


def test_one_expert_is_its_own_factors(steerable, tmp_path):
    model = steerable()
    report = model.export_lora([1, 0], tmp_path / "lora")
    assert (report.rank, report.even, report.modules) == (4, True, 14)
    written = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for layer in model.modules():
        if isinstance(layer, HoELayer):
            a, b = layer.factors("default")
            assert torch.equal(written[f"base_model.model.{layer.module_name}.lora_A.weight"], a[:4])
            assert torch.equal(written[f"base_model.model.{layer.module_name}.lora_B.weight"], b[:, :4])


def test_ranks_may_differ_and_experts_may_be_absent(toys, as_lora, ids, tmp_path):
    ranks = {"layers.0.self_attn.q_proj": [0, 2, 3], "layers.1.mlp.up_proj": [5, 0, 0]}
    model = get_peft_model(
        toys.make_base().double(),
        HoEConfig(objectives=["low", "high"], r=4, rank_pattern=ranks, target_modules="all-linear", task_type="CAUSAL_LM",
                  init_weights=False),
    ).double().eval()  # fmt: skip
    for preference in ([1, 0], [0, 1], [0.8, 0.2]):
        folder = tmp_path / str(preference)
        report = model.export_lora(preference, folder)
        assert not report.even
        assert any("--even" in note for note in report.notes)
        with torch.no_grad():
            torch.testing.assert_close(
                as_lora(folder, ids), model(input_ids=ids, preference=preference).logits, **EXACT
            )
        even = model.export_lora(preference, tmp_path / f"even {preference}", even=True)
        assert even.even
        config = LoraConfig.from_pretrained(tmp_path / f"even {preference}")
        assert (config.rank_pattern, config.r) == ({}, report.rank)
        torch.testing.assert_close(as_lora(tmp_path / f"even {preference}", ids), as_lora(folder, ids), **EXACT)


def test_a_name_that_ends_another_name_keeps_its_own_rank(ids, tmp_path):
    """PEFT looks `rank_pattern` up by the end of a name, and writes its keys in alphabetical order."""

    class Inner(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(4, 4, dtype=torch.float64)

    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.x = torch.nn.Linear(4, 4, dtype=torch.float64), Inner()

        def forward(self, x):
            return self.x.fc(self.fc(x))

    torch.manual_seed(0)
    base = Outer()
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    config = HoEConfig(
        objectives=["a"], r=3, target_modules=["fc"], rank_pattern={"^fc": 1, "x.fc": 2}, init_weights=False
    )
    model = get_peft_model(base, config, autocast_adapter_dtype=False).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    expected = model(x)
    peft_hoe.export_lora(model, [1.0], tmp_path / "lora")
    plain = Outer()
    plain.load_state_dict(weights)
    got = PeftModel.from_pretrained(plain, tmp_path / "lora").double()(x)
    torch.testing.assert_close(got, expected, **EXACT)


def test_a_smaller_rank_tells_what_it_lost(steerable, tmp_path):
    model = steerable()
    model.export_lora([0.6, 0.4], tmp_path / "exact")
    report = model.export_lora([0.6, 0.4], tmp_path / "cut", rank=5)
    assert report.rank == 5
    exact, cut = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("exact", "cut"))
    total = lost = 0.0
    shares = []
    for key in exact:
        if "lora_A" in key:
            other = key.replace("lora_A", "lora_B")
            delta = exact[other] @ exact[key]
            best = torch.linalg.svdvals(delta)[5:].norm() ** 2
            difference = (delta - cut[other].double() @ cut[key].double()).norm() ** 2
            assert float(difference) == pytest.approx(float(best), rel=1e-5)
            total, lost = total + float(delta.norm() ** 2), lost + float(difference)
            shares.append(float((difference / delta.norm() ** 2).sqrt()))
    assert report.lost == pytest.approx((lost / total) ** 0.5, rel=1e-6)
    assert report.most_lost == pytest.approx(max(shares), rel=1e-6)


def test_a_narrower_dtype_tells_what_it_lost(steerable, tmp_path):
    report = steerable().export_lora([0.6, 0.4], tmp_path / "half", dtype="bfloat16")
    assert report.dtype == "bfloat16"
    assert 2**-12 < report.lost < 2**-8  # two factors of 8 bits each
    with pytest.raises(HoEError, match="int8"):
        steerable().export_lora([0.6, 0.4], tmp_path / "other", dtype="int8")


def test_above_512_it_says_which_rank_fits_and_what_that_costs(toys, tmp_path):
    config = HoEConfig(
        objectives=["a", "b"], r=300, target_modules=["q_proj"], task_type="CAUSAL_LM", init_weights=False
    )
    model = get_peft_model(toys.make_base(), config)
    report = model.export_lora([0.75, 0.25], tmp_path / "lora")
    note = next(note for note in report.notes if "512" in note)
    assert report.rank == 600
    assert "--rank 512 fits" in note
    assert "0.00%" in note  # the module is 32 wide, so nothing is lost
    assert "--max-lora-rank 320" in model.export_lora([1, 0], tmp_path / "one").notes[0]


# -- trained routers ---


def test_trained_routers_need_prompts_or_a_word(steerable, tmp_path):
    model = steerable(trained=("r0",))
    with pytest.raises(StaticMergeError, match=r"r0.*prompts.*drop"):
        model.export_lora([0.25, 0.75], tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    model.export_lora([1, 0], tmp_path / "lora")  # no router is in the way of a corner
    with pytest.raises(HoEError, match="routers is 'never'"):
        model.export_lora([0.25, 0.75], tmp_path / "b", routers="never")


def test_dropped_and_static_routers(steerable, as_lora, ids, tmp_path):
    model = steerable(trained=("r0",))
    untrained = steerable()
    report = model.export_lora([0.3, 0.7], tmp_path / "static", routers="static")
    assert (report.trained_routers, report.routers) == (["r0"], "votes before training")
    with torch.no_grad():
        expected = untrained(input_ids=ids, preference=[0.3, 0.7]).logits
    torch.testing.assert_close(as_lora(tmp_path / "static", ids), expected, **EXACT)
    report = model.export_lora([0.3, 0.7], tmp_path / "drop", routers="drop")
    assert report.experts == pytest.approx({"high": 0.4, "centroid": 0.6})
    model.set_preference([0.3, 0.7])
    merged = model.merge_and_unload(routers="drop")
    torch.testing.assert_close(as_lora(tmp_path / "drop", ids), merged(input_ids=ids).logits, **EXACT)


def test_routers_that_ignore_the_input_freeze_exactly(steerable, as_lora, toys, tokenizer, prompts, ids, tmp_path):
    model = steerable(trained=("r0", "r1"), input_matters=False, interpolation="norm")
    report = model.export_lora([0.3, 0.7], tmp_path / "lora", prompts=prompts[:2], tokenizer=tokenizer)
    with torch.no_grad():
        expected = model(input_ids=ids, preference=[0.3, 0.7]).logits
    torch.testing.assert_close(as_lora(tmp_path / "lora", ids), expected, **EXACT)
    assert "mean votes of each module over 2 prompts" in report.routers
    assert report.logits["kl"] == pytest.approx(0, abs=1e-12)
    assert report.logits["agreement"] == 1
    assert report.logits["largest"] < 1e-11


@pytest.mark.parametrize("preference", [[0.25, 0.75], [0.3, 0.7]])
def test_routers_by_module_leave_exactly_without_prompts(steerable, as_lora, ids, tmp_path, preference):
    router = RouterSpec([0.25, 0.75], kind="module")
    model = steerable(routers=[router, [0.75, 0.25]], trained=("r0",), input_matters=False, interpolation="norm")
    report = model.export_lora(preference, tmp_path / "lora")
    with torch.no_grad():
        expected = model(input_ids=ids, preference=preference).logits
        static = model(input_ids=ids, preference=preference, routers="static").logits
    torch.testing.assert_close(as_lora(tmp_path / "lora", ids), expected, **EXACT)
    assert not torch.allclose(static, expected, atol=1e-3)
    assert report.trained_routers == []


def test_calibration_takes_the_mean_and_tells_how_far_it_is(steerable, as_lora, tokenizer, tmp_path):
    model = steerable(trained=("r0",))
    texts = ["w1 w2 w3", "w9 w8"]
    report = model.export_lora([0.25, 0.75], tmp_path / "lora", prompts=texts, tokenizer=tokenizer)
    votes, divergence, places = [], 0.0, 0
    for text in texts:
        batch = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad(), peft_hoe.record_votes(model) as recorded:
            routed = model(input_ids=batch, preference=[0.25, 0.75]).logits.log_softmax(-1)
            frozen = as_lora(tmp_path / "lora", batch).log_softmax(-1)
        votes.append(recorded["model.layers.1.mlp.up_proj"][0])
        divergence += float((routed.exp() * (routed - frozen)).sum())
        places += routed.shape[1]
    mean = torch.cat(votes).mean(0)  # (L,): the router has the whole weight here
    layer = next(
        m for m in model.modules() if isinstance(m, HoELayer) and m.module_name == "model.layers.1.mlp.up_proj"
    )
    a, b = layer.factors("default")
    written = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.1.mlp.up_proj"
    got = written[f"{stem}.lora_B.weight"] @ written[f"{stem}.lora_A.weight"]
    torch.testing.assert_close(got, b * mean.repeat_interleave(4) @ a, **EXACT)
    assert report.logits["kl"] == pytest.approx(divergence / places, rel=1e-9)
    assert report.logits["kl"] > 1e-4
    assert report.logits["tokens"] == places == 5


def test_what_calibration_refuses(steerable, tokenizer, tmp_path):
    model = steerable(trained=("r0",))
    model.save_pretrained(tmp_path / "hoe")
    with pytest.raises(StaticMergeError, match="need a model"):
        export_lora(tmp_path / "hoe", [0.25, 0.75], tmp_path / "x", prompts=["w1"], tokenizer=tokenizer)
    with pytest.raises(HoEError, match="tokenizer"):
        model.export_lora([0.25, 0.75], tmp_path / "x", prompts=["w1"])
    with pytest.raises(HoEError, match="prompts is empty"):
        model.export_lora([0.25, 0.75], tmp_path / "x", prompts=[], tokenizer=tokenizer)
    with pytest.raises(HoEError, match="no token"):
        model.export_lora([0.25, 0.75], tmp_path / "x", prompts=[""], tokenizer=tokenizer)


# -- kinds of models ---


def test_a_head_that_is_saved_whole_goes_along(tmp_path, ids):
    def base():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_labels=3,
            pad_token_id=0,
        )  # fmt: skip
        return LlamaForSequenceClassification(config).double().eval()

    config = HoEConfig(
        objectives=["a", "b"], r=2, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS", init_weights=False
    )
    model = get_peft_model(base(), config, autocast_adapter_dtype=False).double().eval()
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            torch.nn.init.normal_(parameter)
    expected = model(input_ids=ids, preference=[0.3, 0.7]).logits
    model.save_pretrained(tmp_path / "hoe")
    for name, source in {"model": model, "files": tmp_path / "hoe"}.items():
        report = export_lora(source, [0.3, 0.7], tmp_path / name)
        assert any("as vLLM does" in note for note in report.notes)
        loaded = PeftModel.from_pretrained(base(), tmp_path / name, autocast_adapter_dtype=False).double()
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, **EXACT)


def test_conv1d_weights_lie_the_other_way_round(tmp_path, ids):
    def base():
        torch.manual_seed(0)
        return (
            GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2)).double().eval()
        )

    config = HoEConfig(objectives=["a", "b"], r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", init_weights=False)
    model = get_peft_model(base(), config, autocast_adapter_dtype=False).double().eval()
    expected = model(input_ids=ids, preference=[0.3, 0.7]).logits
    model.export_lora([0.3, 0.7], tmp_path / "lora")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "lora", autocast_adapter_dtype=False).double()
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected, **EXACT)


def test_a_plain_model_with_a_loaded_adapter_exports_too(steerable, toys, as_lora, ids, tmp_path):
    steerable().save_pretrained(tmp_path / "hoe")
    base = toys.make_base().double()
    base.load_adapter(str(tmp_path / "hoe"), adapter_name="mine")
    peft_hoe.export_lora(base, [0.6, 0.4], tmp_path / "lora", adapter_name="mine")
    with torch.no_grad():
        torch.testing.assert_close(
            as_lora(tmp_path / "lora", ids), base(input_ids=ids, preference=[0.6, 0.4]).logits, atol=1e-5, rtol=0
        )


# -- errors ---


def test_what_cannot_be_exported_says_so(steerable, toys, tmp_path):
    model = steerable()
    with pytest.raises(PreferenceError, match=r"sums to 1\.2"):
        model.export_lora([0.6, 0.6], tmp_path / "lora")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(CheckpointError, match="not empty"):
        model.export_lora([0.6, 0.4], tmp_path / "full")
    with pytest.raises(ExpertError, match="rank is 0"):
        model.export_lora([0.6, 0.4], tmp_path / "lora", rank=0)
    with pytest.raises(CheckpointError, match="neither a directory nor a Hub repository"):
        export_lora("no/such-adapter", [0.6, 0.4], tmp_path / "lora")
    with pytest.raises(PreferenceError, match="no HoE adapter"):
        export_lora(toys.make_base(), [0.6, 0.4], tmp_path / "lora")
    lora = get_peft_model(toys.make_base(), LoraConfig(r=2, task_type="CAUSAL_LM"))
    lora.save_pretrained(tmp_path / "another")
    with pytest.raises(CheckpointError, match="LORA"):
        export_lora(tmp_path / "another", [0.6, 0.4], tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_damaged_files_are_named_and_nothing_is_left_behind(steerable, tmp_path):
    steerable().save_pretrained(tmp_path / "hoe")
    path = tmp_path / "hoe" / "adapter_model.safetensors"
    tensors = {
        key: tensor.clone() for key, tensor in load_file(path).items()
    }  # old safetensors map the file that is written
    key = next(key for key in tensors if "q_proj.hoe_B" in key)
    save_file({**tensors, key: tensors[key] * float("nan")}, path)
    with pytest.raises(CheckpointError, match=r"q_proj.hoe_B.weight' holds NaN"):
        export_lora(tmp_path / "hoe", [0.6, 0.4], tmp_path / "lora")
    save_file({**tensors, key: tensors[key][:, :3].contiguous()}, path)
    with pytest.raises(CheckpointError, match=r"q_proj.hoe_B.weight' has shape \(32, 3\)"):
        export_lora(tmp_path / "hoe", [0.6, 0.4], tmp_path / "lora")
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, path)
    with pytest.raises(CheckpointError, match="is missing"):
        export_lora(tmp_path / "hoe", [0.6, 0.4], tmp_path / "lora")
    assert sorted(child.name for child in Path(tmp_path).iterdir()) == ["hoe"]


def test_it_replaces_a_lora_only_when_told_to(steerable, tmp_path):
    model = steerable()
    model.export_lora([1, 0], tmp_path / "lora")
    with pytest.raises(CheckpointError, match="overwrite"):
        model.export_lora([0, 1], tmp_path / "lora")
    assert model.export_lora([0, 1], tmp_path / "lora", overwrite=True).preference == {"low": 0, "high": 1}
