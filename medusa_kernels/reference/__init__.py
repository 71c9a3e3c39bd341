"""Obvious PyTorch for every op: the definition of right, in fp32, one sequence and one node at a time."""
