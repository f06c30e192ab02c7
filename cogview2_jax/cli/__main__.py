"""`python -m cogview2_jax.cli` is `cogview2`."""

from cogview2_jax.cli import main

main()
