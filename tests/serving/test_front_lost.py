"""The hypervolume that frozen votes lose, measured as the adapter's sweep was."""

from __future__ import annotations

import json

import numpy as np
import pytest
from peft import PeftModel

from peft_hoe import Decoding, HoEError, StaticMergeError, Sweep, sweep
from peft_hoe.cli import main
from peft_hoe.errors import RewardError
from peft_hoe.serving import export_lora
from peft_hoe.serving.atlas import export_atlas
from peft_hoe.serving.dense import export_merged

pytest.importorskip("moocore")

POINTS = [[1, 0], [0.6, 0.4], [0.25, 0.75], [0, 1]]
# Six prompts at four preferences: how few they are is not what is tested.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::peft_hoe.HoEWarning")]


@pytest.fixture
def rewards(toys):
    return {"low": toys.low, "high": toys.high}


@pytest.fixture
def swept(tokenizer, prompts, rewards):
    def make(model, **options):
        options = {"decoding": Decoding(8), "progress": False, **options}
        return sweep(model, tokenizer, prompts, rewards, POINTS, **options)

    return make


def test_frozen_votes_lose_what_the_loras_sweep_says(steerable, swept, toys, rewards, tokenizer, prompts, tmp_path):
    model = steerable(trained=("r0", "r1"))
    found = swept(model)
    report = model.export_lora(
        [0.25, 0.75], tmp_path / "lora", prompts=prompts[:2], tokenizer=tokenizer, sweep=found, rewards=rewards
    )
    assert report.hypervolume is not None
    # By hand: every LoRA in plain PEFT writes the same prompts.
    scores = []
    for number, point in enumerate(POINTS):
        model.export_lora(point, tmp_path / str(number), prompts=prompts[:2], tokenizer=tokenizer)
        base = toys.make_base().double()
        lora = PeftModel.from_pretrained(base, tmp_path / str(number), autocast_adapter_dtype=False).double().eval()
        texts = []
        for prompt in prompts:
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
            written = lora.generate(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=2)
            texts.append(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))
        scores.append(np.stack([toys.low(prompts, texts), toys.high(prompts, texts)], axis=1))
    by_hand = Sweep(
        name="by hand", objectives=found.objectives, preferences=found.preferences, prompts=found.prompts,
        rewards=np.stack(scores)[None, :, :, None], completions=found.completions, normalizer=found.normalizer,
        payoff_source=found.payoff_source,
    )  # fmt: skip
    values = found.compare(by_hand).values
    lost = values["hypervolume A - B"]
    assert report.hypervolume == pytest.approx(
        {
            "adapter": float(values["hypervolume A"].estimate),
            "exported": float(values["hypervolume B"].estimate),
            "lost": float(lost.estimate),
            "low": float(lost.low),
            "high": float(lost.high),
            "preferences": 4,
            "swept": 2,  # at the corners, no router votes
            "prompts": len(prompts),
        }
    )
    assert report.hypervolume["lost"] != 0
    assert json.loads((tmp_path / "lora" / "export_report.json").read_text())["hypervolume"] == report.hypervolume
    assert "2 of 4 preferences differ" in report.table()
    assert swept(model).completions == found.completions  # the model is as it was


def test_what_is_exact_loses_nothing_and_a_smaller_rank_may(steerable, swept, rewards, tokenizer, tmp_path):
    model = steerable()
    found = swept(model)
    found.save(tmp_path / "sweep")
    options = {"tokenizer": tokenizer, "sweep": tmp_path / "sweep", "rewards": rewards}
    exact = model.export_lora([0.6, 0.4], tmp_path / "lora", **options).hypervolume
    assert (exact["lost"], exact["low"], exact["high"], exact["swept"]) == (0, 0, 0, 0)
    cut = export_atlas(model, 0.5, tmp_path / "atlas", rank=1, **options)
    assert all(report.hypervolume == cut[0].hypervolume for report in cut)
    assert cut[0].hypervolume["swept"] == 4


