"""Are pictures trained on as a person sees them, whatever form and mode they are stored in?"""

from __future__ import annotations

import base64
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from training.data.images import as_seen, conversions, eight_bits, flat, open_image
from training.data.records import DataError, Place

PLACE = Place(Path("d.json"), "index 3", "e3")
ORIENTATION = 0x0112
#: A 3 x 2 picture whose six pixels differ, so that every way of turning it can be told.
PIXELS = (np.arange(6, dtype=np.uint8).reshape(2, 3) * 40)[:, :, None].repeat(3, 2)
#: What a viewer shows of it for each value of EXIF's orientation.
UPRIGHT = {
    1: PIXELS,
    2: PIXELS[:, ::-1],
    3: PIXELS[::-1, ::-1],
    4: PIXELS[::-1],
    5: PIXELS.transpose(1, 0, 2),
    6: PIXELS.transpose(1, 0, 2)[:, ::-1],
    7: PIXELS.transpose(1, 0, 2)[::-1, ::-1],
    8: PIXELS.transpose(1, 0, 2)[::-1],
}


def stored(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def opened(value: Any, root: Path = Path()) -> Image.Image:
    return open_image(PLACE, "image[0]", value, root)


def seen(value: Any) -> np.ndarray:
    image = opened(value)
    assert image.mode == "RGB"
    return np.asarray(image)


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[ORIENTATION] = orientation
    return found


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_every_orientation_is_turned_upright_once(kind: str, orientation: int) -> None:
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    value = stored(Image.fromarray(PIXELS), kind, exif=exif(orientation), **options)
    assert np.array_equal(seen(value), UPRIGHT[orientation])
    turned = ("turned as EXIF says",) if orientation > 1 else ()
    assert conversions(opened(value)) == turned
    again = np.asarray(as_seen(opened(value)))  # what is upright stays so
    assert np.array_equal(again, UPRIGHT[orientation])


def test_damaged_exif_is_no_damage_to_the_picture() -> None:
    value = stored(Image.fromarray(PIXELS), exif=b"Exif\0\0MM\0\0no tiff")
    assert np.array_equal(seen(value), PIXELS)
    assert conversions(opened(value)) == ("EXIF cannot be read, not turned",)


RAMP = np.array([[0, 51, 102], [153, 204, 255]])


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ((RAMP * 257).astype(np.uint16), "PNG"),
        ((RAMP * 257).astype(np.uint16), "TIFF"),
        ((RAMP * 257).astype(">u2"), "TIFF"),
        ((RAMP * 257).astype(np.int32), "TIFF"),
        (RAMP.astype(np.int32), "TIFF"),
        (((RAMP - 100) * 90_000).astype(np.int32), "TIFF"),  # no known range: its own
        ((RAMP / 255).astype(np.float32), "TIFF"),
        (RAMP.astype(np.float32), "TIFF"),
        ((RAMP / 50 - 1.5).astype(np.float32), "TIFF"),
    ],
    ids=["u16-png", "u16", "u16-big-endian", "i32", "i32-bytes", "i32-own", "f01", "f255", "f-own"],
)
def test_deep_pictures_are_scaled(values: np.ndarray, kind: str) -> None:
    expected = RAMP[:, :, None].repeat(3, 2)
    value = stored(Image.fromarray(values), kind)
    assert np.array_equal(seen(value), expected)
    assert np.array_equal(seen(values), expected)  # as an array
    assert np.array_equal(seen(values.tolist()), expected) or values.dtype.itemsize == 2
    (done,) = conversions(opened(value))
    assert "scaled to 8 bits" in done


def test_numbers_of_no_picture_are_refused() -> None:
    for values, message in (
        (np.array([[0.0, np.nan]]), "NaN or inf"),
        (np.array([[1j, 2]]), "an array of complex"),
        (np.array([["a"]]), "an array of <U1"),
        (np.zeros((5, 6, 2)), r"shape \(5, 6, 2\), expected height, width and 1, 3 or 4"),
        (np.zeros((2, 4, 5, 3)), "shape"),
        (np.zeros((0, 4, 3), np.uint8), "an empty picture"),
        ([[1, 2], [3]], "inhomogeneous"),
    ):
        with pytest.raises(DataError, match=rf"index 3 \(id 'e3'\).*'image\[0\]': got .*{message}"):
            opened(values)
    assert eight_bits(np.array([[7.5, 7.5]])).tolist() == [[0, 0]]


def transparent() -> dict[str, Image.Image]:
    """Four pixels: clear (with a hidden colour), half clear, solid; in every mode that can."""
    rgba = Image.new("RGBA", (3, 1), (200, 0, 0, 255))
    rgba.putpixel((0, 0), (10, 20, 30, 0))
    rgba.putpixel((1, 0), (0, 0, 0, 128))
    la = Image.new("LA", (2, 1), (200, 255))
    la.putpixel((0, 0), (10, 0))
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([10, 20, 30, 200, 0, 0])
    palette.putpixel((0, 0), 0)
    return {"RGBA": rgba, "LA": la, "P": palette, "RGBa": rgba.convert("RGBa")}


