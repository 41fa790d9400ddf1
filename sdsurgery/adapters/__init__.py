"""LoRA and its kin: which weight of a model each of their tensors means, and what they come to.

``naming`` and ``reading`` look at headers only; ``formulas``, ``baking`` and ``extracting`` compute with torch.
"""
