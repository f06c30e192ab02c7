"""The command line: `cogview2 generate`, `caption`, `rank`, `edit`, `infill`, `vary`, `outpaint`,
`serve`, `evaluate`, `plan`, `init`, `info`, `convert`, `export`, `data` and `train`.

A user's mistake ends in one line on stderr and exit code 2, before anything is computed or written.
Exit code 1 means that some of several inputs could not be used, and the others were. Files appear
complete or not at all, and never replace those of another command unless asked. Heavy modules are
imported where they are needed, so that help and error messages appear at once.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

import click

from cogview2_jax import __version__, errors
from cogview2_jax.cli import (
    common,
    convert,
    data,
    drawn,
    edits,
    evaluate,
    generate,
    model,
    pictures,
    plan,
    rank,
    serve,
    train,
    variations,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Exits with 0; 1 when some inputs could not be used; 2 after a mistake; 130 when interrupted.
    """
    _print_anything()
    try:
        code = cli.main(args=arguments, prog_name="cogview2", standalone_mode=False)
    except click.ClickException as error:
        common.complain(error.format_message())
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        common.complain("interrupted")
        sys.exit(130)
    except OSError as error:  # of the machine, wherever it was met: no space left for the output
        common.complain(errors.reason(error))
        sys.exit(2)
    except MemoryError:
        common.complain("not enough memory")
        sys.exit(2)
    except RuntimeError as error:
        if not str(error).startswith("RESOURCE_EXHAUSTED"):  # as XLA says it
            raise
        common.complain(
            "not enough memory on the device: less is needed for fewer pictures at once and with"
            " --dtype int8; `cogview2 plan` says how much"
        )
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)


def _print_anything() -> None:
    """Print what the terminal's encoding lacks (Chinese, names of files that are no text) as
    escapes.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@click.group(
    invoke_without_command=True,
    epilog="""\b
Examples:
  cogview2 generate "a red circle above a striped blue square"
  cogview2 generate --seed 7 --num-images 8 --out birds "蓝色条纹正方形上方的红色圆"
  cogview2 caption pictures/*.png
  cogview2 info
  cogview2 init --out model
  cogview2 convert downloads model --dtype bfloat16
  cogview2 data prepare photos/captions.jsonl --out records
  cogview2 train coglm records --steps 200 --out run
""",
)
@click.version_option(__version__, prog_name="cogview2")
@click.pass_context
def cli(context: click.Context) -> None:
    """Text to pictures with CogView2, on any device that jax runs on.

    Programs are compiled on first use and kept in ~/.cache/cogview2_jax (set XDG_CACHE_HOME or
    JAX_COMPILATION_CACHE_DIR to keep them elsewhere), so the second run starts faster.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


cli.add_command(generate.generate_command)
cli.add_command(pictures.caption_command)
cli.add_command(rank.rank_command)
cli.add_command(edits.edit_command)
cli.add_command(pictures.infill_command)
cli.add_command(variations.vary_command)
cli.add_command(variations.outpaint_command)
cli.add_command(serve.serve_command)
cli.add_command(evaluate.evaluate_command)
cli.add_command(plan.plan_command)
cli.add_command(model.init)
cli.add_command(model.info)
cli.add_command(convert.convert_command)
cli.add_command(convert.export_command)
cli.add_command(data.data_group)
data.data_group.add_command(drawn.draw_command)
data.data_group.add_command(drawn.unpack_command)
cli.add_command(train.train_group)
