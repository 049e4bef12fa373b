"""Front A has two points, front B three; A dominates two of them."""

import peft_hoe.metrics

pareto_dominance = peft_hoe.metrics.load("pareto_dominance")
front_a, front_b = [[0.2, 0.9], [0.7, 0.5]], [[0.1, 0.8], [0.6, 0.5], [0.9, 0.1]]
print(pareto_dominance.compute(predictions=front_a, references=front_b))
