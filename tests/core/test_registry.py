"""The registry of kinds of state: names are unique, and every section can be written to a manifest and read again."""

from __future__ import annotations

import msgspec
import pytest

from tuimig.core.state import KINDS
from tuimig.core.state.base import StateKind


def test_names_are_unique() -> None:
    assert len({kind.name for kind in KINDS}) == len(KINDS)
    assert KINDS


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_section_can_be_typed_and_is_strict(kind: StateKind) -> None:
    msgspec.json.Decoder(kind.Section)  # raises TypeError for a type that msgspec cannot tell apart
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(b'{"nobody knows this": 1}', type=kind.Section)
