"""From what people have (texts, messages, images of many kinds) to what Rust takes: turns, each a role with its pieces."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Optional, Union

from .errors import ImageError, InputError

if TYPE_CHECKING:
    import numpy
    import PIL.Image

Piece = tuple[str, Union[str, bytes]]
"""What it is (`text`, `bytes`, `path`, `url`), and its value."""

Turn = tuple[str, list[Piece]]

ImageLike = Union[str, bytes, bytearray, memoryview, "os.PathLike[str]", "PIL.Image.Image", "numpy.ndarray[Any, Any]"]
"""A path, a URL, a data URL, an encoded image's bytes, an image of Pillow, or an array of numpy: height x width (grey), or height x width
x 3 (RGB) or 4 (RGBA), of `uint8`, or of floats in 0..1."""

Images = Union[ImageLike, Sequence[ImageLike], None]
"""One image, several, or none."""

Query = Union[str, Sequence[Mapping[str, Any]]]
"""What is asked: a text, or messages as OpenAI's chat completions have them."""


def turns(query: Query, images: Images, system: Optional[str]) -> list[Turn]:
    """The conversation. `images` stand first in its last turn of the user."""
    pictures = [image(each) for each in several(images)]
    if isinstance(query, str):
        if not query.strip():
            raise InputError("the query is empty")
        told: list[Turn] = [("user", [*pictures, ("text", query)])]
    else:
        told = [message(each) for each in query]
        last = next((turn for turn in reversed(told) if turn[0] == "user"), None)
        if last is None:
            raise InputError("the conversation has no turn of the user, so there is nothing to answer")
        last[1][:0] = pictures
    if system is not None:
        told.insert(0, ("system", [("text", system)]))
    return told


def several(images: Images) -> Iterable[Any]:
    if images is None:
        return ()
    return images if isinstance(images, (list, tuple)) else (images,)


def image(source: Any) -> Piece:
    """One image."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return "bytes", bytes(source)
    if isinstance(source, os.PathLike):
        return "path", os.fspath(source)
    if isinstance(source, str):
        is_url = source.startswith(("http://", "https://", "data:"))
        return ("url" if is_url else "path"), source
    if hasattr(source, "__array_interface__") and not hasattr(source, "save"):
        return "bytes", png(pillow(source))
    if callable(getattr(source, "save", None)):
        return "bytes", png(source)
    raise ImageError(f"{type(source).__name__} is no image: give a path, bytes, a URL, an image of Pillow, or an array of numpy")


def pillow(array: Any) -> PIL.Image.Image:
    try:
        import numpy
        import PIL.Image
    except ImportError as error:
        raise ImageError(f"an array becomes an image by Pillow, which is missing: {error}") from error
    if array.dtype.kind == "f":
        if array.size and not (0.0 <= float(array.min()) and float(array.max()) <= 1.0):
            raise ImageError("an array of floats is an image where all of them are in 0..1")
        array = (array * 255.0).round().astype(numpy.uint8)
    if array.dtype != numpy.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ImageError(
            f"an array of shape {array.shape} and type {array.dtype} is no image: it takes height x width, or height x width x 3 or 4, "
            "of uint8, or of floats in 0..1"
        )
    return PIL.Image.fromarray(array)


def png(picture: Any) -> bytes:
    """An image of Pillow, without loss. One that still has the file it was read from is shown as it is on screen."""
    modes = ("L", "LA", "RGB", "RGBA", "1", "P", "I;16")
    if picture.mode in ("I", "I;16B", "F"):
        raise ImageError(f"an image of mode {picture.mode} has no known range of brightness: convert it to L or RGB")
    file = io.BytesIO()
    (picture if picture.mode in modes else picture.convert("RGB")).save(file, format="PNG")
    return file.getvalue()


def message(told: Mapping[str, Any]) -> Turn:
    """A message as OpenAI's chat completions have it. What can't be judged is an error."""
    if not isinstance(told, Mapping):
        raise InputError(f"a message is a dictionary, not {type(told).__name__}")
    role = told.get("role")
    if role not in ("system", "developer", "user", "assistant"):
        raise InputError(f"no message can be of the role {role!r}: system, developer, user and assistant can")
    other = sorted(name for name, value in told.items() if value and name not in ("role", "content", "name"))
    if other:
        raise InputError(f"a message has what can't be judged here: {', '.join(other)}")
    content = told.get("content")
    if isinstance(content, str):
        return role, [("text", content)]
    if not isinstance(content, (list, tuple)):
        raise InputError(f"a message's content is a text or a list of parts, not {type(content).__name__}")
    return role, [part(each) for each in content]


def part(told: Any) -> Piece:
    """A part of a message. Of images only what can't name a file here: who wrote the message may be a stranger."""
    kind = told.get("type") if isinstance(told, Mapping) else None
    if kind in ("text", "input_text") and isinstance(told.get("text"), str):
        return "text", told["text"]
    if kind in ("image_url", "input_image"):
        url = told.get("image_url")
        url = url.get("url") if isinstance(url, Mapping) else url
        if isinstance(url, str) and url.startswith(("http://", "https://", "data:")):
            return "url", url
        raise ImageError("an image in a message is a data URL, or a URL of http or https; give others by `images`")
    if kind == "image" and "image" in told and not isinstance(told["image"], (str, os.PathLike)):
        return image(told["image"])
    raise InputError(f"a part of a message that can't be judged here: {kind!r}; text and image_url can")
