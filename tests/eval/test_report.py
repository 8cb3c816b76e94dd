"""The report: self-contained, complete, with the numbers that the JSON holds."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from matplotlib import image

from eval import published
from eval.report import Settings
from eval.report_data import collect, extremes, read_run, signed

SHAPE = (20, 16, 6)
AFFINE = np.diag([2.0, 2.0, 5.0, 1.0])


class Page(HTMLParser):
    """Tables by id as rows of cell texts, images as attributes, all texts, and every tag with its attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.images: list[dict[str, str]] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self._rows: list[list[str]] | None = None
        self._cell = False
        self._skip = False
        self.feed(html)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.tags.append((tag, values))
        self._skip = tag == "style"
        if tag == "img":
            self.images.append(values)
        if tag == "table":
            self._rows = self.tables[values["id"]] = []
        if tag == "tr" and self._rows is not None:
            self._rows.append([])
        if tag in ("td", "th") and self._rows is not None:
            self._rows[-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self._rows = None
        if tag in ("td", "th"):
            self._cell = False
        self._skip = False

    def handle_data(self, data: str) -> None:
        if not self._skip:
            self.text += data
        if self._cell and self._rows is not None:
            self._rows[-1][-1] += " ".join(data.split())

    def row(self, table: str, first: str) -> list[str]:
        (found,) = [row for row in self.tables[table] if row[0] == first]
        return found


def accuracy_case(case: str, dsc: float, nsd: float, reference_ml: float, prediction_ml: float, **more: Any) -> dict:
    return {
        **{"case": case, "name": f"{case}.nii.gz", "dsc": dsc, "nsd": nsd, "missing": False, "notes": []},
        **{"reference_ml": reference_ml, "prediction_ml": prediction_ml, "error_ml": prediction_ml - reference_ml},
        **{"lesions": 2, "found": 1, "predicted_lesions": 3, "false_positives": 1, "healthy": reference_ml == 0},
        **more,
    }


def efficiency_case(case: str, time_s: float, gpu_mib: float | None, area: float | None, **more: Any) -> dict:
    curve = [[step / 10, gpu_mib, 5000.0 + step, 50.0] for step in range(int(10 * time_s))]
    return {
        **{"case": case, "name": f"{case}_0000.nii.gz", "status": "done", "exit_code": 0, "time_s": time_s},
        **{"max_gpu_mib": gpu_mib, "auc_gpu_mib_s": area, "max_ram_mib": 9000.0, "auc_ram_mib_s": 70000.0},
        **{"over_time_s": max(0.0, time_s - 45), "over_gpu_mib": gpu_mib and max(0.0, gpu_mib - 4096)},
        **{"mask_s": time_s, "stray": [], "curve": curve},
        **more,
    }


def mask(folder: Path, case: str, *boxes: tuple[slice, slice, slice], name: str = "{}.nii.gz") -> None:
    folder.mkdir(exist_ok=True)
    voxels = np.zeros(SHAPE, np.uint8)
    for box in boxes:
        voxels[box] = 1
    nib.save(nib.Nifti1Image(voxels, AFFINE), folder / name.format(case))


SMALL, LARGE = (slice(3, 6), slice(4, 8), slice(2, 4)), (slice(3, 9), slice(4, 9), slice(1, 5))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_run(tmp_path)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Page, str]:
    """Exit code and page of the whole run."""
    return report(write_run(tmp_path_factory.mktemp("rendered")))


