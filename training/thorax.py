"""The chest above the heart's middle, for scans of the chest: wall and shoulders, lungs, mediastinum, bones.

What `anatomy.py`, `viscera.py` and `skeleton.py` draw ends at the heart's upper edge; these parts go on from there to
the neck, with what is no lesion but looks like one. Template coordinates as in `anatomy.py`: mm (z, y, x); the apex of
the lung lies at about z = 350, the carina at 248.
"""

from __future__ import annotations

import numpy as np

from training.anatomy import Organ, Patient, grow_tree, turn_about_z
from training.grid import Array
from training.scene import GAS_HU, Material
from training.shapes import Column, Cut, Ellipsoid, Tube, rotation
from training.skeleton import add_vertebra, bone_layers, rib

Z_KNOTS = np.array([255.0, 300, 330, 360, 385, 410, 430, 480])
"""From the chest (as wide as `anatomy.WIDTH` ends) to the neck."""
HALF_X = np.array([138.0, 133, 126, 112, 92, 74, 64, 60])
HALF_Y = np.array([106.0, 102, 96, 87, 78, 70, 64, 62])
CENTRE_Y = np.array([0.0, 0, 3, 7, 10, 12, 12, 12])
LUNG_Z = np.array([235.0, 260, 290, 315, 335, 350])
BULGES = (((338, 10, 150), (72, 58, 58)), ((295, 80, 84), (80, 34, 66)), ((285, -84, 62), (58, 24, 58)))
"""Centres and radii of the muscles of a left shoulder, shoulder blade and breast."""
VERTEBRAE_Z = (261, 283, 304, 324, 343, 361, 378, 394, 410, 426, 442)
"""Centres of T4 to C1; the first four carry ribs."""
RIBS = 4
FACES = (Organ.AIR, Organ.FAT)
SOFT = (Organ.CAVITY, Organ.MUSCLE, Organ.LUNG)


def add_wall(p: Patient) -> None:
    """Skin, fat, muscle and the fat inside, from the chest to the neck; muscles and breasts on the ribs; shoulders."""
    ant, lat, post = p.fat_mm
    fat = Material(p.hu("fat"), 4, 5)
    skin = [(0.0, p.material("skin")), (p.between(1.2, 2.2), fat)]
    muscle = p.material("muscle", 6, 8)
    p.add(p.wobble(_column(p, (ant, lat, post)), 2.5, 60), skin, Organ.FAT, FACES)
    for side in (-1, 1):
        for place, radii in BULGES:
            centre = p.near(np.array(place) * (1, 1, side), 4)
            size = np.array(radii) * p.scale * np.sqrt(p.muscle)
            p.add(p.wobble(Ellipsoid(centre, size + lat / 2 + 2), 3, 40), skin, Organ.FAT, FACES)
            p.add(p.wobble(Ellipsoid(centre, size), 3, 30), muscle, Organ.MUSCLE, FACES)
    p.add(p.wobble(_column(p, (0, 0, 0)), 2.5, 50), muscle, Organ.MUSCLE)
    thick = 11 * p.muscle
    p.add(p.wobble(_column(p, (-0.8 * thick, -thick, -34 * p.scale)), 2, 40), Material(p.hu("visceral_fat"), 6, 5),
          Organ.CAVITY)  # fmt: skip
    if p.chance(0.45):
        _add_breasts(p)
    _add_arms(p)


def _column(p: Patient, grow: tuple[float, float, float]) -> Column:
    """The trunk's upper end, thickened by `grow` mm (anterior, lateral, posterior)."""
    half_y = HALF_Y * p.scale + (grow[0] + grow[2]) / 2
    centre = CENTRE_Y * p.scale + (grow[2] - grow[0]) / 2
    return Column(Z_KNOTS * p.scale, centre, np.zeros(8), half_y, HALF_X * p.scale + grow[1], 0.35)


