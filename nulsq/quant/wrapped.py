"""require_plain(model, order): refuses models that a wrapper or a compiler refers to already."""

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


def require_plain(model: nn.Module, order: str) -> None:
    """Raise ValueError for a compiled model and for one that is wrapped for several devices; `order` says what to do.

    Both would keep on using the layers as they were.
    """
    for name, module in model.named_modules():
        where = f"{name} is" if name else "the model is"
        classes = {cls.__name__ for cls in type(module).__mro__}
        if isinstance(module, DistributedDataParallel | DataParallel):
            raise ValueError(f"{where} wrapped in {type(module).__name__}, which would keep its old layers. {order}")
        if classes & {"FullyShardedDataParallel", "FSDPModule"}:
            raise ValueError(f"{where} wrapped for FSDP, which would keep its old parameters. {order}")
        if "OptimizedModule" in classes or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(f"{where} compiled, so its graph would keep its old layers. {order}")
