"""A patient and the hull of the trunk: wall, back muscles, chest. Bones are in `skeleton.py`, organs in `viscera.py`.

Template coordinates in mm (z, y, x): the origin lies in the midline, at mid-depth, between L1 and L2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from training.grid import Array
from training.scene import Material, Part
from training.shapes import Column, Cut, Ellipsoid, Shape, Sheet, SmoothField, Tube, Vector, Wobble


class Organ(IntEnum):
    """Labels of the organ map."""

    AIR = 0
    FAT = 1
    """Under the skin."""
    MUSCLE = 2
    BONE = 3
    CAVITY = 4
    """Fat of the belly and the mediastinum."""
    LUNG = 5
    LIVER = 6
    SPLEEN = 7
    KIDNEY = 8
    PANCREAS = 9
    STOMACH = 10
    BOWEL = 11
    COLON = 12
    GALLBLADDER = 13
    VESSEL = 14
    HEART = 15
    BLADDER = 16
    CANAL = 17
    TABLE = 18
    ADRENAL = 19
    AORTA = 20


PHASES = ("none", "arterial", "portal", "delayed")
TISSUE_HU: dict[str, tuple[float, float, float, float]] = {
    #             none  arterial portal delayed
    "skin": (15, 20, 30, 25),
    "fat": (-106, -106, -106, -106),
    "visceral_fat": (-102, -101, -99, -99),
    "muscle": (52, 57, 62, 62),
    "blood_artery": (42, 300, 150, 110),
    "blood_cava": (42, 90, 135, 112),
    "blood_portal": (42, 115, 165, 118),
    "blood_hepatic": (42, 58, 155, 112),
    "heart": (42, 190, 140, 110),
    "myocardium": (45, 95, 108, 95),
    "liver": (57, 68, 112, 92),
    "spleen": (48, 120, 120, 95),
    "kidney_cortex": (33, 170, 185, 160),
    "kidney_medulla": (31, 65, 155, 165),
    "kidney_pelvis": (5, 5, 25, 380),
    "pancreas": (40, 100, 92, 75),
    "adrenal": (20, 65, 70, 55),
    "bowel_wall": (40, 75, 92, 78),
    "fluid": (12, 12, 12, 14),
    "gallbladder": (8, 8, 10, 12),
    "urine": (4, 4, 8, 120),
    "node": (38, 60, 85, 75),
    "lung": (-860, -855, -850, -850),
    "disc": (80, 82, 88, 88),
    "cord": (25, 28, 30, 30),
    "cartilage": (105, 105, 110, 110),
    "marrow": (170, 175, 190, 185),
    "cortex": (620, 620, 620, 620),
    "contrast": (330, 330, 330, 330),
    "stool": (20, 20, 25, 25),
    "table": (-60, -60, -60, -60),
}


@dataclass
class Patient:
    """One drawn patient: sizes in mm, contrast phase, tissue HU; collects the parts of the scene."""

    rng: np.random.Generator
    phase: str
    scale: float
    """Size of the skeleton against the template."""
    fat_mm: tuple[float, float, float]
    """Fat under the skin: anterior, lateral, posterior."""
    visceral_mm: float
    """How far fat inside the belly pushes its wall forward."""
    muscle: float
    """Thickness of muscles against the template."""
    parts: list[Part] = field(default_factory=list)
    shift_hu: dict[str, float] = field(default_factory=dict)

    def hu(self, tissue: str) -> float:
        """This patient's HU of `tissue`."""
        return TISSUE_HU[tissue][PHASES.index(self.phase)] + self.shift_hu.get(tissue, 0.0)

    def material(self, tissue: str, grain_hu: float = 3.0, blotch_hu: float = 2.0) -> Material:
        """This patient's `tissue`, textured."""
        return Material(self.hu(tissue), grain_hu, blotch_hu)

    def wobble(self, shape: Shape, amplitude_mm: float, step_mm: float) -> Shape:
        """`shape` with an irregular surface."""
        return Wobble(shape, SmoothField(self.rng, step_mm, 14), amplitude_mm) if amplitude_mm else shape

    def add(
        self,
        shape: Shape,
        layers: Material | Sequence[tuple[float, Material]],
        organ: Organ,
        only_over: Sequence[Organ] | None = None,
        blur_mm: float = 0.0,
    ) -> None:
        """Append a part to the scene; a single material is one layer without inset."""
        stack = [(0.0, layers)] if isinstance(layers, Material) else list(layers)
        over = None if only_over is None else frozenset(int(o) for o in only_over)
        self.parts.append(Part(shape, stack, int(organ), over, blur_mm))

    def near(self, point: Vector, spread_mm: float) -> Array:
        """`point` (z, y, x) of the template in this patient: scaled, displaced by `spread_mm`."""
        return np.asarray(point, float) * self.scale + self.rng.normal(0, spread_mm, 3)

    def between(self, low: float, high: float) -> float:
        """A uniform draw."""
        return float(self.rng.uniform(low, high))

    def chance(self, probability: float) -> bool:
        """True with `probability`."""
        return bool(self.rng.random() < probability)


