"""Tiny random models of many architectures, in float64, with inputs for two rows of each.

Nothing is loaded: configurations are made here, small enough that all checks of one take a second or two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers as t
from torch import nn

VOCABULARY, WIDTH, LAYERS, HEADS, LENGTH = 64, 32, 2, 4, 7
_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_dropout": 0.0, "attention_dropout": 0.0,
}  # fmt: skip
_EXPERTS: dict[str, Any] = {
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24, "decoder_sparse_step": 1,
}  # fmt: skip
_ENCODER: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "initializer_range": 0.2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
        make: a new random model.
        inputs: of two rows, by the names that the model's forward takes.
        task: PEFT's task type.
        generates: whether greedy generation is checked.
        targets: modules that get an adapter.
        excluded: modules among them that get none.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, torch.Tensor]]
    task: str | None = "CAUSAL_LM"
    generates: bool = True
    targets: Any = "all-linear"
    excluded: Any = None


def _tokens() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCABULARY - 4, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _pairs() -> dict[str, torch.Tensor]:
    inputs = _tokens()
    return {**inputs, "decoder_input_ids": inputs["input_ids"][:, :4].clone()}


def _pixels(size: int, channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def _settings(kind: Any, **changes: Any) -> Any:
    """A configuration of the class: of the common settings those that it knows, and the changes."""
    wanted = {**_TEXT, **changes}
    try:
        return kind(**wanted)
    except TypeError:
        known = set(getattr(kind, "__dataclass_fields__", {})) | set(kind().to_dict())
        return kind(**{name: value for name, value in wanted.items() if name in known or name in changes})


def _causal(prefix: str, suffix: str = "ForCausalLM", **changes: Any) -> Architecture:
    kind, model = getattr(t, f"{prefix}Config"), getattr(t, f"{prefix}{suffix}", None)
    return Architecture(lambda: _eager(model(_settings(kind, **changes))), _tokens)  # type: ignore[misc]


def _eager(model: nn.Module) -> nn.Module:
    """A mixture of experts by plain products: the grouped ones know no float64."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model


def _llava() -> nn.Module:
    vision = t.CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=HEADS, image_size=16,
        patch_size=8, projection_dim=WIDTH,
    )  # fmt: skip
    text = _settings(t.LlamaConfig)
    return t.LlavaForConditionalGeneration(
        t.LlavaConfig(
            vision_config=vision, text_config=text, image_token_index=60, image_token_id=60, vision_feature_layer=-1
        )
    )


def _llava_inputs() -> dict[str, torch.Tensor]:
    inputs = _tokens()
    inputs["input_ids"][:, 1:5] = 60
    return {**inputs, "pixel_values": _pixels(16)}


def _qwen2_vl() -> nn.Module:
    vision = {"depth": 2, "embed_dim": WIDTH, "num_heads": HEADS, "hidden_size": WIDTH, "mlp_ratio": 2, "patch_size": 4,
              "spatial_merge_size": 2, "temporal_patch_size": 1, "in_channels": 3}  # fmt: skip
    text = {name: value for name, value in _TEXT.items() if name != "head_dim"}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    return t.Qwen2VLForConditionalGeneration(
        t.Qwen2VLConfig(
            vision_config=vision, text_config=text, image_token_id=60, video_token_id=61, vision_start_token_id=62,
            vision_end_token_id=63,
        )
    )  # fmt: skip


def _qwen2_vl_inputs() -> dict[str, torch.Tensor]:
    inputs = _tokens()
    inputs["input_ids"][:, 2:6] = 60  # 16 patches of a picture, four of them merged into a token
    patches = torch.randn(2 * 16, 3 * 4 * 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    types = (inputs["input_ids"] == 60).int()
    return {
        **inputs,
        "pixel_values": patches,
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
        "mm_token_type_ids": types,
    }


def _whisper() -> nn.Module:
    return t.WhisperForConditionalGeneration(
        t.WhisperConfig(
            vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_attention_heads=HEADS,
            decoder_attention_heads=HEADS, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=10,
            max_target_positions=32, init_std=0.2, dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
        )
    )  # fmt: skip


def _whisper_inputs() -> dict[str, torch.Tensor]:
    features = torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return {"input_features": features, "decoder_input_ids": _tokens()["input_ids"][:, :4]}


def _t5(**changes: Any) -> Architecture:
    settings = {
        "vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": LAYERS, "num_heads": HEADS,
        "dropout_rate": 0.0, "decoder_start_token_id": 0, "initializer_factor": 1.0, **changes,
    }  # fmt: skip
    return Architecture(lambda: t.T5ForConditionalGeneration(t.T5Config(**settings)), _pairs, "SEQ_2_SEQ_LM")


def _bart() -> nn.Module:
    return t.BartForConditionalGeneration(
        t.BartConfig(
            vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_attention_heads=HEADS,
            decoder_attention_heads=HEADS, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, init_std=0.2,
            dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2, forced_eos_token_id=None,
        )
    )  # fmt: skip


def _opt(**changes: Any) -> Architecture:
    settings = {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "ffn_dim": 48, "num_hidden_layers": LAYERS, "dropout": 0.0,
        "num_attention_heads": HEADS, "word_embed_proj_dim": WIDTH, "max_position_embeddings": 64, "init_std": 0.2,
        "pad_token_id": 0, **changes,
    }  # fmt: skip
    return Architecture(lambda: t.OPTForCausalLM(t.OPTConfig(**settings)), _tokens)


def _jamba() -> Architecture:
    return _causal(
        "Jamba", **_EXPERTS, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
        use_mamba_kernels=False, mamba_d_state=4, mamba_dt_rank=4,
    )  # fmt: skip


def _vit() -> nn.Module:
    settings = {**_ENCODER, "image_size": 16, "patch_size": 8, "num_labels": 5}
    settings.pop("vocab_size")
    return t.ViTForImageClassification(t.ViTConfig(**settings))


_DISTIL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": 48, "dropout": 0.0,
    "attention_dropout": 0.0, "seq_classif_dropout": 0.0, "initializer_range": 0.2, "max_position_embeddings": 64,
}  # fmt: skip
_FALCON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_kv_heads": 2, "new_decoder_architecture": True, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64, "resid_pdrop": 0.0,
    "embd_pdrop": 0.0, "attn_pdrop": 0.0, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_MAMBA = _causal("Mamba", state_size=4, time_step_rank=4)
