"""Each quality loss has the value of its formula, the gradient of its value, and no padding."""

import math

import pytest
import torch

from selectmoe.model.modeling_select_moe import QUALITY_LOSSES as MODEL_LOSSES
from selectmoe.model.quality_losses import (
    QUALITY_LOSSES,
    beta_moment_matching,
    contrastive,
    linear,
    masked_mean,
    mean_variance_regularization,
    mse,
    sigmoid,
)
from selectmoe.model.quiet_loading import register_select_moe

LOSSES = [
    (sigmoid, {}),
    (linear, {}),
    (mse, {"target": 0.3}),
    (beta_moment_matching, {"alpha": 0.4, "beta": 0.9}),
    (mean_variance_regularization, {"target_mean": 0.2, "variance_weight": 0.7}),
]
each_loss = pytest.mark.parametrize(
    ("loss", "parameters"), LOSSES, ids=lambda x: getattr(x, "__name__", "")
)
both_averages = pytest.mark.parametrize("sample_wise", [True, False])


@pytest.fixture
def good_LBT():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, 3, 4, generator=generator, dtype=torch.float64)


@pytest.fixture
def mask_BT():
    return torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0]]).bool()


def is_gradient_of_finite_differences(function, *tensors):
    # In float64 central differences with a step of 1e-6 are good to about 1e-9; the check allows
    # 1e-5, far below a gradient that is missing or has another factor.
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    return torch.autograd.gradcheck(function, tensors, eps=1e-6, atol=1e-5, rtol=1e-5)


@each_loss
@both_averages
def test_gradient_equals_finite_differences(loss, parameters, sample_wise, good_LBT, mask_BT):
    assert is_gradient_of_finite_differences(
        lambda good: loss(good, mask_BT, sample_wise_averaging=sample_wise, **parameters), good_LBT
    )


@each_loss
def test_every_token_in_the_mask_has_a_gradient_and_no_other(loss, parameters, good_LBT, mask_BT):
    good_LBT.requires_grad_()
    loss(good_LBT, mask_BT, **parameters).backward()
    torch.testing.assert_close(good_LBT.grad != 0, mask_BT.expand_as(good_LBT))


@pytest.mark.parametrize("form", ["label", "ranking"])
def test_contrastive_gradient_equals_finite_differences(form):
    margins = torch.tensor([0.3, -1.2, 2.0, 0.1, 0.7], dtype=torch.float64)
    labels = torch.tensor([1, 0, 1, 0, 0]).bool()
    pair_ids = torch.tensor([0, 0, 1, 1, 1])
    assert is_gradient_of_finite_differences(
        lambda m: contrastive(m, labels, pair_ids=pair_ids, form=form, temperature=0.5), margins
    )


def test_values_of_the_formulas_on_one_sample():
    good = torch.tensor([[[0.2, 0.4, 0.9]]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    mean, variance = 0.5, (0.09 + 0.01 + 0.16) / 3
    expected = {
        "sigmoid": sum(1 / (1 + math.exp(-g)) for g in (0.2, 0.4, 0.9)) / 3,
        "linear": mean,
        "mse": variance,  # its target is 0.5, which is the mean
        # Beta(1/2, 1/2) has the mean 1/2 and the variance 1/8.
        "beta_moment_matching": (variance - 1 / 8) ** 2,
        "mean_variance_regularization": -variance,
    }
    assert expected.keys() == QUALITY_LOSSES.keys()
    for name, value in expected.items():
        assert QUALITY_LOSSES[name](good, mask).item() == pytest.approx(value, abs=1e-6), name


def test_beta_moments_are_those_of_the_distribution():
    # With mean and variance of Beta(2, 6) itself: 1/4 and 1/48. Two tokens, at mean +- deviation.
    deviation = math.sqrt(1 / 48)
    good = torch.tensor([[[0.25 - deviation, 0.25 + deviation]]], dtype=torch.float64)
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert beta_moment_matching(good, mask, alpha=2.0, beta=6.0).item() == pytest.approx(0)
    assert beta_moment_matching(good, mask, alpha=6.0, beta=2.0).item() == pytest.approx(0.25)


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 1.0), (1.0, -0.5)])
def test_a_beta_distribution_that_is_none_is_refused(alpha, beta, good_LBT, mask_BT):
    with pytest.raises(ValueError, match=f"must be above 0, got {alpha} and {beta}"):
        beta_moment_matching(good_LBT, mask_BT, alpha=alpha, beta=beta)


