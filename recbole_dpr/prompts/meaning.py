"""Which categories a prompt means without naming them.

Legend: N prompts, n examples, D encoder size, C categories, H hidden size.
"""

from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, gelu
from tqdm import tqdm

from recbole_dpr.prompts.cache import fitted_once

_HIDDEN = 512
# of the network, by the likelihood of texts of writers left out and by dataset/prompts/category_wishes_dev.tsv
_EPOCHS, _BATCH, _LEARNING_RATE, _DECAY = 40, 512, 2e-2, 1e-2
_DROPOUT, _NOISE = 0.5, 0.5  # the noise's length beside the prompt's of 1


class MeaningReader(nn.Module):
    """How much each category counts as meant, each on its own: sigmoid of a linear map of the prompt plus a network of one hidden layer.

    Which of the two says something of a category depends on its examples (`PromptBank.meaning_reader`). A new one is silent: nothing
    is meant.

    Attributes:
        linear: [D + 1, C], hidden: [D + 1, H], whose last rows are biases; output: [H, C].
    """

    def __init__(self, prompt_size, n_categories):
        super().__init__()
        hidden_size = _HIDDEN if n_categories else 0
        self.register_buffer("linear", torch.zeros(prompt_size + 1, n_categories))
        self.register_buffer("hidden", torch.zeros(prompt_size + 1, hidden_size))
        self.register_buffer("output", torch.zeros(hidden_size, n_categories))
        self.linear[-1] = -torch.inf

    def forward(self, prompt):
        """[N, D] -> [N, C]."""
        return torch.sigmoid(affine(prompt, self.linear) + gelu(affine(prompt, self.hidden)) @ self.output)

    def completed(self, state_dict, name):
        """A model's state dict with all of its reader, called `name`.

        Of an older model whose reader was a linear map that map, without a network; of one from before there was any, this reader.
        """
        own = self.state_dict(prefix=f"{name}.")
        if name in state_dict:
            others = {key: value for key, value in state_dict.items() if key != name}
            return others | {key: torch.zeros_like(value) for key, value in own.items()} | {f"{name}.linear": state_dict[name]}
        return state_dict if own.keys() & state_dict.keys() else state_dict | own


def affine(prompt, weights):
    """[N, k]: prompts [N, D] through weights [D + 1, k], whose last row is the bias."""
    return torch.addmm(weights[-1], prompt, weights[:-1])


def regressions(x, y, c):
    """Logistic regressions of each column: x [n, D], y [n, C], c inverse strength of the penalty -> [D + 1, C] as for `affine`."""
    weight, bias = torch.zeros(x.shape[1], y.shape[1], requires_grad=True), at_large(y).requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=60, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = binary_cross_entropy_with_logits(x @ weight + bias, y, reduction="sum") + weight.square().sum() / (2 * c)
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return torch.cat([weight, bias[None]]).detach()


def network(x, y, seed, folder, show_progress=False):
    """A network of one hidden layer for all columns at once, which share it: x [n, D], y [n, C]; folder: of `fitted_once`.

    Noise and dropout stand for the words that other people would have said it in.

    Returns:
        hidden [D + 1, H], output [H + 1, C], both as for `affine`; logits = affine(gelu(affine(x, hidden)), output).
    """
    recipe = b"".join([repr((seed, x.shape, y.shape)).encode(), Path(__file__).read_bytes(), x.numpy().tobytes(), y.numpy().tobytes()])
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        new = nn.Sequential(nn.Linear(x.shape[1], _HIDDEN), nn.GELU(), nn.Dropout(_DROPOUT), nn.Linear(_HIDDEN, y.shape[1]))
        fitted = fitted_once(folder, "meanings", recipe, new, lambda layers: _train(layers, x, y, show_progress))
    return tuple(torch.cat([layer.weight.T, layer.bias[None]]).detach() for layer in (fitted[0], fitted[-1]))


def _train(layers, x, y, show_progress):
    layers[-1].bias.data.copy_(at_large(y))
    optimizer = torch.optim.AdamW(layers.parameters(), lr=_LEARNING_RATE, weight_decay=_DECAY)
    n_batches = -(-len(x) // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=_EPOCHS * n_batches, pct_start=0.1)
    with tqdm(total=_EPOCHS * n_batches, desc="learn what is meant", disable=not show_progress) as bar:
        for _ in range(_EPOCHS):
            for rows in torch.randperm(len(x)).split(_BATCH):
                noisy = x[rows] + _NOISE / x.shape[1] ** 0.5 * torch.randn(len(rows), x.shape[1])
                loss = binary_cross_entropy_with_logits(layers(noisy), y[rows], reduction="sum") / len(rows)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
            bar.set_postfix(loss=f"{loss.item():.4f}")


def at_large(y):
    """Log-odds of each column."""
    return torch.logit(y.mean(0).nan_to_num(), eps=1e-4)
