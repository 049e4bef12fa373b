from __future__ import annotations

from types import ModuleType

import numpy as np
import torch

from peft_hoe import Decoding
from peft_hoe.generation.fused_generation import generate_fused
from peft_hoe.generation.fusion import fusion_logprobs
from peft_hoe.generation.prompts import PromptBatch

IDS = torch.tensor([[0, 5, 6, 7], [10, 11, 12, 13], [4, 20, 21, 22]])
MASK = (IDS != 0).long()
PREFERENCES = np.array([[0.3, 0.7], [1.0, 0.0], [0.5, 0.5]])


def batch(ids: torch.Tensor, mask: torch.Tensor) -> PromptBatch:
    return PromptBatch(ids, mask.bool(), [""] * len(ids), {})


def test_greedy_follows_the_fusion_of_separate_forwards(toys: ModuleType) -> None:
    """Token by token, without a cache, each prompt with a preference of its own; padding after the end."""
    model = toys.make_policy()
    tokenizer = toys.make_tokenizer()
    new = generate_fused(model, "default", PREFERENCES, batch(IDS, MASK), tokenizer, Decoding(5, stop_tokens=(2,)))
    found = torch.cat([IDS, new.ids], dim=1)
    for row, preference in enumerate(PREFERENCES):
        ids, mask = IDS[row : row + 1], MASK[row : row + 1]
        for _ in range(5):
            grown = torch.cat([ids, torch.zeros(1, 1, dtype=torch.long)], dim=1)
            attended = torch.cat([mask, torch.ones(1, 1, dtype=torch.long)], dim=1)
            best = fusion_logprobs(model, "default", preference, grown, attended, 1)[:, 0].argmax(-1, keepdim=True)
            ids, mask = torch.cat([ids, best], dim=1), attended
            if int(best) == 2:
                break
        assert found[row, : ids.shape[1]].tolist() == ids[0].tolist()
        assert not found[row, ids.shape[1] :].any()


def test_samples_have_the_fusions_frequencies(toys: ModuleType) -> None:
    """First tokens of 4,000 samples against the fusion's probabilities: within five standard errors each."""
    model = toys.make_policy()
    count = 4000
    torch.manual_seed(0)
    ids, mask = IDS[1:2].repeat(count, 1), MASK[1:2].repeat(count, 1)
    one = Decoding(1, do_sample=True, temperature=0.7, stop_tokens=(2,))
    preferences = np.tile([[0.3, 0.7]], (count, 1))
    found = generate_fused(model, "default", preferences, batch(ids, mask), toys.make_tokenizer(), one).ids[:, -1]
    grown = torch.cat([IDS[1:2], torch.zeros(1, 1, dtype=torch.long)], dim=1)
    logs = fusion_logprobs(model, "default", np.array([0.3, 0.7]), grown, torch.ones_like(grown), 1)[0, 0]
    wanted = (logs / 0.7).softmax(-1)
    shares = torch.bincount(found, minlength=len(wanted)) / count
    assert ((shares - wanted).abs() <= 5 * (wanted * (1 - wanted) / count).sqrt() + 1e-9).all()


def test_top_k_and_top_p_are_those_of_the_fusion(toys: ModuleType) -> None:
    """Only the most likely tokens of the fused distribution are drawn, whatever single experts like."""
    model = toys.make_policy()
    count = 400
    torch.manual_seed(0)
    ids, mask = IDS[1:2].repeat(count, 1), MASK[1:2].repeat(count, 1)
    preferences = np.tile([[0.3, 0.7]], (count, 1))
    grown = torch.cat([IDS[1:2], torch.zeros(1, 1, dtype=torch.long)], dim=1)
    chances = fusion_logprobs(model, "default", np.array([0.3, 0.7]), grown, torch.ones_like(grown), 1)[0, 0].exp()
    order = chances.argsort(descending=True)
    for how, wanted in (
        ({"top_k": 3}, order[:3]),
        ({"top_p": 0.5}, order[: int((chances[order].cumsum(0) < 0.5).sum()) + 1]),
    ):
        one = Decoding(1, do_sample=True, stop_tokens=(2,), **how)  # type: ignore[arg-type]
        found = generate_fused(model, "default", preferences, batch(ids, mask), toys.make_tokenizer(), one).ids[:, -1]
        assert set(found.tolist()) == set(wanted.tolist())
