"""The explorer as a person uses it: in a real JupyterLab, and once in Notebook 7.

Each step waits for what must change - a value, a picture's bytes - and compares it; no
step only looks whether something is there. Screenshots of each state are kept in the
test's folder.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from browser import Visit, jupyter_lab, write_notebook

import geopeft_kit as gk

pytestmark = [pytest.mark.slow, pytest.mark.browser, pytest.mark.timeout(1800)]

WAIT = 240_000  # milliseconds; a busy machine has to be waited for
EVIL = "<img src=x onerror=window.hacked=1>"
SETUP = f"""
import sys
sys.path.insert(0, {{tests!r}})
from pathlib import Path
from toy import toy_data
import geopeft_kit as gk
data = toy_data(Path("toy"), chips=12)
data.classes = [{EVIL!r}, "high"]
"""
SHOW = 'explorer = gk.Explorer(data, {"tiny": {"name": "geopeft_tiny"}})\nexplorer'


CHECKSUM = """async selector => {
  const bytes = await (await fetch(document.querySelector(selector).src)).arrayBuffer();
  const hash = new Uint8Array(await crypto.subtle.digest('SHA-256', bytes));
  return [...hash].map(b => b.toString(16).padStart(2, '0')).join('');
}"""


class Hand:
    """What a person does with the explorer, and what they see."""

    def __init__(self, page: Any, folder: Path) -> None:
        self.page, self.folder = page, folder
        page.set_default_timeout(WAIT)
        page.locator(".gpk-explorer").wait_for()
        self.await_state("parameters", "counted")

    def text(self, panel: str) -> str:
        return self.page.locator(f".gpk-{panel} .widget-html-content").inner_text()

    def state(self, panel: str) -> str:
        inner = self.page.locator(f".gpk-{panel} [data-gpk-state]")
        return inner.get_attribute("data-gpk-state") if inner.count() else ""

    def await_state(self, panel: str, state: str) -> None:
        self.page.wait_for_selector(f".gpk-{panel} [data-gpk-state='{state}']")

    def picture(self, name: str = "picture") -> str:
        """Checksum of the bytes of a picture in the page."""
        return self.page.evaluate(CHECKSUM, f"img.gpk-{name}")

    def await_picture(self, same: str = "", other: str = "", name="picture") -> str:
        """Wait until a picture is a certain one, or another one."""
        end = time.monotonic() + WAIT / 1000
        while time.monotonic() < end:
            now = self.picture(name)
            if (same and now == same) or (other and now != other):
                return now
            self.page.wait_for_timeout(100)
        raise AssertionError(f"the {name} did not change as it has to")

    def pick(self, name: str, begin: str) -> None:
        """Choose the option of a dropdown that begins with a text."""
        box = self.page.locator(f".gpk-{name} select")
        texts = box.locator("option").all_inner_texts()
        plain = [text.replace("\xa0", " ") for text in texts]
        box.select_option(
            index=next(i for i, text in enumerate(plain) if text.startswith(begin))
        )

    def method(self, key: str) -> None:
        self.pick("method", f"{key}: ")

    def click(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).click()

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name, exact=True).click()

    def number(self, name: str, value: int) -> None:
        box = self.page.locator(f".gpk-{name} input")
        box.fill(str(value))
        box.press("Enter")

    def seconds_until_redrawn(self, act: Callable[[], None]) -> float:
        """Do something and wait until the parameters are drawn anew."""
        before, start = self.text("parameters"), time.monotonic()
        act()
        self.page.wait_for_function(
            "old => document.querySelector('.gpk-parameters .widget-html-content')"
            ".innerText !== old",
            arg=before,
            polling=20,
        )
        return time.monotonic() - start

    def shoot(self, name: str) -> None:
        self.page.screenshot(path=self.folder / f"{name}.png")


def limit() -> float:
    """Seconds that a toggle may take: 1, more on a machine that is overloaded."""
    busy = os.getloadavg()[0] / (os.cpu_count() or 1)
    return max(1.0, busy)


def counts(text: str) -> dict[str, int]:
    """Numbers in the panel of parameters."""
    found = re.findall(r"(backbone|adapter|decoder)\s+([\d,]+)", text)
    return {name: int(number.replace(",", "")) for name, number in found}


def choose_before_training(hand: Hand) -> None:
    """Toggles redraw sizes at once, and what does not fit says why."""
    lora = counts(hand.text("parameters"))
    times = [hand.seconds_until_redrawn(lambda k=k: hand.method(k)) for k in
             ("bias", "ssf", "vpt")]  # fmt: skip
    vpt = counts(hand.text("parameters"))
    assert vpt["backbone"] == lora["backbone"] and vpt["adapter"] != lora["adapter"]
    memory = hand.text("memory")
    times.append(hand.seconds_until_redrawn(lambda: hand.pick("decoder", "unet")))
    unet = counts(hand.text("parameters"))
    assert unet["adapter"] == vpt["adapter"] and unet["decoder"] > vpt["decoder"]
    assert hand.text("memory") != memory
    print("seconds until a toggle was redrawn:", [round(t, 2) for t in times])
    assert min(times) < limit()
    hand.method("upetu")
    hand.await_state("notes", "refused")
    assert "ConvNeXt" in hand.text("notes")
    assert hand.page.locator(".gpk-train").is_disabled()
    hand.shoot("refused")


def train(hand: Hand, method: str, number: int) -> None:
    hand.method(method)
    hand.await_state("parameters", "counted")
    hand.page.locator(".gpk-train:not([disabled])").click()
    hand.await_state("progress", f"run:{number}")


def toggle_while_training_then_cancel(hand: Hand) -> None:
    hand.method("lora")
    hand.pick(
        "decoder", "fcn"
    )  # without a head start: the runs differ after two epochs
    hand.number("epochs", 400)
    hand.page.locator(".gpk-train:not([disabled])").click()
    hand.page.wait_for_function(
        "/step [1-9]/.test(document.querySelector('.gpk-progress').innerText)"
    )
    times = [hand.seconds_until_redrawn(lambda k=k: hand.method(k)) for k in
             ("bias", "norm", "ssf", "bias")]  # fmt: skip
    print("the same while training:", [round(t, 2) for t in times])
    assert min(times) < limit()
    assert hand.state("progress") == "training", "the training ended too early"
    step = r"step (\d+)/"
    first = int(re.search(step, hand.text("progress"))[1])
    hand.page.wait_for_function(
        "old => +document.querySelector('.gpk-progress').innerText"
        ".match(/step (\\d+)/)[1] > old",
        arg=first,
    )
    hand.shoot("training")
    hand.click("Cancel")
    hand.await_state("progress", "untrained")
    assert "Cancelled" in hand.text("notes")
    assert hand.page.locator(".gpk-cancel").is_disabled()
    hand.number("epochs", 2)


def train_two_and_switch_back(hand: Hand) -> None:
    empty = hand.picture()
    train(hand, "lora", 1)
    lora, progress = hand.await_picture(other=empty), hand.text("progress")
    hand.shoot("trained")
    train(hand, "bias", 2)
    hand.await_picture(other=lora)
    hand.tab("Runs")
    hand.await_state("table", "runs:2")
    rows = hand.page.locator(".gpk-table tr").all_inner_texts()
    assert len(rows) == 3 and "lora" in rows[1] and "bias" in rows[2]
    shown = hand.page.locator(".gpk-table tr.shown td").first
    assert shown.inner_text().endswith("2 bias + fcn")
    front = hand.picture("trade-off")
    hand.shoot("runs")
    hand.method("lora")
    hand.await_state("progress", "run:1")
    hand.await_picture(other=front, name="trade-off")  # the shown run is marked
    assert shown.inner_text().endswith("1 lora + fcn")
    hand.tab("Picture")
    hand.await_picture(same=lora)
    assert hand.text("progress") == progress
    assert hand.page.locator(".gpk-run option").count() == 2


def show_the_map(hand: Hand) -> None:
    """Two runs on two sides of a divider; `test_region_map` works the map by hand."""
    page = hand.page
    hand.pick("other", "2 bias + fcn")
    hand.tab("Map")
    page.wait_for_selector(".gpk-map .leaflet-image-layer")
    page.locator(".leaflet-sbs-divider").wait_for()
    assert EVIL in page.locator(".gpk-legend").inner_text().replace("\n", " ")
    cuts = page.eval_on_selector_all(
        ".leaflet-pane", "all => all.map(p => p.style.clip).filter(c => c)"
    )
    assert len(set(cuts)) == 2, "the two runs are cut alike"
    hand.shoot("swipe")


def copy_code(hand: Hand) -> str:
    hand.tab("Code")
    code = hand.page.locator("pre.gpk-code")
    code.wait_for()
    hand.page.locator(".gpk-copy").click()
    hand.page.wait_for_function(
        "document.querySelector('.gpk-copy').textContent === 'Copied'"
    )
    copied = hand.page.evaluate("navigator.clipboard.readText()")
    assert copied.strip() == code.inner_text().strip()
    assert 'gk.attach(backbone, "lora")' in copied and "epochs=2" in copied
    hand.shoot("code")
    return copied


def save_this_run(hand: Hand, folder: Path) -> None:
    """A sentence says where the run is, or why it is not; the code follows."""
    code = hand.page.locator("pre.gpk-code")
    before = code.inner_text()
    place = hand.page.locator(".gpk-folder input")
    (folder / "taken").mkdir()
    (folder / "taken" / "notes.txt").write_text("mine")
    place.fill("taken")
    place.press("Enter")
    hand.click("Save this run")
    hand.await_state("notes", "refused")
    said = hand.text("notes")
    assert "was not saved" in said and "notes.txt" in said and "Traceback" not in said
    assert code.inner_text() == before
    hand.shoot("not_saved")
    place.fill("")
    place.press("Enter")
    hand.click("Save this run")
    hand.page.get_by_text("Saved. In the next session").wait_for()
    assert "gk.load_model('runs/lora_fcn')" in hand.text("notes")
    assert 'gk.save_model(model, "runs/lora_fcn")' in code.inner_text()
    hand.shoot("saved")
    assert gk.load_model(folder / "runs" / "lora_fcn").classes == [EVIL, "high"]


def no_overflow(page: Any) -> None:
    """Nothing is cut off or wider than its place at 1280 pixels."""
    wide = page.evaluate(
        "[...document.querySelectorAll('.gpk-explorer, .gpk-explorer *')].filter(e =>"
        " e.clientWidth && e.scrollWidth > e.clientWidth + 2 &&"
        " getComputedStyle(e).overflowX === 'auto')"
        ".map(e => e.className + ': ' + e.scrollWidth + ' in ' + e.clientWidth)"
    )
    assert wide == []
    edge = page.locator(".gpk-explorer").bounding_box()
    assert edge["x"] + edge["width"] <= 1280


def open_notebook(visit: Visit, lab: Any) -> None:
    visit.page.set_viewport_size({"width": 1280, "height": 960})
    lab.open(visit.page, "explorer.ipynb", timeout=300)
    lab.run_all(visit.page)


def notebook(folder: Path) -> Path:
    tests = str(Path(__file__).parent)
    return write_notebook(folder / "explorer.ipynb", [SETUP.format(tests=tests), SHOW])


def test_in_jupyterlab(visit: Visit, tmp_path: Path) -> None:
    notebook(tmp_path)
    page = visit.page
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    with jupyter_lab(tmp_path, timeout=300) as lab:
        open_notebook(visit, lab)
        hand = Hand(page, tmp_path)
        no_overflow(page)
        choose_before_training(hand)
        toggle_while_training_then_cancel(hand)
        train_two_and_switch_back(hand)
        no_overflow(page)
        show_the_map(hand)
        copy_code(hand)
        save_this_run(hand, tmp_path)
        no_overflow(page)
        code = page.locator("pre.gpk-code").inner_text()
        seen = hand.text("progress"), hand.text("parameters")
        page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
        page.reload()
        hand = Hand(page, tmp_path)
        assert (hand.text("progress"), hand.text("parameters")) == seen
        assert page.locator("pre.gpk-code").inner_text().strip() == code.strip()
        hand.method("bias")
        hand.await_state("progress", "run:2")
        assert page.evaluate("window.hacked") is None
    visit.clean()


def test_in_notebook_7(visit: Visit, tmp_path: Path) -> None:
    notebook(tmp_path)
    with jupyter_lab(tmp_path, timeout=300, front_end="notebook") as lab:
        open_notebook(visit, lab)
        hand = Hand(visit.page, tmp_path)
        hand.number("epochs", 1)
        before = hand.picture()
        train(hand, "bias", 1)
        hand.await_picture(other=before)
        hand.tab("Map")
        visit.page.wait_for_selector(".gpk-map .leaflet-image-layer")
        hand.shoot("notebook_7")
    assert visit.external == []
