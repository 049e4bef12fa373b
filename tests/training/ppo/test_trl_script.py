"""TRL's scripts examples/scripts/ppo/ppo.py and ppo_tldr.py, called as their documentation calls them, offline.

What they do is done here in their order, in words of our own.

HoERouterTrainer and HoERouterConfig stand in the places of PPOTrainer and PPOConfig. The policy has a HoE adapter, and there is
a reward model for each objective. TRL's distributions do not ship the script; where TRL_CHECKOUT names a clone of its
repository (1.9 to 1.12), ppo.py itself runs too.
"""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    HfArgumentParser,
    LlamaForSequenceClassification,
)

from peft_hoe import HoEWarning
from peft_hoe.training import HoERouterConfig, HoERouterTrainer


@pytest.fixture
def saved(toys: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base, an adapter, a reward model and a dataset on disk."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    toys.make_base().save_pretrained(tmp_path / "base")
    toys.make_tokenizer().save_pretrained(tmp_path / "base")
    toys.make_policy().save_pretrained(tmp_path / "adapter")
    config = toys.make_base().config
    config.num_labels = 1
    torch.manual_seed(3)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "reward")
    toys.make_tokenizer().save_pretrained(tmp_path / "reward")
    (tmp_path / "prompts" / "data").mkdir(parents=True)  # there `datasets` takes a split's name from a file's
    rows = [{"prompt": f"w{i % 28} w{7 * i % 28}"[: None if i % 2 else 3], "completion": "w1"} for i in range(132)]
    (tmp_path / "prompts" / "data" / "descriptiveness-00000-of-00001.jsonl").write_text(
        "\n".join(map(json.dumps, rows))
    )
    return tmp_path


def call(saved: Path) -> list[str]:
    """The arguments as TRL's documentation gives them, with local names, and what a tiny model needs."""
    return [
        "--dataset_name", str(saved / "prompts"), "--dataset_train_split", "descriptiveness", "--learning_rate", "3e-6",
        "--num_ppo_epochs", "1", "--num_mini_batches", "1",
        "--output_dir", str(saved / "ppo"), "--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "1",
        "--total_episodes", "32", "--verdict_texts", "0",
        "--model_name_or_path", str(saved / "base"), "--sft_model_path", str(saved / "base"),
        "--reward_model_path", str(saved / "reward"), "--missing_eos_penalty", "1.0",
        "--router", "r0", "--response_length", "8", "--use_cpu", "true", "--report_to", "none", "--payoff_prompts", "16",
    ]  # fmt: skip


def check_saved(saved: Path, printed: str) -> None:
    """The router that was to train is saved as trained, and samples were shown in training and at the end."""
    if importlib.util.find_spec("rich") is not None:
        assert printed.count("model response") >= 2
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved / "base"), saved / "ppo")
    assert [router.trained for router in loaded.peft_config["default"].routers] == [True, False]


