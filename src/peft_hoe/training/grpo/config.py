"""HoEGRPOConfig: GRPOConfig, and what the training of a router adds to it."""

from __future__ import annotations

from dataclasses import dataclass, field

from trl import GRPOConfig  # type: ignore[attr-defined]

from ...errors import HoEError, check_choice
from ...generation.decoding import Decoding
from ..run.arguments import ObjectiveArguments, RouterArguments
from ..run.refused_arguments import NO_PREDICTIONS, refuse_changed

_AGGREGATIONS = {"joint": "sum_then_normalize", "objective": "normalize_then_sum"}

REFUSED = {
    **NO_PREDICTIONS,
    "average_tokens_across_devices": "TRL counts the tokens of all processes by itself",
    "max_tool_calling_iterations": "there are no tools",
    "neftune_noise_alpha": "noise in the embeddings would make the probabilities of completions those of another policy",
    "train_sampling_strategy": "TRL draws the prompts by itself: in random order, or as they come with shuffle_dataset=False",
    "use_vllm": "vLLM generates with merged weights, but a router's vote depends on the token: it would be another policy",
    "cast_lm_head_to_fp32": "it changes the model's head for good, and nothing but the router may change",
    "sync_ref_model": "the reference is the base model, which does not move",
    "reward_weights": "the weights are those of the objectives: give the router a preference",
}


@dataclass
class HoEGRPOConfig(ObjectiveArguments, RouterArguments, GRPOConfig):  # type: ignore[misc]
    """Configuration of `HoEGRPOTrainer`; what GRPOConfig has means the same here, with the exceptions below.

    `beta` stays GRPO's coefficient of the KL divergence from the base model; how fast the weights of objectives forget, β, is
    `objective_beta`.

    Args:
        objective_beta: β, how fast the weights of objectives forget.
        advantage_scaling: "joint" mixes the normalised rewards by u, centres them in the group of a prompt and divides them by
            what `scale_rewards` says; "objective" divides each objective by its own deviation in the group before they are
            mixed, which moves the fixed point away from the smooth Tchebycheff solution where the deviations differ, and has
            no use for `scale_rewards`.
        scale_rewards: "batch", here the default, divides by one σ, that of the mixed rewards of the batch: the relative weight
            of prompts and objectives is kept. "group" has a σ for each prompt, so that prompts whose completions differ
            little count more; "none" divides by nothing.
        multi_objective_aggregation: follows from `advantage_scaling`.
        stop_strings: texts that end a completion, which is trained on up to and including the token that completes one, and
            scored without it, see `Decoding`. TRL's `completions/clipped_ratio` counts such a completion as clipped.

    The rest of what is new is in `RouterArguments` and `ObjectiveArguments`.

    Raises:
        HoEError: a setting is out of range, contradicts another one or cannot work with routers.

    >>> from peft_hoe import HoEGRPOConfig
    >>> args = HoEGRPOConfig(output_dir="run", router="r0", num_generations=4, use_cpu=True, bf16=False)
    >>> args.router, args.num_generations
    ('r0', 4)
    """

    scale_rewards: str = field(default="batch", metadata={"help": "batch, group or none."})
    multi_objective_aggregation: str | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Follows from advantage_scaling."}
    )

    objective_beta: float = field(default=0.1, metadata={"help": "How fast the weights of objectives forget."})
    advantage_scaling: str = field(default="joint", metadata={"help": "joint or objective."})

    stop_strings: list[str] | None = field(default=None, metadata={"help": "Texts that end a completion."})

    def __post_init__(self) -> None:
        refuse_changed(self, REFUSED)
        super().__post_init__()
        check_choice("advantage_scaling", self.advantage_scaling, tuple(_AGGREGATIONS))
        check_choice("scale_rewards", self.scale_rewards, ("batch", "group", "none"))
        expected = _AGGREGATIONS[self.advantage_scaling]
        if self.multi_objective_aggregation not in (None, expected):
            raise HoEError(
                f"multi_objective_aggregation is {self.multi_objective_aggregation!r}, but advantage_scaling="
                f"{self.advantage_scaling!r} is {expected!r}; leave it out, and set advantage_scaling to one of "
                f"{', '.join(_AGGREGATIONS)}",
                argument="multi_objective_aggregation",
                value=self.multi_objective_aggregation,
                allowed=(expected,),
            )
        self.multi_objective_aggregation = expected
        if self.advantage_scaling == "objective" and self.scale_rewards != "batch":
            raise HoEError(
                f"scale_rewards={self.scale_rewards!r} has no use with advantage_scaling='objective', which divides each "
                "objective by its own deviation in the group; leave it out",
                argument="scale_rewards",
                value=self.scale_rewards,
                allowed=("batch",),
            )
        self._check_decoding()

    def _check_decoding(self) -> None:
        """See that completions can be written as the fields say.

        Raises:
            HoEError: a field is out of range, or cannot work here.
        """
        Decoding(do_sample=True, temperature=self.temperature, stop_strings=self.stop_strings or ())  # type: ignore[arg-type]
        if "stop_strings" in (self.generation_kwargs or {}):
            raise HoEError(
                "generation_kwargs has stop_strings, which transformers cannot look for without a tokenizer; say stop_strings=",
                argument="generation_kwargs",
                value=self.generation_kwargs,
            )
        if self.stop_strings and self.mask_truncated_completions:
            raise HoEError(
                "mask_truncated_completions=True with stop_strings is not supported: TRL tells a completion that has ended by "
                "its last token, so that those that a stop string ended would be left out. Leave one of them out",
                argument="mask_truncated_completions",
                value=True,
            )
        if self.use_transformers_continuous_batching and (self.bf16 or self.fp16):
            raise HoEError(
                "use_transformers_continuous_batching with bf16 or fp16 is not supported: TRL would cast the whole model, "
                "experts and router included, for good. Use one of them",
                argument="use_transformers_continuous_batching",
                value=True,
            )