def write_run(tmp_path: Path) -> Path:
    """A run of four scored cases, one that cannot be scored, and six measured ones, with scans of all but one."""
    for case, dsc in (("a", 0.9), ("b", 0.1), ("<i>c", 0.5)):
        mask(tmp_path / "truth", case, LARGE)
        mask(tmp_path / "masks", case, LARGE if dsc > 0.5 else SMALL)
        if case != "b":
            mask(tmp_path / "scans", case, LARGE, name="{}_0000.nii.gz")
    spread = {"mean": 0.375, "sd": 0.4113, "median": 0.3, "low": 0.05, "high": 0.725}
    accuracy = {
        "predictions": str(tmp_path / "masks"),
        "references": str(tmp_path / "truth"),
        "tolerance_mm": 2.0,
        "date": "2031-02-03T04:05:06+00:00",
        "summary": {
            **{"dsc": spread, "nsd": {**spread, "mean": 0.2525}, "lesion_sensitivity": 0.5, "lesion_precision": 0.6667},
            **{"false_positives_per_scan": 1.0, "healthy_scans": 0, "healthy_false_positive_rate": None},
        },
        "missing": ["d.nii.gz"],
        "errors": {"e": f"{tmp_path}/masks/e.nii.gz: has the shape (1,): a mask must have three dimensions"},
        "cases": [
            accuracy_case("a", 0.9, 0.8076, 4.8, 4.8),
            accuracy_case("b", 0.1, 0.0, 4.8, 0.96, notes=["stored as floats"]),
            accuracy_case("<i>c", 0.5, 0.2024, 4.8, 0.96),
            accuracy_case("d", 0.0, 0.0, 4.8, 0.0, missing=True, false_positives=0),
        ],
    }
    efficiency = {
        **{"name": "team", "inputs": str(tmp_path / "scans"), "date": "2031-02-04T10:00:00+00:00", "gpu": 0},
        **{"machine": {"cpu": "Some CPU", "cores": 8, "gpu": "Some GPU", "gpu_mib": 16384, "driver": None}},
        **{"period_s": 0.1, "timeout_s": 60.0, "memory_limit_mib": 4096.0, "time_limit_s": 45.0},
        "cases": [
            efficiency_case("a", 12.344, 3000.4, 21000.6),
            efficiency_case("b", 46.5, 4200.0, 90000.0, stray=["log.txt"]),
            efficiency_case("<i>c", 9.0, 2000.0, 9000.0),
            efficiency_case("d", 3.0, 300.0, 900.0, status="failed", exit_code=3, mask_s=None),
            efficiency_case("e", 60.0, 2500.0, 99000.0, status="timeout", exit_code=None, mask_s=None),
            efficiency_case("f", 2.0, 300.0, 600.0, status="no mask", mask_s=None),
        ],
    }
    run = tmp_path / "run"
    run.mkdir()
    (run / "accuracy.json").write_text(json.dumps(accuracy))
    (run / "efficiency.json").write_text(json.dumps(efficiency))
    return run


def report(folder: Path, **settings: Any) -> tuple[int, Page, str]:
    code = Settings(folder, **settings).run()
    html = (folder / "report.html").read_text(encoding="utf-8")
    return code, Page(html), html


def change(folder: Path, name: str, **values: Any) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_nothing_is_loaded_from_elsewhere(rendered: tuple[int, Page, str]) -> None:
    _, page, html = rendered
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "base")
        for name in ("src", "href", "srcset", "data", "poster"):
            assert attributes.get(name, "data:").startswith("data:")
    assert not re.search(r"url\(|@import|https?://", html)


def test_every_image_is_a_png_with_words(rendered: tuple[int, Page, str]) -> None:
    _, page, _ = rendered
    # Two score plots; a key and slices of the worst two and the best one; six curves.
    assert len(page.images) == 2 + (1 + 2) + (1 + 1) + 6
    for attributes in page.images:
        assert len(attributes["alt"]) > 10
        png = base64.b64decode(attributes["src"].removeprefix("data:image/png;base64,"), validate=True)
        assert min(image.imread(io.BytesIO(png)).shape[:2]) > 50


def test_accuracy_table_beside_published_ones(rendered: tuple[int, Page, str]) -> None:
    _, page, _ = rendered
    own = page.row("table-accuracy", "This run")
    assert own == ["This run", "4 cases of truth", "37.50 ± 41.13", "25.25 ± 41.13", "–"]
    rows = page.tables["table-accuracy"]
    assert len(rows) == 2 + len(published.ACCURACY)
    assert ["SAMCancer (FLARE 2024)", "public validation", "27.19 ± 21.20", "15.07 ± 15.79", "0.04 ± 0.05"] in rows
    assert ["SAMCancer (FLARE 2024)", "online validation", "29.92", "21.92", "–"] in rows
    assert ["FLARE 2026 efficiency award", "public validation, 50 cases", "49.2", "–", "–"] in rows
    assert "different sets are not interchangeable" in page.text


