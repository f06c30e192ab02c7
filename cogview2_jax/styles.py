"""Styles: templates for prompts with sampling of their own, kept in a bundle and chosen by name."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from cogview2_jax.checks import require
from cogview2_jax.config import ClusterSampling, Sampling

PLAIN = "none"  # the style that changes nothing, which every model has


@dataclass(frozen=True)
class Style:
    """A template for prompts, and how its pictures are drawn.

    `template` has one `{}`, where the prompt goes.
    """

    name: str
    template: str = "{}"
    base: ClusterSampling = field(default_factory=ClusterSampling)
    direct: ClusterSampling = field(default_factory=lambda: Sampling().direct)

    def __post_init__(self) -> None:
        named = isinstance(self.name, str) and bool(re.fullmatch(r"[\w-]+", self.name))
        require(
            named and self.name != PLAIN,
            f"a style's name must be one word, and not {PLAIN}: got {self.name!r}",
        )
        one = isinstance(self.template, str) and self.template.count("{}") == 1
        require(one, f"the template of style {self.name} must have one {{}}: got {self.template!r}")


def _published_style(
    name: str, template: str, temperature: float = 1.15, flat: bool = False
) -> Style:
    direct = ClusterSampling(1.0, 5, 0.4) if flat else Sampling().direct
    return Style(name, template, ClusterSampling(temperature), direct)


# The styles of the released scripts (`--style`). The first is the default of text to image.
PUBLISHED_STYLES = (
    _published_style("mainbody", "{} 高清摄影 隔绝"),
    _published_style("photo", "{} 高清摄影"),
    _published_style("flat", "{} 平面风格", 1.1, flat=True),
    _published_style("comics", "{} 漫画 隔绝", 1.1, flat=True),
    _published_style("oil", "{} 油画风格"),
    _published_style("sketch", "{} 素描风格", 1.1),
    _published_style("isometric", "{} 等距矢量图", 1.1),
    _published_style("chinese", "{} 水墨国画", 1.12),
    _published_style("watercolor", "{} 水彩画风格"),
)


def find_style(styles: Sequence[Style], name: str | None) -> Style | None:
    """The style with this name; None for `PLAIN`. Without a name it is the first of the styles.

    Raises ValueError for a name there is not.
    """
    if name is None:
        return styles[0] if styles else None
    if name == PLAIN:
        return None
    for style in styles:
        if style.name == name:
            return style
    known = ", ".join([PLAIN, *(style.name for style in styles)])
    raise ValueError(f"style must be one of {known}: got {name}")


def in_style(style: Style | None, prompt: str) -> str:
    """The prompt in the template of a style."""
    # A prompt without a word is refused as without a style.
    return style.template.replace("{}", prompt) if style and prompt.strip() else prompt
