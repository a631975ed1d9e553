"""The explorer without a browser: choices, previews, runs, code, files."""

from __future__ import annotations

import ast
import asyncio
import base64
import json
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from toy import BANDS, change_data, toy_data

import geopeft_kit as gk
from geopeft_kit.data import Chip, write_chip_folder
from geopeft_kit.explorer.choice import Choice, defaults_of
from geopeft_kit.explorer.figures import positions_in
from geopeft_kit.explorer.session import Session, pareto_front
from geopeft_kit.explorer.threads import MainThreadQueue
from geopeft_kit.training.evaluate import HEADLINE

EVIL = "<img src=x onerror=alert(1)>"
TINY = {"tiny": {"name": "geopeft_tiny"}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> gk.ChipData:
    return toy_data(tmp_path_factory.mktemp("toy"), chips=12)


@pytest.fixture
def session(data: gk.ChipData) -> Session:
    return Session({"toy": data}, TINY)


def choice_of(method: str = "lora", **fields) -> Choice:
    return Choice("toy", "", "tiny", method, **{"epochs": 1, **fields})


@pytest.fixture(scope="module")
def explored(data: gk.ChipData) -> gk.Explorer:
    """An explorer with two runs, shared by the tests that only look."""
    explorer = gk.Explorer(data, methods=["frozen", "bias", "lora", "upetu"])
    for method in ("bias", "lora"):
        # a decoder without a head start: after an epoch the two still differ
        explorer.choose(method=method, decoder="fcn", epochs=1).train().wait()
    return explorer


# --- choices --------------------------------------------------------------------------


def test_a_choice_keeps_only_what_was_changed():
    plain = choice_of()
    assert choice_of(options={"rank": 16, "layers": "all"}) == plain
    assert choice_of(options={"rank": 4}).options == {"rank": 4}
    assert choice_of(options={"rank": 4}).key != plain.key
    assert Choice(**json.loads(plain.key)) == plain


@pytest.mark.parametrize("name", ["rnk", 'rank=1); print("in") #'])
def test_unknown_options_never_reach_the_code(name: str):
    with pytest.raises(ValueError, match="has no option"):
        choice_of(options={name: 4})
    with pytest.raises(ValueError, match="no method 'lore'"):
        choice_of("lore")


@pytest.mark.parametrize("card", gk.list_methods(), ids=lambda card: card.name)
def test_the_controls_say_each_choice_and_read_it_back(explored, card):
    from geopeft_kit.explorer.controls import Controls

    controls = Controls(explored.session, [card.name])
    first = controls.choice()
    assert first.method == card.name
    assert first.options == {}, "the controls of defaults change something"
    changed = {
        name: value + 1
        for name, value in defaults_of(card).items()
        if isinstance(value, int) and not isinstance(value, bool)
    }
    wanted = Choice(
        first.data, "", first.backbone, card.name, {**changed, "layers": "last:2"},
        "fcn", 7, 0.002, 3,
    )  # fmt: skip
    controls.set(wanted)
    assert controls.choice() == wanted


def test_texts_become_lists_numbers_and_words(explored):
    explored.choose(method="lora", options={"targets": ["q", "v"], "alpha": 2.5})
    assert explored.choice.options == {"targets": ["q", "v"], "alpha": 2.5}
    with pytest.raises(ValueError, match="not offered"):
        explored.choose(method="vpt")
    explored.controls.rate.value = "fast"
    assert "write a number" in explored.page.notes.value
    assert explored.page.train_button.disabled
    explored.controls.rate.value = ""
    assert not explored.page.train_button.disabled


# --- before training ------------------------------------------------------------------


@pytest.mark.parametrize("method", ["frozen", "full", "lora", "vpt", "vit_adapter"])
def test_the_preview_counts_what_is_built(session, data, method):
    preview = session.preview(choice_of(method, decoder="fcn"))
    backbone = gk.load_backbone("geopeft_tiny", bands=data.bands)
    plain = sum(p.numel() for p in backbone.parameters())
    adapter = gk.attach(backbone, method)
    model = gk.build_model(backbone, "fcn", data.task, data.num_classes)
    trained = {id(p): p.numel() for p in model.parameters() if p.requires_grad}
    assert preview.backbone == plain
    assert preview.adapter == adapter.num_parameters
    assert preview.adapter + preview.decoder == sum(trained.values())


def test_a_preview_leaves_the_backbone_as_it_was(session):
    backbone = session.backbone_of(choice_of())
    before, state = backbone.weights_hash(), torch.get_rng_state()
    for method in ("lora", "full", "deflect"):
        assert session.preview(choice_of(method)).reason is None
    assert backbone.weights_hash() == before
    assert backbone.adapter is None
    assert torch.equal(torch.get_rng_state(), state)


def test_the_predicted_memory_is_what_training_takes(explored):
    for run in explored.session.runs.values():
        predicted = explored.session.preview(run.choice).memory
        for part, size in predicted.items():
            measured = run.resources[f"{part}_mib"]
            assert size == pytest.approx(measured, rel=0.05, abs=0.02), part


def test_what_does_not_fit_says_why(explored, data):
    explored.choose(method="upetu")
    reason = explored.preview.reason
    assert "ConvNeXt" in reason
    assert "ConvNeXt" in explored.page.notes.value
    assert explored.page.train_button.disabled
    with pytest.raises(ValueError, match="ConvNeXt"):
        explored.train()
    strange = Session({"toy": data}, {"tiny": {"name": "geopeft_tiny_rgb"}})
    assert "does not know NIR_NARROW" in strange.preview(choice_of()).reason
    bad = explored.session.preview(
        Choice(data.name, "", "geopeft_tiny", "lora", {"rank": 0})
    )
    assert "rank" in bad.reason


# --- runs -----------------------------------------------------------------------------


def test_going_back_swaps_the_adapter_and_trains_nothing(explored, data):
    pictures, outputs = {}, {}
    image = data.dataset("test")[0]["image"][None]
    for method in ("bias", "lora", "bias"):
        explored.choose(method=method, epochs=1)
        assert not explored.training
        assert explored.shown.adapter.active, "it was not swapped in"
        model = explored.model
        with torch.inference_mode():
            output = model(image)
        picture = explored.page.picture.value
        if method in outputs:
            assert torch.equal(output, outputs[method])
            assert picture == pictures[method]
        outputs[method], pictures[method] = output, picture
    assert not torch.equal(outputs["bias"], outputs["lora"])
    assert pictures["bias"] != pictures["lora"]
    assert len(explored.runs) == 2


def test_the_kept_prediction_is_that_of_the_swapped_model(explored, data):
    run = next(r for r in explored.session.runs.values() if r.choice.method == "bias")
    explored.choose(method="lora", epochs=1)
    explored.model  # noqa: B018  (the other adapter is active now)
    guess = explored.session.predict(run, 1)
    explored.choose(method="bias", epochs=1)
    with torch.inference_mode():
        output = explored.model(data.dataset("test")[1]["image"][None])
    assert np.array_equal(guess, output.argmax(1)[0].numpy())


@pytest.mark.slow
def test_a_run_repeats_although_the_page_was_used_meanwhile(data):
    """Dropout, order and weights of a training do not notice the previews."""
    options = {"tokens": 4, "dropout": 0.3}
    wanted = choice_of("vpt", options=options, decoder="fcn", epochs=2)
    alone = Session({"toy": data}, TINY).train(wanted, lambda news: None)
    busy = Session({"toy": data}, TINY)
    found = []
    thread = threading.Thread(
        target=lambda: found.append(busy.train(wanted, lambda news: None))
    )
    thread.start()
    looked = 0
    while thread.is_alive():
        for method in ("lora", "full", "convpass"):
            busy._previews.clear()
            assert busy.preview(choice_of(method)).reason is None
            looked += thread.is_alive()
    thread.join()
    assert looked > 2, "the training ended before it could be disturbed"
    assert found[0].scores == alone.scores
    assert [row["loss"] for row in found[0].rows] == [row["loss"] for row in alone.rows]


def test_a_backbone_is_loaded_once_and_never_beside_a_training(data):
    """Loading draws random numbers, and all threads draw from the same ones."""
    session, found = Session({"toy": data}, TINY), []
    ask = lambda: found.append(session.backbone_of(choice_of("lora")))  # noqa: E731
    threads = [threading.Thread(target=ask) for _ in range(2)]
    with session.lock.training():
        state = torch.get_rng_state()
        for thread in threads:
            thread.start()
        threads[0].join(timeout=0.5)
        assert found == []
        assert torch.equal(torch.get_rng_state(), state)
    for thread in threads:
        thread.join()
    assert found[0] is found[1]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_cancel_leaves_everything_as_it_was(data):
    explorer = gk.Explorer(data, methods=["lora", "bias"])
    backbone = explorer.session.backbone_of(explorer.choice)
    before = backbone.weights_hash()
    explorer.choose(method="bias", decoder="fcn", epochs=1).train().wait()
    explorer.choose(method="lora", epochs=500).train()
    with pytest.raises(RuntimeError, match="under way"):
        explorer.train()
    explorer.cancel().wait()
    assert "Cancelled" in explorer.page.notes.value
    assert explorer.shown is None
    assert [run.choice.method for run in explorer.session.runs.values()] == ["bias"]
    backbone.adapter.deactivate() if backbone.adapter else None
    assert backbone.weights_hash() == before
    explorer.choose(epochs=1).train().wait()
    again = Session(explorer.session.data, explorer.session.backbones)
    assert (
        explorer.shown.scores == again.train(explorer.choice, lambda news: None).scores
    )


def test_a_second_click_a_new_cell_and_the_stop_button(data, monkeypatch):
    """Train twice is once; a new explorer, or a stopped cell, ends the training."""
    explorer = gk.Explorer(data, methods=["bias"])
    explorer.choose(decoder="fcn", epochs=10_000)
    explorer.page.train_button.click()
    thread = explorer._thread
    explorer.page.train_button.disabled = False  # the click that was quicker
    explorer.page.train_button.click()
    assert explorer._thread is thread and "Traceback" not in explorer.page.notes.value
    again = gk.Explorer(data, methods=["bias"])
    assert "was cancelled" in again.page.notes.value
    explorer.wait()
    assert not explorer.training and len(explorer.runs) == 0
    again.choose(decoder="fcn", epochs=10_000).train()

    def stop(_: float) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    thread = again._thread
    monkeypatch.setattr(thread, "join", stop)
    with pytest.raises(KeyboardInterrupt):
        again.wait()
    again.wait()
    assert not thread.is_alive() and len(again.runs) == 0


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_rate_that_is_none_is_refused_before_training(data, rate):
    explorer = gk.Explorer(data, methods=["bias"]).choose(learning_rate=rate)
    assert "number above 0" in explorer.page.notes.value
    assert explorer.page.train_button.disabled
    with pytest.raises(ValueError, match="number above 0"):
        explorer.train()


def test_a_typing_error_in_an_option_fills_no_memory(data):
    explorer = gk.Explorer(data, methods=["lora"]).choose(options={"rank": 100_000})
    assert "rank is 100,000" in explorer.page.notes.value
    assert explorer.page.train_button.disabled


def test_runs_are_told_apart_and_downloaded(explored):
    table = explored.runs
    assert {"learning_rate", "options", "seed"} <= set(table.columns)
    plain = choice_of("lora", learning_rate=1e-3, seed=3).title
    assert plain == "lora (learning rate 0.001, seed 3) + linear"
    explored.show("Runs")
    address = re.search(r"base64,([^\"]+)", explored.page.table.value)[1]
    assert base64.b64decode(address).decode() == table.to_csv(index=False)
    explored.show("Picture")
    assert re.search(r'alt="Chip [^"]+image and truth', explored.page.picture.value)


def test_a_word_in_a_list_a_path_and_the_region_given_anyway(data):
    explorer = gk.Explorer(data, methods=["lora"])
    explorer.choose(options={"targets": ["q"]})
    assert explorer.choice.options == {"targets": ["q"]}
    (given,) = explorer.controls._given()
    assert explorer.choose(held_out=given).choice.held_out == ""
    with pytest.raises(TypeError, match="gk.ChipData"):
        gk.Explorer(str(data.folder))


def test_an_error_is_shown_in_full_and_the_widget_lives_on(tmp_path: Path):
    toy_data(tmp_path, chips=12)
    data = gk.ChipData(tmp_path, split="index", batch_size=4, cache=False)
    explorer = gk.Explorer(data, methods=["bias"])
    explorer.choose(decoder="fcn", epochs=1)
    lost = tmp_path / "images" / "chip_002.tif"
    lost.rename(tmp_path / "lost.tif")
    with pytest.raises(RuntimeError, match="Traceback"):
        explorer.train().wait()
    shown = explorer.page.notes.value
    assert "Traceback" in shown and "chip_002" in shown
    (tmp_path / "lost.tif").rename(lost)
    explorer.train().wait()
    assert explorer.shown is not None
    assert "Traceback" not in explorer.page.notes.value


def test_the_front_is_what_no_run_beats(explored):
    run = next(iter(explored.session.runs.values()))
    random = np.random.default_rng(0)

    class Fake:
        model = run.model

        def __init__(self) -> None:
            self.memory, self._score = random.integers(1, 9), random.integers(1, 9)

        def score(self) -> float:
            return float(self._score)

    runs = [Fake() for _ in range(40)]
    front = pareto_front(runs)
    for one in runs:
        beaten = [
            r
            for r in runs
            if r.memory <= one.memory
            and r.score() >= one.score()
            and (r.memory, r.score()) != (one.memory, one.score())
        ]
        point = (one.memory, one.score())
        assert (point in [(r.memory, r.score()) for r in front]) == (not beaten)


def test_another_region_is_held_out(data):
    explorer = gk.Explorer(
        gk.ChipData(data.folder, test_regions=["far"], batch_size=4), methods=["bias"]
    )
    explorer.choose(held_out="near")
    held = explorer.session.data_of(explorer.choice)
    regions = held.index.loc[held.index["split"] == "test", "region"].unique()
    assert list(regions) == ["near"]
    assert 'test_regions=["near"]' in explorer.code
    places = [label for label, _ in explorer.page.place.options]
    assert all(label.startswith("near: ") for label in places)


def test_the_map_compares_two_runs_and_takes_boxes(explored, data):
    bias, lora = explored.session.runs.values()
    explored.choose(method="lora", epochs=1).show("Map")
    explored.page.other.value = bias.choice.key
    scene = list(explored.page._maps.values())[-1]
    names = [layer.name for layer in scene.layers]
    assert [names[i] for i in scene.swipe] == [lora.name, bias.name]
    west, south, east, north = data.index[data.index["split"] == "test"].total_bounds
    assert positions_in(data, (west, south, east, north))
    added = scene.on_box((west, south, east, north))
    assert f"box 1: {lora.name}" in [layer.name for layer in added]
    with pytest.raises(ValueError, match="touches 0 of"):
        scene.on_box((west - 2, south, west - 1, north))
    explored.page.other.value = ""
    explored.show("Picture")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["regression", "classification", "change"])
