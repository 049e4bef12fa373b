"""Measuring steerable models: preference sweeps, baselines and reports."""
