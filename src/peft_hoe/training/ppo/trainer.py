"""HoERouterTrainer: STCH-OMD with mixed advantages (paper section 3.4), on whatever TRL is installed, or none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..trl_versions import trl_ppo
from .shell import PPOShell

if TYPE_CHECKING or trl_ppo() is None:
    Shell = PPOShell
else:
    from .trl_shell import TRLShell as Shell


class HoERouterTrainer(Shell):
    """Trains one router of a HoE adapter for its preference; everything else stays as it is, to the bit.

    With TRL 1.9 to 1.12 it is a PPOTrainer of TRL; TRL has removed that class since, and with a newer TRL, or without one, it
    is the same trainer over transformers' own. `trainer.ppo` makes the updates, see `RouterPPO`.

    Args:
        args: the configuration.
        processing_class: the policy's tokenizer, with a padding token.
        model: a PeftModel with a HoE adapter.
        ref_model: a reference for the KL term; None for `args.kl_reference`. Unused, with a warning, where `args.kl_coef` is 0.
        reward_model: rewards of all objectives, see `Rewards`.
        train_dataset: rows with `prompt` (text or chat messages) or `input_ids`; other columns are passed to the rewards.
        value_model: a critic in TRL's form with 1 or N outputs; None for N heads on the policy's hidden state.
        data_collator: used as given; None for `PromptCollator`.
        eval_dataset: prompts of the sample table and, where there is no `normalizer`, of the payoff table.
        optimizers: optimizer and scheduler; the optimizer's settings are used, what it held is replaced.
        callbacks: as in transformers.
        peft_config: directory or Hub id of a built HoE adapter, to put on a plain `model`.
        normalizer: the scale of the rewards; None to measure it before the first update.

    Raises:
        HoEError: rewards, router, dataset or model do not fit together.

    >>> from peft_hoe import HoERouterConfig, HoERouterTrainer, demo
    >>> model, tokenizer = demo.load_demo_adapter(routers=[[0.75, 0.25]]), demo.load_tokenizer()
    >>> args = HoERouterConfig(
    ...     output_dir="run", max_steps=1, per_device_train_batch_size=4, gradient_accumulation_steps=2, response_length=12,
    ...     num_sample_generations=0, save_strategy="no", disable_tqdm=True, report_to="none", use_cpu=True, bf16=False,
    ... )
    >>> trainer = HoERouterTrainer(
    ...     args, tokenizer, model, reward_model=demo.REWARDS, train_dataset=[{"prompt": text} for text in demo.load_prompts()]
    ... )
    >>> _ = trainer.train()
    {'loss/policy_avg': ...}
    >>> model.peft_config["default"].routers[0].trained
    True
    """
