"""The benchmark's own arithmetic: what is chosen, compared, kept and taken up again."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import geopeft_kit as gk
from tests.toy import toy_data

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def _path() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield
    ours = ("gates", "probing", "continual", "scene", "step", "step_kit", "workers")
    for name in ("paired", "rows", "shared", "methods", *ours):
        sys.modules.pop(name, None)


def trial(label: str, rate: float, val: float, problem: str | None = None) -> dict:
    row = {"label": label, "kind": "search", "seed": 100, "learning_rate": rate}
    return {**row, "val": val, "problem": problem}


def score(label: str, seed: int, test: float, rate: float = 0.01) -> dict:
    row = {"label": label, "kind": "score", "seed": seed, "learning_rate": rate}
    return {**row, "test": test, "problem": None}


def test_the_best_trial_is_taken_and_an_optimum_at_the_edge_is_flagged() -> None:
    from paired import chosen_rates, mark_searches

    trials = [trial("a", 0.1, 0.5), trial("a", 0.01, 0.7), trial("a", 0.001, 0.6)]
    trials += [trial("b", 0.1, 0.9, "diverged"), trial("b", 0.01, 0.2)]
    trials += [trial("b", 0.001, 0.4)]
    rows = pd.DataFrame(trials)
    assert chosen_rates(rows) == {"a": 0.01, "b": 0.001}
    edges = mark_searches(rows).groupby("label")["at_edge"].first()
    assert not edges["a"] and edges["b"]


def test_rows_of_a_rate_no_longer_chosen_are_left_out() -> None:
    from paired import final_rows

    rows = pd.DataFrame(
        [trial("a", 0.1, 0.5), trial("a", 0.01, 0.7)]
        + [score("a", 0, 0.3, rate=0.1), score("a", 0, 0.4, rate=0.01)]
    )
    assert final_rows(rows)["test"].to_list() == [0.4]


def test_differences_are_paired_over_the_seeds_that_both_have() -> None:
    from paired import difference

    base, gain = [0.5, 0.7, 0.6], [0.031, 0.042, 0.036]
    rows = [score("full", seed, value) for seed, value in enumerate([*base, 0.9])]
    rows += [
        score("lora", seed, value + more)
        for seed, (value, more) in enumerate(zip(base, gain, strict=True))
    ]
    shown = difference(pd.DataFrame(rows), "lora", "full", "test")
    low, high = stats.t.interval(0.95, 2, np.mean(gain), stats.sem(gain))
    expected = f"{100 * np.mean(gain):+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
    assert shown == f"{expected} better"


@pytest.mark.slow
def test_a_cut_study_goes_on_and_a_failure_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from paired import Journal, Study, final_rows

    data = toy_data(tmp_path / "toy")

    def study(writer: int) -> Study:
        journal = Journal(tmp_path, "toy", writer)
        return Study(data, "geopeft_tiny", {"weights": None}, 1, 8, journal)

    lora = gk.Candidate("lora", "lora", {"rank": 2}, learning_rates=(1e-4, 1e-3))
    wrong = gk.Candidate("wrong", "lora", {"rank": -1}, learning_rates=(1e-4, 1e-3))
    study(0).run([lora, wrong], seeds=[0])
    rows = study(0).journal.rows()
    assert rows["kind"].value_counts().to_dict() == {"search": 4, "score": 1}
    assert rows[rows["label"] == "wrong"]["problem"].str.contains("rank").all()
    assert rows[rows["kind"] == "search"]["test"].isna().all()

    began = []
    train = Study._train

    def watch(self: Study, candidate: gk.Candidate, seed: int, rate: float) -> dict:
        began.append((candidate.label, seed))
        return train(self, candidate, seed, rate)

    monkeypatch.setattr(Study, "_train", watch)
    study(1).run([lora, wrong], seeds=[0, 1])  # another process, one more seed
    assert began == [("lora", 1)]
    assert sorted(final_rows(study(0).journal.rows())["seed"]) == [0, 1]


def test_ratios_are_taken_turn_by_turn() -> None:
    from workers import ratios

    found = ratios([1.0, 4.0, 3.0], [2.0, 4.0, 12.0])  # a machine that slows down
    assert found["ratio"] == 0.5 and (found["low"], found["high"]) == (0.25, 1.0)
    assert (found["ours"], found["theirs"], found["turns"]) == (3.0, 4.0, 3)


WORKER = f"""
import sys
sys.path.insert(0, {str(FOLDER)!r})
from workers import serve

