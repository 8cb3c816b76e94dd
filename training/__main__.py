"""The training, one command a stage: `python -m training COMMAND --help`.

phantoms, implant → pseudo-labels → hybrid, unet → release → calibrate; unfold, to train on from a UNet that ships.
`training/recipes/` holds whole runs.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from functools import partial

import tyro

from training import calibration, hybrid_training, implant, phantom, pseudo_labels, release, unet_training, unfold
from training.command_line import exit_code

GOES_ON = "interrupted: phantoms, trainings and pseudo-labels go on when they are called again with the same --out"
COMMANDS: dict[str, Callable[..., None]] = {
    "phantoms": phantom.main,
    "implant": implant.main,
    "hybrid": hybrid_training.main,
    "unet": unet_training.main,
    "pseudo-labels": pseudo_labels.main,
    "unfold": unfold.main,
    "release": release.main,
    "calibrate": calibration.main,
}


def main() -> int:
    """0 where the stage was done; 1 and a line on stderr where the user has something to mend; 130 if interrupted."""
    command = partial(
        tyro.extras.subcommand_cli_from_dict,
        COMMANDS,
        prog="python -m training",
        description=__doc__,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    return exit_code(command, 1, GOES_ON)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that processes of its own end with it
    sys.exit(main())