def test_each_task_trains_and_shows_what_it_found(task: str, tmp_path: Path):
    if task == "change":
        data = change_data(tmp_path / "toy", classes=2)
    else:
        data = toy_data(tmp_path / "toy", task, chips=12)
    explorer = gk.Explorer(data, methods=["frozen", "lora"])
    pictures = []
    for method in ("frozen", "lora"):
        explorer.choose(method=method, epochs=1).train().wait()
        pictures.append(explorer.page.picture.value)
    assert pictures[0] and pictures[1]
    explorer.show("Map")
    (shown,) = explorer.page.map_box.children
    if task == "classification":
        assert "no map to draw" in shown.value
    else:
        assert type(shown).__module__.startswith("ipyleaflet") or shown.children
    explorer.show("Runs")
    head, _ = HEADLINE[task]
    for run in explorer.session.runs.values():
        assert run.score() == run.scores["test"]["overall"][head]
        assert f"{run.score():.3f}" in explorer.page.table.value
    assert "Traceback" not in explorer.page.notes.value


@pytest.mark.slow
def test_super_resolution_is_trained_shown_written_down_and_kept(
    tmp_path: Path, capsys
):
    toy_data(tmp_path / "toy", chips=12)
    data = gk.ChipData(tmp_path / "toy", test_regions=["far"], batch_size=4)
    finer = data.for_super_resolution(2)
    explorer = gk.Explorer(finer, methods=["frozen"]).choose(epochs=1)
    empty = explorer.page.picture.value
    run = explorer.train().wait().shown
    assert explorer.page.picture.value != empty
    assert explorer.session.predict(run, 0).shape == (6, 32, 32)
    assert set(run.scores["test"]["overall"]) == {"psnr", "ssim"}
    explorer.show("Map")
    layers = next(iter(explorer.page._maps.values())).layers
    shapes = {layer.name: layer.source[0].array.shape for layer in layers}
    assert {layer.kind for layer in layers} == {"image"}
    assert shapes == {
        "image": (6, 16, 16), "truth": (6, 32, 32), run.name: (6, 32, 32),
    }  # fmt: skip
    capsys.readouterr()
    exec(compile(explorer.code, "cell", "exec"), {})
    assert numbers(capsys.readouterr().out) == [
        run.scores[split]["overall"] for split in ("val", "test")
    ]
    folder = explorer.save(tmp_path / "prepared")
    loaded = gk.Explorer.load(folder, finer)
    assert loaded.page.picture.value == explorer.page.picture.value
    with pytest.raises(ValueError, match="other chips, splits or bands"):
        gk.Explorer.load(folder, data.for_super_resolution(4))
    explorer.choose(held_out="near")
    assert explorer.session.data_of(explorer.choice).factor == 2
    assert explorer.preview.reason is None


