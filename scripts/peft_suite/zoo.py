"""Tiny random models under the ids that PEFT's tests load, laid out as a Hub cache, so that nothing is fetched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

REVISION = "0" * 40
# Larger than the usual 0.02, or else an adapter on a tiny model hardly moves its outputs.
STD = 0.1

_TEXT = {"vocab_size": 1024, "max_position_embeddings": 64, "initializer_range": STD}
_BERT = {
    **_TEXT,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_LLAMA = {
    **_TEXT,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OPT = {
    **_TEXT,
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "ffn_dim": 32,
    "num_attention_heads": 4,
    "init_std": STD,
    "dropout": 0.0,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 2,
}
_GPT = {
    "vocab_size": 1024,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 5,
    "n_head": 4,
    "initializer_range": STD,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 1023,
    "eos_token_id": 1023,
    "pad_token_id": 1023,
}

# Hub id: (architecture, its configuration, arguments)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": (
        "OPTForCausalLM",
        "OPTConfig",
        {**_OPT, "num_hidden_layers": 5},
    ),
    # Twelve layers as in the real one: tests name some of them.
    "peft-internal-testing/opt-125m": ("OPTForCausalLM", "OPTConfig", {**_OPT, "num_hidden_layers": 12}),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", "GPT2Config", _GPT),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT),
    "hf-internal-testing/tiny-random-gpt_neo": (
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {**_TEXT, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    ),
    "hf-internal-testing/tiny-random-BloomForCausalLM": (
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": 1024, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": STD},
    ),
    "hf-internal-testing/tiny-random-GPTBigCodeForCausalLM": ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", _GPT),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", "GPTJConfig", {**_GPT, "rotary_dim": 4}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", "LlamaConfig", _LLAMA),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _LLAMA),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("MistralForCausalLM", "MistralConfig", _LLAMA),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**_LLAMA, "head_dim": 8, "sliding_window": 16},
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification",
        "LlamaConfig",
        _LLAMA,
    ),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        "BertForSequenceClassification",
        "BertConfig",
        _BERT,
    ),
    "bert-base-uncased": ("BertForSequenceClassification", "BertConfig", _BERT),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification",
        "RobertaConfig",
        _BERT,
    ),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", "BertConfig", _BERT),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", "RobertaConfig", _BERT),
    "peft-internal-testing/tiny-random-DebertaModel": (
        "DebertaModel",
        "DebertaConfig",
        {**_BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False},
    ),
    "peft-internal-testing/tiny-random-DebertaV2Model": (
        "DebertaV2Model",
        "DebertaV2Config",
        {**_BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False},
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": 1024,
            "d_model": 32,
            "d_ff": 37,
            "d_kv": 8,
            "num_heads": 4,
            "num_layers": 2,
            "dropout_rate": 0.0,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "decoder_start_token_id": 0,
        },
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        "BartForConditionalGeneration",
        "BartConfig",
        {
            "vocab_size": 1024,
            "max_position_embeddings": 64,
            "d_model": 16,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
            "dropout": 0.0,
            "init_std": STD,
        },
    ),
    "peft-internal-testing/tiny-clip-text-2": (
        "CLIPTextModelWithProjection",
        "CLIPTextConfig",
        {
            **_TEXT,
            "hidden_size": 32,
            "intermediate_size": 37,
            "num_attention_heads": 4,
            "num_hidden_layers": 5,
            "projection_dim": 32,
        },
    ),
}

# Older PEFT's ids of the same models, besides hf-internal-testing/* for peft-internal-testing/*.
OLDER_IDS = {
    "facebook/opt-125m": "peft-internal-testing/opt-125m",
    "ybelkada/tiny-random-T5ForConditionalGeneration-calibrated": (
        "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated"
    ),
}

# Hub id: (revision's name, adapter_config.json)
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "peft-internal-testing/tiny-opt-lora-revision": (
        "test",
        {
            "base_model_name_or_path": "peft-internal-testing/opt-125m",
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": 8,
            "lora_alpha": 32,
            "target_modules": ["q_proj", "v_proj"],
        },
    ),
}


def build(cache: Path) -> None:
    """Write every model and adapter that the Hub cache in `cache` lacks."""
    transformers.utils.logging.disable_progress_bar()
    for repo, (architecture, configuration, arguments) in MODELS.items():
        folder = _snapshot(cache, repo, "main")
        if (folder / "config.json").exists():
            continue
        torch.manual_seed(0)
        config = getattr(transformers, configuration)(**arguments)
        model = getattr(transformers, architecture)(config)
        # Save aside and rename: an interrupted run leaves no half model.
        model.save_pretrained(folder.with_name("partial"))
        folder.rmdir()
        folder.with_name("partial").rename(folder)
    older = {repo.replace("peft-internal", "hf-internal"): repo for repo in MODELS if repo.startswith("peft-internal")}
    for repo, same in (older | OLDER_IDS).items():
        if not _root(cache, repo).exists():
            shutil.copytree(_root(cache, same), _root(cache, repo))
    for repo, (revision, adapter) in ADAPTERS.items():
        (_snapshot(cache, repo, revision) / "adapter_config.json").write_text(json.dumps(adapter))


def _root(cache: Path, repo: str) -> Path:
    return cache / f"models--{repo.replace('/', '--')}"


def _snapshot(cache: Path, repo: str, revision: str) -> Path:
    """The folder of a repository's only commit, with the reference that names it."""
    root = _root(cache, repo)
    reference = root / "refs" / revision
    reference.parent.mkdir(parents=True, exist_ok=True)
    reference.write_text(REVISION)
    folder = root / "snapshots" / REVISION
    folder.mkdir(parents=True, exist_ok=True)
    return folder