def draw_patient(rng: np.random.Generator, widest_mm: float) -> Patient:
    """A patient from thin to obese whose trunk is at most `widest_mm` wide."""
    scale = float(np.clip(rng.normal(1.0, 0.07), 0.86, 1.15))
    scale = min(scale, widest_mm / 2 / 152)
    obesity = rng.beta(1.4, 2.2)
    room = max(widest_mm / 2 - 146 * scale, 3.0)
    lateral = min(4 + 55 * obesity * rng.uniform(0.6, 1.2), room)
    fat = (4 + lateral * rng.uniform(0.3, 0.9), lateral, 5 + lateral * rng.uniform(0.3, 0.9))
    shift = {name: float(rng.normal(0, 0.04 * abs(v[2]) + 1)) for name, v in TISSUE_HU.items()}
    shift |= dict.fromkeys(("fluid", "gallbladder", "urine"), float(rng.normal(0, 3)))
    shift["marrow"] = float(rng.normal(0, 50))
    if rng.random() < 0.2:  # fatty liver
        shift["liver"] = float(-rng.uniform(10, 45))
    phase = str(rng.choice(PHASES, p=(0.15, 0.15, 0.6, 0.1)))
    if phase != "none":  # dose and timing change all vessels together
        gain = rng.normal(0, 0.12)
        for name in ("blood_artery", "blood_cava", "blood_portal", "blood_hepatic", "heart"):
            shift[name] = gain * TISSUE_HU[name][PHASES.index(phase)]
    visceral = float(45 * obesity * rng.uniform(0.2, 1.2))
    return Patient(rng, phase, scale, fat, visceral, float(np.clip(rng.normal(1, 0.15), 0.65, 1.35)), shift_hu=shift)


Z_KNOTS = np.array([-420.0, -250, -200, -150, -100, -50, 0, 50, 100, 150, 200, 300])
WIDTH = np.array([1.12, 1.17, 1.15, 1.08, 1.02, 0.98, 1.0, 1.03, 1.05, 1.05, 1.04, 0.95])
DEPTH = np.array([0.86, 0.92, 0.95, 0.96, 0.95, 0.95, 0.98, 1.03, 1.08, 1.1, 1.08, 1.0])


def _trunk(p: Patient, ay: float, ax: float, cy: float, grow: tuple[float, float, float], square: float) -> Column:
    """A column that follows the trunk, thickened by `grow` mm (anterior, lateral, posterior)."""
    n = len(Z_KNOTS)
    half_y = ay * p.scale * DEPTH + (grow[0] + grow[2]) / 2
    half_x = ax * p.scale * WIDTH + grow[1]
    centre = np.full(n, cy * p.scale + (grow[2] - grow[0]) / 2)
    return Column(Z_KNOTS * p.scale, centre, np.zeros(n), half_y, half_x, square)


def wall_shapes(p: Patient) -> tuple[Shape, Shape, Shape]:
    """Skin surface, outer surface of the muscle wall, and the cavity inside it."""
    front = p.visceral_mm
    ant, lat, post = p.fat_mm
    square = p.between(0.2, 0.5)
    side = 0.35 * front
    outer = _trunk(p, 102, 140, 0, (front, side, 0), square)
    skin = _trunk(p, 102, 140, 0, (front + ant, side + lat, post), square)
    thick = 11 * p.muscle
    cavity = _trunk(p, 102, 140, 0, (front - 0.8 * thick, side - thick, -34 * p.scale), square)
    return (
        p.wobble(skin, 3.0 + 0.06 * (ant + lat), 75),
        p.wobble(outer, 3.0, 55),
        p.wobble(cavity, 2.5, 40),
    )


