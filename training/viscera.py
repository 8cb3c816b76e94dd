"""The organs of the belly as shapes: liver, spleen, kidneys, pancreas, gut, vessels, and benign look-alikes.

Template coordinates as in `anatomy.py`: mm (z, y, x), right of the patient at negative x.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from training.anatomy import Organ, Patient, dome, grow_tree
from training.grid import Array
from training.scene import Material
from training.shapes import Blend, Column, Cut, Ellipsoid, Tube, rotation

BELLY = (Organ.CAVITY,)


def add_viscera(p: Patient) -> None:
    """All organs of the belly, in the order in which they cover each other."""
    add_spleen(p)
    add_liver(p)
    add_kidneys(p)
    add_great_vessels(p)
    add_pancreas(p)
    add_mesentery(p)
    add_small_bowel(p)
    add_colon(p)
    add_stomach(p)
    add_gallbladder(p)


def add_liver(p: Patient) -> None:
    """Right and left lobe under the diaphragm with portal and hepatic veins, and simple cysts."""
    s, front = p.scale, p.visceral_mm
    size = p.between(0.9, 1.1)
    right = Ellipsoid(p.near((55, -5 - front / 3, -68), 4), np.array([88, 82, 62]) * s * size, rotation(p.rng, 8))
    bulk = Ellipsoid(p.near((85, -18 - front / 3, -40), 4), np.array([50, 66, 68]) * s * size, rotation(p.rng, 8))
    reach = p.between(48, 80)
    left = Ellipsoid(p.near((80, -52 - front / 2, 20), 5), np.array([38, 32, reach]) * s, rotation(p.rng, 12))
    caudate = Ellipsoid(p.near((62, -4, -24), 2), np.array([28, 15, 16]) * s)
    fossa = p.wobble(Ellipsoid(p.near((2, 22, 18), 4), np.array([58, 60, 50]) * s), 4, 30)
    lobes = Cut(Blend((Cut(Blend((right, bulk, left), 25), away=fossa), caudate), 8), keep=dome(p, 3.0))
    p.add(p.wobble(lobes, 3.0, 32), p.material("liver", 4, 3), Organ.LIVER, BELLY)
    hilum = p.near((45, -8 - front / 3, -28), 3)
    targets = _points_within(p, right, 60) + _points_within(p, left, 14)
    portal = grow_tree(p.rng, hilum, np.asarray(targets), 1.15, 7.0)
    p.add(portal, p.material("blood_portal", 0, 0), Organ.VESSEL, (Organ.LIVER,))
    outlet = p.near((112, 12, -20), 2)
    drained = _points_within(p, right, 40) + _points_within(p, bulk, 20) + _points_within(p, left, 10)
    p.add(grow_tree(p.rng, outlet, np.asarray(drained), 1.15, 7.0), p.material("blood_hepatic", 0, 0), Organ.VESSEL,
          (Organ.LIVER,))  # fmt: skip
    if p.chance(0.35):
        _add_cysts(p, [right, bulk, left], Organ.LIVER)


def _points_within(p: Patient, shape: Ellipsoid, count: int) -> list[Array]:
    """Random points in the ellipsoid, away from its surface."""
    direction = p.rng.standard_normal((count, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    unit = direction * 0.88 * p.rng.uniform(0, 1, (count, 1)) ** (1 / 3) * np.asarray(shape.radii)
    turned = unit if shape.turn is None else unit @ shape.turn
    return list(turned + np.asarray(shape.centre))


def _add_cysts(p: Patient, homes: Sequence[Ellipsoid], organ: Organ) -> None:
    """Simple cysts: round, sharp, thin-walled, watery. Not lesions."""
    for _ in range(int(p.rng.integers(1, 5))):
        home = homes[int(p.rng.integers(len(homes)))]
        centre = _points_within(p, home, 1)[0]
        radius = float(np.exp(p.rng.uniform(np.log(3), np.log(24))))
        radii = radius * p.rng.uniform(0.94, 1.06, 3)
        over = (organ, Organ.VESSEL, Organ.CAVITY)
        p.add(Ellipsoid(centre, radii, rotation(p.rng, 40)), Material(p.between(0, 14), 1), organ, over)


def add_spleen(p: Patient) -> None:
    """The spleen, mottled in the arterial phase."""
    s = p.scale * p.between(0.85, 1.15)
    body = Ellipsoid(p.near((72, 30, 92), 4), np.array([50, 44, 27]) * s, rotation(p.rng, 18))
    hilum = Ellipsoid(np.asarray(body.centre) + np.array([-5, -12, -34 * s]), np.array([38, 34, 24]) * s)
    mottle = 14.0 if p.phase == "arterial" else 2.0
    shape = Cut(Cut(body, away=hilum), keep=dome(p, 3.0))
    p.add(p.wobble(shape, 2.5, 26), p.material("spleen", 4, mottle), Organ.SPLEEN, BELLY)


def add_kidneys(p: Patient) -> None:
    """Kidneys with cortex, pyramids, sinus fat and pelvis; adrenals; simple cysts."""
    for side in (-1, 1):
        s = p.scale * p.between(0.88, 1.1)
        centre = p.near((2 + 10 * (side > 0), 42, side * 62), 5)
        lean = np.deg2rad(-14 * side + p.rng.normal(0, 5))
        turn = np.array([[np.cos(lean), 0, -np.sin(lean)], [0, 1, 0], [np.sin(lean), 0, np.cos(lean)]])
        body = Ellipsoid(centre, np.array([54, 27, 29]) * s, turn)
        hilum = Ellipsoid(centre + turn.T @ np.array([0, -6, -side * 27]) * s, np.array([19, 11, 17]) * s, turn)
        over = (Organ.CAVITY, Organ.LIVER, Organ.SPLEEN, Organ.VESSEL)
        fascia = Material(p.hu("visceral_fat"), 6, 5)
        p.add(p.wobble(Ellipsoid(centre, np.array([57, 30, 32]) * s, turn), 2, 20), fascia, Organ.CAVITY, over)
        p.add(p.wobble(Cut(body, away=hilum), 1.6, 20), p.material("kidney_cortex", 4, 2), Organ.KIDNEY, over)
        _add_pyramids(p, centre, turn, s, side)
        sinus = Ellipsoid(centre + turn.T @ np.array([0, -3, -side * 10]) * s, np.array([27, 8, 11]) * s, turn)
        p.add(p.wobble(sinus, 2.5, 12), Material(p.hu("visceral_fat"), 12), Organ.CAVITY, (Organ.KIDNEY,))
        start = centre + turn.T @ np.array([0, -3, -side * 8]) * s
        ureter = [start, start + np.array([-8, -4, -side * 14]), (-70 * p.scale, 30 * p.scale, side * 38 * p.scale),
                  (-190 * p.scale, 35 * p.scale, side * 40 * p.scale)]  # fmt: skip
        path = Tube.along(ureter, [6, 4, 2, 2])
        p.add(path, Material(p.hu("kidney_pelvis")), Organ.KIDNEY, (Organ.CAVITY, Organ.KIDNEY))
        if p.chance(0.3):
            _add_cysts(p, [Ellipsoid(centre, np.array([56, 30, 32]) * s, turn)], Organ.KIDNEY)
        gland = centre + np.array([58 * s, -6, -side * 22])
        for foot in ((-16, 12, 6), (-16, 12, -7)):
            limb = Tube.along([gland, gland + np.array(foot) * (1, 1, side)], [2.8, 2.0])
            p.add(p.wobble(limb, 0.4, 8), p.material("adrenal"), Organ.ADRENAL, BELLY)


def _add_pyramids(p: Patient, centre: Array, turn: Array, s: float, side: int) -> None:
    medulla = p.material("kidney_medulla", 4, 2)
    for row, z in enumerate(np.linspace(-34, 34, 6)):
        reach = np.sqrt(1 - (z / 52) ** 2)
        for angle in (-1.5, -0.5, 0.5, 1.5) if row % 2 else (-1.9, -0.9, 0.0, 0.9, 1.9):
            place = np.array([z, 17 * reach * np.sin(angle), side * 18.5 * reach * np.cos(angle)])
            place += p.rng.normal(0, 1, 3)
            pyramid = Ellipsoid(centre + turn.T @ place * s, p.rng.uniform(4.2, 6.8, 3) * s)
            p.add(pyramid, medulla, Organ.KIDNEY, (Organ.KIDNEY,), blur_mm=2.5)


def add_great_vessels(p: Patient) -> None:
    """Aorta, cava, their branches, the portal vein and its roots; crura of the diaphragm; small nodes."""
    s = p.scale
    artery, cava, portal = (p.material(f"blood_{n}", 0, 0) for n in ("artery", "cava", "portal"))
    z = np.array([-88, -50, 0, 50, 100, 150, 260.0]) * s
    bow = np.array([14, 12, 16, 24, 32, 38, 36]) * s
    r = p.between(8, 11.5) * s
    for side in (-1, 1):
        half_y = np.array([2, 8, 13, 13, 4]) * s
        crus = Column(z[1:6], bow[1:6] + 4, np.full(5, side * 13 * s), half_y, np.full(5, 5.0))
        p.add(p.wobble(crus, 1, 15), p.material("muscle"), Organ.MUSCLE, (Organ.CAVITY, Organ.LIVER))
        iliac = [(-86 * s, 13 * s, 4 * s), (-125 * s, 14 * s, side * 24 * s), (-175 * s, 20 * s, side * 50 * s),
                 (-240 * s, -35 * s, side * 72 * s), (-420 * s, -50 * s, side * 80 * s)]  # fmt: skip
        soft = (Organ.CAVITY, Organ.MUSCLE)
        p.add(Tube.along(iliac, [6, 5.5, 5, 4.5, 4]), artery, Organ.AORTA, soft)
        vein = np.asarray(iliac) + np.array([0, 9, side * 5])
        p.add(Tube.along(vein, 6.0), Material(p.hu("blood_cava") * 0.85), Organ.VESSEL, soft)
        renal = [(8 * s, 16 * s, 8 * s), (8 * s, 26 * s, side * 24 * s), (5 * s, 38 * s, side * 46 * s)]
        p.add(Tube.along(renal, 2.6), artery, Organ.VESSEL, soft)
        p.add(Tube.along(np.asarray(renal) + np.array([-4, -8, 0]), 4.8), cava, Organ.VESSEL, BELLY)
    over = (Organ.CAVITY, Organ.MUSCLE, Organ.LIVER, Organ.LUNG)
    inferior = np.stack([z, bow + np.array([8, 4, -2, -8, -14, -30, -30]) * s, np.full(7, -19.0) * s], 1)
    flat = Column(z, inferior[:, 1], inferior[:, 2], np.full(7, p.between(6, 11)), np.full(7, p.between(10, 13)))
    p.add(p.wobble(flat, 1.0, 20), cava, Organ.VESSEL, over)  # ends in the heart
    behind = (*over, Organ.HEART)
    course = np.stack([z, bow, np.linspace(3, 12, 7) * s], 1)
    aorta = p.wobble(Tube.along(course, r), 0.5, 25)
    p.add(aorta, [(-1.0, p.material("muscle", 0, 0)), (0.3, artery)], Organ.AORTA, behind)
    for _ in range(int(p.rng.integers(0, 9)) if p.chance(0.5) else 0):  # calcified wall
        turn, height = p.between(0, 2 * np.pi), p.between(-80, 60) * s
        at = np.array([height, r * np.sin(turn), r * np.cos(turn)])
        at[1:] += [np.interp(height, z, course[:, k]) for k in (1, 2)]
        p.add(Ellipsoid(at, p.rng.uniform(1, 3.5, 3)), Material(p.between(400, 900)), Organ.AORTA)
    oesophagus = Tube.along([(95 * s, 2 * s, 22 * s), (140 * s, 18 * s, 10 * s), (260 * s, 20 * s, 2 * s)], 8.0)
    p.add(p.wobble(oesophagus, 1, 15), [(0, p.material("bowel_wall")), (5.5, Material(-300, 100))], Organ.STOMACH,
          behind)  # fmt: skip
    coeliac = [(32 * s, 18 * s, 7 * s), (36 * s, -2 * s, 5 * s), (40 * s, -6 * s, 30 * s), (55 * s, 20 * s, 78 * s)]
    p.add(Tube.along(coeliac, [4, 3.5, 2.6, 2.2]), artery, Organ.VESSEL, BELLY)
    front = p.visceral_mm / 3
    mesenteric = [(16 * s, 8 * s, 6 * s), (0, -12 * s - front, 6 * s), (-80 * s, -22 * s - front, -8 * s)]
    p.add(Tube.along(mesenteric, [4, 3.6, 2.2]), artery, Organ.VESSEL, BELLY)
    root = np.array([(-80, -24, -18), (12, -14, -8), (45, -8, -28)]) * s - np.outer((1, 0.5, 1), (0, front, 0))
    p.add(Tube.along(root, [4.5, 6, 6.5]), portal, Organ.VESSEL, (Organ.CAVITY, Organ.LIVER))
    splenic = np.stack([root[1], np.array([28, 8, 40]) * s, np.array([50, 28, 76]) * s])
    p.add(Tube.along(splenic, [5, 4.2, 3.5]), portal, Organ.VESSEL, BELLY)
    for _ in range(int(p.rng.integers(2, 8))):  # normal nodes, too small to be disease
        at = p.near((p.between(-80, 50), 8, p.rng.choice((-1, 1)) * p.between(12, 26)), 4)
        p.add(Ellipsoid(at, p.rng.uniform(1.8, 3.6, 3), rotation(p.rng, 90)), p.material("node"), Organ.CAVITY, BELLY)


def add_pancreas(p: Patient) -> None:
    """A lobulated band from the duodenum to the spleen."""
    s, front = p.scale, p.visceral_mm / 3
    course = ((-14, -8, -30), (6, -10, -24), (18, -22, 0), (24, -12, 30), (36, 8, 58), (44, 20, 74))
    points = [p.near(q, 3) for q in course]
    points = [q - np.array([0, front * (1 - k / 6), 0]) for k, q in enumerate(points)]
    thin = p.between(0.75, 1.1) * s
    band = p.wobble(Tube.along(points, np.array([12, 13, 9.5, 9, 9.5, 7]) * thin), 1.8, 6)
    p.add(band, p.material("pancreas", 10, 3), Organ.PANCREAS, BELLY)


def add_mesentery(p: Patient) -> None:
    """Small vessels that fan out in the fat around the bowel."""
    s, front = p.scale, p.visceral_mm
    for name, thin in (("artery", 0.55), ("portal", 0.8)):
        root = p.near((-10, -22 - front / 3, 0), 3)
        targets = p.rng.uniform((-165, -80 - front, -95), (5, 15, 95), (130, 3)) * s
        tree = grow_tree(p.rng, root, targets, thin, 3.5)
        p.add(tree, p.material(f"blood_{name}", 0, 0), Organ.VESSEL, BELLY)


def _loop(p: Patient, start: Array, step_mm: float, count: int, box: tuple[Array, Array]) -> Array:
    """A wandering path (count, 3) that stays in the box (lowest, highest corner)."""
    path, heading = [start], p.rng.standard_normal(3)
    middle, half = (box[0] + box[1]) / 2, (box[1] - box[0]) / 2
    for _ in range(count - 1):
        heading = heading / np.linalg.norm(heading) + 0.55 * p.rng.standard_normal(3)
        pull = (middle - path[-1]) / half
        heading = heading + pull * np.abs(pull) ** 3
        path.append(path[-1] + step_mm * heading / np.linalg.norm(heading))
    return np.asarray(path)


def _contents(p: Patient, level_mm: float, opacified: bool) -> Material:
    """What a piece of bowel holds: fluid or contrast, sometimes under gas."""
    hu = p.hu("contrast") * p.between(0.4, 1.3) if opacified else p.hu("fluid") + p.between(0, 22)
    return Material(hu, 3, 0.05 * abs(hu) + 2, gas_above_mm=level_mm if p.chance(0.3) else None)


def add_small_bowel(p: Patient) -> None:
    """Loops of collapsed, fluid-filled or opacified bowel, and the duodenum."""
    s, front = p.scale, p.visceral_mm
    low, high = np.array([-185, -78 - 0.8 * front, -85]) * s, np.array([-2, 22, 85]) * s
    opacified = p.chance(0.35)
    for _ in range(int(p.rng.integers(22, 36) + 0.25 * front)):
        start = p.rng.uniform(low, high)
        path = _loop(p, start, 11.0, int(p.rng.integers(6, 14)), (low, high))
        radius = p.between(7, 14)
        tube = p.wobble(Tube.along(path, radius * p.rng.uniform(0.8, 1.15, len(path))), 1.0, 9)
        wall = p.material("bowel_wall", 5, 4)
        level = float(path[:, 1].min() + p.between(-8, 4))
        inside = _contents(p, level, opacified and p.chance(0.75))
        inset = p.between(2.0, 3.5) if p.chance(0.7) else 0.8 * radius
        p.add(tube, [(0, wall), (inset, inside)], Organ.BOWEL, BELLY)
    duodenum = [p.near(q, 3) for q in ((22, -25, -40), (0, -8, -46), (-28, 0, -40), (-34, 4, -10), (-30, 2, 22))]
    tube = p.wobble(Tube.along(duodenum, 10.5 * s), 1.2, 9)
    p.add(tube, [(0, p.material("bowel_wall", 5, 4)), (3, _contents(p, -30.0, opacified))], Organ.BOWEL, BELLY)


def add_colon(p: Patient) -> None:
    """The frame of the colon with haustra; gas, stool or fluid, piece by piece."""
    s, front, side = p.scale, p.visceral_mm, 0.25 * p.visceral_mm
    sag = p.between(-60, -5)
    frame = (
        (-125, 0, -84 - side), (-95, 6, -92 - side), (-50, 14, -98 - side), (-12, 12, -94 - side),
        (2, -20, -86 - side), (sag / 2, -64 - front, -62), (sag, -76 - 1.1 * front, -20),
        (sag, -76 - 1.1 * front, 20), (sag / 2, -68 - front, 58), (35, -30 - front / 2, 90), (58, 10, 100),
        (30, 34, 104 + side), (-20, 34, 106 + side), (-75, 26, 104 + side), (-120, 10, 90), (-150, -5, 60),
        (-168, 5, 25), (-185, 25, -5), (-215, 62, 0), (-250, 66, 0),
    )  # fmt: skip
    knots = np.array([p.near(q, 6) for q in frame])
    t = np.linspace(0, len(knots) - 1, 6 * len(knots))
    path = np.stack([np.interp(t, np.arange(len(knots)), knots[:, k]) for k in range(3)], 1)
    path[1:-1] = (path[:-2] + 2 * path[1:-1] + path[2:]) / 4
    wide = np.interp(t, (0, 4, 9, 11, 15, 19), (27, 24, 20, 15, 13, 15)) * p.between(0.75, 1.1) * s
    radii = wide * (1 + 0.13 * np.sin(t * 11.0) + p.rng.normal(0, 0.05, len(t)))
    wall = p.material("bowel_wall", 5, 3)
    cuts = np.unique(np.r_[0, np.sort(p.rng.choice(np.arange(6, len(t) - 6), 9, replace=False)), len(t) - 1])
    for a, b in pairwise(cuts):
        piece = slice(a, b + 1)
        tube = p.wobble(Tube.along(path[piece], radii[piece]), 1.6, 11)
        level = float(path[piece, 1].mean() + p.between(-0.8, 0.8) * wide[a])
        kind = p.rng.choice(3, p=(0.5, 0.27, 0.23))
        stool = Material(p.hu("stool"), 12, 10, level if p.chance(0.3) else None, bubbles=p.between(0.15, 0.5))
        inside = (stool, Material(-960, 3), Material(p.hu("fluid") + 5, 3, 2, level))[kind]
        over = (Organ.CAVITY, Organ.BOWEL, Organ.VESSEL, Organ.LIVER)
        p.add(tube, [(0, wall), (p.between(1.8, 3.0), inside)], Organ.COLON, over)


def add_stomach(p: Patient) -> None:
    """Fundus, body and antrum; rugae; fluid, food or contrast under a gas bubble. Collapsed in some: thick folds."""
    s, front = p.scale, p.visceral_mm
    collapsed = p.chance(0.3)
    full = p.between(0.35, 0.6) if collapsed else p.between(0.6, 1.1)
    wall_mm = p.between(6, 12) if collapsed else p.between(3.5, 6)
    course = ((95, 8, 62), (72, -18 - front / 4, 68), (40, -45 - front / 2, 58), (15, -62 - front / 1.5, 32),
              (12, -58 - front / 1.5, -5), (22, -36 - front / 2, -32))  # fmt: skip
    path = np.array([p.near(q, 5) for q in course])
    tube = Tube.along(path, np.array([33, 33, 28, 22, 17, 11]) * full * s)
    shape = Cut(p.wobble(tube, 3.0, 20), keep=dome(p, 3.0))
    level = float(path[:3, 1].mean() + p.between(-30, 10))
    contrast = p.chance(0.3)
    hu = p.hu("contrast") * p.between(0.3, 1.0) if contrast else p.between(5, 40)
    inside = Material(hu, 4, 10, level, bubbles=0.2 if p.chance(0.25) else 0.0)
    over = (Organ.CAVITY, Organ.LIVER, Organ.SPLEEN, Organ.VESSEL, Organ.BOWEL, Organ.COLON)
    p.add(shape, [(0, p.material("bowel_wall", 8, 4)), (wall_mm, inside)], Organ.STOMACH, over)


def add_gallbladder(p: Patient) -> None:
    """A pear of bile under the liver, absent in some."""
    if p.chance(0.15):
        return
    s, front = p.scale, p.visceral_mm
    top = p.near((28, -12 - front / 3, -42), 4)
    tip = top + np.array([-38, -30, -14]) * s * p.between(0.7, 1.1)
    pear = p.wobble(Tube.along([top, tip], np.array([6, 15]) * s * p.between(0.7, 1.2)), 1, 20)
    layers = [(0.0, p.material("bowel_wall", 0, 0)), (1.2, Material(p.hu("gallbladder"), 2))]
    p.add(pear, layers, Organ.GALLBLADDER, (Organ.CAVITY, Organ.LIVER, Organ.COLON, Organ.BOWEL, Organ.VESSEL))
