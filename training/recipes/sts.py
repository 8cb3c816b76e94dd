"""The sarcoma scans of a `data` folder (images/, labels/, splits.json) as a FLARE folder of links.

python training/recipes/sts.py DATA OUT [train|val]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from training.data import Entry, link


def main(data: Path, out: Path, part: str = "train") -> None:
    names = json.loads((data / "splits.json").read_text())["sts"][part]
    folder = data / "sts"
    link(
        [
            Entry(name, folder / "images" / f"{name}_0000.nii.gz", folder / "labels" / f"{name}.nii.gz", None)
            for name in names
        ],
        out,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