def _add_breasts(p: Patient) -> None:
    size = np.array([p.between(38, 60), p.between(24, 55), p.between(46, 62)]) * p.scale
    gland = Material(p.between(-20, 45), 14, 25)
    for side in (-1, 1):
        centre = p.near((212, -101, side * 74), 4) - np.array([0, p.fat_mm[0] + p.visceral_mm / 2, 0])
        p.add(p.wobble(Ellipsoid(centre, size), 2, 40), [(0, p.material("skin")), (1.8, Material(p.hu("fat"), 5, 5))],
              Organ.FAT, FACES)  # fmt: skip
        inner = size * p.rng.uniform(0.25, 0.75, 3)
        p.add(p.wobble(Ellipsoid(centre, inner), 5, 14), gland, Organ.FAT, (Organ.FAT,), blur_mm=3)


def _add_arms(p: Patient) -> None:
    """Raised beside the head, at times hanging."""
    raised = p.chance(0.8)
    thick = p.between(34, 46) * p.scale + 0.3 * p.fat_mm[1]
    fat_mm = 3 + 0.35 * p.fat_mm[1]
    layers = [(0.0, p.material("skin")), (1.8, Material(p.hu("fat"), 4, 5)), (1.8 + fat_mm, p.material("muscle", 6, 8))]
    for side in (-1, 1):
        joint = p.near((345, 8, side * 152), 4)
        away = np.array([150, p.between(-40, 0), side * 42]) if raised else np.array([-260, 10, side * 62])
        course = [joint, joint + away * p.scale]
        p.add(p.wobble(Tube.along(course, thick), 3, 40), layers, Organ.MUSCLE, FACES)
        p.add(Ellipsoid(joint, np.full(3, 23) * p.scale), bone_layers(p, 1.6), Organ.BONE)
        p.add(Tube.along(course, np.array([14, 11]) * p.scale), bone_layers(p, 3.5), Organ.BONE)


def add_lungs(p: Patient) -> None:
    """The upper lobes with their vessels and scars; what lies at the back of many lungs: fluid, collapsed tissue."""
    s, front = p.scale, p.visceral_mm
    for side in (-1, 1):
        fade = np.array([1, 0.7, 0.4, 0.2, 0, 0])  # of what the belly's fat adds to the ribs
        ay = np.array([92.0, 88, 75, 57, 37, 6]) * s + front / 2 * fade
        ax = np.array([60.0, 57, 50, 40, 27, 5]) * s + 0.17 * front * fade
        cy = np.array([2.0, 2, 7, 13, 18, 20]) * s - front / 2 * fade
        cx = side * (np.array([70.0, 68, 60, 52, 45, 40]) * s + 0.17 * front * fade)
        lung = Cut(p.wobble(Column(LUNG_Z * s, cy, cx, ay, ax, 0.45), 2, 40), keep=_column(p, (-13 * s,) * 3))
        p.add(lung, Material(p.hu("lung"), 12, 18), Organ.LUNG, SOFT)
        hilum = np.array([225 * s, 12 * s, side * 36 * s])
        targets = hilum + p.rng.uniform((-35, -75, -30), (118, 60, 65), (120, 3)) * s * np.array([1, 1, side])
        p.add(grow_tree(p.rng, hilum, targets, 0.95, 7.0), p.material("blood_cava"), Organ.LUNG, (Organ.LUNG,))
        _add_scars(p, side)
        if p.chance(0.12):
            _add_fluid(p, side)


def _add_scars(p: Patient, side: int) -> None:
    """Thin bands and calcified dots: no lesions."""
    for _ in range(int(p.rng.integers(0, 4)) if p.chance(0.5) else 0):
        start = p.near((p.between(60, 330), p.between(-60, 70), side * p.between(45, 115)), 3)
        course = start + np.cumsum(p.rng.normal(0, 12, (4, 3)), axis=0)
        p.add(Tube.along(course, p.between(0.6, 1.6)), Material(p.between(-250, 60)), Organ.LUNG, (Organ.LUNG,))
    if p.chance(0.25):
        dot = p.near((p.between(60, 330), p.between(-60, 70), side * p.between(45, 115)), 3)
        p.add(Ellipsoid(dot, p.rng.uniform(1, 2.5, 3)), Material(p.between(200, 700)), Organ.LUNG, (Organ.LUNG,))


