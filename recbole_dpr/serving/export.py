"""The user tower as an ONNX file, for a server without Python or RecBole; items come from `Recommender.item_embeddings`."""

from pathlib import Path

import torch

from recbole_dpr.errors import UserError
from recbole_dpr.serving.user_tower import UserTower
from recbole_dpr.train.checkpoints import replacing

_OPSET = 18


def export_user_tower(rec, path):
    """Write `UserTower` as ONNX.

    Inputs, by the names of `UserTower.forward`: item_seq int64 [B, T], 1 + the place of each item in `rec.items`, padded
    with 0 on the right; length int64 [B]; for the N clauses of all B requests prompt float [N, D] (the sentence encoder's
    vectors of norm 1), intent int64 [N], strength float [N], owner int64 [N]. A clause of strength 0 is none at all.
    Output: user_vector float [B, R].

    Args:
        rec: Recommender; path: the file.

    Raises:
        UserError: the packages are missing, or the model cannot be exported.
    """
    try:
        import onnx  # noqa: F401 said here what is missing, not in the depths of torch
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"the ONNX export needs {error.name}: pip install 'recbole-dpr[export]'") from None
    if rec.model.token_keys:
        raise UserError("prompt_keys=token: attention over tokens is not exported; train with prompt_keys=sentence")
    batch, steps, clauses = (torch.export.Dim(name, min=1) for name in ("batch", "steps", "clauses"))
    inputs = {
        "item_seq": torch.tensor([[1, 2, 0], [1, 2, 3]]),
        "length": torch.tensor([2, 3]),
        "prompt": torch.zeros(3, rec.encoder.dim),
        "intent": torch.tensor([0, 1, 0]),
        "strength": torch.ones(3),
        "owner": torch.tensor([0, 1, 1]),
    }
    sizes = {"item_seq": {0: batch, 1: steps}, "length": {0: batch}}
    sizes |= {name: {0: clauses} for name in ("prompt", "intent", "strength", "owner")}
    try:
        program = torch.onnx.export(
            UserTower(rec.model).eval(), kwargs=inputs, dynamic_shapes=sizes, output_names=["user_vector"],
            dynamo=True, opset_version=_OPSET, verbose=False,
        )  # fmt: skip
    except Exception as error:  # torch.export refuses a backbone in many ways
        raise UserError(f"{type(rec.model).__name__} cannot be exported ({_reason(error)})") from error
    with replacing(Path(path)) as temporary:
        program.save(temporary)


def _reason(error):
    """The error that torch's advice is wrapped around."""
    error = error.__cause__ or error
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
