"""Fields of PPOConfig and TrainingArguments that HoERouterTrainer has no use for, and why; all others it uses."""

from __future__ import annotations

_NO_LOADER = "prompts are taken by number in the process itself, there is no DataLoader"
_OWN_EVALUATION = "evaluate() writes and scores responses, it has no predictions or labels"
_PLAIN_PROCESSES = "the router and the critic are few numbers, and are averaged as accelerate does it by default"
_COUNTED = "it is counted out from per_device_train_batch_size, gradient_accumulation_steps, num_mini_batches and the processes"
_NOT_COMPILED = (
    "a router trains through modules that are read anew in every forward; compile the model for generation instead"
)

REFUSED = {
    "accelerator_config": _NO_LOADER,
    "average_tokens_across_devices": "the loss is always a mean over the tokens of all processes",
    "batch_eval_metrics": _OWN_EVALUATION,
    "bf16_full_eval": "evaluation has the precision of training; say bf16=True for autocast",
    "fp16_full_eval": "evaluation has the precision of training; say bf16=True for autocast",
    "dataloader_in_order": _NO_LOADER,
    "dataloader_multiprocessing_context": _NO_LOADER,
    "dataloader_num_workers": _NO_LOADER,
    "dataloader_persistent_workers": _NO_LOADER,
    "dataloader_prefetch_factor": _NO_LOADER,
    "ddp_broadcast_buffers": _PLAIN_PROCESSES,
    "ddp_bucket_cap_mb": _PLAIN_PROCESSES,
    "ddp_find_unused_parameters": _PLAIN_PROCESSES,
    "ddp_static_graph": _PLAIN_PROCESSES,
    "debug": "it watches a loop of transformers that is not run here",
    "enable_jit_checkpoint": "Ctrl-C writes a checkpoint (save_on_interrupt), as does save_steps",
    "eval_accumulation_steps": _OWN_EVALUATION,
    "eval_do_concat_batches": _OWN_EVALUATION,
    "eval_use_gather_object": _OWN_EVALUATION,
    "include_for_metrics": _OWN_EVALUATION,
    "label_names": _OWN_EVALUATION,
    "prediction_loss_only": _OWN_EVALUATION,
    "group_by_length": "prompts are drawn evenly, by seed (or data_seed)",
    "ignore_data_skip": "which prompts an update has follows from its number, so nothing is skipped",
    "include_num_input_tokens_seen": "tokens are not counted here; `completion/length` and `episode` are logged",
    "neftune_noise_alpha": "noise in the embeddings would make the probabilities of responses those of another policy",
    "ref_adapter_name": 'the reference is the base or the untrained router (kl_reference="base" or "static"), or ref_model',
    "restore_callback_states_from_checkpoint": "checkpoints hold no state of callbacks",
    "save_on_each_node": "a checkpoint is written by the first process",
    "skip_memory_metrics": "memory is not measured here",
    "torch_compile": _NOT_COMPILED,
    "torch_compile_backend": _NOT_COMPILED,
    "torch_compile_mode": _NOT_COMPILED,
    "fp16": "there is no loss scaling here; use bf16=True",
    "whiten_rewards": "it would undo the payoff table's scale; see advantage_scaling",
    "train_sampling_strategy": "prompts are drawn evenly, by seed (or data_seed)",
    "use_cache": "a forward that trains has no cache, generation always has one",
    # PPOTrainer writes these into its configuration.
    "batch_size": _COUNTED,
    "local_batch_size": _COUNTED,
    "local_mini_batch_size": _COUNTED,
    "micro_batch_size": _COUNTED,
    "mini_batch_size": _COUNTED,
    "num_total_batches": "it follows from max_steps, total_episodes or num_train_epochs",
    "world_size": "it is how many processes are started",
}
