"""The stages, and what Python and the command line take by default. Imports nothing, so that help
comes at once.
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
TOP_K = 10  # of `caption` with a key
TEMPERATURE = 1.0
