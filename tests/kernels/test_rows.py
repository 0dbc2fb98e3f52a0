"""Tables of which a step reads few rows, against indexing in fp64 and torch's AdamW over the whole table in fp64."""

import math

import pytest
import torch

from hnet_kernels import dispatch, rows

pytestmark = pytest.mark.skipif(dispatch.native_error() is not None, reason="needs the native extension")
BETAS, EPS = (0.9, 0.95), 1e-8


@pytest.mark.parametrize(("T", "count", "R"), [(0, 2, 5), (1, 1, 1), (300, 3, 40), (50, 2, 1000)])
def test_groups(T, count, R):
    index = torch.randint(R, (T, count))
    found = rows.group_rows(index, R)
    entries = {}
    for i, row in enumerate(index.flatten().tolist()):
        entries.setdefault(row, []).append(i)
    assert found.rows.tolist() == sorted(entries)
    begin = found.begin.tolist()
    parts = [found.order[a:b].tolist() for a, b in zip(begin, begin[1:], strict=False)]
    assert parts == [entries[row] for row in sorted(entries)]


@pytest.mark.parametrize("D", [1, 17, 64, 129])
@pytest.mark.parametrize("scaled", [False, True])
def test_sums_and_their_gradient(D, scaled):
    torch.manual_seed(0)
    T, count, R = 200, 3, 30
    table, index, dout = torch.randn(R, D), torch.randint(R, (T, count)), torch.randn(T, D)
    scale = torch.rand(T, count) * (torch.rand(T, count) < 0.5) if scaled else None
    exact = table.double().requires_grad_()
    weighed = exact[index] if scale is None else exact[index] * scale[..., None].double()
    weighed.sum(1).backward(dout.double())
    out = rows.sum_rows(table, index, scale)
    assert torch.allclose(out.double(), weighed.sum(1).detach(), atol=1e-6)
    groups = rows.group_rows(index, R, scale)
    gradient = rows.row_gradient(dout, groups, count, scale)
    assert torch.allclose(gradient.double(), exact.grad[groups.rows], atol=1e-5)
    others = torch.ones(R, dtype=torch.bool).index_fill(0, groups.rows, False)
    assert not exact.grad[others].any()


def test_a_row_that_is_dropped_is_not_read():
    table = torch.tensor([[1.0], [math.nan]])
    index, scale = torch.tensor([[0, 1]]), torch.tensor([[2.0, 0.0]])
    assert rows.sum_rows(table, index, scale).item() == 2
    assert rows.group_rows(index, 2, scale).rows.tolist() == [0]


class Table:
    """Weights with moments, and the steps taken so far"""

    def __init__(self, R, D, steps):
        torch.manual_seed(0)
        self.weight, self.done = torch.randn(R, D), 0
        self.moments = torch.zeros(R, D), torch.zeros(R, D)
        self.steps = torch.zeros(R, 2, dtype=torch.int32)
        self.recent = torch.zeros(max(steps, rows.tail(*BETAS)) + 1)

    def update(self, which, gradient=None, rate=None):
        if gradient is not None:
            s = self.done + 1
            self.recent[s] = rate * math.sqrt(1 - BETAS[1] ** s) / (1 - BETAS[0] ** s)
        arguments = (self.weight, *self.moments, self.steps, which, gradient, self.done, self.recent)
        rows.adamw_(*arguments, betas=BETAS, eps=EPS)
        self.done += gradient is not None

    def settle(self):
        self.update(torch.arange(len(self.weight)))


