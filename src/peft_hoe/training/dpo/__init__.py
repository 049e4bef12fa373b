"""HoEDPOTrainer: pairs of answers, each preferred under one objective."""
