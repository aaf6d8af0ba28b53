"""RecBole's layers in their quick form compute what RecBole's do."""

import pytest
import torch
from recbole.model.layers import FeedForward, MultiHeadAttention
from torch import nn

from recbole_dpr.model import quick_layers


def test_dropout_keeps_its_share_and_its_mean():
    torch.manual_seed(0)
    mask = quick_layers.kept((500, 401), 0.2)  # not a multiple of the four draws in a word
    assert mask.unique().tolist() == [0, pytest.approx(1.25, rel=1e-4)]
    assert float((mask > 0).float().mean()) == pytest.approx(0.8, abs=0.004)  # 4 standard deviations
    assert float(mask.mean()) == pytest.approx(1, abs=0.005)
    for axis in (0, 1):  # neighbours are drawn apart, though they share a word
        dropped = (mask == 0).float() - 0.2
        assert abs(float((dropped * dropped.roll(1, axis)).mean())) < 0.002


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_dropout_at_its_ends(p):
    layer, x = quick_layers.Dropout(p), torch.ones(1000, requires_grad=True)
    assert torch.equal(layer.eval()(x), x)
    y = layer.train()(x)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())  # the same mask forward and backward
    assert set(y.tolist()) == {0.0: {1.0}, 0.5: {0.0, 2.0}, 1.0: {0.0}}[p]


def test_dropout_follows_the_seed():
    layer, x = quick_layers.Dropout(0.3).train(), torch.ones(100)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(layer(x))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 1e-9])  # the latter drops nothing, and takes the way of training with dropout
def test_causal_attention_is_recboles_with_a_causal_mask(training, dropout):
    torch.manual_seed(0)
    layer = MultiHeadAttention(2, 8, 0.0, dropout, 1e-12).train(training)
    x, mask = torch.randn(3, 5, 8), quick_layers.causal_mask(5, "cpu")
    wanted = layer(x, mask[None, None])
    names = list(layer.state_dict())
    quick_layers.make_causal(nn.ModuleList([layer]))
    quick_layers.quicken(layer)
    torch.testing.assert_close(layer(x, mask), wanted)
    assert list(layer.state_dict()) == names


def test_gelu_is_recboles():
    torch.manual_seed(0)
    layer = FeedForward(8, 16, 0.0, "gelu", 1e-12)
    other = FeedForward(8, 16, 0.0, "relu", 1e-12)
    x = torch.randn(4, 8)
    wanted = layer(x), other(x)
    for each in (layer, other):
        quick_layers.quicken(each)
    assert layer.intermediate_act_fn is nn.functional.gelu and other.intermediate_act_fn is not nn.functional.gelu
    torch.testing.assert_close((layer(x), other(x)), wanted)
