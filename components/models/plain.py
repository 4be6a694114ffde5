"""Escaping of special tokens in data: their spelling in a row is plain text, so that no row opens or ends a turn."""

from __future__ import annotations

import json
import re
from functools import cached_property
from typing import Any

from components.models.chat_template import special_tokens
from components.models.rendered import Part, Rendered

OPEN, CLOSE = "\U000f0000", "\U000f0001"  # private-use characters around a special token's number


class PlainText:
    """Encoder of texts with special tokens in data, by a tokenizer copy whose special tokens have other spellings: only the
    template's own parts are respelt, so nothing in the data's parts is special."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = special_tokens(tokenizer)
        self._pattern = re.compile("|".join(map(re.escape, sorted(self._special, key=len, reverse=True))))

    def is_needed(self, rendered: Rendered) -> bool:
        """Whether a part from the data spells a special token."""
        return any(self._pattern.search(part.text) for part in rendered.parts if not part.template)

    def encode(self, rendered: Rendered, add_special_tokens: bool) -> tuple[Rendered, list[int], list[tuple[int, int]]]:
        """Respelt text, its token ids, and each token's character offsets in it."""
        backend, ids = self._respelt
        respelt = Rendered(tuple(map(self._respell, rendered.parts)))
        encoding = backend.encode(respelt.text, add_special_tokens=add_special_tokens)
        return respelt, [ids.get(i, i) for i in encoding.ids], encoding.offsets

    def _respell(self, part: Part) -> Part:
        if part.template:
            return part._replace(text=self._pattern.sub(lambda match: self._spelling(match[0]), part.text))
        return part._replace(text=part.text.replace(OPEN, "\ufffd"))

    def _spelling(self, token: str) -> str:
        return f"{OPEN}{self._special.index(token)}{CLOSE}"

    @cached_property
    def _respelt(self) -> tuple[Any, dict[int, int]]:
        """Tokenizer copy, and the map from its added ids to the original ids."""
        from tokenizers import AddedToken, Tokenizer

        tokenizer_json = json.loads(self._tokenizer.backend_tokenizer.to_str())
        for entry in tokenizer_json["added_tokens"]:
            entry["special"] = entry["special"] or entry["content"] in self._special
        copy = Tokenizer.from_str(json.dumps(tokenizer_json))
        copy.no_padding()
        copy.no_truncation()
        copy.encode_special_tokens = True  # encodes their spellings as text; the tokens added below are not special
        added_tokens = {token.content: token for token in self._tokenizer.added_tokens_decoder.values()}
        ids: dict[int, int] = {}
        for token in self._special:
            strip_options = {side: bool(getattr(added_tokens.get(token), side, False)) for side in ("lstrip", "rstrip")}
            copy.add_tokens([AddedToken(self._spelling(token), special=False, normalized=False, **strip_options)])
            ids[int(copy.token_to_id(self._spelling(token)) or 0)] = int(self._tokenizer.convert_tokens_to_ids(token))
        return copy, ids
