"""Each planted defect still has the text that it replaces. `make mutants` checks that the suite finds them."""

from __future__ import annotations

import pytest

from tests.mutants import MUTANTS, ROOT


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant[0])
def test_a_mutant_has_its_text(mutant):
    _, file, text, *_ = mutant
    assert text in (ROOT / file).read_text()
