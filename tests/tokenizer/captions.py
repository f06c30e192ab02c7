"""Captions of Scenes, by seed."""

import numpy as np

from cogview2_jax.data import scenes

NUM_IMAGE = 1024
CHINESE_WORDS = (
    "圆 圆形 正方形 三角形 菱形 星形 星星 心形 十字 半圆 大 小"
    " 红色 橙色 黄色 绿色 青色 蓝色 紫色 粉色 纯色 条纹 圆点 格子"
    " 左边 右边 上方 下方 中间 一个 画面 图中 有 是 在 的 里 和"
).split()


def captions(seed: int, number: int) -> list[str]:
    rng = np.random.default_rng(seed)
    drawn = [scenes.sample_scene(rng) for _ in range(number)]
    return [scenes.caption(scene, rng, language) for scene in drawn for language in ("en", "zh")]
