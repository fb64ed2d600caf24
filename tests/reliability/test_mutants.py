"""`mutants.py` takes hours; that the text of each mutant is still in its file takes none."""

import pytest

from tests.reliability import mutants


@pytest.mark.parametrize("mutant", mutants.mutants(), ids=lambda mutant: mutant.old)
def test_a_mutants_text_is_in_its_file_once(mutant):
    assert (mutants.ROOT / mutant.file).read_text().count(mutant.old) == 1