def add_wall(p: Patient) -> None:
    """Skin, fat under it, the layered muscle wall, and the fat-filled cavity."""
    skin, outer, cavity = wall_shapes(p)
    fat = Material(p.hu("fat"), 4, 5)
    p.add(skin, [(0, p.material("skin")), (p.between(1.2, 2.2), fat)], Organ.FAT)
    muscle = p.material("muscle", 6, 6)
    t = 11 * p.muscle
    seam = Material(0.7 * p.hu("muscle") + 0.3 * p.hu("fat"), 10, 12)
    p.add(outer, [(0, muscle), (0.36 * t, seam), (0.36 * t + 0.9, muscle), (0.68 * t, seam), (0.68 * t + 0.9, muscle)],
          Organ.MUSCLE)  # fmt: skip
    p.add(cavity, Material(p.hu("visceral_fat"), 6, 5), Organ.CAVITY)
    navel = np.array([-60 * p.scale, -(102 * p.scale * 0.95 + p.visceral_mm + p.fat_mm[0] + 2), 0])
    p.add(Ellipsoid(navel, (8, 10, 5)), Material(-1000), Organ.AIR, blur_mm=3)


def add_back_muscles(p: Patient) -> None:
    """Erector spinae, psoas and quadratus lumborum, with fat between them."""
    s, m = p.scale, p.muscle
    z = np.array([-200.0, -120, -60, 0, 60, 120, 260]) * s
    fascia = Material(0.4 * p.hu("muscle") + 0.6 * p.hu("fat"), 15, 25)
    for side in (-1, 1):
        muscle = Material(p.hu("muscle"), 7, 10)
        y = np.array([92, 78, 76, 80, 85, 88, 88.0]) * s
        back = Column(z, y, side * 33 * s + 0 * z, np.array([8, 18, 22, 20, 15, 11, 9]) * s,
                      np.array([18, 26, 30, 29, 26, 22, 20]) * s, 0.3)  # fmt: skip
        p.add(p.wobble(back, 3, 22), [(0, fascia), (1.2, muscle)], Organ.MUSCLE, (Organ.CAVITY, Organ.MUSCLE))
        py = np.array([5, 30, 40, 46, 50, 50, 50.0]) * s
        px = side * np.array([62, 48, 41, 34, 27, 24, 24]) * s
        size = np.array([19, 20, 18, 12, 4, 0.5, 0.5]) * s * np.sqrt(m)
        psoas = Column(z, py, px, size, size * 0.9)
        p.add(p.wobble(psoas, 1.5, 25), Material(p.hu("muscle"), 5, 5), Organ.MUSCLE, (Organ.CAVITY, Organ.MUSCLE))
        lumbar = Column(z[1:5], 62 * s + 0 * z[1:5], side * np.array([74, 70, 64, 55]) * s,
                        np.array([9, 9, 8, 4]) * s * m, np.array([20, 20, 17, 10]) * s)  # fmt: skip
        p.add(p.wobble(lumbar, 1.5, 20), Material(p.hu("muscle"), 5, 5), Organ.MUSCLE, (Organ.CAVITY, Organ.MUSCLE))


def dome(p: Patient, inset_mm: float = 0.0) -> Column:
    """The belly below the diaphragm: as wide as the cavity, closing like a dome towards the chest."""
    z = np.array([-420, 0, 30, 60, 85, 105, 120, 130, 136.0])
    share = np.array([1.2, 1.12, 1.03, 0.96, 0.86, 0.7, 0.5, 0.28, 0.03])
    ay = 88 * p.scale * share + p.visceral_mm / 2
    ax = 128 * p.scale * share + 0.35 * p.visceral_mm
    cy = np.interp(z, (0, 80, 136), (-14, -22, -24)) * p.scale - p.visceral_mm / 2
    return Column(z * p.scale, cy, np.zeros(9), np.maximum(ay - inset_mm, 1), np.maximum(ax - inset_mm, 1), 0.2)


def add_chest(p: Patient) -> None:
    """Lung bases with their vessels, heart, oesophagus; then the belly's fat pushed up under the diaphragm."""
    s, front = p.scale, p.visceral_mm
    z = np.array([-10.0, 20, 60, 150, 260]) * s
    for side in (-1, 1):
        ay = np.array([60, 80, 92, 98, 90]) * s + front / 2
        ax = np.array([56, 60, 62, 62, 58]) * s + 0.17 * front
        lung = Column(z, 0 * z - front / 2 + 2 * s, side * (70 * s + 0.17 * front) + 0 * z, ay, ax, 0.5)
        shape = Cut(p.wobble(lung, 2, 40), keep=_rib_cage(p))
        p.add(shape, Material(p.hu("lung"), 12, 18), Organ.LUNG)
        hilum = np.array([190 * s, 20 * s, side * 30 * s])
        targets = hilum + p.rng.uniform((-175, -95, -45), (40, 65, 85), (170, 3)) * s * np.array([1, 1, side])
        p.add(grow_tree(p.rng, hilum, targets, 0.95, 7.0), p.material("blood_cava"), Organ.LUNG, (Organ.LUNG,))
    add_heart(p)
    belly = Cut(p.wobble(dome(p), 3, 55), keep=_rib_cage(p))
    fat = Material(p.hu("visceral_fat"), 6, 5)
    # The diaphragm shows against the lung only; the fat within also hides the faded edges of the lung.
    p.add(belly, p.material("muscle"), Organ.CAVITY, (Organ.LUNG, Organ.HEART))
    p.add(belly, [(2.0, fat)], Organ.CAVITY, (Organ.CAVITY, Organ.LUNG))


