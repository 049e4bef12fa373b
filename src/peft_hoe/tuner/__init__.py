"""PEFT's side of HoE: the layer, the model, and the steering that carries a preference to the layers."""
