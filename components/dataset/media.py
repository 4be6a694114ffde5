"""Detection of media in rows: images, video or audio by bytes, spelling or key, and other codes' image marks."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

MEDIA_FILE = re.compile(
    r"\.(jpe?g|jpe|jfif|png|webp|gif|bmp|tiff?|avif|hei[cf]|jp2|jxl|svg|p[gp]m|ico|exr|dcm|nii(\.gz)?|np[yz]"
    r"|mp4|m4v|webm|avi|mov|mkv|mpe?g|flv|wmv|3gp|mp3|m4a|aac|opus|wav|flac|ogg)(\?.*)?$",
    re.IGNORECASE,
)
VIDEO = re.compile(r"video|frames?\b|\.(mp4|m4v|webm|avi|mov|mkv|mpe?g|flv|wmv|3gp)\b", re.IGNORECASE)
MEDIA_DATA = re.compile(r"data:(image|video|audio)/[^,]{0,80},")
MEDIA_BASE64 = re.compile(r"\s*(/9j/|iVBORw0KGgo|R0lGOD|UklGR)[A-Za-z0-9+/\s]{40}")  # magic bytes of JPEG, PNG, GIF and WebP
MEDIA_KEY = re.compile(
    r"(^|[^a-z])(images?|imgs?|pictures?|pics?|photos?|screenshots?|jpe?g|png|webp|videos?|frames?|clips?|audios?|media"
    r"|(?<!min_)(?<!max_)pixels?)"
    r"([^a-z]+(?P<pointer>ids?|idx|index|paths?|ur[il]s?|links?|src|files?|filenames?|names?)"
    r"|[^a-z]+(bytes|data|list|base64|b64|str|string))*[^a-z]*$",
    re.IGNORECASE,
)
CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
_MARK = (  # foreign marks: <|image_pad|>, <image_1>, <ImageHere>, <IMG_CONTEXT>, <start_of_image> or [IMG]; ours is <image>
    r"(?:<\|(?:vision|image|img|video|audio|media)[\w ]*\|>"
    r"|(?!(?-i:<image>))<(?:image|img|video|audio|media)(?:here|[ _]?\d+|_\w+)?>|<start_of_image>|\[IMG\])"
)
MEDIA_MARK = re.compile(  # alone on a line, or joined to the words of a question; and Qwen-VL's <img>path</img>
    rf"<img>[^<\n]+</img>|^[ \t]*{_MARK}+\s*$|(?:\A|\n\n)[ \t]*{_MARK}(?=\S)|(?<=\S){_MARK}\s*\Z", re.IGNORECASE | re.MULTILINE
)


class Held(NamedTuple):
    """Place of an image, or of a possible one, within the source's own files."""

    place: list[Any]
    name: str


def holds_media(value: Any, strings: bool) -> bool:
    """Whether a value holds image bytes, plain or in base64, or, if `strings`, a media file name or data URL."""
    if isinstance(value, Held | bytes):
        return True
    if isinstance(value, str):
        if MEDIA_BASE64.match(value):
            return True
        return strings and bool(MEDIA_DATA.match(value) or (len(value) < 1000 and MEDIA_FILE.search(value)))
    if isinstance(value, dict):
        return any(holds_media(one, strings) for one in value.values())
    return isinstance(value, list | tuple) and any(holds_media(one, strings) for one in value)


def named_like_media(key: str) -> re.Match[str] | None:
    """Match of a key that names a medium, or a reference to one."""
    return MEDIA_KEY.search(CAMEL.sub("_", key))


def may_point(value: Any, shown: int) -> bool:
    """Whether a media key's value may refer to a medium: text, a list or an object; a number or true only without images."""
    return isinstance(value, str | list | dict) or (not shown and isinstance(value, int | float) and bool(value))
