"""Where responses end: at stop tokens and at stop strings, the same for every row whatever its neighbours do."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from peft_hoe import Decoding
from peft_hoe.generation.completer import Completer
from peft_hoe.generation.prompts import PromptBatch
from peft_hoe.generation.responses import Responses, generate_responses
from peft_hoe.generation.stop_strings import before_stop_string

PROMPTS = ["w3 w4", "w5", "w6 w7 w8", "w9 w1"]
LENGTH = 16


def respond(toys: ModuleType, decoding: Decoding, chunk: int = 4, tokenizer: Any = None) -> Responses:
    model, tokenizer = toys.make_base(), tokenizer or toys.make_tokenizer()
    completer = Completer(model, tokenizer, decoding)
    return generate_responses(model, completer.batch(model, PROMPTS), tokenizer, completer.decoding, chunk)


def naive(ids: torch.Tensor, tokenizer: Any, string: str) -> tuple[int, str]:
    """How many tokens a text has up to the one that completes the string, and the text before it."""
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count], skip_special_tokens=True)
        if string in text:
            return count, text[: text.index(string)]
    return len(ids), tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("chunk", [4, 1])
@pytest.mark.parametrize("pad_is_eos", [False, True])
@pytest.mark.parametrize("stops", [(), (2,)])
def test_a_text_ends_before_a_stop_string(
    toys: ModuleType, stops: tuple[int, ...], pad_is_eos: bool, chunk: int
) -> None:
    """Of two tokens, within the words; rows that have ended go on with their batch, with padding or without."""
    tokenizer = toys.make_tokenizer()
    if pad_is_eos:
        tokenizer.pad_token = "</s>"
    free = respond(toys, Decoding(LENGTH, stop_tokens=()), tokenizer=tokenizer)
    words = free.texts[0].split()
    string = f"{words[3][-1]} {words[4][:2]}"  # "w12 w7" is completed by the second word
    found = respond(toys, Decoding(LENGTH, stop_strings=[string], stop_tokens=stops), chunk, tokenizer)
    ended = 0
    for row in range(len(PROMPTS)):
        whole = free.ids[row].tolist()
        if 2 in stops and 2 in whole:
            whole = whole[: whole.index(2) + 1]
        count, text = naive(torch.tensor(whole), tokenizer, string)
        assert found.texts[row] == text
        assert found.mask[row].tolist() == [True] * count + [False] * (LENGTH - count)
        assert found.ids[row, :count].tolist() == whole[:count]
        assert (found.ids[row, count:] == tokenizer.pad_token_id).all()
        assert bool(found.ended[row]) == (count < len(whole) or string in tokenizer.decode(whole) or whole[-1] in stops)
        ended += count < LENGTH
    assert 0 < ended < len(PROMPTS) or chunk == 1 or stops  # some end earlier than others
    if not stops:
        assert found.texts[0] == " ".join([*words[:3], words[3][:-1]])


def test_the_first_of_several_stop_strings_ends_a_text(toys: ModuleType) -> None:
    free, tokenizer = respond(toys, Decoding(LENGTH, stop_tokens=())), toys.make_tokenizer()
    words = free.texts[0].split()
    found = respond(toys, Decoding(LENGTH, stop_tokens=(), stop_strings=[words[6], words[2]]))
    count, text = min(naive(free.ids[0], tokenizer, word) for word in (words[6], words[2]))
    assert (found.texts[0], int(found.mask[0].sum())) == (text, count)


def test_the_prompt_plays_no_part(toys: ModuleType) -> None:
    free = respond(toys, Decoding(LENGTH))
    word = free.texts[1].split()[0]
    assert respond(toys, Decoding(LENGTH, stop_strings=[f"w5 {word}"])).texts == free.texts


def test_before_a_stop_string() -> None:
    assert before_stop_string("a b. c. d", ["c.", ". "]) == "a b"
    assert before_stop_string("nothing", ["x"]) == "nothing"


def test_a_stop_token_need_not_be_special(toys: ModuleType) -> None:
    """It is counted and stays in the text, as the end of a turn does where it is an ordinary token."""
    free = respond(toys, Decoding(LENGTH, stop_tokens=()))
    stop = int(free.ids[0, 4])
    first = free.ids[0].tolist().index(stop)
    found = respond(toys, Decoding(LENGTH, stop_tokens=(stop,)))
    assert found.texts[0] == toys.make_tokenizer().decode(free.ids[0, : first + 1], skip_special_tokens=True)
    assert int(found.mask[0].sum()) == first + 1


def test_an_encoder_decoder_answers_with_what_it_decoded(toys: ModuleType) -> None:
    """Its output does not begin with the prompt; where decoding begins is a matter of the model."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=32, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4, pad_token_id=0, eos_token_id=2,
        decoder_start_token_id=0, initializer_factor=3.0,
    )  # fmt: skip
    model, tokenizer = T5ForConditionalGeneration(config).eval(), toys.make_tokenizer()
    completer = Completer(model, tokenizer, Decoding(6, stop_tokens=()))
    batch: PromptBatch = completer.batch(model, PROMPTS)
    expected = model.generate(
        input_ids=batch.ids, attention_mask=batch.mask.long(), max_new_tokens=6, min_new_tokens=6, do_sample=False
    )
    found = Completer(model, tokenizer, Decoding(6, options={"min_new_tokens": 6})).complete(model, PROMPTS)
    assert found == tokenizer.batch_decode(expected[:, 1:], skip_special_tokens=True)
    assert len(completer.complete(model, PROMPTS)) == 4
