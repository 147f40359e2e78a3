"""Calls of PyTorch's own CUDA kernels: which arguments make them run, and not a slow form that materialises everything."""