def _add_fluid(p: Patient, side: int) -> None:
    """A crescent at the back of a lung: an effusion, or tissue that collapsed under its own weight."""
    s, top = p.scale, p.between(110, 290)
    z = np.array([0, top - 30, top]) * s
    deep = np.array([1.0, 0.8, 0.05]) * p.between(6, 38) * s
    layer = Column(z, np.full(3, 100 * s) - 0.2 * deep, np.full(3, side * 70 * s), deep, np.full(3, 66 * s), 0.2)
    fluid = Material(p.between(2, 24), 3, 3) if p.chance(0.5) else Material(p.between(25, 70), 8, 12)
    p.add(p.wobble(layer, 2.5, 25), fluid, Organ.CAVITY, (Organ.LUNG,))


def add_mediastinum(p: Patient) -> None:
    """Aortic arch and its branches, pulmonary arteries, upper cava, airways, oesophagus, thyroid, small nodes."""
    s, over = p.scale, (*SOFT, Organ.HEART, Organ.VESSEL)
    artery, cava, right = (p.material(name, 2, 2) for name in ("blood_artery", "blood_cava", "heart"))
    if p.phase != "none" and p.chance(0.25):
        cava = Material(p.between(350, 1200), 30, 40)  # undiluted contrast agent
    wide = p.between(0.85, 1.2)
    p.add(_tube(p, ((205, -5, -26), (300, -14, -24)), 9 * wide), cava, Organ.VESSEL, over)
    p.add(_tube(p, ((300, -14, -24), (320, -40, -8), (322, -36, 30), (338, -34, 90)), 6), cava, Organ.VESSEL, over)
    p.add(_tube(p, ((300, -14, -24), (334, -34, -90)), 6), cava, Organ.VESSEL, over)
    trunk = ((205, -42, 22), (232, -22, 24), (237, 4, 44), (222, 14, 66))
    p.add(_tube(p, trunk, (14, 13, 11, 8)), right, Organ.VESSEL, over)
    p.add(_tube(p, ((234, -14, 18), (229, 0, -25), (220, 8, -56)), (11, 10, 8)), right, Organ.VESSEL, over)
    arch = ((196, -22, 4), (252, -28, -14), (274, -12, 0), (272, 16, 18), (246, 36, 20), (205, 38, 12))
    p.add(p.wobble(_tube(p, arch, np.array([16, 16, 14, 13, 12.5, 12]) * wide), 0.6, 25), artery, Organ.AORTA,
          (*over, Organ.BONE))  # fmt: skip
    for course, radius in (
        (((274, -10, -4), (335, -6, -24), (380, 2, -30), (480, 2, -32)), 5.0),
        (((276, 2, 6), (380, 4, 28), (480, 2, 32)), 3.8),
        (((274, 14, 14), (338, 8, 38), (350, 0, 100)), 4.6),
        (((335, -6, -24), (350, 0, -100)), 4.4),
    ):
        p.add(_tube(p, course, radius), artery, Organ.AORTA, over)
    _add_airways(p, over)
    gullet = ((255, 24, 3), (330, 26, 4), (480, 26, 2))
    p.add(_tube(p, gullet, 7.5), [(0, p.material("bowel_wall")), (5, Material(-200, 100))], Organ.STOMACH, over)
    thyroid = Material(p.between(85, 120) + (0 if p.phase == "none" else p.between(20, 70)), 5, 6)
    for side in (-1, 1):
        lobe = Ellipsoid(p.near((392, -2, side * 19), 3), np.array([22, 9, 8]) * s * p.between(0.7, 1.3))
        p.add(p.wobble(lobe, 1, 10), thyroid, Organ.MUSCLE, SOFT)
    _add_nodes(p)


def _tube(p: Patient, course: tuple[tuple[float, float, float], ...], radii: float | tuple[float, ...] | Array) -> Tube:
    """Through points of the template; each patient's lies a little elsewhere."""
    shift = p.rng.normal(0, 1.5, 3)
    return Tube.along(np.asarray(course) * p.scale + shift, np.asarray(radii) * p.scale)


def _add_airways(p: Patient, over: tuple[Organ, ...]) -> None:
    wall = [(0.0, Material(p.between(0, 50), 8)), (1.6, Material(GAS_HU))]
    p.add(_tube(p, ((480, 6, 0), (390, 10, 0), (300, 16, 1), (248, 20, 2)), (9.5, 10, 10, 10)), wall, Organ.AIR, over)
    p.add(_tube(p, ((250, 20, 1), (226, 20, -32), (196, 24, -52)), (8.5, 7.5, 5)), wall, Organ.AIR, over)
    p.add(_tube(p, ((250, 20, 3), (224, 22, 42), (190, 26, 60)), (8, 7, 5)), wall, Organ.AIR, over)


