"""Two SASRecs in one pass are each by itself."""

import pytest
import torch

from recbole_dpr.model.backbones import CausalSASRec, ItemVocabulary
from recbole_dpr.model.paired import PairedSASRec

V, L = 30, 9
CONFIG = {
    **{"USER_ID_FIELD": "u", "ITEM_ID_FIELD": "i", "LIST_SUFFIX": "_list", "ITEM_LIST_LENGTH_FIELD": "n", "NEG_PREFIX": "neg_"},
    **{"hidden_size": 8, "inner_size": 12, "n_heads": 2, "layer_norm_eps": 1e-12, "initializer_range": 0.02, "loss_type": "CE"},
    **{"hidden_dropout_prob": 0.5, "attn_dropout_prob": 0.5, "MAX_ITEM_LIST_LENGTH": L, "device": torch.device("cpu"), "backbone_precision": "float32"},
}


@pytest.mark.parametrize("n_layers", [1, 3])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
@torch.no_grad()
def test_a_pair_is_two_passes(n_layers, activation):
    torch.manual_seed(0)
    config = {**CONFIG, "n_layers": n_layers, "hidden_act": activation}
    models = [CausalSASRec(config, ItemVocabulary(V, config)).eval() for _ in range(2)]
    for model in models:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    pair = PairedSASRec(models)
    for lengths in ([L], [1], [3, 1, 7, 5]):
        lengths = torch.tensor(lengths)
        steps = torch.arange(lengths.max())
        item_seq = torch.randint(1, V, (len(lengths), len(steps))) * (steps < lengths[:, None])
        apart = torch.stack([model.encode(item_seq, lengths) for model in models])
        assert (apart[0] - apart[1]).abs().max() > 0.1
        torch.testing.assert_close(pair(item_seq, lengths), apart, atol=1e-5, rtol=1e-5)
