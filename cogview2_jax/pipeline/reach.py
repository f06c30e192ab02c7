"""Which stages the networks of a model can draw, and which networks a stage still needs."""

from collections.abc import Collection

from cogview2_jax.bundle import NETWORKS, TRAINED_BY
from cogview2_jax.pipeline.settings import STAGES


def reached(networks: Collection[str]) -> tuple[str, ...]:
    """The stages that these networks can draw, in order."""
    return tuple(stage for stage, needed in STAGES.items() if set(needed) <= set(networks))


def last_stage(networks: Collection[str]) -> str:
    """The last stage that these networks can draw. Raises ValueError when they can draw none."""
    stages = reached(networks)
    if not stages:
        raise ValueError(what_is_missing(next(iter(STAGES)), networks))
    return stages[-1]


def require_stage(stage: str, networks: Collection[str]) -> None:
    """Raises ValueError for an unknown stage and for one that these networks cannot draw."""
    if stage not in STAGES:
        raise ValueError(f"stage must be one of {', '.join(STAGES)}: got {stage}")
    if stage not in reached(networks):
        raise ValueError(what_is_missing(stage, networks))


def what_is_missing(stage: str, networks: Collection[str]) -> str:
    """A line that says which networks a stage still needs, which command trains the first of them,
    and which stage can be drawn now.
    """
    missing = [name for name in NETWORKS if name in STAGES[stage] and name not in networks]
    said = f"the model lacks {', '.join(missing)}: `{TRAINED_BY[missing[0]]}` trains {missing[0]}"
    if stages := reached(networks):
        said += f"; until then it draws as far as stage {stages[-1]} (--stage {stages[-1]})"
    return said
