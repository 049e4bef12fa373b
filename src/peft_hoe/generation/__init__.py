"""How any part of the package writes text: prompts, decoding, responses, and the logits behind them."""
