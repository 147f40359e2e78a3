"""The modules of the decoder and the vision tower: parameters and taps. The mathematics is in `qwen35moe.ops`."""
