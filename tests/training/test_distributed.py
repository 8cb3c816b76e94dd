"""Two processes on halves of a batch do what one process does on all of it: with layer norm, since on CPUs batch norm
sees each process's half alone.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file

from inference.hybrid.config import HybridConfig
from inference.hybrid.model import Hybrid

SCRIPT = """
import sys
from functools import partial
from pathlib import Path
import torch
from inference.hybrid.config import PRESETS, HybridConfig
from training import hybrid_training
PRESETS["small"] = HybridConfig(32, 4, 2, 0, cnn_width=4, prompt_dim=16)
torch.optim.Adam = torch.optim.SGD  # Adam makes whole steps of the last bit of a gradient that is nearly zero
hybrid_training.main(hybrid_training.Settings(
    (Path(sys.argv[1]),), Path(sys.argv[2]), steps=4, stacks=2, targets=2, crop_share=0.5, crop=64, crop_stacks=2,
    learning_rate=0.3, decay=0.0, precision="32-true", device="cpu", validation=2, validations=1,
    seed=1,  # of seed 0's crops, one magnifies the rounding of the stem's biases to 1e-4
))
"""


def losses_and_weights(folder: Path, out: Path, processes: int) -> dict[str, np.ndarray]:
    script = out.with_suffix(".py")
    script.write_text(SCRIPT)
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launch, str(script), str(folder), str(out)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2], timeout=300
    )
    assert done.returncode == 0, done.stderr
    return load_file(out / "hybrid.safetensors")


def test_two_processes_equal_one(folder, tmp_path) -> None:
    one, two = (losses_and_weights(folder, tmp_path / f"run{n}", n) for n in (1, 2))
    assert one.keys() == two.keys()
    for name, weights in one.items():
        np.testing.assert_allclose(two[name], weights, rtol=1e-3, atol=1e-5, err_msg=name)
    torch.manual_seed(1)
    start = Hybrid(HybridConfig(32, 4, 2, 0, cnn_width=4, prompt_dim=16)).state_dict()
    moved = [name for name, weights in one.items() if np.abs(weights - start[name].numpy()).max() > 1e-5]
    assert {name.split(".")[0] for name in moved} >= {"vit", "cnn", "prompt_encoder", "mask_decoder"}