def run(D, steps, look=lambda step: False, R=40):
    """Some rows are read in every step, some never or once. look(step): ask for some rows in between"""
    table = Table(R, D, steps)
    dense = torch.nn.Parameter(table.weight.double())
    adamw = torch.optim.AdamW([dense], betas=BETAS, eps=EPS, weight_decay=0.0)
    random = torch.Generator().manual_seed(1)
    for step in range(steps):
        chance = torch.tensor([1.0, 0.3, 0.05, 0.005]).repeat(R // 4)
        which = (torch.rand(R, generator=random) < chance).nonzero().flatten()
        if look(step):
            table.update(torch.arange(step % 3, R, 2))
        table.update(which)
        assert torch.allclose(table.weight[which].double(), dense.detach()[which], atol=2e-5), step
        rate, gradient = 0.01 * (1 + math.sin(step)), torch.randn(len(which), D, generator=random)
        dense.grad = torch.zeros(R, D, dtype=torch.float64).index_copy(0, which, gradient.double())
        adamw.param_groups[0]["lr"] = rate
        adamw.step()
        table.update(which, gradient, rate)
    table.settle()
    return table, dense.detach()


@pytest.mark.parametrize("D", [1, 17, 64])
def test_it_is_adamw(D):
    table, dense = run(D, 120)
    assert torch.allclose(table.weight.double(), dense, atol=2e-5)


def test_rows_left_for_long_rest_where_adamw_rests():
    table = Table(4, 8, 400)
    dense = torch.nn.Parameter(table.weight.double())
    adamw = torch.optim.AdamW([dense], lr=0.01, betas=BETAS, eps=EPS, weight_decay=0.0)
    first, none = torch.tensor([0]), torch.tensor([], dtype=torch.int64)
    for step in range(400):
        gradient = torch.randn(1, 8) if step in (3, 390) else None
        dense.grad = torch.zeros(4, 8, dtype=torch.float64)
        if gradient is not None:
            dense.grad[0] = gradient[0].double()
            table.update(first)
        adamw.step()
        table.update(none if gradient is None else first, torch.zeros(0, 8) if gradient is None else gradient, 0.01)
    table.settle()
    assert torch.allclose(table.weight.double(), dense.detach(), atol=1e-5)


def test_asking_in_between_changes_nothing():
    (plain, _), (asked, _), (always, _) = run(24, 90), run(24, 90, lambda s: s % 7 == 3), run(24, 90, lambda s: True)
    for other in (asked, always):
        assert torch.equal(plain.weight, other.weight)
        assert all(torch.equal(a, b) for a, b in zip(plain.moments, other.moments, strict=True))


def test_threads_change_nothing():
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(run(24, 30)[0].weight)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_tails():
    assert rows.tail(0.0, 0.9) == 1
    k = rows.tail(0.9, 0.95)
    assert (0.9 / math.sqrt(0.95)) ** k <= rows.LOST < (0.9 / math.sqrt(0.95)) ** (k - 1)
    assert rows.tail(0.99, 0.9) is None  # momentum outlives the size of gradients: updates would grow
    assert rows.tail(0.9, 0.0) is None
    assert rows.tail(0.9999, 0.9999) is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: rows.group_rows(torch.tensor([[7]]), 7), r"rows must be in \[0, 7\), got 7"),
        (lambda t: rows.group_rows(torch.tensor([7]), 7), r"index must be int64 of shape \(T, count\)"),
        (lambda t: rows.sum_rows(t.weight, torch.tensor([[-1]])), r"rows must be in \[0, 4\), got -1"),
        (lambda t: rows.sum_rows(t.weight, torch.tensor([[1]]), torch.ones(2, 1)), r"scale must be fp32 of shape"),
        (lambda t: t.update(torch.tensor([1, 1])), "rows must rise, got 1 after 1"),
        (lambda t: t.update(torch.tensor([4])), r"rows must be in \[0, 4\), got 4"),
        (lambda t: t.update(torch.tensor([1]), torch.zeros(2, 8), 0.1), r"gradient must be fp32 \(1, 8\)"),
        (lambda t: setattr(t, "recent", torch.zeros(9)) or t.settle(), "recent must hold more than"),
        (lambda t: setattr(t, "steps", torch.zeros(4)) or t.settle(), r"steps must be int32 \(4, 2\)"),
        (lambda t: setattr(t, "weight", t.weight.double()) or t.settle(), "weight must be contiguous fp32"),
    ],
)  # fmt: skip
def test_mistakes(call, message):
    with pytest.raises(ValueError, match=message):
        call(Table(4, 8, 1))
