"""Chip folders: what is written is read back, splits do not leak, errors say what."""

from __future__ import annotations

import datetime as dt
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import geopandas as gpd
import lightning as L
import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from rasterio.transform import from_origin

from geopeft_kit.data import Chip, ChipData, read_chip_folder, write_chip_folder
from geopeft_kit.data.folder import FACTS
from geopeft_kit.data.index import INDEX
from geopeft_kit.data.leakage import check_leakage, touching_chips
from geopeft_kit.data.loading import AugmentedKey, EpochSampler, flip_and_turn

HLS = ("BLUE", "GREEN", "RED", "NIR_NARROW", "SWIR_1", "SWIR_2")
CRS = "EPSG:32633"
INFO: dict[str, Any] = {
    "name": "Toy",
    "task": "segmentation",
    "bands": HLS,
    "classes": ["dry", "water"],
    "scale": 1e-4,
}


def place(number: int, region: int) -> dict[str, Any]:
    """Georeference of a 16-pixel chip; chips lie 2 km apart, regions 50 km."""
    transform = from_origin(3e5 + number * 2e3, 5e6 - region * 5e4, 10, 10)
    return {"crs": CRS, "transform": transform, "region": "abc"[region]}


def image(seed: int, bands: int = 6, size: int = 16) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(1, 4000, (bands, size, size)).astype(np.uint16)


def mask(seed: int, size: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2, (size, size))


def toy_chips(per_region: int = 6, **changes: Any) -> Iterator[Chip]:
    for region in range(3):
        for number in range(per_region):
            seed = region * 100 + number
            given = {
                "image": image(seed),
                "mask": mask(seed),
                "date": dt.date(2024, 1, 1 + number),
            }
            given |= place(number, region) | changes
            yield Chip(f"{'abc'[region]}_{number}", **given)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_chip_folder(tmp_path / "toy", toy_chips(), INFO)


@pytest.fixture
def reindex() -> Callable[..., None]:
    """Change the index of a folder by hand, hash included."""

    def change(folder: Path, **columns: Any) -> None:
        import hashlib

        index = gpd.read_parquet(folder / INDEX)
        for name, value in columns.items():
            index[name] = value
        index.to_parquet(folder / INDEX)
        facts = json.loads((folder / FACTS).read_text())
        digest = hashlib.sha256((folder / INDEX).read_bytes()).hexdigest()
        (folder / FACTS).write_text(json.dumps(facts | {"chips_sha256": digest}))

    return change


# ---------------------------------------------------------------- round trip


def test_a_batch_holds_what_was_written(folder: Path) -> None:
    data = ChipData(folder, test_regions=["b"], batch_size=3)
    batch = next(iter(data.dataloader("test")))
    assert batch["image"].shape == (3, 6, 16, 16)
    assert batch["image"].dtype == torch.float32
    assert batch["mask"].shape == (3, 16, 16)
    assert batch["mask"].dtype == torch.int64
    assert batch["region"] == ["b"] * 3
    assert batch["chip"] == ["b_0", "b_1", "b_2"]
    assert batch["crs"] == [CRS] * 3
    for i in range(3):
        torch.testing.assert_close(
            batch["image"][i], torch.tensor(image(100 + i) * 1e-4, dtype=torch.float32)
        )
        assert torch.equal(batch["mask"][i], torch.tensor(mask(100 + i)))
        with rasterio.open(folder / f"images/b_{i}.tif") as raster:
            assert tuple(batch["bounds"][i].tolist()) == tuple(raster.bounds)
    assert batch["date"].tolist() == [[[2024, i]] for i in range(3)]
    footprints = data.index[data.index["split"] == "test"].geometry[:3]
    np.testing.assert_allclose(
        batch["lonlat"].numpy(), [[g.centroid.x, g.centroid.y] for g in footprints],
        rtol=1e-6,
    )  # fmt: skip
    assert footprints.iloc[0].geom_type == "Polygon"


def test_bands_come_in_the_order_asked_and_nothing_else_is_read(folder: Path) -> None:
    data = ChipData(folder, bands=["B11", "red"], test_regions=["a"])
    assert data.bands == ("SWIR_1", "RED")
    first = data.dataset("test")[0]["image"]
    expected = image(0)[[4, 2]] * np.float32(1e-4)
    np.testing.assert_allclose(first.numpy(), expected, rtol=1e-6)


