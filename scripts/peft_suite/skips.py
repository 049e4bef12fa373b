"""Which of PEFT's tests are not run with HoEConfig, and why. Upstream's own skips carry their own reasons.

Patterns are regular expressions for `module.py::Class::test[parameters]`.
"""

from __future__ import annotations

import re

MERGE = "a trained router chooses experts by the input: nothing static to merge (StaticMergeError)"

# Skipped: they ask of HoE something that it does not offer, on purpose.
SKIPS: dict[str, str] = {
    # The other merge tests ask upstream's own function first; see plugin.refuse_merge.
    r"TestMultipleActiveAdapters::test_\w*merge\w*\[HoE routed": MERGE,
    r"test_add_weighted_adapter|modules_to_save_merging_adapters": (
        "preferences weigh the experts; add_weighted_adapter raises and says so"
    ),
    r"test_mixed_adapter_batches": "rows differ by preference, not by adapter: adapter_names is not offered",
    r"test_add_adapter_rejects_duplicate_name_without_mutation\[True\]": "PeftMixedModel takes PEFT's own methods",
    r"test_adapter_dtype_autocast\[\w+-False-dtype[01]-.*routed"  # on a base in float32 they have its dtype
    r"|no_autocast_adapter_dtype\[(dtype1-routed|dtype0-routed-(?!.*T5))": (  # T5 keeps weights in float32 by itself
        "routers are float32 on every base, also where autocast_adapter_dtype=False leaves experts in the base's dtype"
    ),
    r"test_from_pretrained_cache_dir": "downloads into an empty folder, and nothing here reaches the Hub",
}

# Left out like the tests of other methods: they are about parts of LoRA that HoE has no counterpart of.
LORA_ONLY: dict[str, str] = {
    r"dora": "DoRA",
    r"monteclora": "MonteCLoRA",
    r"lora_bias|lora_safe_merge_does_not_mutate": "a bias on lora_B",
    r"embedding_layer|resized_embedding|lora_emb|embed_scale|tie_word_embeddings": "LoRA on embeddings",
    r"conv2d|unsupported_layer": "LoRA on convolutions",
    r"multihead_attention|test_mha": "LoRA on nn.MultiheadAttention",
    r"trainable_token|trainble_tokens": "trainable_token_indices",
    r"target_parameters": "target_parameters",
    r"TestDynamicDispatch": "LoRA's registry of custom layers",
    r"TestLayerRepr": "the names of LoRA's layer classes",
    r"TestMultiRankAdapter": "alpha_pattern, and the shape of a single LoRA",
    r"TestLoraNestedConfigRoundTrip": "configs of LoRA variants",
    r"layer_replication": "layer_replication",
    r"stable_diffusion": "diffusers pipelines",
    r"warns_for_unsharded_state_dict": "a warning that PEFT gives for the keys lora_A and lora_B only",
}


def skipped(nodeid: str) -> str | None:
    """Why a test is skipped, or None."""
    return _reason(SKIPS, nodeid)


def lora_only(nodeid: str) -> str | None:
    """Which part of LoRA a test is about, or None."""
    return _reason(LORA_ONLY, nodeid)


def _reason(table: dict[str, str], nodeid: str) -> str | None:
    return next((why for pattern, why in table.items() if re.search(pattern, nodeid)), None)
