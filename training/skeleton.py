"""Spine, ribs and pelvis as shapes. Template coordinates as in `anatomy.py`: mm (z, y, x)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from training.anatomy import DEPTH, WIDTH, Z_KNOTS, Organ, Patient, turn_about_z
from training.grid import Array
from training.scene import Material
from training.shapes import Column, Ellipsoid, Shape, Tube

VERTEBRAE_Z = (238, 214, 189, 163, 137, 110, 82, 52, 20, -14, -48, -83, -118)
"""Centres of T5 to L5."""


def add_spine(p: Patient) -> None:
    """Vertebrae with arches and processes, discs, canal, and sacrum."""
    s = p.scale
    axis_x = p.rng.normal(0, 2.0)
    column_z = np.array([-140.0, -60, 0, 80, 160, 260]) * s
    bow = np.array([38.0, 34, 41, 52, 60, 58]) * s
    marrow = Material(p.hu("marrow"), 25, 18)
    bone = [(0.0, p.material("cortex", 60)), (1.6, marrow)]
    ones = np.ones(6)
    disc = Column(column_z, bow, axis_x * ones, 15 * s * ones, 20 * s * ones)
    p.add(p.wobble(disc, 0.6, 20), p.material("disc"), Organ.MUSCLE)
    for z in np.asarray(VERTEBRAE_Z) * s:
        add_vertebra(p, z, float(np.interp(z, column_z, bow)), axis_x, bone)
    canal_y = bow + 24 * s
    p.add(Column(column_z, canal_y, axis_x * ones, 7.5 * s * ones, 9 * s * ones), p.material("cord"), Organ.CANAL)
    sacrum = Tube.along([(-138 * s, 45 * s, 0), (-175 * s, 72 * s, 0), (-225 * s, 85 * s, 0)], [24 * s, 22 * s, 9 * s])
    p.add(p.wobble(sacrum, 2, 18), bone, Organ.BONE)


def bone_layers(p: Patient, cortex_mm: float) -> list[tuple[float, Material]]:
    """Marrow in a shell of so many mm."""
    return [(0.0, p.material("cortex", 55)), (cortex_mm, Material(p.hu("marrow"), 25, 15))]


def add_vertebra(p: Patient, z: float, y: float, x: float, bone: Sequence[tuple[float, Material]]) -> None:
    """Body, arch and processes of the one whose body's centre lies there."""
    s = p.scale * (1.0 if z < 60 else 0.86)
    knots = np.array([-12.5, -8, 0, 8, 12.5]) * s
    waist = np.array([1.06, 1.0, 0.92, 1.0, 1.06])
    body = Column(z + knots, y + 0 * knots, x + 0 * knots, 15.5 * s * waist, 21.5 * s * waist, 0.2)
    p.add(p.wobble(body, 0.7, 14), bone, Organ.BONE)
    arch_z = z - 2
    for side in (-1, 1):
        pedicle = [(z + 3, y + 12 * s, x + side * 12 * s), (arch_z, y + 25 * s, x + side * 14 * s)]
        lamina = [(arch_z, y + 25 * s, x + side * 14 * s), (arch_z - 7, y + 38 * s, x)]
        wing = [(z, y + 24 * s, x + side * 15 * s), (z + 1, y + 28 * s, x + side * 37 * s)]
        facet = [(z - 12 * s, y + 29 * s, x + side * 15 * s), (z + 8 * s, y + 27 * s, x + side * 16 * s)]
        for points, radii in ((pedicle, 5.0), (lamina, 3.6), (wing, (4.5, 3.0)), (facet, 5.5)):
            p.add(p.wobble(Tube.along(points, np.asarray(radii) * s), 0.7, 8), bone, Organ.BONE)
    spinous = Tube.along([(arch_z - 7, y + 37 * s, x), (arch_z - 13, y + 58 * s, x)], [3.5 * s, 4.5 * s])
    p.add(p.wobble(spinous, 0.7, 9), bone, Organ.BONE)


