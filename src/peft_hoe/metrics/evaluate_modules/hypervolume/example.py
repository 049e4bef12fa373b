"""The hypervolume of two points above the origin: 0.2 · 0.9 + 0.5 · 0.5 = 0.43."""

import peft_hoe.metrics

hypervolume = peft_hoe.metrics.load("hypervolume")
print(hypervolume.compute(predictions=[[0.2, 0.9], [0.7, 0.5]], reference_point=[0, 0]))
