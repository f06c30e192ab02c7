"""Defaults that the commands and the functions share. Imports nothing: help shows them."""

IMAGE_FIELD, CAPTION_FIELD = "image", "caption"  # of a captions file
BATCH_SIZE = 64  # pictures that the tokenizer encodes at once
SHARD_SIZE = 4096  # inputs of a shard