def test_scale_and_offset_can_differ_by_band(tmp_path: Path) -> None:
    scale = [1e-4 * (i + 1) for i in range(6)]
    info = INFO | {"scale": scale, "offset": -0.1}
    folder = write_chip_folder(tmp_path / "toy", toy_chips(2), info)
    data = ChipData(folder, bands=["SWIR_2", "BLUE"], test_regions=["a"])
    expected = image(0)[[5, 0]] * np.array([6e-4, 1e-4])[:, None, None] - 0.1
    np.testing.assert_allclose(data.dataset("test")[0]["image"], expected, atol=1e-6)
    with rasterio.open(folder / "images/a_0.tif") as raster:  # other tools see it too
        assert raster.scales[5] == pytest.approx(6e-4)
        assert raster.descriptions == HLS


def test_declared_nodata_is_zero_in_the_image_and_ignored_in_the_mask(
    tmp_path: Path,
) -> None:
    pixels, truth = image(0), mask(0)
    pixels[3, 2, 5] = 0
    chips = [Chip("x", pixels, truth, **place(0, 0)), *toy_chips()]
    folder = write_chip_folder(tmp_path / "toy", chips, INFO | {"nodata": 0})
    data = ChipData(folder, test_regions=["a"])
    sample = data.dataset("test")[0]
    assert (sample["image"][:, 2, 5] == 0).all()
    assert sample["mask"][2, 5] == data.ignore_index
    assert (sample["mask"] == data.ignore_index).sum() == 1
    assert (sample["image"] == 0).sum() == 6


def test_declared_nan_is_nodata_and_undeclared_nan_is_an_error(
    tmp_path: Path,
) -> None:
    holes = image(0).astype(np.float32)
    holes[:, :2] = np.nan
    chips = [Chip("holey", holes, mask(0), **place(0, 0)), *toy_chips()]
    with pytest.raises(ValueError, match=r"'holey'.*192 of 1536.*NaN"):
        write_chip_folder(tmp_path / "no", chips, INFO)
    folder = write_chip_folder(tmp_path / "yes", chips, INFO | {"nodata": float("nan")})
    sample = ChipData(folder, test_regions=["a"]).dataset("test")[0]
    assert (sample["image"][:, :2] == 0).all()
    assert (sample["mask"][:2] == 255).all()
    assert torch.isfinite(sample["image"]).all()


def test_regression_masks_are_floats_with_nan_where_unknown(tmp_path: Path) -> None:
    height = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    height[0, 0] = np.nan
    info = {k: v for k, v in INFO.items() if k != "classes"} | {"task": "regression"}
    folder = write_chip_folder(tmp_path / "toy", toy_chips(2, mask=height), info)
    data = ChipData(folder, test_regions=["a"], batch_size=2)
    batch = next(iter(data.test_dataloader()))
    assert batch["mask"].dtype == torch.float32
    np.testing.assert_array_equal(batch["mask"][1].numpy(), height)
    assert (data.num_classes, data.classes) == (1, None)


def test_classification_by_name_and_multilabel(tmp_path: Path) -> None:
    chips = [
        Chip(f"c{i}", image(i), label=["dry", "water"][i % 2], **place(i, i % 3))
        for i in range(9)
    ]
    info = INFO | {"task": "classification"}
    one = write_chip_folder(tmp_path / "one", chips, info)
    batch = next(iter(ChipData(one, test_regions=["b"]).test_dataloader()))
    assert batch["label"].tolist() == [1, 0, 1]
    assert "mask" not in batch
    for number, chip in enumerate(chips):
        chip.label = [["water"], ["dry", 1], []][number % 3]
    many = write_chip_folder(tmp_path / "many", chips, INFO | {"task": "multilabel"})
    data = ChipData(many, test_regions=["b"])
    batch = next(iter(data.test_dataloader()))
    assert batch["label"].tolist() == [[1.0, 1.0]] * 3
    third = ChipData(many, test_regions=["c"])
    assert next(iter(third.test_dataloader()))["label"].tolist() == [[0.0, 0.0]] * 3


def test_change_pairs_have_two_dates(tmp_path: Path) -> None:
    chips = list(toy_chips(3, image_after=image(77), date_after="2024-12-31"))
    folder = write_chip_folder(tmp_path / "toy", chips, INFO | {"task": "change"})
    data = ChipData(folder, bands=["RED", "BLUE"], test_regions=["a"], batch_size=2)
    batch = next(iter(data.test_dataloader()))
    assert batch["image"].shape == (2, 2, 2, 16, 16)  # (B,C,2,H,W)
    np.testing.assert_allclose(
        batch["image"][1, :, 1], image(77)[[2, 0]] * 1e-4, rtol=1e-5
    )
    np.testing.assert_allclose(
        batch["image"][1, :, 0], image(1)[[2, 0]] * 1e-4, rtol=1e-5
    )
    assert batch["date"].tolist()[0] == [[2024, 0], [2024, 365]]
    chips[0].image_after = None
    with pytest.raises(ValueError, match="a_0.*image_after"):
        write_chip_folder(tmp_path / "no", chips, INFO | {"task": "change"})