def placeless(folder, task, classes, region="", name="Nowhere") -> gk.ChipData:
    """Six chips of random numbers without a place on Earth."""
    random = np.random.default_rng(0)
    kind = np.uint8 if task == "segmentation" else np.float32
    chips = (
        Chip(
            name=f"chip_{n}",
            image=random.integers(0, 3000, (len(BANDS), 32, 32)).astype(np.uint16),
            mask=random.integers(0, 2, (32, 32)).astype(kind),
            region=f"{region}{'ab'[n % 2]}",
            split=["train", "test"][n % 2],
        )
        for n in range(6)
    )
    info = {"name": name, "task": task, "bands": BANDS, "scale": 1e-4}
    write_chip_folder(folder, chips, {**info, "classes": classes})
    return gk.ChipData(folder, split="index", batch_size=3)


@pytest.mark.parametrize("task", ["segmentation", "regression"])
def test_chips_without_a_place_say_so_where_the_map_would_be(task, tmp_path: Path):
    classes = ("one", "two") if task == "segmentation" else ()
    data = placeless(tmp_path / "nowhere", task, classes)
    explorer = gk.Explorer(data, methods=["bias"]).show("Map")
    shown = explorer.page.map_box.children[0].value
    assert "no place on a map" in shown
    assert "chip_1" in shown  # which one, whatever the task
    assert "Traceback" not in explorer.page.notes.value


