"""The commands of `bnnlib`, and of `python -m bnnlib`.

Whatever they say without training, drawing or scoring, mistakes included, they say without PyTorch,
whose import takes seconds: a command imports what needs it when it begins to work.
"""

import click

import bnnlib
from bnnlib.cli.looking import compare, evaluate, export, pack, plot, results, show
from bnnlib.cli.running import describe, list_experiments, names, run_experiment, svhn_subset
from bnnlib.cli.shell import Group
from bnnlib.cli.sweeping import reproduce, sweep

COMMANDS = (
    *(list_experiments, names, describe, run_experiment, sweep, show, compare, results, reproduce),
    *(plot, evaluate, pack, export, svhn_subset),
)


@click.group(
    cls=Group,
    commands=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)
@click.version_option(bnnlib.__version__, prog_name="bnnlib")
def main() -> None:
    """Memorization in binarized neural networks: the experiments and their runs."""
