"""The fusion tower: shortcuts equal the long way, experts are apart, training starts at the backbone."""

import pytest
import torch

from recbole_dpr.model.fusion import FusionBlock, ItemSideWeights, TwoExpertTower


def trained_block():
    torch.manual_seed(0)
    block = FusionBlock(16, 2, 32, 0.0)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return block.eval()


def test_single_key_equals_full_attention():
    block = trained_block()
    state, key = torch.randn(7, 16), torch.randn(7, 1, 16)
    full = block.attention(state[:, None], key, key, need_weights=False)[0][:, 0]
    torch.testing.assert_close(block.single_key(key[:, 0]), full)


def test_padded_keys_do_not_count():
    block = trained_block()
    state, keys = torch.randn(4, 16), torch.randn(4, 3, 16)
    padding = torch.zeros(4, 5, dtype=torch.bool)
    padding[:, 3:] = True
    junk = torch.cat([keys, 100 * torch.randn(4, 2, 16)], dim=1)
    torch.testing.assert_close(block(state, junk, padding), block(state, keys))


def test_attention_over_tokens_depends_on_the_query():
    """With one key it must not; with several it must."""
    block = trained_block()
    states, keys = torch.randn(2, 16), torch.randn(1, 4, 16).expand(2, 4, 16)
    moves = block.attention(states[:, None], keys, keys, need_weights=False)[0][:, 0]
    assert (moves[0] - moves[1]).abs().max() > 1e-4


def test_untrained_block_returns_the_state():
    state = torch.randn(5, 16)
    torch.testing.assert_close(FusionBlock(16, 2, 32, 0.0)(state, torch.randn(5, 1, 16)), state)


def test_routing_is_hard():
    tower = TwoExpertTower(trained_block)
    torch.nn.init.normal_(tower.experts[1].ffn[0].weight)
    state, keys = torch.randn(6, 16), torch.randn(6, 1, 16)
    intent = torch.tensor([0, 1, 1, 0, 1, 0])
    mixed = tower(intent, state, keys)
    for c in (0, 1):
        torch.testing.assert_close(mixed[intent == c], tower(c, state, keys)[intent == c])
    mixed[intent == 0].sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in tower.experts[1].parameters())
    assert (tower(0, state, keys) - tower(1, state, keys)).abs().max() > 1e-3


def test_one_expert_serves_both_intents():
    tower = TwoExpertTower(trained_block, two=False)
    state, keys = torch.randn(3, 16), torch.randn(3, 1, 16)
    torch.testing.assert_close(tower(0, state, keys), tower(1, state, keys))
    assert len(tower.experts) == 1


@pytest.mark.parametrize("scale", [1.0, -2.0])
def test_untrained_item_side_is_the_text_at_its_scale(scale):
    """As far as no category is named."""
    named = torch.tensor([[0.0, 0.0, 0.0, 1.0], [0.25, 0.5, 0.0, 0.25], [0.0, 1.0, 0.0, 0.0]])
    weights = ItemSideWeights(8, 3, scale, 16, 0.0)(torch.randn(3, 8), named)
    torch.testing.assert_close(weights, scale * torch.tensor([[1.0, 0, 0, 0], [0.25, 0, 0, 0], [0.0, 0, 0, 0]]))
