"""Progress of a run on stderr: a bar in a terminal, plain lines everywhere else."""

import sys
import time
from collections.abc import Mapping
from types import TracebackType

from tqdm import tqdm

# Figures that the bar shows, and how.
_SHOWN = {"loss": "{:.4g}", "tokens_per_second": "{:,.0f}", "utilisation": "{:.2f}"}


class Progress:
    """Progress of `num_steps` steps from step `start`; silent unless `shown`.

    In a terminal it is one bar, redrawn in place. Elsewhere, as in a log file, each call of
    `figures` is a line of its own and nothing is redrawn. Seconds a step there are the mean since
    the first step, saves and validation included.
    """

    def __init__(self, name: str, start: int, num_steps: int, *, shown: bool = True) -> None:
        self._name, self._num_steps, self._shown = name, num_steps, shown
        self._bar = None
        self._first = start + 1  # the step that includes compiling
        self._begun = 0.0
        if shown and sys.stderr.isatty():
            self._bar = tqdm(initial=start, total=num_steps, desc=name, file=sys.stderr)

    def say(self, text: str) -> None:
        """One line."""
        if self._bar is not None:
            self._bar.clear()
        if self._shown:
            print(f"{self._name}: {text}", file=sys.stderr, flush=True)
        if self._bar is not None:
            self._bar.refresh()

    def compiling(self) -> None:
        """The first step begins: most of its time is compilation."""
        self._begun = time.monotonic()
        if self._bar is not None:
            self._bar.set_description(f"{self._name}, compiling")
        else:
            self.say("compiling the first step, which can take minutes")

    def compiled(self) -> None:
        if self._bar is not None:
            self._bar.set_description(self._name)
            self._bar.unpause()  # its speed counts from here
        else:
            self.say(f"compiled, first step done in {_duration(time.monotonic() - self._begun)}")
        self._begun = time.monotonic()

    def advance(self) -> None:
        """One more step is done."""
        if self._bar is not None:
            self._bar.update()

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """Show the metrics of a logged step."""
        if self._bar is not None:
            known = {name: form for name, form in _SHOWN.items() if name in figures}
            self._bar.set_postfix(
                {name: form.format(figures[name]) for name, form in known.items()}
            )
            return
        parts = [f"step {step}/{self._num_steps}"]
        if "loss" in figures:
            parts.append(f"loss {figures['loss']:.4g}")
        if step > self._first:
            seconds = (time.monotonic() - self._begun) / (step - self._first)
            digits = 0 if seconds >= 10 else 1 if seconds >= 1 else 3
            parts.append(f"{seconds:.{digits}f} s a step")
            if step < self._num_steps:
                parts.append(f"{_duration(seconds * (self._num_steps - step))} left")
        self.say(", ".join(parts))

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """The bar stays as it is; lines that follow are below it."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _duration(seconds: float) -> str:
    """In the smallest of seconds, minutes and hours that needs two digits at most."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if seconds < 99.5 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
