"""Attention for two-dimensional grids of tokens; imports jax and nothing else."""

from pallas_kernels.local_attention import local_attention_2d, local_attention_2d_with_lse
from pallas_kernels.merge import merge_attention, merge_attention_with_lse

__all__ = [
    "local_attention_2d",
    "local_attention_2d_with_lse",
    "merge_attention",
    "merge_attention_with_lse",
]
