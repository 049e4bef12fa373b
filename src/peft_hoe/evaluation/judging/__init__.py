"""Pairwise judges: which of two completions is better, by a function or behind a URL."""
