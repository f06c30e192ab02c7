"""The figures of a run: what TensorBoard reads, and what is said when nothing can be written."""

import json
import resource
import struct

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from cogview2_jax.metrics import Log


def events(folder):
    """Of every file in the folder, as TensorBoard reads them."""
    found = []
    for file in sorted((folder / "tensorboard").iterdir()):
        content = file.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            found.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return found


def test_figures_and_pictures_are_there_at_once(tmp_path):
    log = Log(tmp_path, start=4)
    log.figures(5, {"loss": 0.5, "accuracy": 0.25})
    picture = log.picture(6, np.zeros((2, 3, 3), np.uint8))
    # Before it is closed: a kill loses none.
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 5,
        "loss": 0.5,
        "accuracy": 0.25,
    }
    version, began, *rest = events(tmp_path)
    assert version.file_version == "brain.Event:2"
    assert began.session_log.status == SessionLog.START and began.step == 5
    found = [(event.step, event.summary.value[0]) for event in rest]
    assert [(step, value.tag) for step, value in found] == [
        (5, "loss"),
        (5, "accuracy"),
        (6, "samples"),
    ]
    assert [value.simple_value for _, value in found[:2]] == [0.5, 0.25]
    assert (found[2][1].image.height, found[2][1].image.width) == (2, 3)
    assert picture.exists()
    log.__exit__(None, None, None)


@pytest.mark.parametrize(
    ("most", "write", "file"),
    [
        (50, lambda log: log.figures(1, {"loss": 1 / 3, "gradient_norm": 1 / 3}), "metrics.jsonl"),
        (150, lambda log: log.figures(1, {str(i): 0.5 for i in range(9)}), "tensorboard"),
        (
            50,
            lambda log: log.picture(1, np.zeros((9, 9, 3), np.uint8)),
            "samples/step_00000001.png",
        ),
    ],
)
def test_a_full_disk_is_one_line(most, write, file, tmp_path):
    expected = f"{tmp_path / file} could not be written: File too large"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(OSError) as caught, Log(tmp_path) as log:
        log._board.flush()
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
            write(log)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(caught.value) == expected
