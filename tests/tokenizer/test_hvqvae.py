"""The image tokenizer: nearest codes, shapes of every stride, borders, batches, precision, size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cogview2_jax.config import HVQVAEConfig, Precision
from cogview2_jax.sharding import Execution
from cogview2_jax.tokenizer import image
from cogview2_jax.tokenizer.hvqvae import HVQVAE, ResidualDownsampler
from tests.common import quick_jit

SMALL = HVQVAEConfig(
    channels=8,
    groups=4,
    encoder_blocks=1,
    z_channels=8,
    codebook_size=20,
    codebook_dim=6,
    nominal_resolution=64,  # attention at level 2, so in every decoder and in the encoder
)
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def params():
    """Drawn here: compiling the initialisation of 200 tensors takes a minute."""
    rng = np.random.default_rng(0)

    def leaf(path, like):
        centre, spread = (1, 0.2) if path[-1].key == "scale" else (0, 0.1)
        return jnp.asarray(centre + spread * rng.standard_normal(like.shape), jnp.float32)

    shapes = jax.eval_shape(lambda key: image.init_params(key, SMALL), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(leaf, shapes)


@jax.jit
def encode(params, images):
    """Ids at every stride. In one program, so that the encoder is compiled once."""
    return {stride: image.encode(params, images, stride, config=SMALL) for stride in SMALL.strides}


@functools.partial(jax.jit, static_argnums=2)
def decode(params, ids, stride):
    return image.decode(params, ids, stride, config=SMALL)


def pictures(*shape):
    return np.random.default_rng(1).random((*shape, 3), np.float32)


IMAGES = pictures(2, 32, 48)


@pytest.fixture(scope="module")
def ids(params):
    return encode(params, IMAGES)


def test_the_nearest_code_is_the_one_at_the_least_distance():
    rng = np.random.default_rng(0)
    vectors, codebook = rng.standard_normal((2, 5, 7, 6)), rng.standard_normal((20, 6))
    distances = np.square(vectors[..., None, :] - codebook).sum(-1)
    nearest = jax.jit(image.nearest_code)
    found = nearest(vectors.astype(np.float32), codebook.astype(np.float32))
    np.testing.assert_array_equal(found, distances.argmin(-1))
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(nearest(codebook, codebook), np.arange(20))


@pytest.mark.parametrize("stride", SMALL.strides)
def test_shapes_of_a_picture_that_is_not_square(params, ids, stride):
    found = ids[stride]
    assert found.shape == (2, 32 // stride, 48 // stride) and found.dtype == jnp.int32
    assert (found >= 0).all() and (found < SMALL.codebook_size).all()
    decoded = decode(params, found, stride)
    assert decoded.shape == IMAGES.shape and decoded.dtype == jnp.float32
    assert np.isfinite(decoded).all()


def test_a_picture_does_not_depend_on_its_batch(params, ids):
    alone = encode(params, IMAGES[1:])
    jax.tree.map(lambda one, both: np.testing.assert_array_equal(one, both[1:]), alone, ids)
    decoded = decode(params, alone[8], 8)
    expected = decode(params, ids[8], 8)[1:]
    np.testing.assert_allclose(decoded, expected, rtol=0, atol=TOLERANCE)


def test_tokens_and_pixels_are_those_of_bytes(params, ids):
    """`to_tokens` and `to_pixels`: uint8 pictures and rows of cells, and the execution is used."""
    options = {"stride": 8, "config": SMALL}
    drawn = image.to_pixels(params, ids[8].reshape(2, -1), grid=(4, 6), **options)
    exact = 255 * np.clip(decode(params, ids[8], 8), 0, 1)
    assert drawn.dtype == jnp.uint8 and exact.min() == 0 and exact.max() == 255
    np.testing.assert_allclose(drawn, exact, rtol=0, atol=0.5 + 255 * TOLERANCE)
    half = Execution(Precision(compute=jnp.bfloat16))
    tokens, of_half = (
        image.to_tokens(params, drawn, execution=execution, **options)
        for execution in (Execution(), half)
    )
    program = jax.make_jaxpr(lambda p: image.to_tokens(params, p, execution=half, **options))
    assert "bf16" in str(program(drawn))
    expected = encode(params, np.asarray(drawn, np.float32) / 255)[8]
    np.testing.assert_array_equal(tokens, expected.reshape(2, -1))
    assert (of_half == tokens).mean() > 0.5  # near ties, and only those, change


def test_strided_convolutions_pad_right_and_bottom():
    """The first pixel meets a corner of the kernel, the last its middle."""
    model = ResidualDownsampler(Precision())
    kernel = np.random.default_rng(0).standard_normal((3, 3, 1, 1), np.float32)
    params = {"conv": {"kernel": kernel, "bias": np.zeros(1, np.float32)}}
    impulses = np.zeros((2, 4, 4, 1), np.float32)
    impulses[0, 0, 0] = impulses[1, 3, 3] = 1
    first, last = jax.jit(model.apply)({"params": params}, impulses)[..., 0]
    np.testing.assert_allclose(first, [[kernel[0, 0, 0, 0] + 0.25, 0], [0, 0]], atol=TOLERANCE)
    np.testing.assert_allclose(last, [[0, 0], [0, kernel[1, 1, 0, 0] + 0.25]], atol=TOLERANCE)


def test_pictures_are_normalised_and_back(params):
    """The published mean and deviation: a decoder that gives zeros gives the mean picture."""
    nothing = jax.tree.map(np.zeros_like, params)
    decoded = decode(nothing, np.zeros((1, 4, 6), np.int32), 8)
    mean = np.broadcast_to(np.float32(SMALL.mean), decoded.shape)
    np.testing.assert_array_equal(decoded, mean)


def test_gradients_are_finite_and_reach_encoder_and_decoder(params):
    model = HVQVAE(SMALL)

    def loss(params):
        vectors = model.apply({"params": params}, pictures(1, 16, 16), method="vectors")[0]
        return (model.apply({"params": params}, vectors, 4, method="reconstruct") ** 2).mean()

    gradients = quick_jit(jax.grad(loss))(params)
    reached = {"encoder", "projection", "decoder_4"}
    for part, tree in gradients.items():
        for gradient in jax.tree.leaves(tree):
            assert np.isfinite(gradient).all()
            assert part in reached or not gradient.any()
    assert gradients["encoder"]["conv_in"]["kernel"].any()
    assert gradients["decoder_4"]["conv_in"]["kernel"].any()


def test_wrong_pictures_and_strides_are_refused(params):
    with pytest.raises(ValueError, match=r"stride must be one of \(4, 8, 16\): got 5"):
        image.encode(params, pictures(1, 32, 32), 5, config=SMALL)
    with pytest.raises(ValueError, match=r"stride must be one of \(4, 8, 16\): got 2"):
        image.decode(params, np.zeros((1, 2, 2), int), 2, config=SMALL)
    with pytest.raises(ValueError, match=r"sides must be multiples of stride 16: got \(32, 40\)"):
        image.encode(params, pictures(1, 32, 40), 16, config=SMALL)


def test_the_published_tokenizer_has_its_tables_and_levels():
    config = HVQVAEConfig()
    shapes = jax.eval_shape(lambda key: image.init_params(key, config), jax.random.key(0))
    assert shapes["codebook"].shape == (20_000, 256)
    assert config.strides == (4, 8, 16)
    # Attention outside the middles: at the lowest level of the stride-16 decoder alone.
    levels = {
        (part, name)
        for part in ("encoder", "decoder_4", "decoder_8", "decoder_16")
        for name in shapes[part]
        if "attn" in name
    }
    assert levels == {("decoder_16", "up_4_attn_0")}
    assert shapes["decoder_16"]["conv_in"]["kernel"].shape == (3, 3, 256, 512)
