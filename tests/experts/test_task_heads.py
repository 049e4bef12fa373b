"""Models with a head that PEFT saves whole: what the adapter carries, and that PEFT loads it."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from peft_hoe import CheckpointError, HoEWarning, Loading, build_adapter
from peft_hoe.experts.architecture import read_architecture
from peft_hoe.tasks import AUTO_CLASSES

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*hardly a fine-tune"),  # these models have nothing in common
]
EXACT = {"r": "full", "pruning": None, "rescale": None, "interpolation": "linear", "progress": False}
SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 32}
LLAMA = LlamaConfig(**SMALL, num_labels=2, pad_token_id=0)
MODELS = {
    "score": (LlamaForSequenceClassification, LLAMA, ["score.weight"]),
    "token": (BertForTokenClassification, BertConfig(**SMALL, num_labels=3), ["classifier.weight", "classifier.bias"]),
    "answers": (BertForQuestionAnswering, BertConfig(**SMALL), ["qa_outputs.weight", "qa_outputs.bias"]),
    # A head of two linear layers, and one whose name PEFT takes for the head as well
    "deep": (
        RobertaForSequenceClassification, RobertaConfig(**SMALL),
        [f"classifier.{part}.{kind}" for part in ("dense", "out_proj") for kind in ("weight", "bias")],
    ),
    "named": (
        DistilBertForSequenceClassification, DistilBertConfig(dim=8, n_layers=1, n_heads=2, hidden_dim=16, vocab_size=32),
        [f"{part}.{kind}" for part in ("pre_classifier", "classifier") for kind in ("weight", "bias")],
    ),
}  # fmt: skip


@pytest.fixture
def save(tmp_path):
    """A function that saves a model of random weights and returns its folder."""

    def make(name, kind, config, seed, keep=None):
        torch.manual_seed(seed)
        model = kind(config)
        model.load_state_dict(keep or {}, strict=False)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


def inputs():
    return {"input_ids": torch.arange(3, 17).reshape(2, 7)}


def output(model, **options):
    with torch.no_grad():
        found = model(**inputs(), **options)
    return found.start_logits if "start_logits" in found else found.logits


@pytest.mark.parametrize("name", MODELS)
def test_the_adapter_carries_the_bases_head_and_loads(save, tmp_path, name):
    # Loading raised KeyError: 'base_model.model.score.weight'.
    kind, config, tensors = MODELS[name]
    base, first, second = (save(f"m{seed}", kind, config, seed) for seed in range(3))
    with pytest.warns(HoEWarning, match="the policies have different heads .*; the adapter has the base's"):
        report = build_adapter(base, {"a": first, "b": second}, tmp_path / "out", **EXACT)
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    own = load_file(base / "model.safetensors")
    assert {key for key in written if ".hoe_" not in key} == {f"base_model.model.{tensor}" for tensor in tensors}
    assert all(torch.equal(written[f"base_model.model.{tensor}"], own[tensor]) for tensor in tensors)
    assert report.policies["a"].not_captured["task head"] > 0
    task = read_architecture(base).task_type
    model = PeftModel.from_pretrained(getattr(transformers, AUTO_CLASSES[task]).from_pretrained(base), tmp_path / "out")
    for i, policy in enumerate((first, second)):
        expected = kind.from_pretrained(base)
        changed = load_file(policy / "model.safetensors")
        scope = {f"{module}.weight": changed[f"{module}.weight"] for module in report.modules}
        expected.load_state_dict(scope, strict=False)
        torch.testing.assert_close(
            output(model.eval(), preference=[1 - i, i]), output(expected.eval()), atol=1e-4, rtol=1e-4
        )


def test_a_head_that_all_policies_share_is_carried_and_captured(save, tmp_path):
    head = {"score.weight": torch.ones(2, 8)}
    base = save("base", LlamaForSequenceClassification, LLAMA, 0)
    policies = {
        name: save(name, LlamaForSequenceClassification, LLAMA, i, head) for i, name in enumerate("ab", start=1)
    }
    report = build_adapter(base, policies, tmp_path / "out", **EXACT)
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert torch.equal(written["base_model.model.score.weight"], head["score.weight"])
    assert "task head" not in report.policies["a"].not_captured


def test_a_base_without_a_head_takes_one_that_the_policies_share_and_no_other(save, tmp_path):
    head = {"score.weight": torch.ones(2, 8)}
    base = save("base", LlamaForCausalLM, LLAMA, 0)
    options = {**EXACT, "loading": Loading(task_type="SEQ_CLS")}
    policies = {
        name: save(name, LlamaForSequenceClassification, LLAMA, i, head) for i, name in enumerate("ab", start=1)
    }
    build_adapter(base, policies, tmp_path / "out", **options)
    assert "base_model.model.score.weight" in load_file(tmp_path / "out" / "adapter_model.safetensors")
    policies["b"] = save("c", LlamaForSequenceClassification, LLAMA, 3)
    with pytest.raises(CheckpointError, match=r"different heads 'score.weight', and the base has none") as caught:
        build_adapter(base, policies, tmp_path / "none", **options)
    assert caught.value.tensor == "score.weight"


def test_a_model_without_a_task_head_saves_none(llama):
    assert read_architecture(llama).heads == {}
