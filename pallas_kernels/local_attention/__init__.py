"""Two-dimensional local attention: one operation, interchangeable implementations."""

from pallas_kernels.local_attention.dispatch import (
    local_attention_2d,
    local_attention_2d_with_lse,
)

__all__ = ["local_attention_2d", "local_attention_2d_with_lse"]
