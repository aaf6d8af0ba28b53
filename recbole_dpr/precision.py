"""Which number format to compute in."""

import torch


def compute_dtype(precision, device):
    """The dtype that a precision key means on a device.

    Args:
        precision: `float32`, `bfloat16`, or `auto`: bfloat16 where the hardware multiplies in it. torch also
            emulates it elsewhere, slowly, so `auto` asks for the instructions.
        device: torch.device.
    """
    if precision != "auto":
        return getattr(torch, precision)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported()
    else:
        names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        native = any(getattr(torch.cpu, name, lambda: False)() for name in names)
    return torch.bfloat16 if native else torch.float32