def add_heart(p: Patient) -> None:
    """Fat, muscle, and in it two ventricles and two atria; the apex points to the front and the left."""
    s = p.scale * p.between(0.88, 1.1)
    centre, turn = p.near((176, -38, 22), 6), turn_about_z(-p.between(15, 40))
    heart = Ellipsoid(centre, np.array([52, 46, 56]) * s, turn)
    within = _rib_cage(p)
    p.add(Cut(p.wobble(heart, 4, 40), keep=within), Material(p.hu("visceral_fat"), 6), Organ.CAVITY)
    muscle = [(p.between(2, 9), p.material("myocardium"))]
    p.add(Cut(p.wobble(heart, 3, 35), keep=within), muscle, Organ.HEART)
    left, early = p.hu("heart"), p.hu("blood_cava")
    right = left if p.phase == "none" else early + p.between(0, 1) * (left - early)
    # Blood, place from the centre and radii (z, y, x), x along the heart from base to apex.
    chambers = (
        (left, (-6, 12, 14), (24, 18, 30)), (left, (20, 22, -18), (18, 16, 20)),
        (right, (-8, -24, 4), (28, 14, 32)), (right, (12, -4, -36), (22, 20, 14)),
    )  # fmt: skip
    for hu, place, radii in chambers:
        size = np.array(radii) * s * p.rng.uniform(0.85, 1.1, 3)
        chamber = Ellipsoid(centre + turn.T @ np.array(place) * s, size, turn)
        p.add(p.wobble(chamber, 2, 15), Material(hu, 3, 2), Organ.HEART, (Organ.HEART,))


def _rib_cage(p: Patient) -> Shape:
    inset = -12.5 * p.scale
    return _trunk(p, 102, 140, 0, (p.visceral_mm + inset, 0.35 * p.visceral_mm + inset, inset), 0.35)


def turn_about_z(degrees: float) -> Array:
    """Rotation matrix 3×3 for axes (z, y, x)."""
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return np.array([[1, 0, 0], [0, c, -s], [0, s, c]])


def grow_tree(rng: np.random.Generator, root: Array, targets: Array, thin_mm: float, thick_mm: float) -> Tube:
    """A vascular tree from `root` (3,) that reaches all `targets` (n, 3); radii follow the number of twigs fed."""
    nodes, parents = [root], [-1]
    for target in targets[np.argsort(np.linalg.norm(targets - root, axis=1))]:
        nearest = int(np.argmin(np.linalg.norm(np.asarray(nodes) - target, axis=1)))
        reach = np.linalg.norm(target - nodes[nearest])
        middle = (nodes[nearest] + target) / 2 + rng.normal(0, 0.1 * reach, 3)
        nodes += [middle, target]
        parents += [nearest, len(nodes) - 2]
    twigs = np.ones(len(nodes))
    for k in range(len(nodes) - 1, 0, -1):
        twigs[parents[k]] += twigs[k]
    radii = np.minimum(thin_mm * (twigs / 2) ** 0.42, thick_mm)
    points, index = np.asarray(nodes), np.asarray(parents[1:])
    return Tube(points[index], points[1:], np.minimum(radii[index], 1.3 * radii[1:]), radii[1:])


def add_table(p: Patient) -> None:
    """The curved table and its mattress under the back."""
    under = 102 * p.scale * 1.1 + p.fat_mm[2] + p.between(4, 14)
    radius = p.between(500, 1200)
    foam = Material(-930, 4)
    p.add(Sheet(under + 12, radius, 205, 12), foam, Organ.TABLE, (Organ.AIR,))
    p.add(Sheet(under + 25, radius, 205, 1.3), p.material("table", 10), Organ.TABLE, (Organ.AIR, Organ.TABLE))
    p.add(Sheet(under + p.between(45, 80), 1e5, 120, 1.0), p.material("table", 10), Organ.TABLE, (Organ.AIR,))
