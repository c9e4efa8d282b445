"""Dropout has the distribution of PyTorch's."""

from __future__ import annotations

import pytest
import torch

from raybert.model.layers import Dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_zeroes_a_share_p_and_scales_the_rest(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.ones(500, 401, dtype=dtype, requires_grad=True)  # not a multiple of four draws
    out = Dropout(p)(x)
    dropped = out == 0
    assert float(dropped.float().mean()) == pytest.approx(p, abs=0.005)  # over four sigmas
    # Neighbours are drawn from the same 64 random bits, and are independent all the same.
    both = (dropped[:, :-1] & dropped[:, 1:]).float().mean()
    assert float(both) == pytest.approx(p * p, abs=0.01)
    kept = out[~dropped].float()
    rounding = 2**-12 if dtype == torch.float32 else 2**-8  # of p, or of the scale
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - p)), rtol=rounding, atol=0)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(gradient, out.detach())


def test_dropout_depends_on_the_seed_alone() -> None:
    x = torch.ones(64, 64)
    torch.manual_seed(1)
    first, second = Dropout(0.5)(x), Dropout(0.5)(x)
    torch.manual_seed(1)
    assert torch.equal(Dropout(0.5)(x), first)
    assert not torch.equal(first, second)


def test_dropout_is_the_identity_outside_of_training() -> None:
    x = torch.ones(8)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0)(x) is x
    assert torch.isfinite(Dropout(1 - 1e-9)(x)).all()
