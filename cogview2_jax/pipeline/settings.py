"""The stages, and the defaults of Python and the command line. Imports nothing, so that help
appears at once.
"""

# Each stage, and the networks that run up to it, in order. The tokenizer draws the pixels.
STAGES = {
    "base": ("coglm", "tokenizer"),
    "direct": ("coglm", "direct", "tokenizer"),
    "full": ("coglm", "direct", "iterative", "tokenizer"),
}
LANGUAGES = ("en", "zh")  # of captions

NUM_IMAGES = 4  # of `generate`
NUM_INFILLED = 1  # of `infill`
NUM_EDITED = 4  # of `edit`, as published, `vary` and `outpaint`
ANIMATIONS = ("webp", "gif")
KEPT = 0.5  # of a picture's cells, by `vary`
DECODED_AT_ONCE = 16  # pictures in a batch of the base stage, candidates included
BATCHES = (16, 8, 4, 2, 1)  # pictures at once that a plan of memory chooses from
SCORED_AT_ONCE = 8  # pairs of text and picture in a batch of `scores`
CAPTIONED_AT_ONCE = 8  # pictures in a batch of `captions`
TOP_K = 10  # of `caption` with a key
TEMPERATURE = 1.0
