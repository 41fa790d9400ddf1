"""What tensors mean: components and their weights, families, position ids."""
