"""Damaged files: an error or a valid result, in bounded time and memory. Bytes are changed, cut, doubled and put in.

A child process does the work under limits of memory and of the processor's time, so that a crash of a decoder is seen as
one and neither the size of torch's libraries nor a busy machine is.
"""

from __future__ import annotations

import io
import json
import resource
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import pytest

from tests.memory import limit_address_space

Image = pytest.importorskip("PIL.Image")
PngInfo = pytest.importorskip("PIL.PngImagePlugin").PngInfo
ROOT = Path(__file__).resolve().parents[1]
KINDS = ("PNG", "JPEG", "GIF", "WEBP", "MP4")
EXAMPLES = 150  # of each kind; about 4 s in all
MEMORY = 1 << 30  # of addresses beyond those of the libraries
SECONDS = 120  # of the processor; the attacks need about 4


def sound_files() -> dict[str, bytes]:
    """A small sound file of each kind."""
    import torch

    torch.manual_seed(0)
    data = torch.randint(0, 256, (36, 52, 3), dtype=torch.uint8)
    files = {}
    for kind in KINDS[:-1]:
        stream = io.BytesIO()
        options: dict[str, Any] = {} if kind == "GIF" else {"exif": exif()}
        if kind == "PNG":  # its pixels are protected twice: damage is refused there, so there is also a text to damage
            options["pnginfo"] = PngInfo()
            options["pnginfo"].add_text("Comment", "a text that nobody needs " * 300)
        Image.frombytes("RGB", (52, 36), bytes(data.flatten().tolist())).save(stream, kind, **options)
        files[kind] = stream.getvalue()
    from tests.test_processing_video import clip, write

    stream = io.BytesIO()
    write(stream, clip(6, 32, 48))
    files["MP4"] = stream.getvalue()
    return files


def exif() -> bytes:
    found = Image.Exif()
    found[0x0112] = 8
    return found.tobytes()


def mended(png: bytearray) -> bytearray:
    """A PNG's checksums made right again: otherwise nearly all damage ends there, and nothing behind them is tried."""
    at = 8
    while at + 12 <= len(png):
        end = at + 8 + int.from_bytes(png[at : at + 4], "big")
        png[end : end + 4] = zlib.crc32(png[at + 4 : end]).to_bytes(4, "big") if end + 4 <= len(png) else b""
        at = end + 4
    return png


def attacks() -> dict[str, dict[str, int]]:
    """One sound file of every kind read, which imports all there is, then the attacks under the limits."""
    from qwen35moe.processing import ImageProcessor, VideoProcessor
    from qwen35moe.processing.pixels import PixelSettings

    small = PixelSettings(patch_size=4, min_pixels=256, max_pixels=16_384, max_frames=8)
    for kind, sound in sound_files().items():
        if kind == "MP4":
            file = Path(tempfile.mkdtemp()) / "sound"
            file.write_bytes(sound)
            VideoProcessor(small)(file)
        else:
            ImageProcessor(small)(sound)
    limit_address_space(MEMORY)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    return {kind: attack(kind) for kind in KINDS}


def attack(kind: str) -> dict[str, int]:
    """How many damaged files were refused and how many gave something; anything else raises."""
    import warnings

    import torch
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    from qwen35moe.processing import ImageProcessor, VideoProcessor
    from qwen35moe.processing.pixels import PixelSettings

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sound = sound_files()[kind]
    small = PixelSettings(patch_size=4, min_pixels=256, max_pixels=16_384, max_frames=8)
    count = {"refused": 0, "read": 0}
    place = st.integers(0, len(sound) - 1)
    damage = st.one_of(
        st.tuples(st.just("set"), place, st.integers(0, 255)),
        st.tuples(st.just("cut"), place, st.integers(0, 0)),
        st.tuples(st.just("drop"), place, st.integers(1, 40)),
        st.tuples(st.just("double"), place, st.integers(1, 40)),
        st.tuples(st.just("ones"), place, st.integers(1, 8)),
    )
    file = Path(tempfile.mkdtemp()) / "damaged"

    @settings(max_examples=EXAMPLES, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(damage, min_size=1, max_size=4))
    def one(changes: list[tuple[str, int, int]]) -> None:
        data = bytearray(sound)
        for what, at, amount in changes:
            if what == "set":
                data[at : at + 1] = bytes([amount])
            elif what == "cut":
                del data[at:]
            elif what == "drop":
                del data[at : at + amount]
            elif what == "double":
                data[at:at] = data[at : at + amount]
            else:
                data[at : at + amount] = b"\xff" * amount
        data = mended(data) if kind == "PNG" and len(data) % 4 else data
        try:
            if kind == "MP4":
                file.write_bytes(data)
                values, grid = VideoProcessor(small)(file)[0].values()
            else:
                values, grid = ImageProcessor(small)(bytes(data)).values()
        except ValueError:
            count["refused"] += 1
            return
        count["read"] += 1
        assert values.shape == (int(grid.prod(1).sum()), 3 * 2 * 16) and len(values) <= 4096
        assert bool((values.abs() <= 1).all())

    one()
    return count


def test_damaged_files_are_refused_or_read() -> None:
    pytest.importorskip("av")
    program = "import json; from tests.test_processing_fuzz import attacks; print(json.dumps(attacks()))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=1200)
    assert run.returncode == 0, run.stderr[-3000:]
    for kind, count in json.loads(run.stdout.splitlines()[-1]).items():
        assert count["refused"] >= 10 and count["read"] >= 5, (kind, count)  # the damage gets through, and tells
        assert sum(count.values()) >= EXAMPLES * 0.9, (kind, count)
