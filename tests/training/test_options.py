"""Options are checked when they are made, and the command line agrees with them."""

import dataclasses

import click
import pytest
from click.testing import CliRunner

from cogview2_jax.cli.options import from_settings, take
from cogview2_jax.cli.train import train_group
from cogview2_jax.training import options as every
from cogview2_jax.training.options import (
    CogLMOptions,
    ComputeOptions,
    DirectSROptions,
    IterativeSROptions,
    LoopOptions,
    Options,
    ProcessOptions,
    TokenizerOptions,
)

SHARED = (Options, LoopOptions, ComputeOptions, ProcessOptions)
OWN = {
    "tokenizer": TokenizerOptions,
    "coglm": CogLMOptions,
    "direct-sr": DirectSROptions,
    "iterative-sr": IterativeSROptions,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1: got 0"),
        ({"accumulate": 3}, "accumulate must divide batch_size 16: got 3"),
        ({"validation": 1.0}, "validation must be from 0 to below 1: got 1.0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0: got 0.0"),
        ({"final_rate": 1.0}, "final_rate must be from 0 to below 1: got 1.0"),
        ({"optimizer": "sgd"}, "optimizer must be one of adamw, muon: got 'sgd'"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0: got nan"),
        ({"clip": float("inf")}, "clip must be above 0: got inf"),
        ({"num_steps": 1.5}, "num_steps must be a whole number: got 1.5"),
        ({"batch_size": True}, "batch_size must be a whole number: got True"),
        ({"warmup": "0.1"}, "warmup must be a number: got '0.1'"),
        ({"seed": 2**31}, "seed must be from 0 to 2147483647: got 2147483648"),
        ({"schedule_steps": 0}, "schedule_steps must be at least 1: got 0"),
    ],
)
def test_options_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        Options(**changes)


@pytest.mark.parametrize("name", ["save_every", "log_every", "keep"])
def test_nothing_happens_every_0_steps(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1: got 0"):
        LoopOptions(**{name: 0})


def test_a_tuple_is_checked_by_item():
    with pytest.raises(ValueError, match="strides must be at least 1: got 0"):
        TokenizerOptions(strides=(8, 0))


def test_processes_by_hand_go_together():
    with pytest.raises(ValueError, match="coordinator, processes and process go together"):
        ProcessOptions(coordinator="first:1")
    # The others would wait for one that does not come.
    with pytest.raises(ValueError, match="process must be below processes 2: got 2"):
        ProcessOptions(coordinator="first:1", processes=2, process=2)


@pytest.mark.parametrize("network", OWN)
def test_every_command_has_every_option_with_its_default(network):
    """The defaults of the command line are those of Python."""
    command = train_group.commands[network]
    made = {param.name: param for param in command.params}
    for kind in (OWN[network], *SHARED):
        for each in dataclasses.fields(kind):
            assert made[each.name].default == each.default, each.name
            assert made[each.name].help == each.metadata["help"], each.name


def test_the_command_line_makes_the_dataclass():
    found = []

    @click.command()
    @from_settings(TokenizerOptions)
    def command(**chosen):
        found.append(take(TokenizerOptions, chosen))
        assert not chosen

    result = CliRunner().invoke(command, ["--stride", "8", "--stride", "16", "--mirror"])
    assert result.exit_code == 0, result.output
    assert found == [TokenizerOptions(strides=(8, 16), mirror=True)]
    result = CliRunner().invoke(command, ["--settle", "1"])
    assert "1.0 is not in the range 0<=x<1" in result.output


def test_all_classes_are_covered():
    kinds = [value for value in vars(every).values() if isinstance(value, type)]
    here = [kind for kind in kinds if kind.__module__ == every.__name__]
    assert set(here) == {*SHARED, *OWN.values()}
