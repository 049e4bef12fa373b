"""What TRL's own tests of PPO check (its tests/experimental/test_ppo_trainer.py), offline and with HoERouterTrainer in place of
PPOTrainer, on tiny random models and in our own words.

| TRL's test | here |
|---|---|
| TestPPOTrainer.test_basic_training | test_basic_training |
| TestPPOTrainer.test_peft_training | test_peft_training, test_lora_config_is_refused |
| test_uneven_micro_batch_stats_are_pooled (newer than 1.12) | test_uneven_micro_batches_are_pooled |
| test_ratio_var_ignores_unwritten_stats (newer than 1.12) | test_ratio_stays_at_one |
| TestBatchGeneration.test_mini_batch_generation | test_generation_in_chunks[3]; logits are not kept from generation |
| TestBatchGeneration.test_single_batch_generation | test_generation_in_chunks[8] |
| TestCore.test_masked_mean, _var, _whiten | test_masked_tokens_do_not_enter_the_scaling |
| value heads: test_value_head, _shape | test_value_heads |
| value heads: test_value_head_init_random | not taken: ours start at zero on purpose (test_trained_router.py) |
| value heads: test_value_head_not_str | does not apply: models are never loaded by name |
| value heads: test_inference | test_value_heads |
| value heads: test_generate, one per architecture | test_architectures |
| value heads: test_dropout_config, _kwargs | test_dropout_is_off: the heads have none, and the policy's is off |
| value heads: test_transformers_bf16_kwargs | test_sixteen_bit_policy |
| value heads: test_from_save_trl, _sharded | test_heads_return_with_a_checkpoint; a few KiB are not sharded |
| value heads: test_from_save_transformers, _sharded | test_save_and_load: the adapter is a plain one, without heads |
| value heads: test_push_to_hub | skipped by TRL too: it needs a network |
| TestSeq2SeqValueHeadModel, all | do not apply; test_encoder_decoders_are_refused |
| TestPeftModel.test_create_peft_model, _from_config | test_peft_training, test_trainable_parameters |
| TestPeftModel.test_peft_requires_grad | test_trainable_parameters |
| TestPeftModel.test_check_peft_model_nb_trainable_params | test_trainable_parameters |
| TestPeftModel.test_create_bnb_peft_model_from_config | not taken: needs bitsandbytes and a GPU |
| TestPeftModel.test_save_pretrained_peft, test_load_pretrained_peft | test_save_and_load |
| TestPeftModel.test_continue_training_peft_model | test_continue_training |

Arguments of PPOConfig that TRL's suite leaves out: test_epochs_count_updates, test_missing_eos_penalty,
test_missing_eos_penalty_without_a_stop_token.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaForSequenceClassification

from peft_hoe import Decoding, HoEConfig, HoEError
from peft_hoe.generation.responses import generate_responses
from peft_hoe.training.ppo.advantages import mix_advantages

Make = Callable[..., Any]
Tensors = dict[str, torch.Tensor]

HOE: dict[str, Any] = {
    "objectives": ["low", "high"],
    "routers": [[0.25, 0.75]],
    "r": 4,
    "target_modules": "all-linear",
    "task_type": "CAUSAL_LM",
    "init_weights": False,
}
TINY: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ARCHITECTURES = ["bloom", "cohere", "gemma", "gemma2", "gpt2", "gpt_neox", "mistral", "opt", "phi3", "qwen2"]
FOUR_ROWS_TWICE = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 2, "num_ppo_epochs": 2}


@pytest.fixture
def script(toys: ModuleType) -> dict[str, Any]:
    """Arguments as a PPO script passes them: classifiers as reward and value models, tokenised rows that end with EOS."""
    tokenizer, config = toys.make_tokenizer(), toys.make_base().config
    config.num_labels = 1
    torch.manual_seed(2)
    texts = [row["prompt"] for row in toys.PROMPTS]
    ids = [[*row, tokenizer.eos_token_id] for row in tokenizer(texts)["input_ids"]]
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
    return {
        "processing_class": tokenizer,
        "ref_model": None,
        "reward_model": [LlamaForSequenceClassification(config).eval() for _ in range(2)],
        "value_model": LlamaForSequenceClassification(config),
        "train_dataset": rows,
        "eval_dataset": rows.select(range(8)),
        "normalizer": None,
    }


def copies(module: torch.nn.Module) -> Tensors:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def moved(module: torch.nn.Module, before: Tensors) -> set[str]:
    """Names of the parameters that changed, of those that were there before."""
    return {name for name, p in module.named_parameters() if name in before and not torch.equal(before[name], p)}


def trainable(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def tiny(architecture: str) -> Any:
    torch.manual_seed(0)
    own = {"ffn_dim": 48, "word_embed_proj_dim": 32} if architecture == "opt" else {}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **TINY, **own)).eval()


# -- TestPPOTrainer ---


def test_basic_training(make_trainer: Make, toys: ModuleType, script: dict[str, Any]) -> None:
    """With a reference model and everything of another model's size; all that moves in the policy is the router."""
    model, reference = toys.make_policy(), toys.make_base(1)
    frozen = [reference, *script["reward_model"]]
    before, critic = copies(model), copies(script["value_model"].model)
    untouched = [copies(module) for module in frozen]
    constructor = {**script, "ref_model": reference}
    trainer = make_trainer(model=model, constructor=constructor, kl_coef=0.05, **FOUR_ROWS_TWICE)
    trainer.train()
    assert moved(trainer.model.value_model.model, critic)
    names = moved(trainer.model.policy, before)
    assert names
    assert all("hoe_router" in name for name in names)
    assert not any(moved(module, values) for module, values in zip(frozen, untouched, strict=True))


