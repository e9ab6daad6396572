"""Conversion of texts, messages and images of many kinds to the turns that the Rust part takes."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, Optional, Union

from .errors import ImageError, InputError

if TYPE_CHECKING:
    import numpy
    import PIL.Image

Piece = tuple[str, Union[str, bytes]]
"""A kind (`text`, `bytes`, `path` or `url`) and its value."""

Turn = tuple[str, list[Piece]]
"""A role and its pieces."""

ImageLike = Union[str, bytes, bytearray, memoryview, BinaryIO, "os.PathLike[str]", "PIL.Image.Image", "numpy.ndarray[Any, Any]"]
"""A path, a URL, a data URL, the bytes of an encoded image, a Pillow image, or a numpy array. Arrays are height x width (grey), or
height x width x 3 (RGB) or 4 (RGBA), of `uint8`, or of floats in 0..1. Open files work too."""

Images = Union[ImageLike, Sequence[ImageLike], None]
"""One image, several, or none."""

LONGEST_PATH = 4096
"""Bytes of the longest path on Linux."""

Query = Union[str, Sequence[Mapping[str, Any]]]
"""A text, or messages in the format of OpenAI's chat completions."""


def turns(query: Query, images: Images, system: Optional[str]) -> list[Turn]:
    """Return the turns of a conversation. `images` come first in the last turn of the user."""
    pieces = [image(source) for source in as_sequence(images)]
    if isinstance(query, str):
        if not query.strip():
            raise InputError("the query is empty")
        conversation: list[Turn] = [("user", [*pieces, ("text", query)])]
    elif isinstance(query, (Mapping, bytes, bytearray)) or not isinstance(query, Iterable):
        raise InputError(f"the query must be a text or a list of messages, not {type(query).__name__}")
    else:
        conversation = [turn(message) for message in query]
        last = next((turn for turn in reversed(conversation) if turn[0] == "user"), None)
        if last is None:
            raise InputError("the conversation has no turn of the user, so there is nothing to answer")
        last[1][:0] = pieces
    if system is not None:
        conversation.insert(0, ("system", [("text", system)]))
    for _, parts in conversation:
        for kind, value in parts:
            if kind == "text":
                checked_text(value)
    return conversation


def checked_text(text: Any) -> str:
    """Check that a text has no lone surrogates, which can't be sent, and return it."""
    if not isinstance(text, str):
        raise InputError(f"expected a text, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"a text has lone surrogates: {error}") from error
    return text


def as_sequence(images: Images) -> Iterable[Any]:
    if images is None:
        return ()
    return images if isinstance(images, (list, tuple)) else (images,)


def image(source: Any) -> Piece:
    """Return the piece for an image."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return "bytes", bytes(source)
    if isinstance(source, os.PathLike):
        return "path", os.fsdecode(source)
    if isinstance(source, str):
        if source.startswith(("http://", "https://", "data:")):
            return "url", source
        if len(source) > LONGEST_PATH or "://" in source:
            raise ImageError("a text that is an image must be a path, a data URL, or an http or https URL; pass encoded images as bytes")
        return "path", source
    if callable(getattr(source, "read", None)):
        content = source.read()
        if not isinstance(content, bytes):
            raise ImageError("a file that is an image must be open in binary mode")
        return "bytes", content
    if callable(getattr(source, "save", None)) and isinstance(getattr(source, "mode", None), str):
        return "bytes", png(source)
    if hasattr(source, "__array_interface__"):
        return "bytes", png(from_array(source))
    raise ImageError(f"{type(source).__name__} is not an image: pass a path, bytes, a URL, a Pillow image or a numpy array")


def from_array(array: Any) -> PIL.Image.Image:
    """Convert a numpy array to a Pillow image."""
    try:
        import numpy
        import PIL.Image
    except ImportError as error:
        raise ImageError(f"install Pillow to use arrays as images: {error}") from error
    if array.dtype.kind == "f":
        if array.size and not (0.0 <= float(array.min()) and float(array.max()) <= 1.0):
            raise ImageError("the values of a float array must be in 0..1 to be an image")
        array = (array * 255.0).round().astype(numpy.uint8)
    if array.dtype != numpy.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ImageError(
            f"an array of shape {array.shape} and type {array.dtype} is not an image: expected height x width, or "
            "height x width x 3 or 4, of uint8, or of floats in 0..1"
        )
    if array.size == 0:
        raise ImageError(f"an array of shape {array.shape} has no pixels")
    return PIL.Image.fromarray(array)


def png(image: Any) -> bytes:
    """Encode a Pillow image as PNG."""
    modes = ("L", "LA", "RGB", "RGBA", "1", "P", "I;16")
    if image.mode in ("I", "I;16B", "F"):
        raise ImageError(f"images of mode {image.mode} have no defined range of brightness: convert it to L or RGB")
    file = io.BytesIO()
    try:
        import PIL.ImageOps

        image = PIL.ImageOps.exif_transpose(image)
        (image if image.mode in modes else image.convert("RGB")).save(file, format="PNG")
    except Exception as error:  # Files are decoded only now, each format by its own code.
        raise ImageError(f"Pillow can't read or convert the image: {error}") from error
    return file.getvalue()


def turn(message: Mapping[str, Any]) -> Turn:
    """Convert a message of OpenAI's chat completions. Contents that can't be judged are an error."""
    if not isinstance(message, Mapping):
        raise InputError(f"a message must be a dictionary, not {type(message).__name__}")
    role = message.get("role")
    if role not in ("system", "developer", "user", "assistant"):
        raise InputError(f"unknown role {role!r}: use system, developer, user or assistant")
    other = sorted(name for name, value in message.items() if value and name not in ("role", "content", "name"))
    if other:
        raise InputError(f"these fields of a message can't be judged: {', '.join(other)}")
    content = message.get("content")
    if isinstance(content, str):
        return role, [("text", content)]
    if not isinstance(content, (list, tuple)):
        raise InputError(f"the content of a message must be a text or a list of parts, not {type(content).__name__}")
    return role, [part_piece(part) for part in content]


def part_piece(part: Any) -> Piece:
    """Convert a part of a message. Paths of images are an error, as strangers may have written the message."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in ("text", "input_text") and isinstance(part.get("text"), str):
        return "text", part["text"]
    if kind in ("image_url", "input_image"):
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, Mapping) else url
        if isinstance(url, str) and url.startswith(("http://", "https://", "data:")):
            return "url", url
        raise ImageError("an image in a message must be a data URL, or an http or https URL; pass others with `images`")
    if kind == "image" and "image" in part and not isinstance(part["image"], (str, os.PathLike)):
        return image(part["image"])
    raise InputError(f"parts of type {kind!r} can't be judged: use text or image_url")
