"""HoEDistillationTrainer: a router learns the logit fusion of the experts."""
