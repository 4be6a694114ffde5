"""Detection of media in rows: images, video or audio by bytes, spelling or key, and other codes' image marks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

_ENDING = (
    r"\.(?:jpe?g|jpe|jfif|png|webp|gif|bmp|tiff?|avif|hei[cf]|jp2|jxl|svg|p[gp]m|ico|exr|dcm|nii(?:\.gz)?|np[yz]"
    r"|mp4|m4v|webm|avi|mov|mkv|mpe?g|flv|wmv|3gp|mp3|m4a|aac|opus|wav|flac|ogg)"
)
MEDIA_FILE = re.compile(rf"{_ENDING}(\?.*)?$", re.IGNORECASE)
VIDEO = re.compile(r"video|\bvids?\b|frames?(?![a-z])|\b(mp4|m4v|webm|avi|mov|mkv|mpe?g|flv|wmv|3gp)\b", re.IGNORECASE)
MEDIA_DATA = re.compile(r"data:(image|video|audio)/[^,]{0,80},", re.IGNORECASE)
_BASE64 = (  # magic bytes of JPEG, PNG, GIF, WebP, BMP and TIFF
    r"(?:/9j/|iVBORw0KGgo|R0lGOD|UklGR|Qk[0-3][A-Za-z0-9+/]{5}AAAAA|SUkqA|TU0AK)[A-Za-z0-9+/\s]{40}"
)
MEDIA_BASE64 = re.compile(rf"\s*{_BASE64}")
NO_PICTURE = re.compile(  # named as an image
    r"^data:(video|audio)/|\.((?P<video>mp4|m4v|webm|avi|mov|mkv|mpe?g|flv|wmv|3gp)|mp3|m4a|aac|opus|wav|flac|ogg)$",
    re.IGNORECASE,
)
MEDIA_KEY = re.compile(
    r"(^|[^a-z])(images?|imgs?|pictures?|pics?|photos?|screenshots?|jpe?g|png|webp|videos?|vids?|frames?|clips?|audios?|media|pdfs?|mp[34]"
    r"|(?<!min_)(?<!max_)pixels?)"
    r"([^a-z]+(ids?|idx|index|paths?|ur[il]s?|links?|src|files?|filenames?|names?|dirs?|folders?|roots?"
    r"|bytes|data|list|base64|b64|str|string|features?|feats?|embeddings?|embeds?))*[^a-z]*$",
    re.IGNORECASE,
)
OWN = re.compile(  # keys of a row's own image: image_url, file_name, coco_url, source, file_name within image_info
    r"((meta|metadata|data|raw|extra)[^a-z0-9]*)*((images?|imgs?|pictures?|pics?|photos?|screenshots?|frame|page|doc)[^a-z0-9]*)?"
    r"((info|annotations?|coco|flickr|original|orig|local|full|relative)[^a-z0-9]*)*"
    r"((ids?|idx|index|paths?|ur[il]s?|links?|src|source|files?|filenames?|fn|names?|titles?|dirs?|folders?|roots?|pdfs?)[^a-z0-9]*)+",
    re.IGNORECASE,
)
CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
_NOUN = r"(?:(?:begin|start|end)_of_)?(?:vision|image|img|im_patch|video|audio|media|speech|sound|point)"
_MARK = (  # foreign marks (ours: <image>): <|image_pad|>, <image_1>, <ImageHere>, <IMG_CONTEXT>, <__media__>, [IMG], {image}
    rf"(?:<\|{_NOUN}[\w ]*\|>|(?!(?-i:<image>))<_*{_NOUN}(?:here|[ _]?\d+|_\w+)?>"
    r"|\[(?:IMG|image|picture)(?:[ _]?\d+)?\]|\{+image\}+)"
)
_SHOWN = r"!\[[^\]\n]*\]\([^)\n]+\)"  # Markdown's image
MEDIA_MARK = re.compile(  # in a question: marks alone on a line or joined to its words, Qwen-VL's <img>path</img>,
    rf"<img>[^<\n]+</img>|^[ \t]*(?:{_MARK}[ \t]*)+$|(?:\A|\n\n)[ \t]*{_MARK}(?=\S)|(?<=\S){_MARK}\s*\Z"
    rf"|\A\s*{_SHOWN}|{_SHOWN}\s*\Z|(?:^|\]\()(?:{MEDIA_DATA.pattern}|[ \t]*{_BASE64})"  # images, and their bytes
    r"""|\A\s*\[\s*\{(?s:.*?)["']type["']:\s*["'][a-z_]*(?:image|video|audio)"""  # a list of parts as text
    r"""|\A\s*\[\s*\{["']type["']:\s*["'](?:input_)?text["'],\s*["']text["']:"""
    rf"|\A\s*\S+{_ENDING}(?:\?\S*)?\s*\Z",  # a file's name or address, and no question
    re.IGNORECASE | re.MULTILINE,
)
ANY_MARK = re.compile(rf"{MEDIA_MARK.pattern}|{_MARK}", MEDIA_MARK.flags)  # and marks among the words


class Held(NamedTuple):
    """Place of an image, or of a possible one, within the source's own files."""

    place: list[Any]
    name: str


def may_be_media(key: str, value: Any, shown: Sequence[str | Held] = ()) -> bool:
    """Whether a value, or one within it, may hold or name a medium other than the images `shown`.

    What names these again is none: their own path, or an address in a key such as `image_url`.
    """
    if isinstance(value, Held | bytes):
        return True
    if value in shown or (isinstance(value, str) and str(PurePosixPath(value)) in shown):
        return False
    if isinstance(value, str) and (MEDIA_BASE64.match(value) or MEDIA_DATA.match(value)):
        return True
    words = CAMEL.sub("_", key)
    again = bool(OWN.fullmatch(words)) and (len(value) if isinstance(value, list) else 1) <= len(shown)
    if value and not again and MEDIA_KEY.search(words) and (not shown or isinstance(value, str | list | dict)):
        return True  # with images, a number counts or rates them
    if isinstance(value, dict):
        return "sampling_rate" in value or any(may_be_media(f"{key}_{inner}", member, shown) for inner, member in value.items())
    if isinstance(value, list | tuple):
        return any(may_be_media(key if again or isinstance(item, dict) else "", item, shown) for item in value)
    return isinstance(value, str) and not again and len(value) < 1000 and bool(MEDIA_FILE.search(value))
