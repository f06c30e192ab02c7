"""What the generated tests share: what may happen to a call, and odd values to call with.

A command may succeed, or end with one line on stderr that begins with "cogview2: " and exit code 1,
2 or 130. A function may succeed, or raise ValueError, OSError or TypeError with a message of one
line. Nothing else: no other error, no hang, no memory beyond a bound, no file written by a command
that was refused, no input changed.
"""

import contextlib
import faulthandler
import os
import re
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import hypothesis
from hypothesis import strategies as st

_PROGRESS = re.compile(r"\r| gone, .* left$")  # of a bar in a terminal, and of one elsewhere
SECONDS = 60.0  # of one call; with what it compiles, on a busy machine
MEGABYTES = 1500  # that one call may add to the memory in use
ADDRESSES = 16 << 30  # bytes of address space that a test may add: more is a MemoryError


def examples(usual: int) -> Any:
    """Settings of a generated test: `usual` examples. COGVIEW2_FUZZ_EXAMPLES multiplies."""
    times = float(os.environ.get("COGVIEW2_FUZZ_EXAMPLES", "1"))
    return hypothesis.settings(
        max_examples=max(1, round(usual * times)),
        derandomize=True,
        database=None,
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
        deadline=None,  # `limits` has one
        suppress_health_check=list(hypothesis.HealthCheck),
    )


class Hang(BaseException):
    """Not an Exception, so that nothing takes it for an error of its own."""


@contextlib.contextmanager
def limits(seconds: float = SECONDS, megabytes: int = MEGABYTES) -> Iterator[None]:
    """Raises Hang for a call that takes longer, and AssertionError where it took more memory. A
    call that cannot be interrupted ends the process after three times as long, with its stacks.
    """

    def late(number: int, frame: FrameType | None) -> None:
        raise Hang(f"still runs after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    used = _memory("VmSize")
    resource.setrlimit(resource.RLIMIT_AS, (used * 1024 + ADDRESSES if used else most, most))
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is in use
    resident = _memory("VmRSS")
    faulthandler.dump_traceback_later(3 * seconds, exit=True, file=sys.__stderr__)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    grown = (_memory("VmHWM") - resident) // 1024
    assert grown < megabytes, f"took {grown} MB"


def _memory(name: str) -> int:
    """A figure of /proc/self/status in kB; 0 where there is none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1])
    return 0


def state_of(*folders: Path) -> dict[str, Any]:
    """Names, sizes and times of all that is in folders, to compare before and after."""
    found: dict[str, Any] = {}
    for folder in folders:
        for place, names, files in os.walk(folder):
            for name in (*names, *files):
                path = os.path.join(place, name)
                status = os.lstat(path)
                found[path] = (status.st_mode, status.st_size, status.st_mtime_ns)
    return found


def check_command(code: Any, out: str, err: str, *, wrote: bool) -> None:
    """The property of a command. `wrote`: whether it changed anything on the disk."""
    assert code in (0, 1, 2, 130), f"exit code {code!r}"
    assert "Traceback" not in err and "Error:" not in err, err
    lines = [line for line in err.split("\n") if line.strip() and not _PROGRESS.search(line)]
    ours = [line for line in lines if line.startswith("cogview2: ")]
    if code == 2:
        assert lines and lines[-1] == ours[-1] and len(ours) <= 2, err
        # Refused afterwards: all inputs of a preparation, and numbers of a training.
        late = ("no input became a record", "not finite at step")
        assert not wrote or any(words in ours[-1] for words in late), f"wrote and said {err}"
    elif code == 1:
        assert ours and lines == ours, err


@contextlib.contextmanager
def refusing(given: object = "") -> Iterator[None]:
    """The property of a function. A path that is `given` may have a line break."""
    try:
        with limits():
            yield
    except (ValueError, OSError, TypeError) as error:
        message = str(error).replace(str(given), "")
        assert message.strip() and "\n" not in message.strip(), repr(error)


# --- Odd values -----------------------------------------------------------------------------------

PROMPTS = ("a red circle above a striped blue square", "左边的绿色星形", "a small green star")
WORDS = st.one_of(
    st.sampled_from(
        [
            *("", " ", "\n", "\t", "-", "--", "\\", "%s{0}", "\u200b", "\x1b[31m red", "\u0300"),
            *("a red\ncircle", "a\u2009red\u202fcircle", "a red\u200c circle", "A RED CIRCLE"),
            *("🎉", "مرحبا بالعالم", "a red\udc80", "左边\U0002a6d6", "\ufeffa red circle", "é"),
            *("a" * 10_000, "a " * 5_000, "a red circle" + "\u200b" * 10_000, "\x01" * 10_000),
            *("<pad>", "<unk>", "<s> a </s>", "<start_of_image>", "▁", "\u2028", "a red circle."),
            *("a red circle" + " " * 9_000, "circle " * 12, "null", "true"),
        ]
    ),
    # What the system passes on: any bytes but NUL, those that are no UTF-8 as half pairs.
    st.binary(max_size=24).map(
        lambda content: content.replace(b"\0", b"").decode("utf-8", "surrogateescape")
    ),
    st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=24),
)
NUMBERS = st.sampled_from(
    [
        *("0", "1", "2", "-1", "-0", "nan", "inf", "-inf", "1e308", "1e-400", "0.5", "1.5", ""),
        *("9" * 30, "9" * 400, "one", "٣", "0x10", "1_000", " 1", "2147483648", "1e3", "1,5"),
        *("4294967296", "9223372036854775808", "None", "True", "\udc80"),
    ]
)
JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=8),
        st.sampled_from([10**400, -(10**18), 2**31, 2**63, 0, -1, 1, 1e308, "\ud83d"]),
    ),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def damaged(draw: Any, content: bytes) -> bytes:
    """File content that was cut, overwritten in places, or had bytes put in."""
    made = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(made) - 1, 0)))
        what = draw(st.sampled_from(("cut", "write", "insert", "flip")))
        if what == "cut":
            del made[place:]
        elif what == "flip" and made:
            made[place] ^= 1 << draw(st.integers(0, 7))
        else:
            added = draw(st.binary(min_size=1, max_size=8))
            made[place : place + (len(added) if what == "write" else 0)] = added
    return bytes(made)


@st.composite
def changed_json(draw: Any, content: Any) -> Any:
    """JSON values with one of them, at any depth, replaced, removed or added."""
    if isinstance(content, dict) and content and draw(st.integers(0, 9)):
        name = draw(st.sampled_from(sorted(content)))
        what = draw(st.integers(0, 19))
        if what == 0:
            return {key: value for key, value in content.items() if key != name}
        if what == 1:
            return content | {draw(st.text(max_size=4)): draw(JSON)}
        return content | {name: draw(changed_json(content[name]))}
    if isinstance(content, list) and content and draw(st.integers(0, 3)):
        place = draw(st.integers(0, len(content) - 1))
        return [*content[:place], draw(changed_json(content[place])), *content[place + 1 :]]
    if isinstance(content, (int, float)) and not isinstance(content, bool):
        near = [0, -1, 1, 2, 3, 7, 64, 10**6, 10**9, content + 1, -content, content * 2]
        odd = [float("nan"), float("inf"), 1e308, 10**400, 2**31, 2**63, content / 2, str(content)]
        return draw(st.sampled_from([*near, *odd]) | JSON)
    return draw(JSON)