# --- code -----------------------------------------------------------------------------


def numbers(text: str) -> list[dict[str, float]]:
    lines = [line for line in text.splitlines() if line.startswith(("valid", "held"))]
    return [ast.literal_eval(line[line.index("{") :]) for line in lines]


def simulated() -> gk.ChipData:
    return gk.simulated_data(
        "burn", chips_per_region=6, size=32, scene_size=64, seed=3, batch_size=4,
        train_regions=["temperate", "boreal"], val_fraction=0.4,
    ).subset(6, seed=2)  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)  # importing torch anew takes minutes on a busy machine
@pytest.mark.parametrize(("source", "weights", "choice"), [
    ("folder", "default",
     {"method": "lora", "options": {"rank": 4, "targets": ["q", "fc1"]},
      "decoder": "fcn", "epochs": 2, "seed": 5}),
    ("simulated", None, {"method": "full", "epochs": 1, "learning_rate": 1e-3}),
])  # fmt: skip
def test_the_code_gives_the_same_numbers_in_an_empty_process(
    tmp_path, data, source, weights, choice
):
    data = simulated() if source == "simulated" else data
    backbones = {"tiny": {"name": "geopeft_tiny", "weights": weights}}
    explorer = gk.Explorer(data, backbones, methods=["lora", "full"])
    explorer.choose(**choice).train().wait()
    assert (str(data.folder) in explorer.code) == (source == "folder")
    script = tmp_path / "cell.py"
    script.write_text(explorer.code)
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path
    )
    scores = explorer.shown.scores
    expected = [scores["val"]["overall"], scores["test"]["overall"]]
    assert numbers(done.stdout) == expected, done.stderr[-2000:]


