import pytest
import torch

from bnnlib.losses import error_rate, hinge_loss, l2_penalty, mistakes, squared_hinge_loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_and_gradient_by_hand(dtype):
    logits = torch.tensor([[0.5, -2, 0], [1, 0.25, -1]], dtype=dtype, requires_grad=True)
    loss = squared_hinge_loss(logits, torch.tensor([0, 1]))
    loss.backward()
    # label 0: (1 - 0.5)^2 = 0.25, (1 - 2)+ = 0, (1 + 0)^2 = 1
    # label 1: (1 + 1)^2 = 4, (1 - 0.25)^2 = 0.5625, (1 - 1)+ = 0
    assert loss.item() == pytest.approx((0.25 + 1 + 4 + 0.5625) / 6)
    assert (loss.dtype, loss.shape) == (dtype, ())
    # -2 t max(0, 1 - t y) / 6
    expected = torch.tensor([[-1, 0, 2], [4, -1.5, 0]], dtype=dtype) / 6
    torch.testing.assert_close(logits.grad, expected)


def test_hinge_and_its_gradient_by_hand():
    logits = torch.tensor([[0.5, -2, 0], [1, 0.25, -1]], requires_grad=True)
    loss = hinge_loss(logits, torch.tensor([0, 1]))
    loss.backward()
    assert loss.item() == pytest.approx((0.5 + 1 + 2 + 0.75) / 6)
    torch.testing.assert_close(logits.grad, torch.tensor([[-1.0, 0, 1], [1, -1, 0]]) / 6)


@pytest.mark.parametrize(("output", "loss"), [(-0.8, 0.36), (-1.0, 0.4), (0.0, 1.0)])
def test_loss_of_a_constant_output(output, loss):
    logits, labels = torch.full((20, 10), output), torch.arange(20) % 10
    assert squared_hinge_loss(logits, labels).item() == pytest.approx(loss)


def test_l2_penalty_is_the_sum_of_squares_without_a_half():
    one, other = torch.tensor([[1.0, -2], [0, 3]], requires_grad=True), torch.tensor([0.5])
    penalty = l2_penalty([one, other])
    penalty.backward()
    assert penalty.item() == 1 + 4 + 0 + 9 + 0.25
    assert one.grad.tolist() == [[2, -4], [0, 6]]
    assert l2_penalty([]) == 0


def test_mistakes_and_their_share():
    logits = torch.tensor([[1.0, 2, 3], [3, 2, 1], [-1, -2, -3], [0, 5, 0]])
    labels = torch.tensor([2, 1, 0, 0])
    assert mistakes(logits, labels).tolist() == [False, True, False, True]
    assert error_rate(logits, labels) == 0.5


def test_error_rate_is_exact_for_many_images():
    logits = torch.zeros(30_000, 2)
    labels = (torch.arange(30_000) < 1).long()  # one image of class 1; class 0 is predicted
    assert error_rate(logits, labels) == 1 / 30_000
