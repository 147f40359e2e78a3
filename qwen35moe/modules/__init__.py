"""The parts of the decoder: parameters and names, no cleverness. The mathematics is in `qwen35moe.ops`."""
