"""The hierarchical VQ-VAE: one encoder, one shared codebook, a decoder for each stride (paper
section 3.1).

Arrays are NHWC; in the published model (icetk 0.0.7, `ice_image.pt`) they are NCHW. This file has
the network only: pixels ↔ ids are in `image.py`, the loss is in `training/losses.py`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cogview2_jax.config import HVQVAEConfig, Precision

Array = jax.Array


def _conv(
    features: int, precision: Precision, name: str, kernel: int = 3, **options: Any
) -> nn.Conv:
    return nn.Conv(
        features,
        (kernel, kernel),
        dtype=precision.compute,
        param_dtype=precision.params,
        name=name,
        **({"padding": kernel // 2} | options),
    )


def _strided_conv(x: Array, features: int, precision: Precision, name: str) -> Array:
    """3×3 convolution of stride 2, padded by 1 on the right and at the bottom, as all convolutions
    of stride 2 in the published model.
    """
    return _conv(features, precision, name, strides=2, padding=((0, 1), (0, 1)))(x)


class NormSwish(nn.Module):
    config: HVQVAEConfig
    precision: Precision
    swish: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.GroupNorm(
            self.config.groups,
            epsilon=1e-6,
            dtype=self.precision.compute,
            param_dtype=self.precision.params,
            name="norm",
        )(x)
        return nn.swish(x) if self.swish else x


class ResidualBlock(nn.Module):
    features: int
    config: HVQVAEConfig
    precision: Precision

    @nn.compact
    def __call__(self, x: Array) -> Array:
        out = NormSwish(self.config, self.precision, name="norm1")(x)
        out = _conv(self.features, self.precision, "conv1")(out)
        out = NormSwish(self.config, self.precision, name="norm2")(out)
        out = _conv(self.features, self.precision, "conv2")(out)
        if x.shape[-1] != self.features:
            x = _conv(self.features, self.precision, "shortcut", kernel=1)(x)
        return x + out


class AttentionBlock(nn.Module):
    """Single-head attention over all cells, scores divided by √channels."""

    config: HVQVAEConfig
    precision: Precision

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b, y, w, c = x.shape
        normed = NormSwish(self.config, self.precision, swish=False, name="norm")(x)
        q, k, v = (
            _conv(c, self.precision, name, kernel=1)(normed).reshape(b, y * w, c) for name in "qkv"
        )
        scores = jnp.einsum("bsc,btc->bst", q, k, preferred_element_type=jnp.float32) * c**-0.5
        out = jnp.einsum("bst,btc->bsc", nn.softmax(scores).astype(v.dtype), v)
        return x + _conv(c, self.precision, "proj_out", kernel=1)(out.reshape(b, y, w, c))


class Middle(nn.Module):
    config: HVQVAEConfig
    precision: Precision

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = ResidualBlock(x.shape[-1], self.config, self.precision, name="block_1")(x)
        x = AttentionBlock(self.config, self.precision, name="attn_1")(x)
        return ResidualBlock(x.shape[-1], self.config, self.precision, name="block_2")(x)


class Encoder(nn.Module):
    """Normalised pictures [b, y, x, 3] → features [b, y/s, x/s, z], where s is the first of
    `config.strides`.
    """

    config: HVQVAEConfig
    precision: Precision

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config, precision = self.config, self.precision
        x = _conv(config.channels, precision, "conv_in")(x)
        for level, multiplier in enumerate(config.encoder_multipliers):
            features = config.channels * multiplier
            for block in range(config.encoder_blocks):
                name = f"down_{level}_block_{block}"
                x = ResidualBlock(features, config, precision, name=name)(x)
                if config.nominal_resolution >> level == config.attention_resolution:
                    x = AttentionBlock(config, precision, name=f"down_{level}_attn_{block}")(x)
            if level + 1 < len(config.encoder_multipliers):
                x = _strided_conv(x, features, precision, f"down_{level}_downsample")
        x = Middle(config, precision, name="mid")(x)
        x = NormSwish(config, precision, name="norm_out")(x)
        return _conv(config.z_channels, precision, "conv_out")(x)


class ResidualDownsampler(nn.Module):
    """Half the rows and columns: the average over 2×2 cells plus a strided convolution."""

    precision: Precision

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.avg_pool(x, (2, 2), (2, 2)) + _strided_conv(
            x, x.shape[-1], self.precision, "conv"
        )


class Decoder(nn.Module):
    """Code vectors [b, y, x, codebook_dim] → normalised pictures [b, stride·y, stride·x, 3]."""

    multipliers: tuple[int, ...]
    config: HVQVAEConfig
    precision: Precision

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config, precision = self.config, self.precision
        x = _conv(config.channels * self.multipliers[-1], precision, "conv_in")(x)
        x = Middle(config, precision, name="mid")(x)
        for level in reversed(range(len(self.multipliers))):
            features = config.channels * self.multipliers[level]
            for block in range(config.decoder_blocks):
                name = f"up_{level}_block_{block}"
                x = ResidualBlock(features, config, precision, name=name)(x)
                if config.nominal_resolution >> level == config.attention_resolution:
                    x = AttentionBlock(config, precision, name=f"up_{level}_attn_{block}")(x)
            if level:
                x = x.repeat(2, axis=1).repeat(2, axis=2)
                x = _conv(features, precision, f"up_{level}_upsample")(x)
        x = NormSwish(config, precision, name="norm_out")(x)
        return _conv(3, precision, "conv_out")(x)


class HVQVAE(nn.Module):
    """Encoder, down-samplers, projection, codebook and decoders, in one parameter tree."""

    config: HVQVAEConfig
    precision: Precision = Precision()

    def setup(self) -> None:
        config, precision = self.config, self.precision
        self.encoder = Encoder(config, precision)
        self.downsamplers = [ResidualDownsampler(precision) for _ in config.strides[1:]]
        self.projection = _conv(config.codebook_dim, precision, "projection", kernel=1)
        self.codebook = self.param(
            "codebook",
            nn.initializers.normal(1.0),
            (config.codebook_size, config.codebook_dim),
            precision.params,
        )
        # Named by stride: decoder_4, decoder_8, decoder_16.
        for stride, multipliers in zip(
            config.strides, config.decoder_multipliers[::-1], strict=True
        ):
            setattr(self, f"decoder_{stride}", Decoder(multipliers, config, precision))

    def features(self, images: Array) -> tuple[Array, ...]:
        """Pictures [b, y, x, 3] in [0, 1] → features before the projection, at every stride, finest
        first.
        """
        config = self.config
        x = (images - jnp.asarray(config.mean)) / jnp.asarray(config.std)
        levels = [self.encoder(x.astype(self.precision.compute))]
        for downsampler in self.downsamplers:
            levels.append(downsampler(levels[-1]))
        return tuple(levels)

    def vectors(self, images: Array) -> tuple[Array, ...]:
        """Pictures [b, y, x, 3] in [0, 1] → projected vectors [b, y/stride, x/stride,
        codebook_dim], at every stride, finest first.
        """
        return tuple(self.projection(level) for level in self.features(images))

    def reconstruct(self, vectors: Array, stride: int) -> Array:
        """Code vectors [b, y, x, codebook_dim] → pictures, nominally in [0, 1] but not clipped."""
        out = getattr(self, f"decoder_{stride}")(vectors.astype(self.precision.compute))
        return out.astype(jnp.float32) * jnp.asarray(self.config.std) + jnp.asarray(
            self.config.mean
        )

    def __call__(self, images: Array) -> tuple[Array, ...]:
        """Pictures → reconstructions at every stride, without quantisation. For initialisation: it
        uses every parameter.
        """
        return tuple(
            self.reconstruct(vectors, stride)
            for vectors, stride in zip(self.vectors(images), self.config.strides, strict=True)
        )
