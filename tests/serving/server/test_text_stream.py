from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from peft_hoe.serving.server.text_stream import TextStream


@pytest.fixture(scope="module")
def bytewise():
    """A token is a byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False)


def parts(tokenizer, text, stop=()):
    stream = TextStream(tokenizer, stop)
    pieces = []
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return stream, [*pieces, stream.finish()]


@pytest.mark.parametrize("text", ["Once upon a time", "naïve – 日本語 🙂 ok", " leading and trailing "])
def test_pieces_add_up_to_the_text_and_no_character_is_torn(bytewise, text):
    stream, pieces = parts(bytewise, text)
    assert "".join(pieces) == text == stream.text
    assert "\ufffd" not in "".join(pieces)
    assert pieces[0] == text[0] or not text.isascii()


def test_words_of_a_tokenizer_that_puts_spaces_between_them(tokenizer):
    _, pieces = parts(tokenizer, "w1 w2 w3")
    assert pieces == ["w1", " w2", " w3", ""]


def test_half_a_character_at_the_end_is_shown_as_what_it_is(bytewise):
    stream = TextStream(bytewise)
    first = bytewise("é", add_special_tokens=False)["input_ids"][0]
    assert stream.push(first) == ""
    assert stream.finish() == "\ufffd"


def test_the_text_ends_before_the_first_stop_string_and_never_shows_its_beginning(bytewise):
    stream, pieces = parts(bytewise, "Hello Hu, Human: hi", ["Human:", "hi"])
    assert "".join(pieces) == "Hello Hu, "
    assert stream.stopped
    # "Hu" is held back until "," shows that it is text.
    assert pieces[7] == ""
    assert pieces[8] == "Hu,"


def test_what_was_held_back_is_given_in_the_end(bytewise):
    stream, pieces = parts(bytewise, "it is Hum", ["Human:"])
    assert pieces[-1] == "Hum"
    assert not stream.stopped
