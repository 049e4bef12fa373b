"""Preferences in the engines that people run: exports, and servers."""

from .lora import export_lora

__all__ = ["export_lora"]
