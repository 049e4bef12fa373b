"""What a sweep says about all preferences between those that it measured: which λ reaches what, and a dial with equal steps."""
