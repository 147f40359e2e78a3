"""Draws docs/figures/routing.png for docs/guide/routing.md: `python docs/figures/routing.py`.

The bundled checkpoint on passages of books outside its training text (passages.txt). Needs matplotlib.
"""

from __future__ import annotations

from pathlib import Path

from qwen35moe.cli import main

HERE = Path(__file__).parent

if __name__ == "__main__":
    raise SystemExit(main(["routing", "tiny", "--text", str(HERE / "passages.txt"), "--plot", str(HERE / "routing.png")]))
