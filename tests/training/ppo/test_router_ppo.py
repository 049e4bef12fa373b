"""The updates by themselves: no Trainer, no TRL."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import LlamaForSequenceClassification

from peft_hoe import HoEError
from peft_hoe.generation.decoding import Decoding
from peft_hoe.generation.prompts import PromptCollator, as_prompt_batch
from peft_hoe.objectives import ObjectiveWeights, RewardNormalizer
from peft_hoe.rewards import Rewards
from peft_hoe.training import HoERouterConfig
from peft_hoe.training.ppo.actor_critic import ActorCritic
from peft_hoe.training.ppo.critics import make_critic
from peft_hoe.training.ppo.references import make_reference
from peft_hoe.training.ppo.router_ppo import RouterPPO
from peft_hoe.training.ppo.settings import PPOSettings
from peft_hoe.training.run.steered_policy import steered
from peft_hoe.training.run.training_state import RouterTrainingState


def make_ppo(
    toys: ModuleType, settings: PPOSettings, *, referred: bool = False, value_model: Any = None, **changes: Any
) -> RouterPPO:
    """On the toy, in float64, with plain AdamW; the base is the reference if `referred`."""
    state = RouterTrainingState(toys.make_policy().double(), "r0")
    state.weights = ObjectiveWeights(state.router.preference, objectives=state.objectives)
    state.normalizer = RewardNormalizer([[0.65, 0.45], [0.45, 0.65]], state.objectives)
    for name, value in changes.items():
        setattr(state, name, value)
    actor_critic = ActorCritic(state.policy, state.router, make_critic(state.policy, value_model, 2))
    optimizer = torch.optim.AdamW(
        [{"params": state.router.parameters()}, {"params": actor_critic.critic.parameters(), "lr": 1e-3}],
        lr=0.05, weight_decay=0.0,
    )  # fmt: skip
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(actor_critic, optimizer)
    reference = make_reference(actor_critic, None, "base") if referred else None
    return RouterPPO(
        state, model, optimizer, Rewards(toys.REWARDS, state.objectives), settings,
        reference=reference, tokenizer=toys.make_tokenizer(), accelerator=accelerator,
    )  # fmt: skip


@pytest.mark.parametrize("kl_coef", [0.0, 0.05])
def test_a_step_is_the_trainers(toys: ModuleType, tmp_path: Path, kl_coef: float) -> None:
    settings = PPOSettings(Decoding(6, do_sample=True, stop_tokens=()), kl_coef=kl_coef)
    ppo = make_ppo(toys, settings, referred=kl_coef > 0)
    trainer = toys.make_trainer(
        toys.make_policy().double(), tmp_path, {}, max_steps=1, lr_scheduler_type="constant", kl_coef=kl_coef
    )
    batch = trainer.next_prompts()
    rows = PromptCollator(ppo.tokenizer)([{"prompt": text} for text in batch.texts])
    torch.manual_seed(trainer.local_seed)
    with steered(ppo.policy, ppo.router):
        logged = ppo.step(as_prompt_batch(rows, ppo.tokenizer, torch.device("cpu")))
    torch.manual_seed(trainer.local_seed)
    trainer.train()
    for x, y in zip(ppo.router.parameters(), trainer.router.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-10)
    assert {name: trainer.state.log_history[0][name] for name in logged} == logged
    assert ppo.weights.log_w.tolist() == trainer.weights.log_w.tolist()


def test_its_state_continues(toys: ModuleType) -> None:
    """A second object that takes the first one's state over makes the same second step."""
    settings = PPOSettings(Decoding(6, do_sample=True))
    first, second = make_ppo(toys, settings), make_ppo(toys, settings)
    rows = PromptCollator(first.tokenizer)(toys.PROMPTS[:8])
    batch = as_prompt_batch(rows, first.tokenizer, torch.device("cpu"))
    with steered(first.policy, first.router), steered(second.policy, second.router):
        first.step(batch)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        for ppo in (first, second):
            torch.manual_seed(5)
            ppo.step(batch)
    for x, y in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(x, y)


def test_what_is_missing_is_named(toys: ModuleType) -> None:
    with pytest.raises(HoEError, match="no weights of objectives"):
        make_ppo(toys, PPOSettings(), weights=None)
    ppo = make_ppo(toys, PPOSettings(), normalizer=None)
    with pytest.raises(HoEError, match="no normalizer yet"):
        ppo.normalize(torch.zeros(8, 2).numpy())
    with pytest.raises(HoEError, match=r"kl_coef is 0\.05, but there is no reference"):
        make_ppo(toys, PPOSettings(kl_coef=0.05))


def test_defaults_are_the_configurations() -> None:
    """Where the two have a field in common."""
    settings = PPOSettings()
    names = [name for name in vars(settings) if hasattr(HoERouterConfig, name) and name not in ("seed", "decoding")]
    assert len(names) == 10
    assert {name: getattr(settings, name) for name in names} == {name: getattr(HoERouterConfig, name) for name in names}
    assert settings.rollout_batch == HoERouterConfig.local_rollout_forward_batch_size
    length, temperature = HoERouterConfig.response_length, HoERouterConfig.temperature
    assert settings.decoding == Decoding(length, do_sample=True, temperature=temperature)


