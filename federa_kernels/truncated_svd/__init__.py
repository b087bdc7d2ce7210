"""The leading singular triplets of matrices, and of sums of low-rank products that are never formed."""

from .factored import factored_svd, svd_memory_needed
from .op import TruncatedSVD, smallest_svd, truncated_svd

__all__ = ["TruncatedSVD", "factored_svd", "smallest_svd", "svd_memory_needed", "truncated_svd"]
