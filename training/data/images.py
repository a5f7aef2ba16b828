"""What does a person see in a stored picture? Every image of data and of benchmarks comes this way.

Cameras store pictures lying on their side and say so (EXIF), scanners store 16 bits a pixel, and
under the transparent parts of a drawing hides whatever colour its program left there. A viewer
turns, scales, and shows the page through; a plain conversion to RGB does none of that. Here:

* orientation: turned upright as EXIF says;
* depth: 16 bits, integers and floats scaled to 8 by the range they stand for (`eight_bits`);
* transparency: laid on white;
* animation: its first frame; CMYK and other colour spaces: RGB by Pillow, without their profiles.

What was done to a picture stays with it (`conversions`), so that `data check` can count it.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import fsspec
import numpy as np
from PIL import Image
from PIL.ExifTags import Base

from training.data.faults import Place, fault, named, shown

WHOLE_IMAGE = "an image file that decodes whole"
FORMS = "a PIL image, bytes, an array, a path or a data URL"
BYTES = (bytes, bytearray, memoryview)
NUMBERS = (bool, int, float)
PICTURE_DEPTH = (2, 3)  # levels of nested lists of numbers that are a picture
CHANNELS = (1, 3, 4)
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TURNED, UNREADABLE = "turned as EXIF says", "EXIF cannot be read, not turned"
CLEAR, FRAME = "transparent, laid on white", "first frame of several"
EXACT = ("1", "L", "P", "RGB", "RGBX")  # modes whose colours are RGB's own
CONVERSIONS = "conversions"  # in `Image.info`


def open_image(place: Place, field: str, value: Any, root: Path = Path()) -> Image.Image:
    """An image in any form that data sets keep it in, as RGB that a person would see.

    Args:
        place: the sample, and
        field: its field, for messages.
        value: a PIL image; the bytes of a file; numbers (H, W), (H, W, C) or (C, H, W) of 1, 3
            or 4 channels, as an array or nested lists; a path; a data URL; or a mapping with
            ``bytes`` or ``path``, as `datasets` keeps an image that it does not decode.
        root: the folder that paths are relative to.

    Raises:
        DataError: it is damaged, missing, or none of these.
    """
    with named(place, field, WHOLE_IMAGE, _name(value, root)):
        if isinstance(value, Mapping):
            value = value.get("bytes") or _fetched(value.get("path"))
        if isinstance(value, Image.Image):
            return as_seen(value)
        if isinstance(value, (list, tuple)) or hasattr(value, "__array__"):
            return _of_array(np.asarray(value))
        if not isinstance(value, (*BYTES, str, Path)):
            raise fault(place, field, shown(value), FORMS)
        with Image.open(_file(value, root)) as image:
            return as_seen(image)


def not_there(name: str, root: Path) -> str | None:
    """Why an image named by a path or data URL cannot be there, or None; it is not opened."""
    if _is_data_url(name):
        return None
    path = root / name
    try:
        return None if path.is_file() else f"no such file: {path}"
    except OSError as error:
        return f"{type(error).__name__}: {error}"


def flat(value: Any) -> list[Any]:
    """The images of a column's value: none, one, or lists of them in lists."""
    if value is None:
        return []
    if not isinstance(value, (list, tuple)) or depth(value) in PICTURE_DEPTH:
        return [value]
    return [one for part in value for one in ([None] if part is None else flat(part))]


def depth(value: Any) -> int:
    """How deep lists of numbers are nested; 0 for anything else."""
    levels = 0
    while isinstance(value, (list, tuple)) and value:
        value, levels = value[0], levels + 1
    return levels if isinstance(value, NUMBERS) else 0


def conversions(image: Image.Image) -> tuple[str, ...]:
    """What `as_seen` did to a picture."""
    return image.info.get(CONVERSIONS, ())


def as_seen(image: Image.Image, *notes: str) -> Image.Image:
    """A picture of any mode as RGB, upright, 8 bits deep, on white; `notes`: conversions so far."""
    done = list(notes)
    if getattr(image, "is_animated", False) and image.format != "MPO":  # MPO: a photograph in 3-D
        done.append(FRAME)
    loading_turns = _orientation(image) if image.format == "TIFF" else None
    image.load()
    if not all(image.size):
        raise ValueError(f"an empty picture, {image.width} x {image.height}")
    orientation = _orientation(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _grey(image, done)
    if orientation in TURNS:
        image = image.transpose(TURNS[orientation])
    if orientation in TURNS or loading_turns in TURNS:
        done.append(TURNED)
    elif orientation == UNREADABLE:
        done.append(UNREADABLE)
    if image.has_transparency_data:
        image = _on_white(image, done)
    elif image.mode not in EXACT:
        done.append(f"{image.mode} to RGB")
    rgb = image.convert("RGB")
    rgb.info = {CONVERSIONS: tuple(done)}
    return rgb


def _orientation(image: Image.Image) -> Any:
    """What EXIF says of a picture, if anything; damaged EXIF is no damage to the picture."""
    try:
        return image.getexif().get(Base.Orientation)
    except Exception:  # Pillow raises whatever its parser stumbles over
        return UNREADABLE


def eight_bits(values: np.ndarray) -> np.ndarray:
    """Numbers as uint8, white where their range ends.

    The range is the whole one of uint8, uint16 and bool. Of other types it is the smallest that
    holds the values: 0 to 1 (floats), 0 to 255 (whole numbers), 0 to 65535 (integers), else their
    own minimum to maximum.

    Raises:
        TypeError: no numbers, or complex ones.
        ValueError: NaN or inf among them.
    """
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind not in "buif":
        raise TypeError(f"an array of {values.dtype}, expected numbers")
    if not np.isfinite(values).all():
        raise ValueError("NaN or inf in it")
    wide = values.astype(np.float64)
    low, high = _range(wide, values.dtype)
    return np.rint((wide - low) * (255 / (high - low))).astype(np.uint8)


def _range(wide: np.ndarray, dtype: np.dtype) -> tuple[float, float]:
    """Black and white of numbers that came as `dtype`."""
    if dtype.name in ("bool", "uint16"):
        return 0.0, 1.0 if dtype.kind == "b" else 65535.0
    low, high = float(wide.min()), float(wide.max())
    whole = dtype.kind in "iu" or bool((wide == np.rint(wide)).all())
    known = {1: dtype.kind == "f", 255: whole, 65535: dtype.kind in "iu"}
    for most, holds in known.items():
        if holds and low >= 0 and high <= most:
            return 0.0, float(most)
    return low, high if high > low else low + 1


def _of_array(values: np.ndarray) -> Image.Image:
    """An array as a picture: channels last, or first where that is the only reading."""
    if values.ndim == 3 and values.shape[0] in CHANNELS and values.shape[2] not in CHANNELS:
        values = values.transpose(1, 2, 0)
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in CHANNELS):
        raise ValueError(f"shape {values.shape}, expected height, width and 1, 3 or 4 channels")
    if not values.size:
        raise ValueError(f"shape {values.shape}, an empty picture")
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    scaled = () if values.dtype == np.uint8 else (_scaled(values),)
    return as_seen(Image.fromarray(np.ascontiguousarray(eight_bits(values))), *scaled)


def _grey(image: Image.Image, done: list[str]) -> Image.Image:
    """A picture of one deep channel with 8 bits, clear where its one transparent value is."""
    values = np.asarray(image)
    done.append(_scaled(values))
    grey = Image.fromarray(eight_bits(values))
    if (clear := image.info.get("transparency")) is not None:
        grey.putalpha(Image.fromarray(eight_bits(values != clear)))
    return grey


def _scaled(values: np.ndarray) -> str:
    return f"{values.dtype.name} scaled to 8 bits"


def _on_white(image: Image.Image, done: list[str]) -> Image.Image:
    """A picture as it looks on a white page; noted only if something shows through."""
    rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    if rgba.getchannel("A").getextrema()[0] == 255:
        return rgba
    done.append(CLEAR)
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)


def _file(value: Any, root: Path) -> Path | BytesIO:
    if isinstance(value, BYTES):
        return BytesIO(bytes(value))
    if not _is_data_url(value):
        return root / value
    head, _, body = value.partition(",")
    content = unquote_to_bytes(body)
    return BytesIO(b64decode(content) if head.endswith(";base64") else content)


def _fetched(path: Any) -> Any:
    """What is behind a URL of a streamed data set; any other path as it is."""
    if not isinstance(path, str) or "://" not in path:
        return path
    with fsspec.open(path, "rb") as file:
        return file.read()  # pyright: ignore[reportAttributeAccessIssue]


def _is_data_url(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("data:")


def _name(value: Any, root: Path) -> str:
    """A value in a message."""
    if isinstance(value, Mapping):
        return _name(value.get("bytes") or value.get("path"), root)
    if _is_data_url(value):
        return "data URL"
    return str(root / value) if isinstance(value, (str, Path)) else type(value).__name__