def test_hidden_colours_under_transparency_are_never_seen() -> None:
    modes = transparent()
    white = [255, 255, 255]
    assert seen(stored(modes["RGBA"])).tolist() == [[white, [127, 127, 127], [200, 0, 0]]]
    assert seen(modes["RGBa"]).tolist() == [[white, [127, 127, 127], [200, 0, 0]]]
    assert seen(modes["LA"]).tolist() == [[white, [200, 200, 200]]]
    assert seen(modes["LA"].convert("La")).tolist() == [[white, [200, 200, 200]]]
    for clear in (0, bytes([0, 255])):  # one clear colour, or alpha for each
        value = stored(modes["P"], transparency=clear)
        assert seen(value).tolist() == [[white, [200, 0, 0]]]
        assert conversions(opened(value)) == ("transparent, laid on white",)
    grey = Image.new("L", (2, 1), 200)
    grey.putpixel((0, 0), 10)
    assert seen(stored(grey, transparency=10)).tolist() == [[white, [200] * 3]]
    colour = Image.new("RGB", (2, 1), (200, 0, 0))
    colour.putpixel((0, 0), (10, 20, 30))
    assert seen(stored(colour, transparency=(10, 20, 30))).tolist() == [[white, [200, 0, 0]]]
    deep = Image.fromarray(np.array([[2570, 51400]], np.uint16))
    assert seen(stored(deep, transparency=2570)).tolist() == [[white, [200] * 3]]
    array = np.array([[[10, 20, 30, 0], [200, 0, 0, 255]]], np.uint8)
    assert seen(array).tolist() == [[white, [200, 0, 0]]]


def test_what_shows_nothing_through_is_not_called_transparent() -> None:
    assert conversions(opened(Image.new("RGBA", (2, 2), (1, 2, 3, 255)))) == ()
    for mode in ("1", "L", "P", "RGB"):
        assert conversions(opened(Image.new(mode, (2, 2)))) == ()
    assert conversions(opened(Image.new("CMYK", (2, 2)))) == ("CMYK to RGB",)
    assert seen(Image.new("CMYK", (1, 1), (0, 255, 255, 0))).tolist() == [[[255, 0, 0]]]


def test_an_animation_is_its_first_frame_and_says_so() -> None:
    frames = [Image.new("RGB", (2, 2), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    value = stored(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert seen(value)[0, 0].tolist() == [255, 0, 0]
    assert conversions(opened(value)) == ("first frame of several",)


def test_every_form_of_an_image_is_the_same_image(tmp_path: Path) -> None:
    image = Image.fromarray(PIXELS)
    png = stored(image)
    (tmp_path / "a.png").write_bytes(png)
    url = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    percent = "data:image/png," + "".join(f"%{byte:02x}" for byte in png)
    forms = [
        image, png, bytearray(png), memoryview(png), memoryview(png + png)[: len(png)],
        PIXELS, PIXELS.tolist(), PIXELS.astype(np.int64),
        PIXELS / 255, url, percent, "a.png", tmp_path / "a.png",
        {"bytes": png, "path": None}, {"bytes": png, "path": "gone.png"},
        {"bytes": None, "path": "a.png"}, {"bytes": None, "path": (tmp_path / "a.png").as_uri()},
    ]  # fmt: skip
    for form in forms:
        got = opened(form, tmp_path)
        assert np.array_equal(np.asarray(got), PIXELS), str(form)[:40]
    wide = np.arange(30, dtype=np.uint8).reshape(2, 5, 3)
    assert np.array_equal(seen(wide.transpose(2, 0, 1)), wide)  # channels first
    assert np.array_equal(seen(wide[:, :, :1]), wide[:, :, :1].repeat(3, 2))
    assert image.info == {} and np.array_equal(np.asarray(image), PIXELS)  # the giver's is his


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "got int 3, expected a PIL image, bytes, an array, a path or a data URL"),
        (None, "got NoneType None, expected"),
        ({"bytes": None, "path": None}, "got NoneType None, expected"),
        ({1, 2}, "got set {1, 2}, expected"),
        ("gone.png", "got gone.png: FileNotFoundError"),
        (b"no picture", "got bytes: UnidentifiedImageError"),
        ("data:image/png;base64,AAAA", "got data URL: UnidentifiedImageError"),
        ("data:image/png;base64,A", "got data URL: Error: "),
        (Image.new("RGB", (0, 4)), "an empty picture, 0 x 4"),
        ("\ud83d.png", r"\\ud83d\.png"),
        ("nul\0.png", "ValueError"),
    ],
)
def test_what_is_no_image_is_refused_by_name(value: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        opened(value)
    str(caught.value).encode()  # can be printed


def test_long_values_are_shortened_and_still_named() -> None:
    long = "x" * 360_000
    for value in (long, f"data:image/png;base64,{long}", long.encode()):
        with pytest.raises(DataError, match=r"d\.json, index 3") as caught:
            opened(value)
        assert len(str(caught.value)) < 800


def test_lists_in_lists_are_flat_and_numbers_a_picture() -> None:
    image, numbers = Image.new("RGB", (2, 2)), PIXELS.tolist()
    assert flat(None) == flat([]) == flat([[]]) == []
    assert flat(image) == flat([image]) == flat([[image]]) == [image]
    assert flat([[image], [image, image]]) == [image] * 3
    assert flat([None]) == [None]  # refused where it is opened
    assert flat(numbers) == flat([numbers]) == [numbers] and flat([numbers] * 2) == [numbers] * 2
    assert flat(b"abc") == [b"abc"] and flat("a.png") == ["a.png"]
