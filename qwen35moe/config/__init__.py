"""What a model is: sizes and switches, named as in config.json, checked once, then fixed.

`Config` is a whole model (text, perhaps vision), `TextConfig` the decoder, `VisionConfig` the tower. All values are
checked when the object is made, so that code further up may rely on them; changing one makes a new object
(`config.replace(num_hidden_layers=8)`). Only keys that decide nothing about the mathematics may be assigned.
"""

from .checks import ConfigError
from .model import Config
from .parameters import TensorShape
from .rope import RopeParameters
from .text import TextConfig
from .vision import VisionConfig

__all__ = ["Config", "ConfigError", "RopeParameters", "TensorShape", "TextConfig", "VisionConfig"]
