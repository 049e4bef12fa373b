"""HoEGRPOTrainer: rewards in groups of completions, without a critic."""