_MAMBA2 = _causal("Mamba2", state_size=4, expand=2, num_heads=8, head_dim=8, n_groups=1, chunk_size=4)
_ATTENTION_AND_MLP = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

_GEMMA3N = Architecture(
    lambda: t.Gemma3nForCausalLM(
        _settings(
            t.Gemma3nTextConfig, num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2,
            num_kv_shared_layers=2, vocab_size_per_layer_input=VOCABULARY, hidden_size_per_layer_input=8,
            laurel_rank=4, activation_sparsity_pattern=None, intermediate_size=[48] * 4, altup_num_inputs=2,
        )
    ),
    _tokens,
)  # fmt: skip

ARCHITECTURES: dict[str, Architecture] = {
    "Llama": _causal("Llama"),
    "Qwen2": _causal("Qwen2"),
    "Qwen3": _causal("Qwen3"),
    "Mistral": _causal("Mistral"),
    "Gemma2": _causal("Gemma2"),
    "Gemma3": Architecture(lambda: t.Gemma3ForCausalLM(_settings(t.Gemma3TextConfig)), _tokens),
    "Gemma3n": replace(_GEMMA3N, excluded=["correction_coefs"]),
    "Gemma3n, all-linear": _GEMMA3N,
    "GPT-2": Architecture(lambda: t.GPT2LMHeadModel(t.GPT2Config(**_GPT2)), _tokens),
    "GPT-NeoX": _causal("GPTNeoX"),
    "OPT": _opt(),
    "OPT, norms after": _opt(do_layer_norm_before=False, word_embed_proj_dim=16),
    "Phi": _causal("Phi", resid_pdrop=0.0, embd_pdrop=0.0),
    "Phi3": _causal("Phi3", resid_pdrop=0.0, embd_pdrop=0.0),
    "Falcon": Architecture(lambda: t.FalconForCausalLM(t.FalconConfig(**_FALCON)), _tokens),
    "Bloom": _causal("Bloom", n_layer=LAYERS, n_head=HEADS),
    "T5": _t5(),
    "T5, gated": _t5(feed_forward_proj="gated-gelu"),
    "BART": Architecture(_bart, _pairs, "SEQ_2_SEQ_LM"),
    "BERT": Architecture(lambda: t.BertForSequenceClassification(t.BertConfig(**_ENCODER)), _tokens, "SEQ_CLS", False),
    "DistilBERT": Architecture(  # all-linear would take its pre_classifier, which PEFT trains whole
        lambda: t.DistilBertForSequenceClassification(t.DistilBertConfig(**_DISTIL)), _tokens, "SEQ_CLS", False,
        ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"],
    ),
    "Mixtral": _causal("Mixtral", **_EXPERTS),
    "Qwen2-MoE": _causal("Qwen2Moe", **_EXPERTS),
    "Qwen3-MoE": _causal("Qwen3Moe", **_EXPERTS),
    "DeepseekV3": _causal(
        "DeepseekV3", **_EXPERTS, n_routed_experts=4, n_shared_experts=1, num_key_value_heads=HEADS, n_group=2,
        topk_group=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
        first_k_dense_replace=1,
    ),
    "GptOss": _causal("GptOss", **_EXPERTS),
    "Qwen3-Next": _causal(
        "Qwen3Next", **_EXPERTS, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
        linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"],
    ),
    "Mamba": replace(_MAMBA, targets=["in_proj"]),
    "Mamba, all-linear": _MAMBA,
    "Mamba2": replace(_MAMBA2, targets=["in_proj"]),
    "Jamba": replace(_jamba(), targets=_ATTENTION_AND_MLP),
    "Jamba, all-linear": _jamba(),
    "Llava": Architecture(_llava, _llava_inputs),
    "Qwen2-VL": Architecture(_qwen2_vl, _qwen2_vl_inputs),
    "Whisper": Architecture(_whisper, _whisper_inputs, None),
    "ViT": Architecture(_vit, lambda: {"pixel_values": _pixels(16)}, None, False),
}  # fmt: skip
