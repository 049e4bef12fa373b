"""transformers' generate_batch, whose forwards run in a thread of its own."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

from peft_hoe import PreferenceError

pytest.importorskip("transformers", minversion="5.8")
from transformers.generation import ContinuousBatchingConfig

PROMPT = [5, 6, 7]


@pytest.fixture
def settings():
    return GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=63, pad_token_id=0)


@pytest.mark.slow
def test_the_preference_reaches_the_thread(hoe_llama, settings):
    # generate_batch dropped preference= without a word, and its thread saw no block.
    model = hoe_llama(trained=True)

    def batch(**brought):
        small = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=16)  # not all of the memory
        outputs = model.generate_batch(
            inputs=[PROMPT], generation_config=settings, continuous_batching_config=small, **brought
        )
        return next(iter(outputs.values())).generated_tokens

    wanted = {}
    for preference in ((0.0, 1.0), (1.0, 0.0)):
        wanted[preference] = model.generate(torch.tensor([PROMPT]), generation_config=settings, preference=preference)[
            0, 3:
        ].tolist()
        assert batch(preference=preference) == wanted[preference]
        with model.use_preference(preference):
            assert batch() == wanted[preference]
        model.set_preference(preference)
        assert batch() == wanted[preference]
    assert len(set(map(tuple, wanted.values()))) == 2


def test_a_preference_for_each_request_is_refused(hoe_llama, settings):
    model = hoe_llama()
    with pytest.raises(PreferenceError, match="call it once for each preference"):
        model.generate_batch(inputs=[PROMPT] * 2, generation_config=settings, preference=[[1, 0], [0, 1]])
