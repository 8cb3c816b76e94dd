"""Rank-then-aggregate on tables written by hand, every expectation derived by hand."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image
from scipy.stats import wilcoxon

from eval.ranking import (
    METRICS,
    Settings,
    Team,
    assemble,
    compare,
    differences,
    min_ranks,
    parse_weights,
    rank,
)
from eval.statistics import wilcoxon_p

OFFICIAL = "Name,Time,MaxGPU_Mem,AUC_GPU_Time,MaxCPU_Utilization,AUC_CPU_Time,MaxRAM,AUC_RAM_Time"
REPOSITORY = Path(__file__).resolve().parents[2]


def write_team(
    folder: Path,
    scores: Mapping[str, tuple[float, float]],
    costs: Mapping[str, tuple[Any, Any]] | None = None,
) -> Path:
    """accuracy.csv of DSC and NSD, and T_Efficiency.csv of time and area ("" for an empty field)."""
    folder.mkdir(parents=True)
    rows = [f"{case}.nii.gz,{dsc},{nsd}" for case, (dsc, nsd) in scores.items()]
    (folder / "accuracy.csv").write_text("\n".join(["Name,Lesion_DSC,Lesion_NSD", *rows]) + "\n")
    if costs is not None:
        rows = [f"{case}_0000.nii.gz,{time},9,{area},50,5,1000,100" for case, (time, area) in costs.items()]
        (folder / "T_Efficiency.csv").write_text("\n".join([OFFICIAL, *rows]) + "\n")
    return folder


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def run(out: Path, *teams: str, **settings: Any) -> tuple[int, dict[str, dict[str, str]]]:
    """Exit code, and ranking.csv by team."""
    code = Settings(teams, out=out, **settings).run()
    return code, {row["team"]: row for row in read_csv(out / "ranking.csv")}


@pytest.fixture
def three(tmp_path: Path) -> list[str]:
    """Ties in DSC and time; B has no mask of case 3, as C's is of no use.

    DSC   A   B   C    ranks    Time  A   B   C    ranks
    1    .9  .8  .8    1 2 2          10   5  10    2 1 2
    2    .5  .5  .7    2 2 1          10  20   5    2 3 1
    3    .6   –  .0    1 2 2           8   –   8    1 3 1
    """
    write_team(
        tmp_path / "a",
        {"1": (0.9, 0.9), "2": (0.5, 0.5), "3": (0.6, 0.6)},
        {"1": (10, 100), "2": (10, 100), "3": (8, 80)},
    )
    write_team(tmp_path / "b", {"1": (0.8, 0.8), "2": (0.5, 0.5)}, {"1": (5, 200), "2": (20, 200)})
    write_team(
        tmp_path / "c",
        {"1": (0.8, 0.8), "2": (0.7, 0.7), "3": (0.0, 0.0)},
        {"1": (10, 300), "2": (5, 300), "3": (8, 300)},
    )
    return [f"{name}={tmp_path / name.lower()}" for name in "ABC"]


def test_golden_ranking(three: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, rows = run(tmp_path / "out", *three, weights=("nsd=0", "area=0", "time=0.5"))
    # Mean ranks: DSC 4/3, 6/3, 5/3; time 5/3, 7/3, 4/3; together (DSC + time / 2) / 1.5: 13/9, 19/9, 14/9.
    assert [float(rows[team]["rank_dsc"]) for team in "ABC"] == pytest.approx([4 / 3, 2, 5 / 3], abs=1e-4)
    assert [float(rows[team]["rank_time"]) for team in "ABC"] == pytest.approx([5 / 3, 7 / 3, 4 / 3], abs=1e-4)
    assert [float(rows[team]["mean_rank"]) for team in "ABC"] == pytest.approx([13 / 9, 19 / 9, 14 / 9], abs=1e-4)
    assert [rows[team]["place"] for team in "ABC"] == ["1", "3", "2"]
    assert list(rows) == ["A", "C", "B"]
    assert "rank_nsd" not in rows["A"]
    assert code == 1  # B misses a case
    assert "B has no mask of 1 of the 3 cases (3)" in capsys.readouterr().err


def test_golden_ranks_of_cases(three: list[str], tmp_path: Path) -> None:
    run(tmp_path / "out", *three, weights=("nsd=0", "area=0"))
    rows = {(row["case"], row["team"]): row for row in read_csv(tmp_path / "out" / "ranking_cases.csv")}
    dsc = [[rows[case, team]["rank_dsc"] for team in "ABC"] for case in "123"]
    time = [[rows[case, team]["rank_time"] for team in "ABC"] for case in "123"]
    assert dsc == [["1", "2", "2"], ["2", "2", "1"], ["1", "2", "2"]]
    assert time == [["2", "1", "2"], ["2", "3", "1"], ["1", "3", "1"]]
    assert (rows["3", "B"]["missed"], rows["3", "B"]["dsc"], rows["3", "B"]["time"]) == ("True", "", "")


def test_mean_values_count_a_missed_case_as_zero_in_scores_only(three: list[str], tmp_path: Path) -> None:
    _, rows = run(tmp_path / "out", *three)
    assert float(rows["B"]["mean_dsc"]) == pytest.approx((0.8 + 0.5 + 0) / 3, abs=1e-4)
    assert float(rows["B"]["mean_time"]) == pytest.approx((5 + 20) / 2)
    assert rows["B"]["missed"] == "1"


def test_all_files_are_written_and_agree(three: list[str], tmp_path: Path) -> None:
    _, rows = run(tmp_path / "out", *three)
    values = json.loads((tmp_path / "out" / "ranking.json").read_text())
    assert [row["team"] for row in values["ranking"]] == list(rows)
    assert values["weights"] == {"dsc": 1, "nsd": 1, "time": 1, "area": 1}
    assert values["missed"] == {"A": [], "B": ["3"], "C": []}
    assert len(read_csv(tmp_path / "out" / "ranking_pairs.csv")) == 4 * 3
    height, width, _ = image.imread(tmp_path / "out" / "ranking.png").shape
    assert width > height > 100


def test_min_ranks_by_hand() -> None:
    values = np.array([0.5, 0.7, 0.5, 0.1])
    assert min_ranks(values, higher_is_better=True).tolist() == [2, 1, 2, 4]
    assert min_ranks(values, higher_is_better=False).tolist() == [2, 4, 2, 1]
    assert min_ranks(np.array([np.inf, 3.0, np.inf]), higher_is_better=False).tolist() == [2, 1, 2]


def dsc_board(**teams: Sequence[float]) -> Any:
    return assemble(
        [
            Team(name, {"dsc": {str(case): value for case, value in enumerate(values)}})
            for name, values in teams.items()
        ],
        METRICS[:1],
    )


def test_places_of_two_teams_that_win_a_case_each() -> None:
    # Of two cases drawn: A's case twice (1/4), B's twice (1/4), or one of each: a tie, both first.
    ranking = rank(dsc_board(a=[1.0, 0.0], b=[0.0, 1.0]), {"dsc": 1.0}, resamples=4000)
    np.testing.assert_allclose(ranking.shares, [[0.75, 0.25], [0.75, 0.25]], atol=0.03)
    assert (ranking.places.tolist(), ranking.low.tolist(), ranking.high.tolist()) == ([1, 1], [1, 1], [2, 2])


def test_intervals_are_rounded_outwards() -> None:
    """Of two resamples, 2.5 % and 97.5 % fall between them: where these differ, the interval holds both."""
    board, mixed = dsc_board(a=[1.0, 0.0], b=[0.0, 1.0]), 0
    for seed in range(20):
        ranking = rank(board, {"dsc": 1.0}, resamples=2, seed=seed)
        if ranking.shares[0].tolist() == [0.5, 0.5]:
            mixed += 1
            assert (ranking.low[0], ranking.high[0]) == (1, 2)
    assert mixed > 0


def test_a_team_that_always_wins_is_first_in_every_resample() -> None:
    ranking = rank(dsc_board(a=[0.1, 0.2, 0.3], b=[0.2, 0.3, 0.4]), {"dsc": 1.0})
    assert ranking.shares.tolist() == [[0.0, 1.0], [1.0, 0.0]]
    assert (ranking.low.tolist(), ranking.high.tolist()) == ([2, 1], [2, 1])


def test_resampling_is_seeded() -> None:
    board = dsc_board(a=[1.0, 0.0, 0.4], b=[0.0, 1.0, 0.5])
    first, again, other = (rank(board, {"dsc": 1.0}, seed=seed).shares.tolist() for seed in (1, 1, 2))
    assert first == again != other


def test_pairs_are_scipys_wilcoxon_with_holm_by_metric() -> None:
    draw = np.random.default_rng(0)
    scores = {name: (draw.random(20) + shift).round(4) / 2 for name, shift in (("a", 0.0), ("b", 0.2), ("c", 0.6))}
    pairs = {(pair.team, pair.other): pair for pair in compare(dsc_board(**scores))}
    p = {names: wilcoxon(scores[names[0]], scores[names[1]]).pvalue for names in pairs}
    assert {names: pair.p for names, pair in pairs.items()} == pytest.approx(p)
    smallest, middle, largest = sorted(p, key=lambda names: p[names])
    steps = [3 * p[smallest], max(3 * p[smallest], 2 * p[middle])]
    assert pairs[smallest].p_holm == pytest.approx(min(1, steps[0]))
    assert pairs[middle].p_holm == pytest.approx(min(1, steps[1]))
    assert pairs[largest].p_holm == pytest.approx(min(1, max(steps[1], p[largest])))
    better = int((scores["a"] > scores["b"]).sum())
    assert (pairs["a", "b"].better, pairs["a", "b"].worse) == (better, 20 - better)


def test_wilcoxon_of_equal_values_and_of_missed_cases() -> None:
    assert wilcoxon_p(differences(np.array([0.5, 0.7]), np.array([0.5, 0.7]))) == 1.0
    # One missed case beside three differences of the same sign: the exact two-sided p of four is 2 / 2^4.
    # A case that both missed is none.
    first = np.array([-1.0, -2.0, -3.0, -9.0, -np.inf])
    second = np.array([-2.0, -4.0, -6.0, -np.inf, -np.inf])
    assert wilcoxon_p(differences(first, second)) == pytest.approx(0.125)
    assert differences(np.array([0.8, 0.5]), np.array([0.7, 0.4])).tolist() == [0.1, 0.1]  # as floats 2e-17 apart


def test_lower_time_is_better_in_pairs(three: list[str], tmp_path: Path) -> None:
    run(tmp_path / "out", *three)
    rows = read_csv(tmp_path / "out" / "ranking_pairs.csv")
    (pair,) = [row for row in rows if (row["metric"], row["team"], row["other"]) == ("area", "A", "B")]
    assert (pair["better"], pair["worse"]) == ("3", "0")  # 100 < 200 twice, and B misses the third


def test_without_gpu_columns_area_is_left_out_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_team(tmp_path / "a", {"1": (0.9, 0.9)}, {"1": (10, 500)})
    write_team(tmp_path / "b", {"1": (0.8, 0.8)}, {"1": (5, "")})
    code, rows = run(tmp_path / "out", f"A={tmp_path / 'a'}", f"B={tmp_path / 'b'}")
    assert code == 0
    assert "rank_area" not in rows["A"]
    assert float(rows["A"]["mean_rank"]) == pytest.approx((1 + 1 + 2) / 3, abs=1e-4)
    assert "GPU area is left out: no value of AUC_GPU_Time from B." in capsys.readouterr().err


def test_the_tables_may_lie_in_subfolders(tmp_path: Path) -> None:
    for name, dsc in (("a", 0.5), ("b", 0.6)):
        made = write_team(tmp_path / "made" / name, {"1": (dsc, dsc)}, {"1": (1, 1)})
        for kind, file in (("accuracy", "accuracy.csv"), ("efficiency", "T_Efficiency.csv")):
            (tmp_path / name / kind).mkdir(parents=True)
            (made / file).rename(tmp_path / name / kind / file)
    _, rows = run(tmp_path / "out", f"A={tmp_path / 'a'}", f"B={tmp_path / 'b'}")
    assert (rows["A"]["place"], rows["B"]["place"]) == ("2", "1")


def test_a_container_that_fails_at_once_does_not_win_in_time(tmp_path: Path) -> None:
    """Its row is in the table, with the shortest time of all; efficiency.json tells that no mask came of it."""
    for name, time in (("a", 1), ("b", 9)):
        write_team(tmp_path / name, {"1": (0.0, 0.0)}, {"1": (time, 100 * time)})
    failed = {"case": "1", "status": "failed", "mask_s": None}
    head = dict.fromkeys(
        ("name", "inputs", "date", "machine", "gpu", "period_s", "timeout_s", "memory_limit_mib", "time_limit_s")
    )
    (tmp_path / "a" / "efficiency.json").write_text(json.dumps({**head, "cases": [failed]}))
    code, rows = run(tmp_path / "out", f"A={tmp_path / 'a'}", f"B={tmp_path / 'b'}")
    assert (rows["A"]["rank_time"], rows["B"]["rank_time"]) == ("2.0", "1.0")
    assert (rows["A"]["missed"], code) == ("1", 1)


def test_what_could_not_be_scored_is_told_apart_from_what_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_team(tmp_path / "a", {"1": (0.9, 0.9), "2": (0.9, 0.9), "3": (0.9, 0.9)})
    write_team(tmp_path / "b", {"1": (0.8, 0.8)})
    head = dict.fromkeys(("predictions", "references", "tolerance_mm", "date", "summary"))
    told = {**head, "missing": [], "errors": {"2": "2.nii.gz: cannot be read"}, "cases": []}
    (tmp_path / "b" / "accuracy.json").write_text(json.dumps(told))
    code, rows = run(tmp_path / "out", f"A={tmp_path / 'a'}", f"B={tmp_path / 'b'}", weights=("time=0", "area=0"))
    said = capsys.readouterr().err
    assert "B has no mask of 1 of the 3 cases (3)" in said
    assert "B was not scored, as accuracy.json tells, in 1 of the 3 cases (2)" in said
    assert (rows["B"]["missed"], code) == ("2", 1)


@pytest.mark.parametrize(
    "odd", [{"cases": 5}, {"cases": [5]}, {"cases": [{}]}, {"errors": None}, {"missing": 5}, {"missing": [5]}]
)
def test_json_of_another_kind_is_one_sentence(tmp_path: Path, odd: dict[str, Any]) -> None:
    head = dict.fromkeys(("predictions", "references", "tolerance_mm", "date", "summary"))
    told = {**head, "missing": [], "errors": {}, "cases": [], **odd}
    for name in "ab":
        write_team(tmp_path / name, {"1": (0.9, 0.9)})
        (tmp_path / name / "accuracy.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"accuracy\.json: is not what `python -m eval accuracy` writes"):
        run(tmp_path / "out", f"A={tmp_path / 'a'}", f"B={tmp_path / 'b'}", weights=("time=0", "area=0"))


def test_a_name_that_is_no_formula(three: list[str], tmp_path: Path) -> None:
    run(tmp_path / "out", three[0].replace("A=", "$A^$_="), *three[1:])
    assert image.imread(tmp_path / "out" / "ranking.png").any()


def test_cases_without_a_row_in_any_accuracy_table_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, dsc in (("a", 0.9), ("b", 0.8)):
        write_team(tmp_path / name, {"1": (dsc, dsc)}, {"1": (1, 1), "extra": (1, 1)})
    code, _ = run(tmp_path / "out", f"A={tmp_path / 'a'}", f"B={tmp_path / 'b'}")
    assert {row["case"] for row in read_csv(tmp_path / "out" / "ranking_cases.csv")} == {"1"}
    assert "left out: extra" in capsys.readouterr().err
    assert code == 0


def test_accuracy_alone_can_be_ranked(tmp_path: Path) -> None:
    write_team(tmp_path / "a", {"1": (0.9, 0.2)})
    write_team(tmp_path / "b", {"1": (0.8, 0.3)})
    teams = (f"A={tmp_path / 'a'}", f"B={tmp_path / 'b'}")
    _, rows = run(tmp_path / "out", *teams, weights=("time=0", "area=0"))
    assert (rows["A"]["mean_rank"], rows["B"]["mean_rank"]) == ("1.5", "1.5")
    assert (rows["A"]["place"], rows["B"]["place"]) == ("1", "1")
    with pytest.raises(ValueError, match=r"holds no \*_Efficiency.csv.*--weights time=0 area=0"):
        Settings(teams, out=tmp_path / "out").run()
    with pytest.raises(ValueError, match="--seed -1: give 0 or more"):
        Settings(teams, out=tmp_path / "out", seed=-1).run()


def test_weights_are_read() -> None:
    assert parse_weights(("time=0.5", "area=0")) == {"dsc": 1, "nsd": 1, "time": 0.5, "area": 0}
    for wrong in (("speed=1",), ("dsc",), ("dsc=-1",), ("dsc=nan",), ("dsc=inf",), ("dsc=1e308",), ("dsc=x",)):
        with pytest.raises(ValueError, match="--weights"):
            parse_weights(wrong)
    with pytest.raises(ValueError, match="all are 0"):
        parse_weights(("dsc=0", "nsd=0", "time=0", "area=0"))


@pytest.mark.parametrize(
    ("teams", "sentence"),
    [
        (("A=a", "A=b"), "named twice"),
        (("A=a",), "two teams or more"),
        (("A=a", "b"), "write TEAM=DIR"),
        (("A=a", "B=nowhere"), "nowhere: no such folder"),
        (("A=a", "B=empty"), "empty: is empty"),
        (("A=a", "B=two"), "two: holds several tables"),
        (("A=a", "B=percent"), "Lesion_DSC of 1 is 45.2: it must be a number, from 0 to 1"),
        (("A=a", "B=word"), "Time of 1 is fast: it must be a number, 0 or more"),
        (("A=a", "B=twice"), "names the case 1 twice"),
        (("A=a", "B=other"), "no full columns Name and Lesion_NSD, separated by commas"),
        (("A=a", "B=header"), "holds no case"),
    ],
)
def test_bad_input_is_one_sentence(
    teams: tuple[str, ...], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    good = {"1": (0.5, 0.5)}, {"1": (1, 1)}
    for name in ("a", "two", "twice", "other", "header"):
        write_team(Path(name), *good)
    Path("empty").mkdir()
    Path("two/U_Efficiency.csv").write_text(OFFICIAL + "\n")
    write_team(Path("percent"), {"1": (45.2, 0.5)}, good[1])
    write_team(Path("word"), good[0], {"1": ("fast", 1)})
    Path("twice/accuracy.csv").write_text("Name,Lesion_DSC,Lesion_NSD\n1.nii.gz,0,0\n1.nii.gz,1,1\n")
    Path("other/accuracy.csv").write_text("Name,Lesion_DSC\n1.nii.gz,0\n")
    Path("header/accuracy.csv").write_text("Name,Lesion_DSC,Lesion_NSD\n")
    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        Settings(teams, out=Path("out")).run()
    assert "\n" not in str(caught.value)
    assert not Path("out").exists()


def test_importing_the_commands_does_not_import_what_only_drawing_needs() -> None:
    code = "import sys, eval.ranking, eval.report; print(*{'matplotlib', 'jinja2', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
