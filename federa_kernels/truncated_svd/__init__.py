"""The leading singular triplets of matrices."""

from .op import TruncatedSVD, truncated_svd

__all__ = ["TruncatedSVD", "truncated_svd"]