def test_files_without_a_place_keep_their_type(tmp_path: Path) -> None:
    chips = []
    for i in range(8):
        path = tmp_path / f"{i}.jpg"
        Image.fromarray(np.full((16, 16, 3), 10 * i, np.uint8)).save(path)
        chips.append(Chip(f"c{i}", path, label=i % 2, region="ab"[i // 4]))
    info = INFO | {"task": "classification", "bands": "rgb", "scale": 1 / 255}
    folder = write_chip_folder(tmp_path / "toy", chips, info)
    data = ChipData(folder, test_regions=["b"], batch_size=4)
    batch = next(iter(data.test_dataloader()))
    assert batch["bounds"].isnan().all()
    assert batch["crs"] == [""] * 4
    assert "lonlat" not in batch
    assert "date" not in batch
    assert {p.suffix for p in (folder / "images").iterdir()} == {".jpg"}
    assert abs(float(batch["image"][1].mean()) * 255 - 50) < 2


def test_unlabelled_chips_are_apart(tmp_path: Path) -> None:
    bare = [Chip(f"u{i}", image(i), **place(20 + i, 1)) for i in range(3)]
    folder = write_chip_folder(tmp_path / "toy", [*toy_chips(), *bare], INFO)
    data = ChipData(folder, test_regions=["b"])
    assert data.splits == ["train", "val", "test", "unlabelled"]
    batch = next(iter(data.dataloader("unlabelled")))
    assert batch["chip"] == ["u0", "u1", "u2"]
    assert "mask" not in batch
    assert len(data.dataset("test")) == 6


def test_chips_across_the_180th_meridian_have_two_small_footprints(
    tmp_path: Path,
) -> None:
    transform = from_origin(179.99, 0.01, 0.002, 0.002)
    chips = [Chip("fiji", image(0), mask(0), crs="EPSG:4326", transform=transform)]
    folder = write_chip_folder(tmp_path / "toy", chips, INFO)
    _, index = read_chip_folder(folder)
    assert index.geometry.iloc[0].area < 0.01


# ---------------------------------------------------------------- splits


def test_held_out_regions_test_and_validation_comes_from_the_rest(
    folder: Path,
) -> None:
    data = ChipData(folder, test_regions=["b"], val_fraction=0.34)
    counts = data.index.groupby(["split", "region"]).size().to_dict()
    assert counts == {
        ("test", "b"): 6, ("val", "a"): 2, ("val", "c"): 2,
        ("train", "a"): 4, ("train", "c"): 4,
    }  # fmt: skip
    assert data.splits == ["train", "val", "test"]
    assert data.regions == ["a", "b", "c"]
    none = ChipData(folder, test_regions="b", val_fraction=0)
    assert none.splits == ["train", "test"]
    assert none.val_dataloader() == []


def test_validation_keeps_scenes_whole_and_touching_chips_together(
    tmp_path: Path,
) -> None:
    def grid(scene: bool) -> Iterator[Chip]:
        for region in range(2):
            for block in range(5):
                for window in range(4):  # side by side: they touch
                    x = 3e5 + region * 5e4 + block * 3e3 + window * 160
                    yield Chip(
                        f"{'ab'[region]}{block}_{window}", image(window), mask(window),
                        region="ab"[region], crs=CRS,
                        transform=from_origin(x, 5e6, 10, 10),
                        extra={"scene": f"{region}{block}"} if scene else {},
                    )  # fmt: skip

    for scene in (True, False):
        folder = write_chip_folder(tmp_path / f"{scene}", grid(scene), INFO)
        data = ChipData(folder, test_regions=["b"], val_fraction=0.2)
        blocks = data.index["chip"].str[:2]
        assert data.index.groupby(blocks)["split"].nunique().max() == 1
        assert (data.index["split"] == "val").sum() == 4


def test_one_scene_without_a_place_cannot_be_split(tmp_path: Path) -> None:
    """Chips of one scene without a place: there is no area to validate on."""
    chips = toy_chips(extra={"scene": "one"}, crs=None, transform=None)
    folder = write_chip_folder(tmp_path / "toy", chips, INFO)
    with pytest.raises(ValueError, match=r"no validation chips.*val_fraction=0"):
        ChipData(folder, test_regions=["a"])


def test_the_folders_own_lists(tmp_path: Path, reindex: Callable[..., None]) -> None:
    folder = write_chip_folder(tmp_path / "toy", toy_chips(), INFO)
    with pytest.raises(ValueError, match=r"no split lists.*a, b, c.*random"):
        ChipData(folder)
    own = ["train"] * 8 + ["test"] * 6 + ["bolivia"] * 3 + [None]
    reindex(folder, split=own)
    data = ChipData(folder, split="index")
    assert data.splits == ["train", "test", "bolivia"]
    assert len(data.dataset("bolivia")) == 3
    assert "val" in ChipData(folder).splits  # drawn, since the lists have none
    assert (
        ChipData(folder, test_regions=["c"]).index["split"].tolist()[-6:]
        == ["test"] * 6
    )


def test_random_has_to_be_asked_for_and_is_reproducible(folder: Path) -> None:
    first, again = (ChipData(folder, split="random", seed=4) for _ in range(2))
    other = ChipData(folder, split="random", seed=5)
    assert first.index["split"].tolist() == again.index["split"].tolist()
    assert first.index["split"].tolist() != other.index["split"].tolist()
    assert first.index["split"].value_counts().to_dict() == {
        "train": 10, "val": 4, "test": 4,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"test_regions": ["d"]}, ["'d'", "a, b, c"]),
        ({"test_regions": []}, ["a, b, c"]),
        ({"test_regions": ["a", "b", "c"]}, ["every region", "Hold fewer"]),
        ({"split": "scene"}, ["'scene'", "region, index, random"]),
        ({"split": "random", "test_regions": ["a"]}, ["test_regions"]),
        ({"test_regions": ["a"], "val_fraction": 1.0}, ["1.0", "below 1"]),
        ({"test_regions": ["a"], "bands": ["B1"]}, ["COASTAL_AEROSOL", "BLUE"]),
        ({"test_regions": ["a"], "bands": ["RDE"]}, ["RDE", "RED"]),
        ({"test_regions": ["a"], "batch_size": 0}, ["batch_size is 0"]),
    ],
)
def test_refused_options(folder: Path, options: dict, parts: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        ChipData(folder, **options)
    for part in parts:
        assert part in str(error.value)


def test_an_empty_split_is_named_with_those_that_exist(folder: Path) -> None:
    data = ChipData(folder, test_regions=["a"], val_fraction=0)
    with pytest.raises(ValueError, match=r"'val'.*train \(12\), test \(6\)"):
        data.dataloader("val")


def test_shared_ground_is_refused_and_touching_chips_do_not_train(
    tmp_path: Path,
) -> None:
    def two(shift: float) -> Iterator[Chip]:
        for name, x in (("a", 3e5), ("b", 3e5 + shift)):
            for number in range(3):
                transform = from_origin(x, 5e6 - number * 5e3, 10, 10)
                yield Chip(f"{name}{number}", image(1), mask(1), region=name, crs=CRS,
                           transform=transform)  # fmt: skip

    overlap = write_chip_folder(tmp_path / "overlap", two(80), INFO)
    with pytest.raises(ValueError, match="3 test chips show the same ground"):
        ChipData(overlap, test_regions=["b"])
    touch = write_chip_folder(tmp_path / "touch", two(160), INFO)
    with pytest.raises(ValueError, match="all 3 training chips touch test chips"):
        ChipData(touch, test_regions=["b"])
    apart = write_chip_folder(tmp_path / "apart", two(400), INFO)
    data = ChipData(apart, test_regions=["b"])
    assert check_leakage(data.index, data.index["split"]) == 0
    with pytest.raises(ValueError, match="within 300 m"):
        ChipData(apart, test_regions=["b"], buffer_m=300)
    pairs = touching_chips(data.index, data.index["split"], buffer_m=300)
    assert set(zip(pairs["test"], pairs["train"], strict=True)) == {
        (f"b{i}", f"a{i}") for i in range(3)
    }


def test_subsets_are_nested_and_stratified(tmp_path: Path) -> None:
    chips = [
        Chip(f"c{i:02d}", image(i), label=int(i % 4 == 0), **place(i, i % 2))
        for i in range(80)
    ]
    info = INFO | {"task": "classification"}
    folder = write_chip_folder(tmp_path / "toy", chips, info)
    data = ChipData(folder, test_regions=["b"], val_fraction=0)

    def names(n: int, seed: int = 0) -> set[str]:
        smaller = data.subset(n, seed)
        assert len(smaller.dataset("train")) == n
        assert len(smaller.dataset("test")) == 40
        return {sample["chip"] for sample in smaller.dataset("train")}

    sizes = [1, 2, 4, 10, 32, 40]
    subsets = [names(n) for n in sizes]
    assert all(a < b for a, b in zip(subsets, subsets[1:], strict=False))
    assert names(10, seed=1) != subsets[3]
    labels = data.index.set_index("chip")["label"]
    assert [int(labels[list(s)].sum()) for s in subsets[2:]] == [2, 5, 16, 20]
    for wrong in (0, 41):
        with pytest.raises(ValueError, match=f"subset of {wrong}.*has 40"):
            data.subset(wrong)


def test_shots_are_counted_per_bucket_and_nested(tmp_path: Path) -> None:
    chips = [
        Chip(
            f"c{i:02d}",
            image(i),
            label=int(i % 3 == 0),
            **place(i, i % 3) | {"region": "abc"[i % 3 if i < 50 else 0]},
            split=["train", "val", "test"][i % 7 // 3],
        )
        for i in range(80)
    ]
    info = INFO | {"task": "classification"}
    folder = write_chip_folder(tmp_path / "toy", chips, info)
    data = ChipData(folder, split="index")

    def buckets(few: ChipData, split: str, by: str = "region") -> dict[str, int]:
        return few.index.query("split == @split")[by].value_counts().to_dict()

    before: set[str] = set()
    for n in (1, 2, 5, 6):
        few = data.n_shot(n, seed=3)
        assert buckets(few, "train") == {"a": n, "b": n, "c": n}
        assert buckets(few, "val") == dict.fromkeys("abc", -(-n // 5))
        assert buckets(few, "test") == buckets(data, "test")
        names = {sample["chip"] for sample in few.dataset("train")}
        assert before < names
        before = names
    assert buckets(data.n_shot(4, by="label"), "train", "label") == {0: 4, 1: 4}
    assert data.n_shot(4, 1).subsets == ('.n_shot(4, 1, "region")',)
    fewest = min(buckets(data, "train").values())
    for wrong in (0, fewest + 1):
        with pytest.raises(ValueError, match=f"{wrong} chips of each region.*1 to"):
            data.n_shot(wrong)
    with pytest.raises(ValueError, match="by is 'colour'.*region, label"):
        data.n_shot(1, by="colour")


# ---------------------------------------------------------------- order, augmentation


def test_order_depends_on_seed_and_epoch_alone() -> None:
    fresh = EpochSampler(50, seed=3)
    fresh.set_epoch(7)
    used = EpochSampler(50, seed=3)
    orders = []
    for epoch in range(8):
        used.set_epoch(epoch)
        orders.append(list(used))
        torch.rand(3)  # the global state plays no part
    assert list(fresh) == orders[7]
    assert len({tuple(o) for o in orders}) == 8
    assert all(sorted(o) == list(range(50)) for o in orders)
    assert list(EpochSampler(50, seed=4)) != orders[0]


def test_a_lone_last_chip_is_left_out_of_training_only(folder: Path) -> None:
    data = ChipData(folder, test_regions=["a"], val_fraction=0, batch_size=11)
    assert [len(b["chip"]) for b in data.train_dataloader()] == [11]
    assert [len(b["chip"]) for b in data.dataloader("train")] == [11, 1]
    assert sum(len(b["chip"]) for b in data.test_dataloader()) == 6


def test_loaders_leave_the_global_random_state_alone(folder: Path) -> None:
    data = ChipData(folder, test_regions=["a"], augment=True)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(data.train_dataloader())
    assert torch.equal(before, torch.get_rng_state())


def test_augmentation_is_the_same_for_image_and_mask_and_repeats(
    tmp_path: Path,
) -> None:
    def shown(seed: int) -> Chip:
        truth = mask(seed)
        pixels = np.repeat(truth[None], 6, 0).astype(np.uint16) * 1000
        return Chip(f"c{seed}", pixels, truth, **place(seed, seed % 2))

    folder = write_chip_folder(tmp_path / "toy", map(shown, range(32)), INFO)
    data = ChipData(folder, test_regions=["b"], batch_size=4, augment=True, seed=2)
    plain = {s["chip"]: s["mask"] for s in data.dataset("train")}

    def epoch(number: int, **options: Any) -> dict[str, torch.Tensor]:
        loader = data.dataloader("train", shuffle=True, **options)
        loader.sampler.set_epoch(number)
        seen = {}
        for batch in loader:
            expected = batch["mask"].float() * 0.1
            torch.testing.assert_close(batch["image"][:, 0], expected)
            seen |= dict(zip(batch["chip"], batch["mask"], strict=True))
        return seen

    one, again, two = epoch(1), epoch(1), epoch(2)
    assert all(torch.equal(one[c], again[c]) for c in one if c in again)
    assert any(not torch.equal(one[c], two[c]) for c in one)
    assert any(not torch.equal(one[c], plain[c]) for c in one)
    off = epoch(1, augment=False)
    assert all(torch.equal(off[c], plain[c]) for c in off)
    for batch in data.dataloader("val"):
        assert (batch["image"][:, 0] - batch["mask"] * 0.1).abs().max() < 1e-6
    with pytest.raises(ValueError, match="shuffle=True"):
        data.dataloader("train", augment=True)


def test_all_eight_turns_occur_and_oblong_images_keep_their_shape() -> None:
    square = torch.arange(16.0).reshape(1, 4, 4)
    seen = set()
    for position in range(200):
        turned = flip_and_turn([square], AugmentedKey(position, 0, 0))[0]
        assert sorted(turned.flatten().tolist()) == list(range(16))
        seen.add(tuple(turned.flatten().tolist()))
    assert len(seen) == 8
    oblong = torch.arange(12.0).reshape(3, 4)
    shapes = {flip_and_turn([oblong], AugmentedKey(i, 0, 0))[0].shape
              for i in range(50)}  # fmt: skip
    assert shapes == {(3, 4)}


def test_lightning_tells_the_sampler_the_epoch(folder: Path) -> None:
    class Watch(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)
            self.seen: list[list[str]] = [[]]

        def training_step(self, batch: dict, _: int) -> torch.Tensor:
            self.seen[-1] += batch["chip"]
            return self.layer(torch.ones(1, 1)).sum()

        def on_train_epoch_end(self) -> None:
            self.seen.append([])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.0)

    data = ChipData(folder, test_regions=["a"], val_fraction=0, batch_size=4)
    watch = Watch()
    trainer = L.Trainer(
        max_epochs=3, logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(watch, data.train_dataloader())
    for epoch in range(3):
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        assert watch.seen[epoch] == [c for batch in loader for c in batch["chip"]]
    assert watch.seen[0] != watch.seen[1]


def test_cached_chips_are_read_once_and_never_changed(folder: Path) -> None:
    data = ChipData(folder, test_regions=["a"], cache=True)
    first = list(data.dataset("test"))
    first[0]["image"].zero_()
    for path in (folder / "images").iterdir():
        path.unlink()
    again = data.subset(3).dataset("test")[0]["image"]
    np.testing.assert_allclose(again.numpy(), image(0) * 1e-4, rtol=1e-5)
    with pytest.raises(RuntimeError, match=r"'[bc]_\d'.*missing"):
        data.dataset("train")[0]


def test_worker_processes_give_the_same_batches(folder: Path) -> None:
    def order(workers: int) -> list[str]:
        data = ChipData(
            folder, test_regions=["a"], num_workers=workers, batch_size=4, augment=True
        )
        loader = data.train_dataloader()
        loader.sampler.set_epoch(3)
        return [f"{c}{m.sum()}{m[0]}" for b in loader
                for c, m in zip(b["chip"], b["mask"], strict=True)]  # fmt: skip

    assert order(0) == order(1)


# ---------------------------------------------------------------- bad input


def broken(tmp_path: Path, **changes: Any) -> Path:
    """A folder whose chip a_0 has files that write_chip_folder took as they are."""
    place_0 = place(0, 0)
    profile = {
        "driver": "GTiff", "height": 16, "width": 16, "crs": place_0["crs"],
        "transform": place_0["transform"],
    }  # fmt: skip
    paths = {}
    for name, array in (("image", image(0)), ("mask", mask(0)[None].astype(np.uint8))):
        own = dict(changes.get(name, {}))
        array = own.pop("array", array)
        paths[name] = tmp_path / f"{name}.tif"
        given = profile | {"count": len(array), "dtype": array.dtype.name} | own
        with rasterio.open(paths[name], "w", **given) as raster:
            raster.write(array)
    chips = [Chip("bad", paths["image"], paths["mask"], region="a"), *toy_chips()]
    return write_chip_folder(tmp_path / "toy", chips, INFO)


def read_bad(folder: Path) -> dict[str, Any]:
    return ChipData(folder, test_regions=["a"]).dataset("test")[0]


def holed() -> np.ndarray:
    pixels = image(0).astype(np.float32)
    pixels[0, 0, :3] = np.nan
    return pixels


SEVEN = np.full((1, 16, 16), 7, np.uint8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": {"crs": "EPSG:32634"}}, r"'bad'.*EPSG:32634.*EPSG:32633.*Warp"),
        (
            {"mask": {"transform": from_origin(3e5 + 50, 5e6, 10, 10)}},
            r"'bad'.*5\.0 pixels away",
        ),
        (
            {"mask": {"array": SEVEN}},
            r"'bad'.*value 7.*0-1 \(dry, water\) and 255",
        ),
        ({"image": {"array": holed()}}, r"'bad'.*3 of 1536.*NaN.*nodata"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_bad(broken(tmp_path, **changes))


def test_files_that_just_fit(tmp_path: Path) -> None:
    """A shift by rounding, and a nodata tag where none is declared."""
    shifted = from_origin(3e5 + 1e-6, 5e6, 10, 10)
    nodata = int(image(0)[0, 0, 0])
    folder = broken(tmp_path, mask={"transform": shifted}, image={"nodata": nodata})
    assert read_bad(folder)["mask"][0, 0] == 255


def test_damaged_files(tmp_path: Path) -> None:
    folder = broken(tmp_path)
    path = folder / "images" / "bad.tif"
    whole = path.read_bytes()
    for content in (whole[:-900], b"<html>not found</html>"):
        path.write_bytes(content)
        with pytest.raises(RuntimeError, match=r"'bad'.*bad\.tif cannot be read"):
            read_bad(folder)
    path.write_bytes(whole)
    with rasterio.open(path) as raster:
        profile = raster.profile | {"count": 4}
    with rasterio.open(path, "w", **profile) as raster:
        raster.write(image(0, bands=4))
    with pytest.raises(ValueError, match=r"'bad'.*has 4 bands.*names 6.*BLUE"):
        read_bad(folder)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"image": image(0, bands=4)}, ["a_0", "(4, 16, 16)", "(6, H, W)"]),
        ({"mask": mask(0, size=8)}, ["a_0", "8 x 8", "16 x 16"]),
        ({"mask": SEVEN[0]}, ["a_0", "value 7"]),
        ({"crs": None}, ["a_0", "crs"]),
        ({"transform": None}, ["a_0", "transform"]),
        ({"image": "nowhere.tif"}, ["a_0", "nowhere.tif"]),
        ({"extra": {"split": "x"}}, ["a_0", "split"]),
    ],
)
def test_chips_that_do_not_fit(tmp_path: Path, changes: dict, parts: list) -> None:
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        write_chip_folder(tmp_path / "toy", toy_chips(1, **changes), INFO)
    for part in parts:
        assert part in str(error.value)
    assert not (tmp_path / "toy").exists()


def test_labels_outside_the_classes_and_twice_the_same_name(tmp_path: Path) -> None:
    info = INFO | {"task": "classification"}
    for label in ("lava", 2, -1):
        chips = [Chip("x", image(0), label=label)]
        with pytest.raises(ValueError, match=rf"'x'.*{label}.*dry, water"):
            write_chip_folder(tmp_path / "toy", chips, info)
    twice = [Chip("x", image(0), label=0)] * 2
    with pytest.raises(ValueError, match="two chips are named 'x'"):
        write_chip_folder(tmp_path / "toy", twice, info)
    with pytest.raises(ValueError, match=r"\.\./x"):
        write_chip_folder(tmp_path / "t", [Chip("../x", image(0), label=0)], info)
    with pytest.raises(ValueError, match="no chips"):
        write_chip_folder(tmp_path / "toy", [], info)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"task": "detection"}, ["detection", "segmentation"]),
        ({"bands": ["RDE"]}, ["RDE"]),
        ({"classes": []}, ["classes"]),
        ({"classes": ["a", "a"]}, ["unique"]),
        ({"colours": ["#112233"]}, ["1 colours for 2 classes"]),
        ({"colours": ["red", "#112233"]}, ["'red'", "#rrggbb"]),
        ({"scale": [1.0, 2.0]}, ["2 numbers for 6 bands"]),
        ({"scale": 0}, ["scale is 0"]),
        ({"ignore_index": 1}, ["ignore_index is 1", "water"]),
        ({"nodta": 0}, ["nodta", "nodata"]),
        ({"name": ""}, ["name"]),
    ],
)
def test_facts_that_cannot_be_right(
    tmp_path: Path, changes: dict, parts: list[str]
) -> None:
    with pytest.raises(ValueError) as error:
        write_chip_folder(tmp_path / "toy", toy_chips(), INFO | changes)
    for part in parts:
        assert part in str(error.value)


