"""How likely a model finds the tokens of a response, from its logits.

Text by text: logits are the largest tensors of an update where a vocabulary is large, and of what is computed from them in
float32, over the whole vocabulary, one text's share exists at a time. Only what a gradient needs is kept of all.

Shapes: B texts, T response positions, V vocabulary.
"""

from __future__ import annotations

import torch


def token_logprobs(logits: torch.Tensor, ids: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probabilities of `ids` `(B, T)` at a temperature, from logits `(B, T, V)`."""
    texts = zip(logits.unbind(), ids.unbind(), strict=True)
    return torch.stack([_of_tokens(log_softmax(text, temperature), tokens) for text, tokens in texts])


def logprobs_and_entropy(
    logits: torch.Tensor, ids: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`token_logprobs` and, without a gradient, the entropy `(B, T)` of each position."""
    logprobs, entropies = [], []
    for text, tokens in zip(logits.unbind(), ids.unbind(), strict=True):
        logs = log_softmax(text, temperature)
        logprobs.append(_of_tokens(logs, tokens))
        entropies.append(entropy(logs.detach()))
    return torch.stack(logprobs), torch.stack(entropies)


def log_softmax(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probabilities of logits `(..., V)` at a temperature, in float32 or wider."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (wide if temperature == 1 else wide / temperature).log_softmax(-1)


def entropy(logs: torch.Tensor) -> torch.Tensor:
    """Entropy `(...)` of log-probabilities `(..., V)`, in nats."""
    return -(logs.exp() * logs).sum(-1)


def _of_tokens(logs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return logs.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
