"""Modules for Hugging Face `evaluate`, one folder each. `evaluate` copies the module, so it imports the maths from peft_hoe.

`evaluate` reads the imports of a module line by line: one package a line.
"""