def test_efficiency_table_beside_published_ones(rendered: tuple[int, Page, str]) -> None:
    _, page, _ = rendered
    # Mean of the cases with a mask, a, b and c: (12.344 + 46.5 + 9) / 3, (3000.4 + 4200 + 2000) / 3, (21000.6 + …) / 3.
    own = page.row("table-efficiency", "This run, mean of 3")
    assert own[2:5] == ["22.61", "3067", "40000"]
    assert page.row("table-efficiency", "SAMCancer (FLARE 2024), mean")[2:5] == ["18.05", "3563", "38960"]
    assert page.row("table-efficiency", "a") == ["a", "20 × 16 × 6", "12.34", "3000", "21001", ""]
    assert page.row("table-efficiency", "b")[2:] == [
        *("46.50", "4200", "90000"),
        "1.5 s over 45 s; 104 MiB over 4096 MiB of GPU memory",
    ]
    assert page.row("table-efficiency", "f")[1:] == ["–", "2.00", "300", "600", "no mask"]
    assert [row[0] for row in page.tables["table-efficiency"][-6:]] == ["e", "b", "a", "<i>c", "d", "f"]


def test_table_of_cases_holds_the_numbers_worst_first(rendered: tuple[int, Page, str], folder: Path) -> None:
    _, page, _ = rendered
    rows = page.tables["table-cases"][1:]
    assert [row[0] for row in rows] == ["e", "f", "d", "b", "<i>c", "a"]  # e and f have no score, e took longer
    held = {case["case"]: case for case in json.loads((folder / "accuracy.json").read_text())["cases"]}
    for row in rows[2:]:
        case = held[row[0]]
        assert [float(cell) for cell in row[1:5]] == [
            *(case["dsc"], case["nsd"], case["reference_ml"], case["prediction_ml"])
        ]
        assert float(row[5].replace("−", "-")) == pytest.approx(case["error_ml"])
        assert (row[6], row[7]) == (f"{case['found']} of {case['lesions']}", str(case["false_positives"]))
    assert page.row("table-cases", "b")[8] == "stray files in outputs; stored as floats"


def test_what_is_amiss_comes_first(rendered: tuple[int, Page, str]) -> None:
    code, page, html = rendered
    assert code == 1
    assert html.index("Missing, failed or over a limit: 4 of 6 cases") < html.index("<table")
    for sentence in (
        "d: no prediction; counted as DSC 0 and NSD 0; the container failed (exit code 3)",
        "e: could not be scored and is in no mean: masks/e.nii.gz: has the shape (1,): a mask must have three "
        "dimensions; the container was stopped after 60 s; 15.0 s over 45 s",
        "f: the container wrote no mask (exit code 0)",
        "b: stray files in outputs: log.txt; 1.5 s over 45 s; 104 MiB over 4096 MiB of GPU memory",
    ):
        assert sentence in page.text


def test_header_says_what_when_and_on_what(rendered: tuple[int, Page, str]) -> None:
    _, page, _ = rendered
    for words in ("2031-02-03 04:05 UTC", "2031-02-04 10:00 UTC", "Some CPU", "Some GPU", "16.0 GiB", "2 mm", "team"):
        assert words in page.text
    assert "None" not in page.text


def test_names_are_escaped(rendered: tuple[int, Page, str]) -> None:
    _, page, _ = rendered
    assert not [tag for tag, _ in page.tags if tag == "i"]
    assert page.row("table-cases", "<i>c")[1] == "0.5000"


def test_accuracy_alone(folder: Path) -> None:
    (folder / "efficiency.json").unlink()
    code, page, _ = report(folder)
    assert set(page.tables) == {"table-accuracy", "table-cases"}
    assert "masks alone, --inputs names no scans" in page.text
    assert "GPU" not in page.text
    assert code == 1
    change(folder, "accuracy.json", missing=[], errors={}, cases=[accuracy_case("a", 0.9, 0.8, 4.8, 4.8)])
    code, page, _ = report(folder)
    assert "Of 1 cases, none is missing or failed." in page.text
    assert code == 0


def test_efficiency_alone_without_gpu_shows_host_memory(folder: Path) -> None:
    (folder / "accuracy.json").unlink()
    change(folder, "efficiency.json", gpu=None, cases=[efficiency_case("a", 5.0, None, None)])
    code, page, _ = report(folder)
    assert set(page.tables) == {"table-efficiency"}
    assert "Host memory (no GPU was measured) over time" in page.text
    assert "5.00 s, at most 9000 MiB, area 70000 MiB·s" in page.text
    assert page.row("table-efficiency", "a")[2:5] == ["5.00", "–", "–"]
    assert page.row("table-efficiency", "This run, mean of 1")[2:5] == ["5.00", "–", "–"]
    assert page.images[0]["alt"].startswith("Host RAM over time of a")
    assert code == 0


