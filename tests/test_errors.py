"""Errors in one line."""

import pytest

from cogview2_jax import errors


@pytest.mark.parametrize(
    ("error", "one", "first", "reason"),
    [
        (ValueError("a\n  b\tc"), "a b c", "a", "a b c"),
        (ValueError("\n a \nb"), "a b", "a", "a b"),
        (ValueError(), "ValueError", "ValueError", "ValueError"),
        (OSError("no room"), "no room", "no room", "no room"),
        (
            PermissionError(13, "Permission denied", "a.json"),
            "[Errno 13] Permission denied: 'a.json'",
            "[Errno 13] Permission denied: 'a.json'",
            "a.json: Permission denied",
        ),
        (OSError(28, "No space\nleft"), "[Errno 28] No space left", "[Errno 28] No space", None),
    ],
)
def test_an_error_in_one_line(error, one, first, reason):
    assert errors.one_line(error) == one
    assert errors.first_line(error) == first
    assert errors.reason(error) == (reason or "No space left")


def test_words_that_a_terminal_can_show():
    assert errors.plain("a\nb\r\n c\x1b[1m \udcff 图 é") == r"a b c\x1b[1m \udcff 图 é"