def test_an_altered_index_is_noticed(folder: Path) -> None:
    index = gpd.read_parquet(folder / INDEX)
    index["split"] = "train"
    index.to_parquet(folder / INDEX)
    with pytest.raises(ValueError, match="altered after it was written"):
        ChipData(folder, test_regions=["a"])


@pytest.mark.parametrize(
    ("columns", "error", "parts"),
    [
        ({"chip": "same"}, ValueError, ["'same'", "twice"]),
        (
            {"image": "../secret.tif"},
            ValueError,
            ["../secret.tif", "out of the folder"],
        ),
        ({"image": "/etc/hosts"}, ValueError, ["/etc/hosts"]),
        ({"image": "images/gone.tif"}, FileNotFoundError, ["1 of 19", "gone.tif"]),
        ({"region": None}, ValueError, ["region"]),
    ],
)
def test_an_index_that_cannot_be_right(
    folder: Path,
    reindex: Callable[..., None],
    columns: dict,
    error: type[Exception],
    parts: list[str],
) -> None:
    reindex(folder, **columns)
    with pytest.raises(error) as caught:
        ChipData(folder, test_regions=["a"])
    for part in parts:
        assert part in str(caught.value)


def test_unfinished_and_garbled_folders(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        ChipData(tmp_path / "nowhere")
    facts = (folder / FACTS).read_text()
    for text, message in (("{", "JSON"), ("[]", "format"), ("{}", "format")):
        (folder / FACTS).write_text(text)
        with pytest.raises(ValueError, match=message):
            ChipData(folder)
    (folder / FACTS).write_text(facts)
    (folder / INDEX).unlink()
    with pytest.raises(FileNotFoundError, match=r"no chips\.parquet"):
        ChipData(folder)


def test_chips_of_different_size_need_batches_of_one(tmp_path: Path) -> None:
    large = Chip("large", image(9, size=32), mask(9, size=32), **place(9, 0))
    folder = write_chip_folder(tmp_path / "toy", [*toy_chips(), large], INFO)
    data = ChipData(folder, test_regions=["a"])
    with pytest.raises(ValueError, match=r"2 sizes.*16 x 16.*batch_size=1"):
        data.test_dataloader()
    single = ChipData(folder, test_regions=["a"], batch_size=1)
    assert len(list(single.test_dataloader())) == 7


# ---------------------------------------------------------------- writing


def test_an_existing_data_set_is_not_overwritten_unasked(folder: Path) -> None:
    before = (folder / INDEX).read_bytes()
    with pytest.raises(FileExistsError, match="overwrite=True"):
        write_chip_folder(folder, toy_chips(1), INFO)
    assert (folder / INDEX).read_bytes() == before
    write_chip_folder(folder, toy_chips(1), INFO, overwrite=True)
    assert len(read_chip_folder(folder)[1]) == 3


def test_a_failure_midway_leaves_nothing(tmp_path: Path) -> None:
    def failing() -> Iterator[Chip]:
        yield from toy_chips(2)
        raise KeyboardInterrupt

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    for name in ("new", "mine"):
        with pytest.raises(KeyboardInterrupt):
            write_chip_folder(tmp_path / name, failing(), INFO)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["mine", "notes.txt"]
    old = write_chip_folder(tmp_path / "mine", toy_chips(1), INFO)
    with pytest.raises(KeyboardInterrupt):
        write_chip_folder(old, failing(), INFO, overwrite=True)
    assert len(read_chip_folder(old)[1]) == 3 and len(list(old.iterdir())) == 5


@pytest.mark.skipif(sys.platform == "win32", reason="needs a file size limit")
@pytest.mark.parametrize("file", ["b_3.tif", INDEX])
def test_a_write_that_fails_leaves_nothing_and_names_the_file(
    tmp_path: Path, file: str
) -> None:
    import resource

    chips = list(toy_chips())
    sizes = write_chip_folder(tmp_path / "fits", chips, INFO)
    largest = max(p.stat().st_size for p in (sizes / "images").iterdir())
    assert (sizes / INDEX).stat().st_size > largest
    shutil.rmtree(sizes)
    if file != INDEX:  # one image larger than the others and than the limit
        chips[9].image = image(9, size=128)
        chips[9].mask = None
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
    try:
        with pytest.raises(OSError, match=file):
            write_chip_folder(tmp_path / "toy", chips, INFO)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_files_that_lie_in_the_folder_stay_where_they_are(tmp_path: Path) -> None:
    home = tmp_path / "mine"
    (home / "raw").mkdir(parents=True)
    chips = []
    for i in range(4):
        path = home / "raw" / f"{i}.png"
        Image.fromarray(np.full((16, 16, 3), i, np.uint8)).save(path)
        chips.append(Chip(f"c{i}", path, label=0, region="ab"[i % 2]))
    info = INFO | {"task": "classification", "bands": "rgb"}
    write_chip_folder(home, chips, info)
    assert read_chip_folder(home)[1]["image"].tolist() == [
        f"raw/{i}.png" for i in range(4)
    ]
    assert not (home / "images").exists()