# --- on disk --------------------------------------------------------------------------


@pytest.mark.slow
def test_a_saved_explorer_comes_back_without_training(explored, data, tmp_path):
    explored.choose(method="lora", epochs=1)
    folder = explored.save(tmp_path / "prepared")
    kinds = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert kinds == {".json", ".safetensors"}
    loaded = gk.Explorer.load(folder, data)
    assert loaded.code == explored.code
    assert loaded.runs.equals(explored.runs)
    image = data.dataset("test")[0]["image"][None]
    for method in ("bias", "lora"):
        explored.choose(method=method, epochs=1)
        loaded.choose(method=method, epochs=1)
        with torch.inference_mode():
            assert torch.equal(loaded.model(image), explored.model(image))
        assert loaded.page.picture.value == explored.page.picture.value
    assert (
        explored.session.backbone_of(explored.choice).adapter is explored.shown.adapter
    )
    explored.save(folder)  # replaces the one that is there
    assert len(gk.Explorer.load(folder, data).runs) == 2


def test_a_run_is_saved_by_a_click_and_its_code_says_so(
    explored, data, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    explored.choose(method="lora", epochs=1).show("Code")
    page, run = explored.page, explored.shown
    assert "save_model" not in explored.code
    assert page.folder.placeholder == "runs/lora_fcn"
    page.save_button.click()
    assert "gk.load_model(&#39;runs/lora_fcn&#39;)" in page.notes.value
    assert 'gk.save_model(model, "runs/lora_fcn")' in explored.code
    assert "save_model" in page.code.value
    assert page.folder.placeholder == "runs/lora_fcn_2"  # nothing is overwritten
    loaded = gk.load_model("runs/lora_fcn")
    image = data.dataset("test")[0]["image"][None]
    with torch.inference_mode():
        assert torch.equal(loaded(image), explored.model(image))
    assert loaded.classes == data.classes and loaded.colours == data.colours

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    page.folder.value = "mine"
    page.save_button.click()
    assert "The run was not saved" in page.notes.value
    assert "Traceback" not in page.notes.value
    assert run.saved == "runs/lora_fcn"
    page.folder.value = "mine/own"
    page.save_button.click()
    assert gk.load_model("mine/own").bands == list(data.bands)
    run.saved = ""  # as the tests that follow expect it
    explored.show("Picture")
    explored.choose(method="frozen")
    assert page.save_button.disabled
    with pytest.raises(RuntimeError, match="no trained model"):
        explored.save_run()


@pytest.mark.slow
def test_a_saved_explorer_is_checked(explored, data, tmp_path):
    with pytest.raises(FileNotFoundError, match="explorer.json"):
        gk.Explorer.load(tmp_path, data)
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match="not an explorer"):
        explored.save(tmp_path)
    folder = explored.save(tmp_path / "prepared")
    with pytest.raises(ValueError, match="other chips, splits or bands"):
        gk.Explorer.load(folder, data.subset(4))
    with pytest.raises(ValueError, match="same labels"):
        gk.Explorer.load(folder, {"another": data})
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    decoder = next(broken.rglob("model.safetensors"))
    decoder.write_bytes(decoder.read_bytes()[:100])
    with pytest.raises(ValueError, match="is damaged"):
        gk.Explorer.load(broken, data)
    (broken / "explorer.json").write_text("{")
    with pytest.raises(ValueError, match="truncated"):
        gk.Explorer.load(broken, data)


# --- text, threads --------------------------------------------------------------------


def test_names_from_data_are_text(tmp_path: Path):
    data = placeless(tmp_path, "segmentation", (EVIL, "two"), f"{EVIL} ", EVIL)
    explorer = gk.Explorer(data, {EVIL: {"name": "geopeft_tiny"}}, methods=["bias"])
    explorer.choose(decoder="fcn", epochs=1).train().wait()
    for number in range(4):
        explorer.page.tabs.selected_index = number
    page = explorer.page
    shown = [page.as_html(), page.table.value, page.code.value, page.progress.value]
    shown += [child.value for child in page.map_box.children]
    for text in shown:
        assert EVIL not in text
        assert "<img src=x" not in text
    assert "&lt;img src=x" in page.table.value
    assert "no place on a map" in page.map_box.children[0].value


def test_the_queue_calls_in_the_thread_that_made_it():
    async def main() -> list[int]:
        box, seen = MainThreadQueue(), []
        thread = threading.Thread(
            target=lambda: box.put(lambda: seen.append(threading.get_ident()))
        )
        thread.start()
        await asyncio.sleep(0.05)
        return seen

    assert asyncio.run(main()) == [threading.get_ident()]
