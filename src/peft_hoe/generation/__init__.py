"""How any part of the package writes text: prompts, decoding, responses, and the logits behind them."""

from .decoding import Decoding

__all__ = ["Decoding"]
