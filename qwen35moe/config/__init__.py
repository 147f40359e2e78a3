"""Configurations: the sizes and switches of a model, named as in config.json, checked once, then fixed.

`Config` describes a whole model (text and optionally vision), `TextConfig` the decoder, `VisionConfig` the vision tower.
All values are checked when the object is made, so that other code may rely on them; `config.replace(num_hidden_layers=8)`
makes a changed copy. Only keys that do not affect the mathematics may be assigned.
"""

from .checks import ConfigError
from .generation import GenerationConfig
from .model import Config
from .parameters import TensorShape
from .rope import RopeParameters
from .text import TextConfig
from .vision import VisionConfig

__all__ = ["Config", "ConfigError", "GenerationConfig", "RopeParameters", "TensorShape", "TextConfig", "VisionConfig"]
