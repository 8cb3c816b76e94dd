"""Torch paints what numpy paints, on whatever device; a device that cannot be used is one sentence."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from training.grid import HOST, Grid, Torch, computer
from training.phantom import Scanner, Settings, main, make_phantom

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU that torch finds")
SMALL = Scanner((30, 60, 66), (8.0, 6.0, 5.5), noise_hu=8.0, kernel_mm=1.0, top_mm=140.0)
CHEST = Scanner((36, 60, 66), (8.0, 6.0, 5.5), noise_hu=8.0, kernel_mm=1.0, top_mm=350.0, round_field=True)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NO_GPU)])
@pytest.mark.parametrize("scanner", [SMALL, CHEST], ids=["abdomen", "chest"])
def test_torch_paints_the_same_phantoms(device: str, scanner: Scanner) -> None:
    """Up to rounding: a voxel in a thousand may differ by one HU, one in ten thousand lie across an organ's border."""
    on = Torch(device)
    for seed in range(3):
        ours, theirs = (
            make_phantom(seed, healthy=False, scanner=scanner, chest=scanner is CHEST, on=way) for way in (HOST, on)
        )
        assert ours.drawn == theirs.drawn
        apart = np.abs(ours.hu.astype(int) - theirs.hu)
        assert apart.max() <= 1
        assert apart.mean() < 1e-3
        for name in ("lesions", "organs", "sites"):
            assert (getattr(ours, name) != getattr(theirs, name)).mean() < 1e-4
        assert ours.lesions.any()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NO_GPU)])
def test_numbers_leave_volumes_in_32_bits(device: str) -> None:
    axis = np.linspace(-1, 1, 5)  # float64, as a scanner's positions may be
    for on in (HOST, Torch(device)):
        z, y, x = Grid((axis.astype(np.float32),) * 3, on).open((np.float64(0.1), 0, 0))
        volume = on.number(np.float64(0.1)) * (z + y + x) + on.put(np.float32([[[2]]]))
        assert on.fetch(volume).dtype == np.float32
        assert on.fetch(on.lookup(np.arange(256) == 7, on.full((2, 3, 4), 7, "uint8"))).all()
    assert str(Torch(device).put(axis).dtype) == "torch.float32"


@pytest.mark.parametrize("device", ["cuda:99", "gpu"])
def test_a_device_that_cannot_be_used_is_one_sentence(tmp_path: Path, device: str) -> None:
    with pytest.raises(ValueError, match=f"--device {device} cannot be used: take cpu"):
        main(Settings(tmp_path / "out", 1, device=device))
    assert not (tmp_path / "out").exists()


def test_processes_that_paint_with_torch(tmp_path: Path) -> None:
    """ "cpu:0" is torch's name of the host; processes are started as a GPU needs them."""
    paths = [tmp_path / name for name in ("numpy", "torch")]
    for path, device in zip(paths, ("cpu", "cpu:0"), strict=True):
        main(Settings(path, 1, seed=3, jobs=2, network_grid=True, device=device))
    assert computer("cpu") is HOST
    ours, theirs = (np.asarray(nib.load(path / "imagesTr/phantom_000003_0000.nii.gz").dataobj) for path in paths)
    assert np.abs(ours.astype(int) - theirs).max() <= 1
    assert (paths[0] / "cases.csv").read_text() == (paths[1] / "cases.csv").read_text()