def test_embeddings_and_norms_are_frozen_too(steerable, swept, rewards, tokenizer, toys, tmp_path):
    model = steerable(
        trained=("r0", "r1"), input_matters=False, target_embeddings=["embed_tokens"], target_norms=["norm"]
    )
    toys.make_base().double().save_pretrained(tmp_path / "base")
    report = export_merged(
        model, [0.25, 0.75], tmp_path / "base", tmp_path / "dense", prompts=["w1 w2"], tokenizer=tokenizer,
        sweep=swept(model), rewards=rewards,
    )  # fmt: skip
    assert report.hypervolume["swept"] == 2
    assert report.hypervolume["lost"] == pytest.approx(0, abs=1e-12)  # these routers do not read


def test_sampled_texts_are_drawn_as_in_the_sweep(steerable, swept, rewards, tokenizer, tmp_path):
    model = steerable(trained=("r0", "r1"), input_matters=False)
    found = swept(model, decoding=Decoding(8, do_sample=True), texts=2, seed=5)
    report = model.export_lora(
        [0.25, 0.75], tmp_path / "lora", prompts=["w1 w2"], tokenizer=tokenizer, sweep=found, rewards=rewards
    )
    assert report.hypervolume["low"] <= report.hypervolume["lost"] <= report.hypervolume["high"]


def test_a_sweep_of_anything_else_is_refused_by_name(steerable, swept, rewards, tokenizer, toys, prompts, tmp_path):
    model, other = steerable(trained=("r0", "r1")), steerable()
    found = swept(model)

    def refused(match, *, error=HoEError, **options):
        options = {"tokenizer": tokenizer, "prompts": prompts[:1], "sweep": found, "rewards": rewards, **options}
        with pytest.raises(error, match=match):
            export_lora(options.pop("model", model), [0.25, 0.75], tmp_path / "lora", **options)

    refused("the sweep is of another adapter", model=other)
    refused("sweep is a dict; give a Sweep", sweep={})
    refused("cannot read a sweep", sweep=tmp_path / "nowhere")
    refused("there are no rewards", rewards=None, error=RewardError)
    refused(r"rewards of \['high'\] do not score the sweep's texts as", rewards={"low": toys.low, "high": toys.low})
    refused("without a tokenizer", tokenizer=None)
    refused("rewards= was given without a sweep", sweep=None)
    refused("choose experts by the input", prompts=None, error=StaticMergeError)
    refused("made with routers='drop'", sweep=swept(model, routers="drop"))
    refused("is of 2 runs of training", sweep=Sweep.stack([found, found]))
    told = [(point, p, "w1") for point in POINTS for p in range(len(prompts))]
    elsewhere = Sweep.from_generations(told, rewards, prompts=prompts, objectives=["low", "high"])
    refused("does not say how its texts were written", sweep=elsewhere)
    model.save_pretrained(tmp_path / "hoe")
    refused("sweep= was given without a model", model=tmp_path / "hoe", prompts=None, tokenizer=None)
    assert not (tmp_path / "lora").exists()


def test_from_the_command_line(toys, tokenizer, prompts, tmp_path, capsys):
    toys.make_base().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = toys.make_policy()
    model.mark_trained("r0")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "hoe")
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    (tmp_path / "points.json").write_text(json.dumps(POINTS))
    adapter, file = str(tmp_path / "hoe"), str(tmp_path / "prompts.json")
    sources = ["--reward", "low=router_toys:low", "--reward", "high=router_toys:high"]
    command = ["sweep", adapter, "--prompts", file, "--output", str(tmp_path / "sweep"), "--max-new-tokens", "8"]
    assert main([*command, "--preferences", str(tmp_path / "points.json"), "--cpu", "--quiet", *sources]) == 0
    command = ["export", adapter, "--preference", "0.25,0.75", "--output", str(tmp_path / "lora"), "--prompts", file]
    assert main([*command, "--sweep", str(tmp_path / "sweep")]) == 2
    assert "--sweep cannot be used here: it goes with --reward NAME=SOURCE" in capsys.readouterr().err
    assert main([*command, *sources]) == 2
    assert "--reward cannot be used here: it goes with --sweep DIR" in capsys.readouterr().err
    assert main([*command, "--sweep", str(tmp_path / "sweep"), *sources]) == 0
    said = capsys.readouterr().out
    assert "front:      hypervolume" in said
    assert f"1 of 4 preferences differ, {len(prompts)} prompts" in said
