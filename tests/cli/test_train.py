"""train: files, messages, and refusals before anything starts."""

import json

import numpy as np
import pytest

from cogview2_jax import bundle as bundles


def test_train_writes_a_model_and_goes_on(run, tiny, tiny_folder, records, tmp_path):
    out = tmp_path / "run"
    command = ("train", "coglm", records, "--bundle", tiny_folder, "--out", out, "--patch-size", 2)
    options = ("--batch-size", 2, "--validation", 0.25, "--text-ratio", 0, "--log-every", 1)
    code, said, _ = run(*command, *options, "--steps", 2)
    assert (code, said) == (0, f"{out / 'model'}\n")
    made = bundles.load(out / "model")
    assert not np.array_equal(made.coglm["word_embeddings"], tiny.coglm["word_embeddings"])
    np.testing.assert_array_equal(made.direct["word_embeddings"], tiny.direct["word_embeddings"])
    assert run(*command, *options, "--steps", 3)[0] == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    code, _, err = run(*command, *options, "--steps", 4, "--learning-rate", 1)
    assert code == 2
    expected = "was begun with options.learning_rate 0.0004, now it is 1"
    assert expected in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("coglm", "{records}", "--accumulate", 3), "accumulate must divide batch_size 16: got 3"),
        (("coglm", "no such folder"), "holds no prepared records"),
        (("coglm", "{records}", "--fsdp", 2), "need several devices: there is one"),
        (("coglm", "{records}", "--start", "coglm"), "'coglm' is not one of 'model', 'nothing'"),
        (
            ("coglm", "{records}", "--coordinator", "a:1"),
            "coordinator, processes and process go together",
        ),
        (("coglm", "{records}", "--dropout", 1), "1.0 is not in the range"),
        (("direct-sr", "{records}", "--batch-size", 4), "no picture of 144 tokens: prepare them"),
        (("tokenizer", "{records}"), "holds tokens, not pictures"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    run, tiny_folder, records, tmp_path, arguments, message
):
    filled = [str(argument).format(records=records) for argument in arguments]
    out = tmp_path / "run"
    code, _, err = run("train", *filled, "--bundle", tiny_folder, "--out", out)
    assert code == 2
    assert message in err.splitlines()[-1] and err.splitlines()[-1].startswith("cogview2: ")
    assert not out.exists()


def test_pictures_of_a_model_in_the_making_are_refused_at_the_start(run, tiny, records, tmp_path):
    bundles.save(tmp_path / "base", tiny._replace(tokenizer={}, cluster_labels=np.zeros(0, int)))
    out = tmp_path / "run"
    command = ("train", "coglm", records, "--bundle", tmp_path / "base", "--out", out)
    options = ("--patch-size", 2, "--text-ratio", 0, "--batch-size", 2)
    code, _, err = run(*command, *options, "--sample-every", 5, "--prompt", "a red circle")
    assert code == 2
    expected = "cogview2: the model lacks tokenizer: `cogview2 train tokenizer` trains it"
    assert err.splitlines()[-1] == expected
    assert not out.exists()
