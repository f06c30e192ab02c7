"""Checks of text ids: odd texts, and the ids that the published tokenizer gave for them."""

import json
from collections.abc import Iterator
from pathlib import Path

from cogview2_jax.tokenizer import text
from experiments.parity.golden import Check, Outcome

NUM_IMAGE = 20_000


def check_text_ids(model_file: Path, ids_file: Path) -> Iterator[Outcome]:
    """The three recorded ways: a text, with line breaks kept, with `<start_of_image>` behind it."""
    model = text.load_text_model(model_file)
    vocabulary = text.vocabulary_for(model, NUM_IMAGE, as_published=True)
    recorded = json.loads(ids_file.read_text("utf-8"))
    for name, options in (
        ("ids", {}),
        ("keep_line_breaks", {"keep_line_breaks": True}),
        ("with_start", {}),
    ):
        wrong = []
        for row in recorded:
            typed = row["text"] + (text.START_OF_IMAGE if name == "with_start" else "")
            if text.encode(model, typed, vocabulary, allow_empty=True, **options) != row[name]:
                wrong.append(row["text"])
        note = f"{len(recorded)} texts" + (f", first wrong: {wrong[0]!r}" if wrong else "")
        yield Check(name, float(len(wrong)), 0.0, not wrong, note)