@pytest.mark.skipif("TRL_CHECKOUT" not in os.environ, reason="TRL_CHECKOUT names no clone of TRL's repository")
def test_the_file_itself(saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The file as it is; the two names are ours, and its trainer gets the adapter and a reward for the second objective."""
    ppo = pytest.importorskip("trl.experimental.ppo")
    made: list[HoERouterTrainer] = []

    def trainer(**arguments: Any) -> HoERouterTrainer:
        torch.manual_seed(5)
        other = LlamaForSequenceClassification(arguments["reward_model"].config)
        arguments |= {
            "reward_model": {"low": arguments["reward_model"], "high": other},
            "peft_config": saved / "adapter",
        }
        with pytest.warns(HoEWarning, match="ref_model is not used"):
            made.append(HoERouterTrainer(**arguments))
        return made[0]

    monkeypatch.setattr(ppo, "PPOTrainer", trainer)
    monkeypatch.setattr(ppo, "PPOConfig", HoERouterConfig)
    script = Path(os.environ["TRL_CHECKOUT"]) / "examples" / "scripts" / "ppo" / "ppo.py"
    monkeypatch.setattr(sys, "argv", [str(script), *call(saved)])
    runpy.run_path(str(script), run_name="__main__")

    assert (made[0].state.global_step, made[0].state.episode) == (4, 32)
    check_saved(saved, capsys.readouterr().out)


def loaded(kind: Any, path: Any, model_args: Any, **others: Any) -> Any:
    """A model as the scripts load it, with what `ModelConfig` says."""
    from trl import get_quantization_config

    dtype = model_args.dtype if model_args.dtype in ("auto", None) else getattr(torch, model_args.dtype)
    settings = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": dtype,
    }
    assert get_quantization_config(model_args) is None
    return kind.from_pretrained(path, **settings, **others)


def tokenized(rows: Any, tokenizer: Any, settings: Any, *, with_lengths: bool) -> Any:
    """Rows of `input_ids` alone, made in batches; or one by one, with their lengths beside them, by which some are left out."""
    others = {"remove_columns": rows.column_names, "num_proc": settings.dataset_num_proc}

    def ids(texts: Any) -> Any:
        return tokenizer(texts, padding=False)["input_ids"]

    if not with_lengths:
        return rows.map(lambda batch: {"input_ids": ids(batch["prompt"])}, batched=True, **others)
    found = rows.map(lambda row: {"input_ids": ids(row["prompt"]), "lengths": len(ids(row["prompt"]))}, **others)
    return found.filter(lambda row: row["lengths"] <= 512, num_proc=settings.dataset_num_proc)


@pytest.mark.parametrize("script", ["ppo", "ppo_tldr"])
def test_the_script_runs_to_its_end(saved: Path, capsys: pytest.CaptureFixture[str], script: str) -> None:
    """A padding token that is added and not resized for, a fine for the missing end without a stop token, tokenised rows.

    The policy has its adapter, or gets it by `peft_config`, where the script hands on what `get_peft_config` gave it.
    """
    trl = pytest.importorskip("trl")
    from accelerate import PartialState
    from datasets import load_dataset

    tldr = script == "ppo_tldr"
    more = ["--stop_token", "eos", "--eval_strategy", "steps", "--eval_steps", "2"] if tldr else []
    parser = HfArgumentParser((trl.ScriptArguments, HoERouterConfig, trl.ModelConfig))
    script_args, training_args, model_args = parser.parse_args_into_dataclasses([*call(saved), *more])
    shutil.rmtree(training_args.output_dir, ignore_errors=True)

    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, padding_side="left")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    scorer, policy = training_args.reward_model_path, training_args.sft_model_path
    value_model = loaded(AutoModelForSequenceClassification, scorer, model_args, num_labels=1)
    reward_model = loaded(AutoModelForSequenceClassification, scorer, model_args, num_labels=1)
    model, peft_config = loaded(AutoModelForCausalLM, policy, model_args), trl.get_peft_config(model_args)
    assert peft_config is None
    if tldr:
        peft_config = saved / "adapter"
    else:
        model = PeftModel.from_pretrained(model, saved / "adapter")
    dataset = load_dataset(
        script_args.dataset_name, name=script_args.dataset_config, split=script_args.dataset_train_split
    )
    train, held_out = dataset.select(range(len(dataset) - 100)), dataset.select(range(len(dataset) - 100, len(dataset)))
    with PartialState().local_main_process_first():
        train, held_out = (tokenized(rows, tokenizer, training_args, with_lengths=tldr) for rows in (train, held_out))
    torch.manual_seed(5)
    with pytest.warns(HoEWarning, match=r"kl_coef is 0 .*PPOConfig's is 0\.05.*ref_model is not used"):
        trainer = HoERouterTrainer(
            args=training_args,
            processing_class=tokenizer,
            model=model,
            ref_model=loaded(AutoModelForCausalLM, policy, model_args),
            reward_model={"low": reward_model, "high": LlamaForSequenceClassification(reward_model.config)},
            value_model=value_model,
            train_dataset=train,
            eval_dataset=held_out,
            peft_config=peft_config,
        )
    assert trainer.ref_model is None
    trainer.train()
    trainer.save_model(training_args.output_dir)
    assert not training_args.push_to_hub
    trainer.generate_completions()

    assert (trainer.state.global_step, trainer.state.episode) == (4, 32)
    assert sum("eval_objective/scores" in entry for entry in trainer.state.log_history) == (2 if tldr else 0)
    check_saved(saved, capsys.readouterr().out)
