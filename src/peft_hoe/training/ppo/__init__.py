"""HoERouterTrainer: rewards, a critic and mixed advantages (paper section 3.4)."""
