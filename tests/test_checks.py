"""What every public door refuses, and what the message says."""

from __future__ import annotations

import numpy as np
import pytest

from kalm_rag.checks import check_count, check_cut
from kalm_rag.errors import InputError


@pytest.mark.parametrize("value", [0, -3, True, 1.0, "4", None, float("nan")], ids=str)
def test_no_whole_number_is_refused_by_its_name(value: object) -> None:
    """Copies of this check let `batch_size=True` or 0 through in some doors; now one check names its argument."""
    with pytest.raises(InputError, match=r"^batch_size is .*; wanted a whole number >= 1\.$"):
        check_count(value, "batch_size")


def test_whole_numbers_come_back_as_int() -> None:
    assert type(check_count(np.int64(7), "fetch_k")) is int
    assert check_count(0, "prefix_cache_bytes", least=0) == 0
    with pytest.raises(InputError, match=r"top_n is 0; wanted a whole number >= 1, or None for all\."):
        check_cut(0, None)
