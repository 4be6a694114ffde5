import itertools
import math

import pytest
import torch

from components.config.models import Optimiser, Training
from components.digits.train_loop import epochs, fit
from components.errors import AlignTIError


def recipe(steps: int, weight_decay: float = 0.0, warmup: float = 0.0, clip: float = 1.0, rate: float = 0.1) -> Training:
    optimiser = Optimiser(
        learning_rate=rate, betas=(0.9, 0.98), weight_decay=weight_decay, warmup_ratio=warmup, max_grad_norm=clip
    )
    return Training(steps=steps, batch_size=1, optimiser=optimiser)


def test_finds_a_minimum_and_reports_every_twenty_steps() -> None:
    x = torch.tensor([3.0], requires_grad=True)
    logged: list[tuple[str, float, int]] = []
    fit([x], lambda step: (x - 1).pow(2).sum(), recipe(150), "parabola", lambda *line: logged.append(line))
    assert abs(x.item() - 1) < 0.05
    assert [step for _, _, step in logged] == [20, 40, 60, 80, 100, 120, 140, 150]
    assert logged[0][1] > 100 * logged[-1][1]


def test_rate_warms_up_and_ends_at_zero() -> None:
    x = torch.zeros(1, requires_grad=True)
    positions = [0.0]

    def loss_at(step: int) -> torch.Tensor:
        if step > 1:
            positions.append(x.item())
        return x.sum()

    fit([x], loss_at, recipe(100, warmup=0.2), "slope", lambda *_: None)
    moved = [abs(b - a) for a, b in itertools.pairwise([*positions, x.item()])]  # AdamW on a constant slope moves by the rate
    assert moved[0] == 0 and math.isclose(moved[10], 0.05, rel_tol=1e-3) and math.isclose(moved[20], 0.1, rel_tol=1e-3)
    assert math.isclose(moved[60], 0.05, rel_tol=1e-3) and moved[99] < 1e-3


def test_decay_is_for_matrices_alone() -> None:
    matrix, vector = torch.ones(2, 2, requires_grad=True), torch.ones(2, requires_grad=True)
    fit([matrix, vector], lambda step: (matrix.sum() + vector.sum()) * 0, recipe(5, weight_decay=1.0), "decay", lambda *_: None)
    assert (matrix < 1).all() and torch.equal(vector, torch.ones(2))


def test_loss_that_is_not_finite_stops_the_training_by_name() -> None:
    x = torch.ones(1, requires_grad=True)
    with pytest.raises(AlignTIError, match="teacher base: the loss is nan at step 3"):
        fit([x], lambda step: x.sum() * (math.nan if step == 3 else 1), recipe(9), "teacher base", lambda *_: None)


def test_epochs_see_every_index_once_before_any_twice() -> None:
    batches = epochs(10, 4, torch.Generator().manual_seed(0))
    drawn = [index for _ in range(5) for index in next(batches)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10)) and drawn[:10] != drawn[10:]
    small = epochs(3, 8, torch.Generator().manual_seed(0))
    assert len(next(small)) == 8