def test_subfolders_and_another_place(folder: Path, tmp_path: Path) -> None:
    for kind in ("accuracy", "efficiency"):
        (folder / kind).mkdir()
        (folder / f"{kind}.json").rename(folder / kind / f"{kind}.json")
    Settings(folder, out=tmp_path / "new" / "page.html").run()
    page = Page((tmp_path / "new" / "page.html").read_text(encoding="utf-8"))
    assert set(page.tables) == {"table-accuracy", "table-cases", "table-efficiency"}


def test_scans_may_lie_elsewhere(rendered: tuple[int, Page, str], folder: Path, tmp_path: Path) -> None:
    _, page, _ = rendered
    assert page.text.count("no usable scan") == 1  # b has none
    mask(tmp_path / "moved", "b", LARGE, name="{}_0000.nii.gz")
    _, page, _ = report(folder, inputs=tmp_path / "moved")
    assert page.text.count("no usable scan") == 2  # now b alone has one
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        Settings(folder, inputs=tmp_path / "nowhere").run()


def test_masks_that_are_gone_are_told(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "masks" / "b.nii.gz").unlink()
    _, page, _ = report(folder)
    assert "DSC 0.1000, NSD 0.0000. Cannot be drawn:" in page.text
    assert len(page.images) == 2 + (1 + 1) + (1 + 1) + 6


def test_no_case_scored_and_no_case_with_samples(folder: Path) -> None:
    summary = json.loads((folder / "accuracy.json").read_text())["summary"]
    change(folder, "accuracy.json", cases=[], missing=[], summary={**summary, "dsc": None, "nsd": None})
    change(folder, "efficiency.json", cases=[efficiency_case("a", 0.0, None, None, status="failed", mask_s=None)])
    _, page, _ = report(folder)
    assert page.row("table-accuracy", "This run")[2:4] == ["–", "–"]
    assert page.row("table-efficiency", "This run, mean of 0")[2:5] == ["–", "–", "–"]
    assert "no samples of this case" in page.text


def test_worst_and_best_never_share_a_case(folder: Path) -> None:
    change(folder, "efficiency.json", cases=[])
    for count, expected in ((1, ("0", "")), (2, ("0", "1")), (5, ("012", "43")), (9, ("012", "876"))):
        scored = [accuracy_case(str(n), n / 10, n / 10, 1.0, 1.0) for n in range(count)]
        empty = accuracy_case("empty", 1.0, 1.0, 0.0, 0.0)
        gone = accuracy_case("gone", 0.0, 0.0, 1.0, 0.0, missing=True)
        change(folder, "accuracy.json", missing=["gone.nii.gz"], errors={}, cases=[*scored, empty, gone])
        worst, best = extremes(collect(read_run(folder, None)))
        assert ("".join(case.name for case in worst), "".join(case.name for case in best)) == expected


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (None, "", "is empty"),
        ("notes.txt", "", "holds no accuracy.json or efficiency.json"),
        ("accuracy.json", "{", "accuracy.json: cannot be read as JSON"),
        ("accuracy.json", "[]", "accuracy.json: is not what `python -m eval accuracy` writes"),
        ("efficiency.json", '{"name": "x"}', "efficiency.json: is not what `python -m eval efficiency` writes"),
    ],
)
def test_bad_input_is_one_sentence(name: str | None, content: str, sentence: str, tmp_path: Path) -> None:
    if name:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        Settings(tmp_path).run()
    assert not (tmp_path / "report.html").exists()


def test_a_case_that_lacks_a_value_is_one_sentence(folder: Path) -> None:
    change(folder, "accuracy.json", cases=[{"case": "a"}])
    with pytest.raises(ValueError, match="its JSON files lack 'missing'"):
        Settings(folder).run()


def test_signs() -> None:
    assert [signed(value, 1) for value in (2.0, -2.0, 0.0, -0.01, None)] == ["+2.0", "−2.0", "0.0", "0.0", "–"]
