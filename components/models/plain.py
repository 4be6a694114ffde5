"""Escaping of special tokens in data: text that looks like one is plain text, so that no row opens or ends a turn."""

from __future__ import annotations

import json
import re
from functools import cached_property
from typing import Any

from components.models.template import Part, Rendered, special_tokens

OPEN, CLOSE = "\U000f0000", "\U000f0001"  # private characters around the number of a special token


class PlainText:
    """Encodes such texts with a copy of the tokenizer in which special tokens are spelt otherwise: those that the template
    writes are respelt, so that in the other parts nothing is special."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = special_tokens(tokenizer)
        self._pattern = re.compile("|".join(map(re.escape, sorted(self._special, key=len, reverse=True))))

    def is_needed(self, rendered: Rendered) -> bool:
        """Does a special token stand in a part that is not the template's own?"""
        return any(self._pattern.search(part.text) for part in rendered.parts if not part.own)

    def encode(self, rendered: Rendered, add_special_tokens: bool) -> tuple[Rendered, list[int], list[tuple[int, int]]]:
        """The text as it is encoded, its token ids, and the characters of it that each stands for."""
        backend, ids = self._respelt
        respelt = Rendered(tuple(map(self._respell, rendered.parts)))
        encoding = backend.encode(respelt.text, add_special_tokens=add_special_tokens)
        return respelt, [ids.get(i, i) for i in encoding.ids], encoding.offsets

    def _respell(self, part: Part) -> Part:
        if part.own:
            return part._replace(text=self._pattern.sub(lambda found: self._spelling(found[0]), part.text))
        return part._replace(text=part.text.replace(OPEN, "\ufffd"))

    def _spelling(self, token: str) -> str:
        return f"{OPEN}{self._special.index(token)}{CLOSE}"

    @cached_property
    def _respelt(self) -> tuple[Any, dict[int, int]]:
        """The copy, and the id that each of its additional tokens stands for."""
        from tokenizers import AddedToken, Tokenizer

        written = json.loads(self._tokenizer.backend_tokenizer.to_str())
        for entry in written["added_tokens"]:
            entry["special"] = entry["special"] or entry["content"] in self._special
        copy = Tokenizer.from_str(json.dumps(written))
        copy.no_padding()
        copy.no_truncation()
        copy.encode_special_tokens = True  # as text; what is added below is not special
        known = {token.content: token for token in self._tokenizer.added_tokens_decoder.values()}
        ids: dict[int, int] = {}
        for token in self._special:
            how = {side: bool(getattr(known.get(token), side, False)) for side in ("lstrip", "rstrip")}
            copy.add_tokens([AddedToken(self._spelling(token), special=False, normalized=False, **how)])
            ids[int(copy.token_to_id(self._spelling(token)) or 0)] = int(self._tokenizer.convert_tokens_to_ids(token))
        return copy, ids