def test_peft_training(
    make_trainer: Make, toys: ModuleType, script: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    critic = copies(script["value_model"].model)
    constructor = {**script, "peft_config": HoEConfig(**HOE)}
    trainer = make_trainer(model=toys.make_base(), constructor=constructor, num_sample_generations=1, **FOUR_ROWS_TWICE)
    before = copies(trainer.model.policy)
    trainer.train()
    assert moved(trainer.model.value_model.model, critic)
    names = moved(trainer.model.policy, before)
    assert names
    assert all("hoe_router" in name for name in names)


def test_lora_config_is_refused(make_trainer: Make, toys: ModuleType, script: dict[str, Any]) -> None:
    lora = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules="all-linear")
    with pytest.raises(HoEError, match="peft_config is a LoraConfig"):
        make_trainer(model=toys.make_base(), constructor={**script, "peft_config": lora})


def test_epochs_count_updates(make_trainer: Make) -> None:
    trainer = make_trainer(max_steps=-1, num_train_epochs=2, response_length=2)
    trainer.train()
    assert trainer.state.global_step == 6  # 24 prompts, 8 an update, twice
    assert trainer.state.episode == 48
    assert trainer.state.epoch == 2


def test_missing_eos_penalty(make_trainer: Make) -> None:
    """What every response without the stop token is worth falls by the penalty, in each objective."""
    returns = []
    for penalty in (None, 0.5):
        trainer = make_trainer(missing_eos_penalty=penalty, stop_token="eos", lam=1.0)
        rollout = trainer.ppo.rollout(trainer.next_prompts())
        rollout.responses.ended = torch.arange(8) < 3
        rollout.responses.ids[rollout.responses.ids == 2] = 3  # whatever was sampled
        rewards = np.linspace(0, 1, 16).reshape(8, 2)
        targets = trainer.ppo.advantages(rollout, rewards, np.array([0.5, 0.5]))
        returns.append(targets.returns[:, 0])
    lost = returns[0] - returns[1]
    torch.testing.assert_close(lost[:3], torch.zeros(3, 2))
    torch.testing.assert_close(lost[3:], torch.full((5, 2), 0.5))


def test_missing_eos_penalty_without_a_stop_token(make_trainer: Make) -> None:
    """As TRL's script passes it: responses run on, and those that hold no end of text are fined, not all."""
    returns = []
    for penalty in (None, 0.5):
        trainer = make_trainer(missing_eos_penalty=penalty, response_length=16, lam=1.0)
        torch.manual_seed(0)
        rollout = trainer.ppo.rollout(trainer.next_prompts())
        targets = trainer.ppo.advantages(rollout, np.zeros((8, 2)), np.array([0.5, 0.5]))
        returns.append(targets.returns[:, 0])
    has_end = (rollout.responses.ids == 2).any(1)
    assert 0 < has_end.sum() < 8
    assert not rollout.responses.ended.any()
    expected = torch.where(has_end, 0.0, 0.5).unsqueeze(1).expand(8, 2)
    torch.testing.assert_close(returns[0] - returns[1], expected)


# -- statistics over micro-batches ---


