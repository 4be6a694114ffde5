"""Three readers of yes/no answers, where they agree and where not."""

from __future__ import annotations

import pytest

from tests.oracles.closed import verdict_mme, verdict_pope, verdict_vlmeval


@pytest.mark.parametrize(
    ("answer", "vlmeval", "pope", "mme"),
    [
        ("Yes", "yes", "yes", "yes"),
        ("no.", "no", "no", "no"),
        ("No, there is not.", "no", "no", "no"),
        ("Yes, there is. No doubt.", None, "yes", "yes"),  # POPE reads the first sentence, MME four letters
        ("There is not a dog", None, "no", None),
        ("There is a dog", None, "yes", None),
        ("I see no dog", "no", "no", None),
        ("yesterday", None, "yes", "yes"),
        ("Nothing", None, "yes", "no"),
        ("", None, "yes", None),
        ("Nein", None, "yes", None),
        ("NO", "no", "yes", "no"),  # POPE's list has No and no, not NO
    ],
)
def test_readers(answer: str, vlmeval: str | None, pope: str, mme: str | None) -> None:
    assert (verdict_vlmeval(answer), verdict_pope(answer), verdict_mme(answer)) == (vlmeval, pope, mme)
