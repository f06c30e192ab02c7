"""Inputs of `prepare`, by number: a captions file with pictures, a folder of pictures, a prepared
tfds data set, Scenes, a file of tokens.

A source has a length and gives input `i` as an `Input`, or raises `Refused` with the reason, so
that the work can be split by number and one bad input never stops the others. Many threads read a
source at once. Errors of the machine (too many open files, a failing disk) do not refuse an input:
they are raised unchanged.
"""

from cogview2_jax.data.sources.captions_file import CaptionsFile
from cogview2_jax.data.sources.inputs import (
    Captions,
    First,
    Input,
    LeftOut,
    Refused,
    Sampled,
    Source,
    caption_sets,
    left_out,
    refused_text,
)
from cogview2_jax.data.sources.picture_folder import PictureFolder
from cogview2_jax.data.sources.prompt_file import PromptFile
from cogview2_jax.data.sources.scenes import Scenes
from cogview2_jax.data.sources.tfds import Tfds
from cogview2_jax.data.sources.token_file import TokenFile

__all__ = [
    "Captions",
    "CaptionsFile",
    "First",
    "Input",
    "LeftOut",
    "PictureFolder",
    "PromptFile",
    "Refused",
    "Sampled",
    "Scenes",
    "Source",
    "Tfds",
    "TokenFile",
    "caption_sets",
    "left_out",
    "refused_text",
]
