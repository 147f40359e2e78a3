"""Functions of tensors: each operation's definition first, its fast PyTorch forms beside it, one contract for all."""
