"""What the GPU path needs beside products: panels made orthonormal and small eigenproblems, a batch in few launches.

Kernels of csrc/cuda where they are built, and the same in torch where they are not and on every other device.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from .._extension import load_extension
from . import krylov

WIDEST = 136  # columns of a panel: what is kept of its Gram matrix fits the shared memory of sm_80


@functools.cache
def _kernels(device: torch.device) -> tuple[Any, int]:
    """The extension where it was built with kernels for this device, and how many columns a panel may have."""
    module = load_extension()
    if device.type != "cuda" or not hasattr(module, "cholesky_qr"):
        return None, 0
    properties = torch.cuda.get_device_properties(device)
    if properties.major < 8:
        return None, 0
    return module, WIDEST if properties.shared_memory_per_block_optin >= 163 * 1024 else 104


def _module(panel: Tensor) -> Any:
    """The extension where its kernels take this panel, or None."""
    module, widest = _kernels(panel.device)
    return module if panel.shape[-1] <= widest else None


def orthonormalise(Y: Tensor, noise: Tensor, Q: Tensor, R: Tensor) -> None:
    """Cholesky-QR with a Gram matrix in float64, Y = Q R; columns that nothing is left of become those of `noise`.

    Y (G,K,b), noise (K,b) -> Q (G,K,b), which may be Y; all float32 or float64, with rows of stride 1
    R (G,b,b) float64, of stride 1, upper triangular; zeros in the rows of columns that nothing is left of
    """
    if module := _module(Y):
        G, K, b = Y.shape
        assert Y.stride(2) == Q.stride(2) == 1 and noise.is_contiguous() and R.stride()[1:] == (b, 1)
        work = Y.new_empty(module.cholesky_qr_work(G, K, b), dtype=torch.float64)
        panels = (value for panel in (Y, Q) for value in (panel.data_ptr(), panel.stride(0), panel.stride(1)))
        module.cholesky_qr(
            Y.dtype == torch.float64, G, K, b, *panels, noise.data_ptr(), R.data_ptr(), R.stride(0), work.data_ptr(),
            _stream(Y),
        )  # fmt: skip
        return
    found, factors = krylov._orthonormalise(Y)
    dead = factors.diagonal(dim1=-2, dim2=-1) == 0
    Q.copy_(torch.where(dead[:, None, :], noise, found))
    R.copy_(factors)


def eigenpairs(H: Tensor) -> tuple[Tensor, Tensor]:
    """Of symmetric H (G,n,n) float64: values (G,n), descending, vectors (G,n,n), as columns; anything if H has NaN."""
    if module := _module(H):
        G, n, _ = H.shape
        H = H.contiguous()
        values, vectors = H.new_empty(G, n), torch.empty_like(H)
        module.symmetric_eigenpairs(G, n, H.data_ptr(), values.data_ptr(), vectors.data_ptr(), _stream(H))
        return values, vectors
    values, vectors = torch.linalg.eigh(((H + H.mT) / 2).nan_to_num())  # which raises on NaN
    return values.flip(-1), vectors.flip(-1)


def product(A: Tensor, X: Tensor) -> Tensor:
    """A X (G,N,b) float32 of A (G,N,K) and X (G,K,b), both bfloat16 or both float16, summed in float32."""
    if A.device.type == "cuda":
        return torch.bmm(A, X, out_dtype=torch.float32)
    return torch.bmm(A.float(), X.float())


def _stream(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream
