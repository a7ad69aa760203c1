"""The suite's own safety net works: an allocation read before it is written is NaN."""

import pytest
import torch

ALLOCATIONS = {
    "empty": lambda x: torch.empty(4, dtype=x.dtype, device=x.device),
    "empty_like": torch.empty_like,
    "empty_strided": lambda x: torch.empty_strided((2, 2), (1, 2), dtype=x.dtype, device=x.device),
    "new_empty": lambda x: x.new_empty(2, 3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ALLOCATIONS)
def test_allocations_are_poisoned(name: str, dtype: torch.dtype, device: torch.device) -> None:
    assert ALLOCATIONS[name](torch.zeros(4, dtype=dtype, device=device)).isnan().all()


@pytest.mark.parametrize("repetition", range(2))
def test_every_test_draws_the_same_numbers(repetition: int) -> None:
    torch.testing.assert_close(torch.rand(2), torch.tensor([0.4962566, 0.7682218]), rtol=0, atol=1e-6)