def test_uneven_micro_batches_are_pooled(make_trainer: Make, script: dict[str, Any]) -> None:
    """Mini-batches of 6 in micro-batches of 4 and 2 log, and learn, what undivided ones do."""
    results = []
    for rows, accumulation in ((4, 3), (12, 1)):
        constructor = {key: script[key] for key in ("processing_class", "train_dataset", "eval_dataset")}
        trainer = make_trainer(
            constructor=constructor, per_device_train_batch_size=rows, gradient_accumulation_steps=accumulation,
            num_mini_batches=2, num_ppo_epochs=1, total_episodes=12, max_steps=-1, response_length=4, stop_token="eos",
        )  # fmt: skip
        trainer.train()
        assert trainer.state.global_step == 1
        results.append((trainer.state.log_history[-1], list(trainer.router.parameters())))
    (divided, learned), (whole, expected) = results
    assert {
        "loss/policy_avg",
        "loss/value_avg",
        "policy/approxkl_avg",
        "policy/entropy_avg",
        "val/ratio",
    } <= whole.keys()
    for name in whole.keys() - {"eps"}:
        assert divided[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-5), name
    torch.testing.assert_close(learned, expected, rtol=0, atol=1e-5)


def test_ratio_stays_at_one(make_trainer: Make, script: dict[str, Any]) -> None:
    """With a learning rate of zero, over uneven micro-batches."""
    trainer = make_trainer(
        constructor=script, learning_rate=0.0, value_learning_rate=0.0, per_device_train_batch_size=4,
        gradient_accumulation_steps=3, num_mini_batches=2, num_ppo_epochs=2, max_steps=1,
    )  # fmt: skip
    trainer.train()
    logged = trainer.state.log_history[-1]
    assert logged["val/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert logged["val/ratio_var"] == pytest.approx(0.0, abs=1e-9)
    assert logged["policy/approxkl_avg"] == pytest.approx(0.0, abs=1e-9)
    assert logged["policy/clipfrac_avg"] == logged["val/clipfrac_avg"] == 0


@pytest.mark.parametrize("scaling", ["joint", "objective", "none"])
def test_masked_tokens_do_not_enter_the_scaling(scaling: str) -> None:
    values, mask, weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[0, 1, 1, 0]]), torch.ones(1)
    masked = mix_advantages(values.unsqueeze(-1), weight, mask, scaling=scaling)
    alone = mix_advantages(values[:, 1:3].unsqueeze(-1), weight, torch.ones(1, 2), scaling=scaling)
    torch.testing.assert_close(masked[:, 1:3], alone)
    assert masked[0, [0, 3]].tolist() == [0, 0]
    if scaling != "none":
        assert alone.tolist() == [[-1, 1]]  # mean 2.5, deviation 0.5


# -- TestBatchGeneration ---


@pytest.mark.parametrize("chunk", [3, 8])
def test_generation_in_chunks(make_trainer: Make, chunk: int) -> None:
    """The shapes are those of the batch, and greedy responses do not depend on the chunk."""
    trainer = make_trainer(response_length=9, local_rollout_forward_batch_size=chunk)
    prompts = trainer.next_prompts()
    rollout = trainer.ppo.rollout(prompts)
    assert rollout.responses.ids.shape == rollout.logprobs.shape == rollout.entropy.shape == (8, 9)
    assert rollout.values.shape == (8, 9, 2)
    ids, mask = rollout.sequences(slice(None))
    assert ids.shape == mask.shape == (8, prompts.ids.shape[1] + 9)
    tokenizer, policy = trainer.processing_class, trainer.policy_model
    decoding = Decoding(9, stop_tokens=())
    greedy = [generate_responses(policy, prompts, tokenizer, decoding, rows).ids for rows in (chunk, 8)]
    assert torch.equal(*greedy)


# -- value heads ---


def test_value_heads(make_trainer: Make) -> None:
    """One output for each objective, and one forward for logits and values."""
    trainer = make_trainer()
    assert trainer.model.critic.heads.weight.shape == (2, 32)
    ids = torch.arange(3, 13).repeat(2, 1)
    logits, values = trainer.model(ids, torch.ones_like(ids), 4)
    assert logits.shape == (2, 4, 32)
    assert values.shape == (2, 4, 2)


