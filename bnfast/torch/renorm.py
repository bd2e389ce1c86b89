"""Batch renormalization (Ioffe 2017) as PyTorch modules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bnfast.renorm import checked_limits

from . import batches
from .modules import BatchNormOnCPU

if TYPE_CHECKING:
    from bnfast._types import Activation


class BatchRenormOnCPU(BatchNormOnCPU):
    """The constructor and forward that the layers of this module share."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        *,
        rmax: float = 3.0,
        dmax: float = 5.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, device=device, dtype=dtype)
        self.rmax, self.dmax = checked_limits(rmax, dmax)

    def forward(
        self,
        input: Tensor,  # noqa: A002, PyTorch's name for it
        residual: Tensor | None = None,
        activation: Activation = None,
        *,
        mask: Any = None,
    ) -> Tensor:
        """Normalise: by the batch, corrected, in training; by the running statistics in evaluation.

        Parameters
        ----------
        input : Tensor
            Of the rank in the layer's name, with its channels on axis 1.
        residual : Tensor, optional
            Added to the result, in the same pass; shape and dtype of `input`.
        activation : str, ("leaky_relu", float) or None
            Applied last, in the same pass: one of the names that `bnfast.batch_norm` takes.
        mask : Tensor or array_like, optional
            Which values count in training: see `bnfast.batch_norm`.

        Returns
        -------
        Tensor
            In the memory format of `input`.
        """
        # Without tracked statistics, as when population statistics are computed, it is plain.
        if not (self.training and self.track_running_stats):
            return super().forward(input, residual, activation, mask=mask)
        if isinstance(input, torch.fx.Proxy):
            return self._as_leaf(input, residual, activation, mask)
        return self._by_batches(input, residual, activation, mask)

    def _limits(self) -> batches.Limits | None:
        corrects = self.training and self.track_running_stats
        return batches.Limits(*checked_limits(self.rmax, self.dmax)) if corrects else None

    def extra_repr(self) -> str:
        """Return the options for `repr`."""
        return f"{super().extra_repr()}, rmax={self.rmax}, dmax={self.dmax}"


class BatchRenorm1d(BatchRenormOnCPU, nn.BatchNorm1d):
    """`bnfast.BatchRenorm` as a PyTorch module, for (N, C) or (N, C, L).

    State and evaluation are those of `torch.nn.BatchNorm1d`; `rmax` and `dmax` are attributes that
    a schedule may change.
    """


class BatchRenorm2d(BatchRenormOnCPU, nn.BatchNorm2d):
    """`bnfast.BatchRenorm` as a PyTorch module, for (N, C, H, W).

    State and evaluation are those of `torch.nn.BatchNorm2d`; `rmax` and `dmax` are attributes that
    a schedule may change.
    """


class BatchRenorm3d(BatchRenormOnCPU, nn.BatchNorm3d):
    """`bnfast.BatchRenorm` as a PyTorch module, for (N, C, D, H, W).

    State and evaluation are those of `torch.nn.BatchNorm3d`; `rmax` and `dmax` are attributes that
    a schedule may change.
    """


# What they are in evaluation.
PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    BatchRenorm1d: nn.BatchNorm1d,
    BatchRenorm2d: nn.BatchNorm2d,
    BatchRenorm3d: nn.BatchNorm3d,
}
