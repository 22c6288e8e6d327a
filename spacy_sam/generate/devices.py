"""Which device, number format and end tokens a model has."""

from typing import Any, Optional, Tuple

import torch

from ..errors import SamError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def resolve_device(device: Optional[str]) -> torch.device:
    """The torch device for a setting. RAISES: SamError S501 if it is not there."""
    if device is None:
        from thinc.api import get_current_ops, get_torch_default_device

        if get_current_ops().device_type == "gpu":
            return torch.device(get_torch_default_device())
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    name = "cuda" if device == "gpu" else device
    try:
        found = torch.device(name)
    except RuntimeError as error:
        raise SamError("S501", device=device, reason="torch knows no such device") from error
    if found.type == "cuda" and (not torch.cuda.is_available() or (found.index or 0) >= torch.cuda.device_count()):
        raise SamError("S501", device=device, reason=f"torch sees {torch.cuda.device_count()} CUDA devices")
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise SamError("S501", device=device, reason="torch sees no MPS device")
    if found.type not in ("cpu", "cuda", "mps"):
        raise SamError("S501", device=device, reason="only cpu, cuda and mps are supported")
    return found


def resolve_dtype(dtype: Optional[str], device: torch.device) -> torch.dtype:
    """The torch dtype for a setting; by default float32 on the CPU. RAISES: SamError S502 if it is none of those."""
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if dtype not in DTYPES:
        raise SamError("S502", dtype=dtype, known=", ".join(DTYPES))
    return DTYPES[dtype]


def end_ids(model: Any, tokenizer: Any) -> Tuple[int, ...]:
    """The tokens that end an answer."""
    generation = getattr(model, "generation_config", None)
    ids = [tokenizer.eos_token_id, generation.eos_token_id if generation else None]
    flat = [i for item in ids for i in (item if isinstance(item, list) else [item])]
    return tuple(sorted({i for i in flat if i is not None}))
