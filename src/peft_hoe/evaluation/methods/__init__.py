"""What a sweep generates with: a HoE model, or any function from prompts and a preference to texts."""