def test_a_group_of_responses_is_its_own_baseline(toys, tmp_path):
    """Each prompt stands as often as there are responses to it, and the critic's values play no part in the advantages."""
    trainer = toys.make_trainer(None, tmp_path, {}, num_generations=4, baseline="group")
    prompts = trainer.next_prompts()
    assert prompts.texts == [text for text in prompts.texts[::4] for _ in range(4)]
    with steered(trainer.policy, trainer.router):
        rollout = trainer.ppo.rollout(prompts)
    rewards = np.random.default_rng(0).normal(size=(8, 2))
    found = []
    for shift in (0.0, 5.0):
        rollout.values = rollout.values + shift * torch.rand_like(rollout.values)
        found.append(trainer.ppo.advantages(rollout, rewards, np.asarray([0.25, 0.75])).advantages)
    assert torch.equal(*found)
    constructor = {"value_model": LlamaForSequenceClassification(toys.make_base().config)}
    with pytest.raises(HoEError, match=r"baseline='group' .* uses no values"):  # a whole model would train for nothing
        toys.make_trainer(None, tmp_path, constructor, num_generations=4, baseline="group")
    with pytest.raises(HoEError, match="num_generations is 1, but baseline='group' needs at least 2 responses"):
        toys.make_trainer(None, tmp_path, {}, baseline="group")
    with pytest.raises(HoEError, match="num_generations is 3, but an update has 8 responses"):
        toys.make_trainer(None, tmp_path, {}, num_generations=3)


def test_the_reference_is_only_computed_where_there_is_one(toys: ModuleType) -> None:
    """A pass over whole texts less, and the same router to the bit as with a reference that is measured and not held to."""
    settings = PPOSettings(Decoding(6, do_sample=True))
    routers, metrics, passes = [], [], []
    for referred in (False, True):
        ppo = make_ppo(toys, settings, referred=referred)
        cached: list[bool] = []
        ppo.policy.get_base_model().register_forward_pre_hook(
            lambda module, inputs, keywords, cached=cached: cached.append(keywords["use_cache"]), with_kwargs=True
        )
        rows = PromptCollator(ppo.tokenizer)(toys.PROMPTS[:8])
        torch.manual_seed(0)
        with steered(ppo.policy, ppo.router):
            metrics.append(ppo.step(as_prompt_batch(rows, ppo.tokenizer, torch.device("cpu"))))
        routers.append(list(ppo.router.parameters()))
        passes.append(cached.count(False))  # texts are written with a cache
    assert all(torch.equal(x, y) for x, y in zip(*routers, strict=True))
    assert passes == [1, 2]
    assert metrics[1].keys() - metrics[0].keys() == {"objective/kl", "loss/kl_avg"}
    assert metrics[1]["objective/kl"] > 0


@pytest.mark.parametrize("own_critic", [False, True])
def test_the_first_step_goes_on_from_the_rollouts_forward(toys: ModuleType, own_critic: bool) -> None:
    """It has the gradient that a second forward would give, and that forward is not made; nor is the critic's.

    Attention that drops out by a function, in training mode only, drops nothing out.
    """
    settings = PPOSettings(Decoding(6, do_sample=True), num_ppo_epochs=2)
    config = toys.make_base().config
    config.attention_dropout = 0.5
    made, forwards = [], []
    for keeps in (True, False):
        torch.manual_seed(1)
        ppo = make_ppo(
            toys, settings, value_model=LlamaForSequenceClassification(config).double() if own_critic else None
        )
        if not keeps:
            ppo._starts_with_the_rollout = lambda rows: False  # type: ignore[method-assign]
        counted: list[Any] = []
        for module in (ppo.model, ppo.critic):
            module.register_forward_hook(lambda module, *_, counted=counted: counted.append(type(module).__name__))
        rows = PromptCollator(ppo.tokenizer)(toys.PROMPTS[:8])
        torch.manual_seed(0)
        with steered(ppo.policy, ppo.router):
            ppo.step(as_prompt_batch(rows, ppo.tokenizer, torch.device("cpu")))
        made.append(list(ppo.model.parameters()))
        forwards.append(Counter(counted))
    for x, y in zip(*made, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-7)  # advantages are float32, in another order
    critic = "ValueModel" if own_critic else "ValueHeads"
    assert forwards == [{"ActorCritic": 2, critic: 2}, {"ActorCritic": 3, critic: 3}]


def test_no_graph_is_kept_where_a_second_forward_would_differ(toys: ModuleType) -> None:
    ppo = make_ppo(toys, PPOSettings(Decoding(6, do_sample=True)))
    assert ppo._starts_with_the_rollout(8)
    assert not ppo._starts_with_the_rollout(9)  # two steps
    ppo.policy.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    assert not ppo._starts_with_the_rollout(8)
