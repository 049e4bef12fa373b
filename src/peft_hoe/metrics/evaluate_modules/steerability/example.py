"""Three preferences; the second objective falls once where its weight rises."""

import peft_hoe.metrics

steerability = peft_hoe.metrics.load("steerability")
preferences = [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]
rewards = [[0.9, 0.2], [0.6, 0.8], [0.1, 0.7]]
print(steerability.compute(predictions=rewards, references=preferences))
