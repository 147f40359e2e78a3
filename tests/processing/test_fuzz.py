"""Damaged files give a ValueError or a valid result, in bounded time and memory. Bytes are set, cut, dropped and duplicated.

A forked child does the work under limits of memory and processor time, so that a crash of a decoder fails the test and
neither the size of torch's libraries nor a busy machine does.
"""

from __future__ import annotations

import io
import resource
import tempfile
import zlib
from pathlib import Path
from typing import Any

import pytest

from tests.support.memory import forked, limit_address_space

Image = pytest.importorskip("PIL.Image")
PngInfo = pytest.importorskip("PIL.PngImagePlugin").PngInfo
KINDS = ("PNG", "JPEG", "GIF", "WEBP", "MP4")
EXAMPLES = 150  # of each kind; about 4 s in all
MEMORY = 1 << 30  # of addresses beyond those of the libraries
SECONDS = 120  # of the processor; the attacks need about 4


def valid_files() -> dict[str, bytes]:
    """A small valid file of each kind."""
    import torch

    torch.manual_seed(0)
    data = torch.randint(0, 256, (36, 52, 3), dtype=torch.uint8)
    files = {}
    for kind in KINDS[:-1]:
        stream = io.BytesIO()
        options: dict[str, Any] = {} if kind == "GIF" else {"exif": exif()}
        if kind == "PNG":  # checksums protect the pixels; a text chunk is damaged more often
            options["pnginfo"] = PngInfo()
            options["pnginfo"].add_text("Comment", "a text without a purpose " * 300)
        Image.frombytes("RGB", (52, 36), bytes(data.flatten().tolist())).save(stream, kind, **options)
        files[kind] = stream.getvalue()
    from tests.processing.test_video import clip, write

    stream = io.BytesIO()
    write(stream, clip(6, 32, 48))
    files["MP4"] = stream.getvalue()
    return files


def exif() -> bytes:
    tags = Image.Exif()
    tags[0x0112] = 8
    return tags.tobytes()


def with_checksums(png: bytearray) -> bytearray:
    """The PNG with correct checksums: otherwise the decoder stops at nearly every damage."""
    at = 8
    while at + 12 <= len(png):
        end = at + 8 + int.from_bytes(png[at : at + 4], "big")
        png[end : end + 4] = zlib.crc32(png[at + 4 : end]).to_bytes(4, "big") if end + 4 <= len(png) else b""
        at = end + 4
    return png


def attacks() -> dict[str, dict[str, int]]:
    """Read one valid file of every kind, which imports everything, then run the attacks under the limits."""
    from qwen35moe.processing import ImageProcessor, VideoProcessor
    from qwen35moe.processing.pixels import PixelSettings

    small = PixelSettings(patch_size=4, min_pixels=256, max_pixels=16_384, max_frames=8)
    for kind, valid in valid_files().items():
        if kind == "MP4":
            file = Path(tempfile.mkdtemp()) / "valid"
            file.write_bytes(valid)
            VideoProcessor(small)(file)
        else:
            ImageProcessor(small)(valid)
    limit_address_space(MEMORY)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    return {kind: attack(kind) for kind in KINDS}


def attack(kind: str) -> dict[str, int]:
    """The numbers of damaged files that were refused and read; anything else raises."""
    import warnings

    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    from qwen35moe.processing import ImageProcessor, VideoProcessor
    from qwen35moe.processing.pixels import PixelSettings

    warnings.simplefilter("ignore")
    valid = valid_files()[kind]
    small = PixelSettings(patch_size=4, min_pixels=256, max_pixels=16_384, max_frames=8)
    count = {"refused": 0, "read": 0}
    offset = st.integers(0, len(valid) - 1)
    damage = st.one_of(
        st.tuples(st.just("set"), offset, st.integers(0, 255)),
        st.tuples(st.just("cut"), offset, st.integers(0, 0)),
        st.tuples(st.just("drop"), offset, st.integers(1, 40)),
        st.tuples(st.just("duplicate"), offset, st.integers(1, 40)),
        st.tuples(st.just("ones"), offset, st.integers(1, 8)),
    )
    file = Path(tempfile.mkdtemp()) / "damaged"

    @settings(max_examples=EXAMPLES, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(damage, min_size=1, max_size=4))
    def one(changes: list[tuple[str, int, int]]) -> None:
        data = bytearray(valid)
        for change, at, amount in changes:
            if change == "set":
                data[at : at + 1] = bytes([amount])
            elif change == "cut":
                del data[at:]
            elif change == "drop":
                del data[at : at + amount]
            elif change == "duplicate":
                data[at:at] = data[at : at + amount]
            else:
                data[at : at + amount] = b"\xff" * amount
        data = with_checksums(data) if kind == "PNG" and len(data) % 4 else data
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
    for kind, count in forked(attacks).items():
        assert count["refused"] >= 10 and count["read"] >= 5, (kind, count)  # the damage reaches the decoders and has an effect
        assert sum(count.values()) >= EXAMPLES * 0.9, (kind, count)