def double(number):
    print("a library's own chatter")
    return {{"number": 2 * number}}

serve({{"double": double}})
"""


def test_a_worker_answers_whatever_else_it_prints(tmp_path: Path) -> None:
    from workers import Worker

    script, log = tmp_path / "worker.py", tmp_path / "log"
    script.write_text(WORKER)
    worker = Worker(str(script), sys.executable, log)
    assert [worker.ask("double", number=n)["number"] for n in (1, 4)] == [2, 8]
    with pytest.raises(RuntimeError, match="number"):
        worker.ask("double")
    assert "chatter" in log.read_text()
    worker.stop()


def test_names_of_the_peer_are_found_in_the_kit() -> None:
    from step_kit import kit_name

    theirs = "encoder.base_model.model.blocks.3.attn.qkv.v_linear.lora_A.default.weight"
    network = gk.load_backbone("geopeft_tiny", weights=None)
    gk.attach(network, "lora", targets=("q", "v"))
    names = dict(gk.build_model(network, "unet").named_parameters())
    assert kit_name(theirs) in names
    assert kit_name("neck.2.fpn1.3.weight") in names
    assert kit_name("decoder.decoder.blocks.0.conv1.0.weight") in names
    assert kit_name("head.head.2.bias") in names
    assert kit_name("encoder.norm.weight") in names
    gk.attach(network, "vpt", tokens=2)
    names = dict(gk.build_model(network, "unet").named_parameters())
    assert kit_name("encoder.vpt_prompt_embeddings.5") in names


def test_goals_are_said_to_be_met_or_missed() -> None:
    from step import GOALS, SETTINGS, report

    assert {mode for mode, _ in GOALS} == set(SETTINGS)
    row = {"mode": "lora", "setting": "memory, bf16", "time_ours": 1.0}
    row |= {"time_theirs": 2.0, "time_ratio": 0.66, "time_low": 0.4, "time_high": 0.7}
    row |= {"saved_ours": 3.0, "saved_theirs": 10.0, "saved_ratio": 0.3}
    row |= {"output_difference": 0.0, "gradients_difference": 1e-6}
    page = report(pd.DataFrame([row, row | {"setting": "plain"}]))
    assert "<= 0.65, missed" in page and "<= 0.30, met" in page
    assert page.splitlines()[-1].count(" - ") == 2


def test_a_faster_scene_is_a_speed_above_one() -> None:
    from scene import speed

    found = speed(ours=[1.0, 2.0, 4.0], theirs=[2.0, 8.0, 4.0])
    assert (found["speed_ratio"], found["speed_low"], found["speed_high"]) == (2, 1, 4)
    assert (found["seconds_kit"], found["seconds_terratorch"]) == (2, 4)


def test_a_gate_is_met_by_its_whole_interval() -> None:
    from gates import Gate, check

    seeds = range(5)
    gains = [0.04, 0.05, 0.06, 0.05, 0.05]  # paired: the common part cancels
    common = [0.5, 0.7, 0.6, 0.4, 0.8]
    rows = [
        {"label": "a", "seed": s, "test": c + g}
        for s, c, g in zip(seeds, common, gains, strict=True)
    ]
    rows += [
        {"label": "b", "seed": s, "test": c} for s, c in zip(seeds, common, strict=True)
    ]
    table = pd.DataFrame(rows)

    def found(low: float, high: float = float("inf")) -> dict:
        return check(Gate("", "burn", "a", "b", "test", low, high), table)

    half = stats.t.ppf(0.975, 4) * np.std(gains, ddof=1) / 5**0.5
    assert found(0.03)["value"] == pytest.approx(0.05)
    assert found(0.03)["low"] == pytest.approx(0.05 - half, abs=1e-4)
    assert found(0.03)["verdict"] == "met"
    assert found(0.049)["verdict"] == "mean only"
    assert found(0.051)["verdict"] == "not met"
    assert found(0.0, 0.04)["verdict"] == "not met"
    alone = check(Gate("", "burn", "b", None, "test", 0.2, 0.92), table)
    assert alone["value"] == alone["score"] == pytest.approx(0.6)


def test_a_cell_that_is_there_is_not_made_again(tmp_path: Path) -> None:
    from rows import Rows

    rows, made = Rows(tmp_path / "study.csv", ("label", "seed")), []
    for cell in rows.missing([("a", 0), ("a", 1), ("a", 0)]):
        made.append(cell)
        rows.put(cell, [{"test": 1 / 3, "few": None}, {"test": 0.3}])
    assert made == [("a", 0), ("a", 1)]
    again = Rows(rows.path, rows.key)
    assert list(again.missing([("a", 1), ("b", 0)])) == [("b", 0)]
    assert list(again.missing([("b", 0)], until=0)) == []  # the time is up
    again.put(("a", 0), [{"test": 2.0}])  # in place of its two older rows
    found = again.read()
    assert list(found) == ["label", "seed", "test", "few"]
    assert found["seed"].tolist() == [1, 1, 0]
    assert found["test"].tolist() == pytest.approx([1 / 3, 0.3, 2.0], rel=1e-12)


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("few_shot", ("study", "label", "n", "seed")),
        ("corpus_scale", ("factor", "seed")),
        ("levers", ("group", "lever", "seed")),
        ("memory_estimate", ("backbone", "method", "decoder", "batch", "size")),
        ("step", ("mode",)),
        ("step_growth", ("backbone", "size", "batch")),
        ("scene", ("backbone", "size")),
        ("start", ("what",)),
        ("continual_objectives", ("label", "seed")),
    ],
)
def test_published_rows_can_be_gone_on_with(
    file: str, key: tuple[str, ...], tmp_path: Path
) -> None:
    from rows import Rows

    copy = tmp_path / f"{file}.csv"
    copy.write_bytes((FOLDER.parent / "docs" / "results" / copy.name).read_bytes())
    rows = Rows(copy, key)
    before = rows.read()
    cells = list(dict.fromkeys(before[list(key)].itertuples(index=False, name=None)))
    assert list(rows.missing([*cells, ("new",) * len(key)])) == [("new",) * len(key)]
    own = (before[list(key)] == list(cells[-1])).all(axis=1)
    rows.put(cells[-1], before[own].to_dict("records"))
    same = pd.concat([before[~own], before[own]], ignore_index=True)
    pd.testing.assert_frame_equal(rows.read(), same)


def test_crops_are_pieces_of_their_image() -> None:
    import torch
    from continual import SIDE, Crops

    image = torch.arange(3 * 80 * 70).reshape(3, 80, 70).float()
    torch.manual_seed(0)
    crop = Crops([image])[0]["image"]
    assert crop.shape == (3, SIDE, SIDE)
    assert set(crop.flatten().tolist()) <= set(image.flatten().tolist())
    assert len(crop.unique()) == 3 * SIDE**2  # no pixel twice


@pytest.mark.slow
def test_a_probe_reads_the_drawn_images_only(tmp_path: Path) -> None:
    """A label that the image shows plainly is found, in the region never seen too."""
    from probing import probe

    data = toy_data(tmp_path / "toy", "classification", chips=60)
    found = probe(gk.load_backbone("geopeft_tiny"), data, seed=0, chips=20)
    assert found["test"] > 0.8
    assert found == probe(gk.load_backbone("geopeft_tiny"), data, seed=0, chips=20)


def test_scores_of_both_systems_count_labelled_pixels_only() -> None:
    import torch
    from score import report, scores

    wanted = torch.tensor([[0, 0, 1, 1], [2, 2, 255, 255]])[None]
    guess = torch.tensor([[0, 0, 1, 0], [2, 2, 0, 1]])[None]
    found = scores(guess, wanted, classes=4)  # the fourth occurs nowhere
    assert found["accuracy"] == pytest.approx(5 / 6)
    assert found["miou"] == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    rows = pd.DataFrame(
        {"mode": "full", "seed": seed, "system": system, "miou": miou,
         "accuracy": 0.5, "same class": 1.0}
        for seed, pair in enumerate([(0.5, 0.51), (0.6, 0.57)])
        for system, miou in zip(("TerraTorch", "kit, plain"), pair, strict=True)
    )  # fmt: skip
    apart = report(rows)["mIoU apart, at most"]
    assert apart["full: TerraTorch"] == 0
    assert apart["full: kit, plain"] == pytest.approx(0.03)