def test_a_long_sample_counts_no_more_than_a_short_one_when_averaged_by_sample():
    good = torch.tensor([[[0.1, 0.2, 0.3, 0.4], [0.9, 5.0, 5.0, 5.0]]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    by_sample = masked_mean(good, mask, sample_wise_averaging=True)
    by_token = masked_mean(good, mask, sample_wise_averaging=False)
    assert by_sample.item() == pytest.approx((0.25 + 0.9) / 2)
    assert by_token.item() == pytest.approx((0.1 + 0.2 + 0.3 + 0.4 + 0.9) / 5)


def test_variance_has_the_same_weights_as_the_mean():
    # Weights by sample: 1/4 on each of 0.2 and 0.4, 1/2 on 0.9.
    good = torch.tensor([[[0.2, 0.4], [0.9, 0.0]]])
    mask = torch.tensor([[1, 1], [1, 0]]).bool()
    mean = 0.25 * 0.2 + 0.25 * 0.4 + 0.5 * 0.9
    variance = 0.25 * (0.2 - mean) ** 2 + 0.25 * (0.4 - mean) ** 2 + 0.5 * (0.9 - mean) ** 2
    value = mean_variance_regularization(good, mask, target_mean=0.0, variance_weight=2.0)
    assert value.item() == pytest.approx(mean**2 - 2 * variance, abs=1e-6)


def test_variance_of_nearly_open_gates_does_not_drown_in_rounding():
    # Deviations of 1e-5 around 0.98 in float32: mean(good^2) - mean^2 is off by 1e-7, 1,000 times
    # the variance of 1e-10.
    good = torch.full((1, 1, 1_000), 0.98) + 1e-5 * torch.tensor([1.0, -1.0]).repeat(500)
    mask = torch.ones(1, 1_000, dtype=torch.bool)
    value = mean_variance_regularization(good, mask, target_mean=0.98, variance_weight=1.0)
    # float32 numbers near 0.98 are 6e-8 apart, which is 0.6 % of the deviations.
    assert -value.item() == pytest.approx(1e-10, rel=0.05)


@each_loss
@both_averages
@pytest.mark.parametrize("padded", [0.0, 1e6, float("inf"), float("nan")])
def test_what_stands_in_padding_changes_nothing(
    loss, parameters, sample_wise, padded, good_LBT, mask_BT
):
    expected = loss(good_LBT, mask_BT, sample_wise_averaging=sample_wise, **parameters)
    good_LBT[:, ~mask_BT] = padded
    other = loss(good_LBT, mask_BT, sample_wise_averaging=sample_wise, **parameters)
    assert torch.equal(other, expected)


@each_loss
@both_averages
def test_a_sample_of_padding_alone_counts_as_absent(
    loss, parameters, sample_wise, good_LBT, mask_BT
):
    whole = loss(good_LBT, mask_BT, sample_wise_averaging=sample_wise, **parameters)
    present = loss(good_LBT[:, :2], mask_BT[:2], sample_wise_averaging=sample_wise, **parameters)
    assert torch.isfinite(whole)
    torch.testing.assert_close(whole, present)  # the order of a sum may differ


@each_loss
@both_averages
def test_a_batch_of_padding_alone_has_the_loss_0_and_no_gradient(
    loss, parameters, sample_wise, good_LBT
):
    good_LBT.requires_grad_()
    nothing = torch.zeros(3, 4, dtype=torch.bool)
    value = loss(good_LBT, nothing, sample_wise_averaging=sample_wise, **parameters)
    value.backward()
    assert value.item() == 0
    assert torch.equal(good_LBT.grad, torch.zeros_like(good_LBT))


@pytest.mark.parametrize("mask_dtype", [torch.int64, torch.float32])
def test_the_mask_may_be_an_attention_mask_of_numbers(mask_dtype, good_LBT, mask_BT):
    expected = linear(good_LBT, mask_BT)
    assert torch.equal(linear(good_LBT, mask_BT.to(mask_dtype)), expected)


def test_label_form_is_the_cross_entropy_of_real_against_copy():
    margins = torch.tensor([2.0, -1.0])
    value = contrastive(margins, torch.tensor([True, False]), temperature=2.0)
    expected = (math.log1p(math.exp(-1.0)) + math.log1p(math.exp(-0.5))) / 2
    assert value.item() == pytest.approx(expected)


def test_ranking_form_compares_a_copy_with_its_own_sample_only():
    margins = torch.tensor([1.0, 100.0, 0.0, 103.0])  # two samples, then their copies
    labels = torch.tensor([1, 1, 0, 0])
    value = contrastive(margins, labels, pair_ids=torch.tensor([7, 8, 7, 8]), form="ranking")
    expected = (math.log1p(math.exp(-1.0)) + math.log1p(math.exp(3.0))) / 2
    assert value.item() == pytest.approx(expected)


def test_ranking_form_pulls_the_sample_up_and_its_copy_down():
    margins = torch.tensor([0.0, 0.0], requires_grad=True)
    ids = torch.tensor([0, 0])
    contrastive(margins, torch.tensor([1, 0]), pair_ids=ids, form="ranking").backward()
    # Descent goes against the gradient; softplus has the slope 1/2 at 0.
    torch.testing.assert_close(margins.grad, torch.tensor([-0.5, 0.5]))


@pytest.mark.parametrize(
    ("margins", "labels", "form"),
    [([], [], "label"), ([1.0, 2.0], [1, 1], "ranking"), ([1.0, 2.0], [1, 0], "ranking")],
)
def test_a_batch_without_a_row_or_a_pair_has_the_loss_0_and_no_gradient(margins, labels, form):
    margins = torch.tensor(margins, requires_grad=True)
    pair_ids = torch.arange(len(labels))  # each by itself
    value = contrastive(margins, torch.tensor(labels), pair_ids=pair_ids, form=form)
    value.backward()
    assert value.item() == 0
    assert torch.equal(margins.grad, torch.zeros_like(margins))


def test_ranking_without_pairs_is_refused():
    with pytest.raises(ValueError, match="needs pair_ids"):
        contrastive(torch.zeros(2), torch.tensor([1, 0]), form="ranking")


def test_an_unknown_form_or_temperature_is_refused():
    margins, labels = torch.zeros(2), torch.tensor([1, 0])
    with pytest.raises(ValueError, match="one of label, ranking, got 'rank'"):
        contrastive(margins, labels, pair_ids=labels, form="rank")
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        contrastive(margins, labels, temperature=0.0)


def test_registration_gives_the_model_every_loss():
    register_select_moe()
    assert QUALITY_LOSSES.items() <= MODEL_LOSSES.items()
