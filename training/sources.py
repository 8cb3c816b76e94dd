"""Several folders in one training: each has its fixed share of every batch, its own Dice loss and its own figures.

A Dice over phantoms and sarcomas at once would be the sarcomas' alone: one holds a thousand times the voxels of a small
lesion. And shares that vary from batch to batch would make what batch norm measures vary along.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from training.loop import Run


class Sourced(Protocol):
    @property
    def source(self) -> Path:
        """FLARE folder that a case comes from."""


T = TypeVar("T", bound=Sourced)


def by_source(cases: Iterable[T]) -> dict[Path, list[T]]:
    """Cases by folder, folders in the order of their first case."""
    groups: dict[Path, list[T]] = {}
    for case in cases:
        groups.setdefault(case.source, []).append(case)
    return groups


def short_names(folders: Iterable[Path]) -> dict[Path, str]:
    """The last part of each path, or all of it where another one ends alike."""
    folders = list(folders)
    ends = [folder.name for folder in folders]
    return {folder: folder.name if ends.count(folder.name) == 1 else str(folder) for folder in folders}


def refuse_shares(shares: tuple[float, ...], folders: int) -> None:
    """ValueError where so many folders cannot have these shares of a batch."""
    if len(shares) != folders or not all(0 < share < np.inf for share in shares):
        raise ValueError(f"--shares: give one positive number for each of the {folders} folders of --data")


class Sources(Generic[T]):
    """Draws from which folder a member of a batch comes."""

    def __init__(self, cases: Iterable[T], shares: tuple[float, ...] = ()) -> None:
        """shares: of a batch, by folder, any positive numbers; as many as there are cases where none are given."""
        self.groups = list(by_source(cases).values())
        weights = shares or tuple(len(group) for group in self.groups)
        refuse_shares(weights, len(self.groups))
        self.limits = np.cumsum(weights) / sum(weights)

    def draw(self, rng: np.random.Generator, member: int, batch: int) -> int:
        """Index of a folder, stratified: what a batch holds of each differs from its share by less than two."""
        place = (member + rng.random()) / batch
        return min(int(np.searchsorted(self.limits, place, side="right")), len(self.groups) - 1)

    def one_hot(self, index: int) -> Tensor:
        """float (folders,), 1 at the index."""
        return torch.eye(len(self.groups))[index]


def scores_by_source(
    run: Run, cases: list[T], names: tuple[str, ...], judge: Callable[[T], tuple[float, ...]]
) -> dict[str, float]:
    """Mean of each score over each folder's cases, NAME_FOLDER where there are several, and NAME, the folders' mean."""
    groups = by_source(cases)
    means = {source: run.mean([judge(case) for case in run.own(group)], len(names)) for source, group in groups.items()}
    scores = dict(zip(names, np.mean(list(means.values()), axis=0).tolist(), strict=True))
    if len(groups) > 1:
        short = short_names(groups)
        for source, values in means.items():
            scores |= {f"{name}_{short[source]}": float(value) for name, value in zip(names, values, strict=True)}
    return scores