def add_ribs(p: Patient) -> None:
    """Twelve-ish ribs that slope forward and down inside the wall, their cartilages, and the sternum."""
    s = p.scale
    bone = [(0.0, p.material("cortex", 50)), (1.7, Material(p.hu("marrow"), 25))]
    for i, z0 in enumerate(np.asarray(VERTEBRAE_Z[:8]) * s):
        last = (165, 160, 152, 145, 135, 120, 95, 62)[i]
        angles = np.deg2rad(np.arange(12, last + 1, 9.0))
        z = z0 + 6 * s - 95 * s * (1 - np.cos(angles)) / 2 * np.sqrt(last / 165)
        for side in (-1, 1):
            bend = 1 + p.rng.normal(0, 0.006)
            half_y = (97 * np.interp(z, Z_KNOTS * s, DEPTH)) * s + p.visceral_mm / 2 - 1
            half_x = (135 * np.interp(z, Z_KNOTS * s, WIDTH)) * s + 0.35 * p.visceral_mm - 1
            y = -p.visceral_mm / 2 + half_y * np.cos(angles) * bend
            points = np.stack([z, y, side * half_x * np.sin(angles) * bend], 1)
            p.add(rib(p, points), bone, Organ.BONE)
            if i < 6:
                end = np.array([z[-1] + 30 * s, y[-1] - 6 * s, side * 18 * s])
                cartilage = Tube.along([points[-1], end], [5.5 * s, 6 * s])
                p.add(cartilage, p.material("cartilage", 12), Organ.MUSCLE, (Organ.MUSCLE, Organ.FAT, Organ.CAVITY))
    y = -(98 * s * 1.08) - p.visceral_mm + 4
    sternum = Column(np.array([130, 150, 260]) * s, (y, y, y + 12), (0, 0, 0), (4, 6, 6), (8, 17, 18), 0.4)
    p.add(p.wobble(sternum, 0.6, 12), bone, Organ.BONE)


def rib(p: Patient, points: Array) -> Shape:
    """Along points (n, 3) in mm, in this patient's scale."""
    return p.wobble(Tube.along(points, 5.2 * p.scale), 0.5, 9)


def add_pelvis(p: Patient) -> None:
    """Iliac wings, hip joints with femoral heads, gluteal muscles, and the bladder."""
    s = p.scale
    bone = [(0.0, p.material("cortex", 60)), (1.8, Material(p.hu("marrow"), 30, 20))]
    bladder = Ellipsoid(p.near((-225, -35, 0), 5), np.array([35, 38, 45]) * s * p.between(0.6, 1.1))
    p.add(p.wobble(bladder, 3, 40), [(0, p.material("muscle")), (3, Material(p.hu("urine")))], Organ.BLADDER)
    for side in (-1, 1):
        glutei = Column(np.array([-330, -230, -150, -95]) * s, np.array([75, 75, 62, 40]) * s,
                        side * np.array([85, 88, 95, 112]) * s, np.array([50, 48, 42, 14]) * s,
                        np.array([60, 58, 42, 12]) * s, 0.3)  # fmt: skip
        over = (Organ.CAVITY, Organ.MUSCLE, Organ.FAT)
        p.add(p.wobble(glutei, 4, 35), Material(p.hu("muscle"), 8, 12), Organ.MUSCLE, over)
        for z, y, x, width in ((-105, 18, 118, 46), (-135, 30, 104, 44), (-165, 40, 86, 38)):
            wing = Ellipsoid(p.near((z, y, side * x), 1), np.array([34, width, 6.5]) * s, turn_about_z(38 * side))
            p.add(p.wobble(wing, 1.5, 20), bone, Organ.BONE)
        socket = Ellipsoid(p.near((-225, 15, side * 92), 1), np.array([30, 34, 26]) * s)
        head = Ellipsoid(p.near((-232, 12, side * 96), 1), np.array([23, 23, 23]) * s)
        p.add(p.wobble(socket, 2, 20), bone, Organ.BONE)
        p.add(head, [(-1.5, p.material("cartilage")), *bone], Organ.BONE)
        neck = np.array([(-235, 12, side * 100), (-262, 14, side * 135), (-420, 5, side * 140)]) * s
        p.add(Tube.along(neck, np.array([16, 17, 14]) * s), bone, Organ.BONE)