def test_dropout_is_off(make_trainer: Make) -> None:
    """Also in train mode: the log-probabilities of a rollout and of its update would differ otherwise."""
    trainer = make_trainer(model=tiny("gpt2"), constructor={"peft_config": HoEConfig(**HOE)})
    dropouts = [module for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout)]
    assert all(dropout.p == 0.1 for dropout in dropouts)  # the user's: GPT-2 has them by default
    with trainer.model_settings.applied():
        trainer.model.train()
        assert dropouts
        assert not any(dropout.p for dropout in dropouts)
        ids = torch.arange(3, 13).repeat(2, 1)
        first, second = (trainer.model(ids, torch.ones_like(ids), 4)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_sixteen_bit_policy(make_trainer: Make, toys: ModuleType) -> None:
    trainer = make_trainer(model=toys.make_policy().to(torch.bfloat16), max_steps=1)
    assert trainer.model.policy.get_base_model().lm_head.weight.dtype == torch.bfloat16
    trainer.train()
    assert np.isfinite(trainer.state.log_history[-1]["loss/policy_avg"])


def test_heads_return_with_a_checkpoint(make_trainer: Make, tmp_path: Path) -> None:
    first = make_trainer(save_strategy="steps", save_steps=2)
    first.train()
    again = make_trainer(save_strategy="steps", save_steps=2)
    assert moved(again.ppo.critic, copies(first.ppo.critic))
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))  # nothing is left to do
    assert not moved(again.ppo.critic, copies(first.ppo.critic))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architectures(make_trainer: Make, architecture: str) -> None:
    """A rollout and an update on each architecture that TRL tests, Llama apart; heads on the hidden state fit all."""
    trainer = make_trainer(
        model=tiny(architecture), constructor={"peft_config": HoEConfig(**HOE)}, max_steps=1, per_device_train_batch_size=4,
        num_ppo_epochs=1, response_length=3,
    )  # fmt: skip
    before = copies(trainer.model.policy)
    trainer.train()
    names = moved(trainer.model.policy, before)
    assert names
    assert all("hoe_router" in name for name in names)
    assert trainer.state.log_history[-1]["val/ratio"] == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("architecture", ["t5", "bart"])
def test_encoder_decoders_are_refused(make_trainer: Make, architecture: str) -> None:
    sizes: dict[str, Any] = {
        "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4},
        "bart": {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
                 "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64},
    }[architecture]  # fmt: skip
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
    config = AutoConfig.for_model(architecture, vocab_size=32, **special, **sizes)
    hoe = HoEConfig(**{**HOE, "task_type": "SEQ_2_SEQ_LM"})
    with pytest.raises(HoEError, match="encoder-decoder"):
        make_trainer(model=AutoModelForSeq2SeqLM.from_config(config), constructor={"peft_config": hoe})


# -- TestPeftModel ---


def test_trainable_parameters(make_trainer: Make, toys: ModuleType) -> None:
    """The router's rows, one weight a module input and one bias for each expert that it votes for, and two heads."""
    model = get_peft_model(toys.make_base(), HoEConfig(**HOE))
    from_config = make_trainer(model=toys.make_base(), constructor={"peft_config": HoEConfig(**HOE)})
    for trainer in (make_trainer(model=model), from_config):
        votes = len(trainer.router.voting_experts)
        inputs = 2 * (6 * 32 + 48)  # q, k, v, o, gate and up read 32 features, down 48; two layers
        modules = 2 * 7
        router = votes * (inputs + modules)
        heads = 2 * (32 + 1)
        assert trainable(trainer.router) == router
        assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == 2 * modules + 2
        held = sum(p.numel() for group in trainer.optimizer.param_groups for p in group["params"])
        assert held == router + heads
        assert trainer.model.critic.heads.weight.requires_grad


def test_save_and_load(make_trainer: Make, toys: ModuleType, tmp_path: Path) -> None:
    """What is saved is an adapter as any other: no value heads in it, and it loads to the same logits."""
    trainer = make_trainer()
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all("hoe_" in name for name in saved)
    loaded = PeftModel.from_pretrained(toys.make_base(), str(tmp_path / "adapter")).eval()
    trained = trainer.policy_model.eval()
    assert dict(loaded.named_parameters()).keys() == dict(trained.named_parameters()).keys()
    assert not moved(loaded, copies(trained))
    ids = torch.arange(3, 13).unsqueeze(0)
    with torch.no_grad():
        expected, logits = (model(ids, preference=[0.25, 0.75]).logits for model in (trained, loaded))
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("is_trainable", [True, False])
def test_continue_training(make_trainer: Make, toys: ModuleType, tmp_path: Path, is_trainable: bool) -> None:
    """A saved adapter trains on, from where it was, with as many parameters; whether it was loaded as trainable or not."""
    first = make_trainer(max_steps=1)
    first.train()
    first.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(toys.make_base(), str(tmp_path / "adapter"), is_trainable=is_trainable)
    second = make_trainer(model=loaded, max_steps=1)
    assert not moved(second.router, copies(first.router))
    assert trainable(second.router) == trainable(first.router)
    second.train()
    assert moved(second.router, copies(first.router))