def _add_nodes(p: Patient) -> None:
    """Normal ones, too small to be disease, in the mediastinum and the armpits."""
    for _ in range(int(p.rng.integers(3, 11))):
        at = p.near((p.between(205, 300), p.between(-30, 28), p.between(-34, 34)), 3)
        p.add(Ellipsoid(at, p.rng.uniform(1.5, 4.0, 3), rotation(p.rng, 90)), p.material("node"), Organ.CAVITY,
              (Organ.CAVITY,))  # fmt: skip
    for side in (-1, 1):
        for _ in range(int(p.rng.integers(0, 5))):
            at = p.near((p.between(270, 330), p.between(-30, 40), side * p.between(122, 150)), 4)
            p.add(Ellipsoid(at, p.rng.uniform(2, 5, 3), rotation(p.rng, 90)), p.material("node"), Organ.FAT,
                  (Organ.FAT,))  # fmt: skip


def add_bones(p: Patient) -> None:
    """Vertebrae up to the neck, the upper ribs, manubrium, clavicles, shoulder blades."""
    s = p.scale
    z = np.array([255.0, 320, 370, 420, 480]) * s
    bow = np.array([58.0, 58, 51, 42, 36]) * s
    middle, ones = np.zeros(5), np.ones(5)
    p.add(p.wobble(Column(z, bow, middle, 14 * s * ones, 17 * s * ones), 0.6, 20), p.material("disc"), Organ.MUSCLE)
    for height in np.asarray(VERTEBRAE_Z) * s:
        add_vertebra(p, height, float(np.interp(height, z, bow)), 0.0, bone_layers(p, 1.6))
    p.add(Column(z, bow + 22 * s, middle, 7 * s * ones, 9 * s * ones), p.material("cord"), Organ.CANAL)
    for index, height in enumerate(np.asarray(VERTEBRAE_Z[:RIBS]) * s):
        _add_upper_ribs(p, float(height), (62, 50, 38, 26)[index] * s)
    front = 9 - 105 * s + np.array([-2, 6, 16])
    manubrium = Column(np.array([256, 282, 302]) * s, front, (0, 0, 0), (6, 6, 5), (17, 27, 22), 0.4)
    p.add(p.wobble(manubrium, 0.6, 12), bone_layers(p, 1.6), Organ.BONE)
    for side in (-1, 1):
        clavicle = ((303, -80, side * 16), (318, -72, side * 62), (340, -28, side * 128))
        p.add(p.wobble(_tube(p, clavicle, (9, 6, 6.5)), 0.6, 12), bone_layers(p, 1.8), Organ.BONE)
        blade = Ellipsoid(p.near((288, 96, side * 92), 3), np.array([62, 4.5, 42]) * s, turn_about_z(-side * 24))
        p.add(p.wobble(blade, 1, 18), bone_layers(p, 1.4), Organ.BONE, (Organ.MUSCLE, Organ.FAT))
        spine = ((318, 104, side * 66), (338, 78, side * 112), (345, 34, side * 142))
        p.add(p.wobble(_tube(p, spine, (4, 5.5, 8)), 0.6, 10), bone_layers(p, 1.6), Organ.BONE)


def _add_upper_ribs(p: Patient, height: float, drop: float) -> None:
    """A pair around the upper lungs, falling by `drop` mm towards the front."""
    angles = np.deg2rad(np.arange(12.0, 158, 9.0))
    z = height + 6 * p.scale - drop * (1 - np.cos(angles)) / 2
    half_y, half_x, cy = (np.interp(z, Z_KNOTS * p.scale, v * p.scale) for v in (HALF_Y, HALF_X, CENTRE_Y))
    for side in (-1, 1):
        y = cy + (half_y - 6 * p.scale) * np.cos(angles)
        points = np.stack([z, y, side * (half_x - 6 * p.scale) * np.sin(angles)], 1)
        p.add(rib(p, points), bone_layers(p, 1.7), Organ.BONE)
