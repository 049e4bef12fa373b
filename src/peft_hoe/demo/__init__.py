"""The embedded demonstration: a tiny base, two tiny policies, their rewards, and the job on them."""
