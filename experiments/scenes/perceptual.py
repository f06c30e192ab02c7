"""A small network that classifies the object at each cell. Its features make the tokenizer's
perceptual loss.

It is fully convolutional (any picture size) and used only in training. It is not the judge of
`experiments/caption_match`: another architecture, other pictures, another seed.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from cogview2_jax.data import scenes

Array = jax.Array
_HEADS = {
    "shape": scenes.SHAPES,
    "colour": tuple(scenes.COLOURS),
    "size": scenes.SIZES,
    "fill": scenes.FILLS,
}


class Perceptor(nn.Module):
    """Pictures [b, y, x, 3] in [0, 1] → features at strides 2, 4, 8 and logits at stride 8."""

    @nn.compact
    def __call__(self, x: Array) -> tuple[list[Array], dict[str, Array]]:
        features = []
        x = 2 * x - 1
        for channels, layers in ((24, 1), (48, 2), (96, 2)):
            for layer in range(layers):
                stride = 2 if layer == 0 else 1
                x = nn.relu(nn.Conv(channels, (3, 3), strides=stride)(x))
            features.append(x)
        x = nn.relu(nn.Conv(128, (3, 3))(x))
        x = nn.relu(nn.Conv(128, (3, 3))(x))
        # One more class for "no object is centred here".
        heads = {
            name: nn.Conv(len(of) + 1, (2, 2), padding="VALID")(x) for name, of in _HEADS.items()
        }
        return features, heads


def _targets(scene: scenes.Scene) -> dict[str, np.ndarray]:
    """Class maps [7, 7] over the inner lattice points of the 8×8 grid (corners of four cells)."""
    maps = {name: np.full((7, 7), len(of), np.int32) for name, of in _HEADS.items()}
    for item in scene.objects:
        row, column = item.y // scenes.CELL - 1, item.x // scenes.CELL - 1
        for name, of in _HEADS.items():
            maps[name][row, column] = of.index(getattr(item, name))
    return maps


def train(rng: np.random.Generator, *, num_steps: int = 500, batch_size: int = 48) -> Any:
    """Parameters of a `Perceptor` trained on 64-pixel scenes."""
    model = Perceptor()
    params = model.init(jax.random.key(17), jnp.zeros((1, 64, 64, 3)))["params"]
    optimizer = optax.adamw(optax.cosine_onecycle_schedule(num_steps, 3e-3), weight_decay=1e-3)

    def loss_fn(params: Any, images: Array, targets: dict[str, Array]) -> Array:
        _, logits = model.apply({"params": params}, images)
        loss = jnp.zeros(())
        for name, labels in targets.items():
            log_probs = jax.nn.log_softmax(logits[name])
            each = -jnp.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0]
            weight = jnp.where(labels == len(_HEADS[name]), 0.05, 1.0)
            loss += jnp.sum(weight * each) / jnp.sum(weight)
        return loss

    @jax.jit
    def step(params: Any, opt_state: Any, images: Array, targets: Any) -> tuple[Any, Any, Array]:
        loss, grads = jax.value_and_grad(loss_fn)(params, images, targets)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state = optimizer.init(params)
    bar = tqdm(range(num_steps), desc="perceptual loss")
    for _ in bar:
        drawn = [scenes.sample_scene(rng) for _ in range(batch_size)]
        images = np.stack([np.asarray(scenes.draw(s).reduce(3), np.float32) for s in drawn]) / 255
        # Noise keeps the features meaningful on the imperfect pictures of a tokenizer in training.
        noise = rng.normal(0, rng.uniform(0, 0.1, (batch_size, 1, 1, 1)), images.shape)
        maps = [_targets(s) for s in drawn]
        targets = {name: np.stack([m[name] for m in maps]) for name in _HEADS}
        params, opt_state, loss = step(
            params, opt_state, (images + noise).astype(np.float32), targets
        )
        bar.set_postfix(loss=f"{float(loss):.3f}")
    return params


def distance(params: Any, out: Array, images: Array) -> Array:
    """Mean squared distance of features, each stride normalised by the mean square of the true
    picture's.
    """
    ours, _ = Perceptor().apply({"params": params}, out)
    true, _ = Perceptor().apply({"params": params}, images)
    terms = [
        jnp.mean((a - b) ** 2) / (jnp.mean(jax.lax.stop_gradient(b) ** 2) + 1e-6)
        for a, b in zip(ours, true, strict=True)
    ]
    return sum(terms, jnp.zeros(())) / len(terms)
