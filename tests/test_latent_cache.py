"""Latents on the disk: what is stored, who may read it, kills and damage, and that training sees no difference."""

import contextlib
import errno
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from tiny import decoder_recipe, save_encoder

from rae import RAE
from rae.commands import cache as command
from rae.commands.cache import write_cache
from rae.config import ConfigError
from rae.data import latent_format
from rae.data.images import DataConfig, ImageError, Stream, loader, open_images, open_split
from rae.data.latent_cache import open_cache
from rae.data.latent_format import (
    CacheError,
    CacheSettings,
    Origin,
    Stored,
    differences,
    empty_rows,
    fill,
    map_shard,
    shard_path,
    shard_rows,
    store,
    write_shard,
)
from rae.training.decoder import train_decoder
from rae.training.latents import cache_latents, cached_latents, online_latents, origin_of, stored_latents

DTYPES = ["fp32", "fp16", "bf16", "int8"]
DATA = DataConfig(source="digits", held_out=0.95, enlarge=True, flip=True)  # 90 images
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def several_shards():
    """Small ones: 90 images make 6 of float32, 3 of the other types."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latent_format, "SHARD_BYTES", 2**13)
        yield


@pytest.fixture(scope="module")
def model(runs) -> Path:
    return runs / "decoder"


@pytest.fixture(scope="module")
def rae(model) -> RAE:
    return RAE.from_pretrained(model)


@pytest.fixture(scope="module")
def written(model, tmp_path_factory) -> dict[str, Path]:
    """A cache of each type; not to be written to."""
    root = tmp_path_factory.mktemp("caches")
    return {dtype: write_cache(model, DATA, root / dtype, dtype=dtype, batch=8) for dtype in DTYPES}


@pytest.fixture
def cache(written, tmp_path) -> Path:
    """A copy of that of fp16, to be damaged."""
    return shutil.copytree(written["fp16"], tmp_path / "cache")


def contents(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def normals(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 0), ("fp16", 2**-11), ("bf16", 2**-8)])
def test_floats_lose_no_more_than_their_rounding(dtype, bound):
    z = normals(5, 7, 4, 4) * 10 ** normals(5, 7, 4, 4).clamp(-3, 3)
    z = z[:, :, z.abs().amin((0, 1)) > 2**-14] if dtype == "fp16" else z  # below, float16 has fewer bits
    error = (store(z.reshape(5, -1, 1, 1), dtype).to(CPU).reshape(z.shape).double() - z).abs()
    assert bool((error <= bound * z.abs()).all())
    assert dtype == "fp32" or error.max() > 0.5 * bound * z.abs().max() / 4  # it is that type, and no larger one


def test_int8_loses_no_more_than_half_a_step_of_its_own_channel():
    z = normals(6, 5, 8, 8) * torch.tensor([1e-30, 1e-3, 1.0, 50.0, 0.0])[:, None, None]
    stored = store(z, "int8")
    assert (stored.values.dtype, stored.scale.dtype) == (torch.int8, torch.float32)
    torch.testing.assert_close(stored.scale, z.abs().amax((2, 3)) / 127)
    error = (stored.to(CPU).double() - z).abs()
    assert bool((error <= stored.scale[..., None, None].double() * (0.5 + 1e-5)).all())
    assert bool((stored.values.abs().amax((2, 3)) == 127)[:, :4].all())  # the whole range is used
    assert bool((stored.to(CPU)[:, 4] == 0).all())  # a channel of zeros divides nothing by zero
    # uniform rounding errors: s^2 / 12
    assert error[:, 2].square().mean() == pytest.approx(float(stored.scale[:, 2].square().mean() / 12), rel=0.1)


def settings(dtype: str, rows: int, flip: bool = True) -> CacheSettings:
    origin = Origin(latents="a", encoder="b", images="c", labels="d", image_size=(16, 16), crop="center", enlarge=False)
    shared = {
        "autoencoder": "x",
        "class_names": None,
        "origin": origin,
        "shape": (3, 4, 5),
        "count": rows,
        "shard_rows": rows,
    }
    return CacheSettings(dtype=dtype, flip=flip, **shared)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_shard_is_read_as_it_was_written_by_us_and_by_datasets(dtype, tmp_path):
    config, z = settings(dtype, 6), normals(2, 6, 3, 4, 5)
    columns, stored = empty_rows(config, 6), [store(z[0], dtype), store(z[1], dtype)]
    columns["label"][:] = torch.arange(6)
    for view, latents in zip(config.views, stored):
        for rows in (slice(0, 4), slice(4, 6)):
            fill(columns, view, rows, Stored(*(x if x is None else x[rows] for x in latents)))
    write_shard(tmp_path / "x.arrow", config, columns)
    found = map_shard(tmp_path / "x.arrow", config, 6, "")
    assert found["label"].tolist() == [0, 1, 2, 3, 4, 5]
    table = datasets.Dataset.from_file(str(tmp_path / "x.arrow"))
    assert isinstance(table.data, datasets.table.MemoryMappedTable)
    for view, (values, scale) in zip(config.views, stored):
        bits = values.view(torch.uint16) if dtype == "bf16" else values
        assert np.array_equal(found[view], bits.numpy())
        assert not found[view].flags.writeable  # on the mapped file, no copy
        assert np.array_equal(np.array(table[2][view], bits.numpy().dtype), bits[2].flatten().numpy())
        if dtype == "int8":
            assert np.array_equal(found[f"{view}_scale"], scale.numpy())
            assert np.array_equal(np.array(table[2][f"{view}_scale"], np.float32), scale[2].numpy())
    with pyarrow.memory_map(str(tmp_path / "x.arrow")) as file:
        assert json.loads(pyarrow.ipc.open_stream(file).schema.metadata[b"shape"]) == [3, 4, 5]


def test_shards_keep_to_their_size(monkeypatch):
    monkeypatch.setattr(latent_format, "SHARD_BYTES", 2**28)
    shape = (768, 16, 16)
    assert [shard_rows(shape, dtype, False) for dtype in DTYPES] == [256, 512, 512, 1024]
    assert [shard_rows(shape, dtype, True) for dtype in DTYPES] == [128, 256, 256, 512]
    assert shard_rows((10**9, 1, 1), "fp16", True) == 1
    config = settings("int8", 6)
    assert latent_format.shard_bytes(config, 6) == 6 * (8 + 2 * (60 + 3 * 4))


# --- what is in a cache ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_training_sees_the_same_latents_in_the_same_order(dtype, written, rae):
    images, _ = open_split(DATA)
    memory = cache_latents(rae, images, DATA, batch=8)
    disk = stored_latents(written[dtype], rae, images, DATA)
    assert len(disk.columns) == (6 if dtype == "fp32" else 3)
    stream, batches = Stream(images, DATA, rae.image_size, 3), [range(85, 95), range(95, 105), range(105, 106)]
    ways = [
        cached_latents(disk, batches, 3, 4, CPU),
        cached_latents(memory, batches, 3, 4, CPU),
        online_latents(rae, loader(stream, batches, DATA), 4),
    ]
    for batch, *steps in zip(batches, *ways):
        steps = [list(step) for step in steps]
        assert [positions for _, _, positions in steps[0]] == [list(batch[i : i + 4]) for i in range(0, len(batch), 4)]
        for mine, kept, encoded in zip(*steps, strict=True):
            assert mine[2] == kept[2] == encoded[2]
            assert torch.equal(mine[1], kept[1])
            assert torch.equal(mine[1], encoded[1])
            assert torch.equal(mine[0], store(kept[0], dtype).to(CPU))  # to the last bit, but for the type
            torch.testing.assert_close(kept[0], encoded[0], rtol=1e-4, atol=1e-5)
    assert all(next(way, None) is None for way in ways)


def test_both_views_serve_a_run_that_mirrors_nothing(written, rae):
    plain = DATA.model_copy(update={"flip": False})
    images, _ = open_split(plain)
    disk, memory = stored_latents(written["fp32"], rae, images, plain), cache_latents(rae, images, plain, batch=8)
    assert torch.equal(disk.take(range(90), 0)[0].to(CPU), memory.take(range(90), 0)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_error_is_the_one_that_was_made(dtype, written):
    exact, stored = open_cache(written["fp32"]), open_cache(written[dtype])
    views = [False] * 90 + [True] * 90
    z, found = (x.gather([*range(90)] * 2, views).to(CPU).double() for x in (exact, stored))
    error = float((found - z).square().mean())
    assert stored.config.error == pytest.approx(error, rel=1e-4)
    if dtype == "fp32":
        assert (stored.config.error, stored.config.snr) == (0, None)
    else:
        assert stored.config.snr == pytest.approx(10 * math.log10(float(z.square().mean()) / error), abs=1e-3)


def test_the_command_says_what_it_wrote(written, model, capsys):
    write_cache(model, DATA, written["int8"], dtype="int8", batch=8)  # nothing to be done
    printed = capsys.readouterr().out
    config = open_cache(written["int8"]).config
    for text in ("90, and mirrored", "(16, 2, 2)", "int8", "shards: 3", f"{config.snr:.1f} dB", f"{config.error:.2g}"):
        assert text in printed


def test_processes_share_the_shards(written, model, tmp_path, monkeypatch):
    """Two threads stand for two processes: what they share is the folder and the barriers."""
    barrier, ranks = threading.Barrier(2, timeout=20), {}
    monkeypatch.setattr(command, "process_state", lambda: ranks[threading.get_ident()])
    shares, write = {0: [], 1: []}, command.write_shard

    def keep(path, *arguments):
        shares[ranks[threading.get_ident()].process_index].append(path.name[1:6])
        write(path, *arguments)

    monkeypatch.setattr(command, "write_shard", keep)

    def work(rank: int) -> None:
        ranks[threading.get_ident()] = SimpleNamespace(
            process_index=rank,
            num_processes=2,
            is_main_process=rank == 0,
            device=CPU,
            wait_for_everyone=barrier.wait,
        )
        write_cache(model, DATA, tmp_path / "cache", dtype="fp32", batch=8)

    other = threading.Thread(target=work, args=[1])
    other.start()
    work(0)
    other.join()
    assert shares == {0: ["00000", "00002", "00004"], 1: ["00001", "00003", "00005"]}
    assert contents(tmp_path / "cache") == contents(written["fp32"])


# --- interruptions ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_killed_writer_goes_on_to_the_same_bits(written, model, tmp_path, monkeypatch):
    folder, write = tmp_path / "cache", command.write_shard
    for number in (1, 2, 4):

        def stick(path, *arguments, at=f".{number:05d}.arrow"):
            write(path, *arguments)
            if path.name.startswith(at):
                os.truncate(path, path.stat().st_size // 2)
                time.sleep(60)

        monkeypatch.setattr(command, "write_shard", stick)
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                write_cache(model, DATA, folder, dtype="fp32", batch=8)
            os._exit(0)
        deadline = time.monotonic() + 30
        while not list(folder.glob(f"shards/.{number:05d}.arrow.*")) and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert list(folder.glob(f"shards/.{number:05d}.arrow.*"))
        assert len(list(folder.glob("shards/*.arrow"))) == number
        with pytest.raises(CacheError, match="not finished: run the same `rae cache` command again"):
            open_cache(folder)
    monkeypatch.setattr(command, "write_shard", write)
    write_cache(model, DATA, folder, dtype="fp32", batch=8)
    assert contents(folder) == contents(written["fp32"])


def test_a_full_disk_leaves_what_was_finished(written, model, tmp_path, monkeypatch):
    folder, write = tmp_path / "cache", command.write_shard

    def full(path, *arguments):
        write(path, *arguments)
        if "00002" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(command, "write_shard", full)
    with pytest.raises(OSError, match="No space left"):
        write_cache(model, DATA, folder, batch=8)
    assert sorted(path.name for path in (folder / "shards").iterdir()) == [
        "00000.arrow",
        "00000.json",
        "00001.arrow",
        "00001.json",
    ]
    monkeypatch.setattr(command, "write_shard", write)
    write_cache(model, DATA, folder, batch=8)
    assert contents(folder) == contents(written["fp16"])


def test_too_little_room_is_told_before_anything_is_encoded(model, tmp_path, monkeypatch):
    monkeypatch.setattr(command.shutil, "disk_usage", lambda _: SimpleNamespace(free=20_000))
    monkeypatch.setattr(command, "_write_shards", pytest.fail)
    with pytest.raises(CacheError, match=r"needs 23\.8 kB for 3 shards of fp16, 20\.0 kB are free: make room"):
        write_cache(model, DATA, tmp_path / "cache")


def test_other_settings_do_not_go_on_with_a_cache(cache, model):
    before = contents(cache)
    with pytest.raises(CacheError, match=r"begun with other settings:\n  dtype: fp16 -> int8\n.*give another folder"):
        write_cache(model, DATA, cache, dtype="int8", batch=8)
    with pytest.raises(CacheError, match="flip: True -> False"):
        write_cache(model, DATA.model_copy(update={"flip": False}), cache, batch=8)
    with pytest.raises(CacheError, match=r"count: 90 -> 180\n  images: "):
        write_cache(model, DATA.model_copy(update={"held_out": 0.9}), cache, batch=8)
    (cache / "cache.json").unlink()
    assert contents(cache) == {name: data for name, data in before.items() if name != "cache.json"}


def test_folders_of_something_else_are_left_alone(model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CacheError, match="is not empty, and no latent cache; give a new folder"):
        write_cache(model, DATA, tmp_path)
    with pytest.raises(CacheError, match=r"notes\.txt is a file; give a folder"):
        write_cache(model, DATA, tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_two_writers_at_once_are_refused(cache, model):
    with command._claim(cache), pytest.raises(CacheError, match="another process is writing"):
        write_cache(model, DATA, cache, batch=8)


# --- damage ----------------------------------------------------------------------------------------------------------


def cut(path: Path) -> str:
    path.write_bytes(path.read_bytes()[:-8])
    return f"{path} is damaged: 9,.* bytes instead of"


def remove(path: Path) -> str:
    path.unlink()
    return f"{path} is missing"


def spoil_header(path: Path) -> str:
    path.write_bytes(b"x" * 64 + path.read_bytes()[64:])
    return f"{path} is damaged"


@pytest.mark.parametrize("damage", [cut, remove, spoil_header])
def test_a_damaged_shard_is_named_and_the_same_command_mends_it(damage, cache, written, model, capsys):
    message = damage(shard_path(cache, 1))
    with pytest.raises(CacheError, match=f"{message}.*Copy it again, or run the same `rae cache` command again"):
        open_cache(cache)
    write_cache(model, DATA, cache, batch=8, verify=damage is spoil_header)
    assert "00001.arrow" in capsys.readouterr().err
    assert contents(cache) == contents(written["fp16"])


def test_a_flipped_bit_is_found_where_it_is_asked_for(cache, written, model):
    path = shard_path(cache, 2)
    data = bytearray(path.read_bytes())
    data[-200] ^= 1
    path.write_bytes(data)
    open_cache(cache)
    with pytest.raises(CacheError, match=rf"{path} is damaged: its SHA-256 is not the one written"):
        open_cache(cache, verify=True)
    write_cache(model, DATA, cache, batch=8)
    assert path.read_bytes() == data  # sizes alone say nothing
    write_cache(model, DATA, cache, batch=8, verify=True)
    assert contents(cache) == contents(written["fp16"])


def test_a_shard_of_another_cache_is_refused(cache, model, tmp_path):
    other = DATA.model_copy(update={"label": ""})
    write_cache(model, other, tmp_path / "other", batch=8)
    shutil.copy(shard_path(tmp_path / "other", 1), shard_path(cache, 1))
    with pytest.raises(CacheError, match=r"00001\.arrow is not a shard of this cache"):
        open_cache(cache)


def test_what_is_no_cache_is_refused(cache, rae, tmp_path):
    with pytest.raises(CacheError, match=r"nowhere is not a latent cache .*`rae cache` writes one"):
        open_cache(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"latents: onlin is no folder; there are online, memory and folders of"):
        stored_latents("onlin", rae, open_split(DATA)[0], DATA)
    config = json.loads((cache / "cache.json").read_text())
    (cache / "cache.json").write_text(json.dumps(config | {"version": 2}))
    with pytest.raises(CacheError, match=r"cache\.json does not fit:\n  version: Input should be 1"):
        open_cache(cache)


@pytest.mark.parametrize("unfinished", [False, True])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda _: "{", r"cache\.json is not valid JSON"),
        (lambda config: json.dumps(config | {"shards": config["shards"][:-1]}), "it names 2 shards of 3"),
        (lambda config: json.dumps(config | {"shape": None}), "shape: Input should be a valid tuple"),
    ],
)
def test_a_damaged_cache_json_is_written_anew_of_shards_that_are_kept(
    cache, written, model, monkeypatch, capsys, spoil, message, unfinished
):
    config = json.loads((cache / "cache.json").read_text())
    (cache / "cache.json").write_text(spoil(config))
    with pytest.raises(CacheError, match=rf"(?s){message}.*run the same `rae cache` command again"):
        open_cache(cache)
    if unfinished:
        (cache / "cache.json").rename(cache / "partial.json")
    with monkeypatch.context() as patch:
        patch.setattr(command, "write_shard", pytest.fail)
        write_cache(model, DATA, cache, batch=8)
    said = capsys.readouterr().err
    assert "cache.json" in said or "partial.json" in said
    assert "The command goes on without it." in said
    assert contents(cache) == contents(written["fp16"])


def test_where_the_settings_cannot_be_read_the_shards_tell_of_what_they_are(cache, written, model, tmp_path):
    for name in ("cache.json", "shards/00001.json"):
        (cache / name).write_text("{")
    before = contents(cache)
    with pytest.raises(CacheError, match=r"(?s)00000.arrow is not a shard of this cache.*ask for the same, or give"):
        write_cache(model, DATA, cache, dtype="int8", batch=8)
    assert contents(cache) == before
    shard_path(cache, 2).write_bytes(shard_path(cache, 2).read_bytes()[:4000])
    with pytest.raises(CacheError, match=r"(?s)00002.arrow is damaged.*remove it, and the same command writes it anew"):
        write_cache(model, DATA, cache, batch=8)
    shard_path(cache, 2).unlink()
    write_cache(model, DATA, cache, batch=8)  # 1, of which nothing is known, and 2
    assert contents(cache) == contents(written["fp16"])


def test_a_cache_that_has_no_records_of_its_shards_is_written_anew(cache, written, model):
    """As versions before this one left them."""
    for record in (cache / "shards").glob("*.json"):
        record.unlink()
    write_cache(model, DATA, cache, batch=8)
    assert not list((cache / "shards").glob("*.json"))  # a whole cache needs none
    shard_path(cache, 1).unlink()
    write_cache(model, DATA, cache, batch=8)
    assert contents(cache) == contents(written["fp16"])
    (cache / "shards/00001.json").unlink()
    (cache / "cache.json").write_text("{")  # nothing says what the shard should be
    write_cache(model, DATA, cache, batch=8)
    assert contents(cache) == contents(written["fp16"])


def test_arrow_that_is_not_installed_is_named(written, model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(CacheError, match=r"00000\.arrow: .* pip install 'rae\[data\]'"):
        open_cache(written["fp16"])
    with pytest.raises(CacheError, match=r"new: .* pip install 'rae\[data\]'"):
        write_cache(model, DATA, tmp_path / "new")
    assert not (tmp_path / "new").exists()  # before anything is encoded


# --- whose cache it is -----------------------------------------------------------------------------------------------


def test_a_cache_of_another_autoencoder_is_refused(written, rae, tmp_path):
    other = train_decoder(
        decoder_recipe(save_encoder(tmp_path / "encoder"), run__duration="1st", data__held_out=0.5), tmp_path / "run"
    )
    images, _ = open_split(DATA)
    mine, theirs = rae.latent_identity, RAE.from_pretrained(other).latent_identity
    assert mine != theirs
    with pytest.raises(CacheError) as refused:
        stored_latents(written["fp16"], RAE.from_pretrained(other), images, DATA)
    for text in (str(written["fp16"]), f"latents: {mine[:12]}... -> {theirs[:12]}...", "`rae cache`"):
        assert text in str(refused.value)
    assert "encoder:" not in str(refused.value)  # the same one: it is the statistics


def test_names_that_a_run_gives_its_classes_change_no_latents(written, rae, tmp_path):
    (tmp_path / "names.txt").write_text("\n".join("abcdefghij"))
    data = DATA.model_copy(update={"class_names": str(tmp_path / "names.txt")})
    images, _ = open_split(data)
    assert images.class_names == list("abcdefghij")
    assert len(stored_latents(written["fp16"], rae, images, data)) == len(images)


def test_a_cache_of_other_images_or_crops_is_refused(written, rae):
    images, _ = open_split(DATA)
    cache, origin = open_cache(written["fp16"]), origin_of(rae, images, DATA)
    fewer = origin_of(rae, open_images("digits"), DATA)
    with pytest.raises(CacheError, match=rf"images: {origin.images[:12]}\.\.\. -> {fewer.images[:12]}\.\.\."):
        cache.of_run(fewer, DATA)
    with pytest.raises(CacheError, match=r"image_size: \(16, 16\) -> \(32, 16\)"):
        cache.of_run(origin.model_copy(update={"image_size": (32, 16)}), DATA)
    with pytest.raises(CacheError, match="enlarge: True -> False"):
        cache.of_run(origin.model_copy(update={"enlarge": False}), DATA)
    unlabelled = DATA.model_copy(update={"label": ""})
    with pytest.raises(CacheError, match=r"\n  labels: \w{12}\.\.\. -> \w{12}\.\.\.\nGive"):
        cache.of_run(origin_of(rae, open_split(unlabelled)[0], unlabelled), unlabelled)
    assert cache.of_run(origin, DATA).flip


def test_a_cache_without_mirrored_images_is_refused_where_they_are_needed(model, rae, tmp_path):
    plain = DATA.model_copy(update={"flip": False})
    folder = write_cache(model, plain, tmp_path / "cache")
    assert "mirrored" not in open_cache(folder).columns[0]
    with pytest.raises(CacheError, match=r"has no mirrored images \(flip: False\), data.flip is True"):
        stored_latents(folder, rae, open_split(DATA)[0], DATA)


def test_random_crops_are_refused(model, rae, tmp_path):
    data = DATA.model_copy(update={"crop": "random"})
    with pytest.raises(ConfigError, match=r"cache holds each image once, data\.crop: random never ends"):
        write_cache(model, data, tmp_path / "cache")
    with pytest.raises(ConfigError, match="cache holds each image once"):
        stored_latents(tmp_path / "cache", rae, open_split(data)[0], data)
    assert not list(tmp_path.iterdir())


def test_differences_name_both_values():
    assert differences({"a": 1, "b": "x"}, {"a": 1, "b": "x"}) == ""
    assert differences({"a": 1, "b": "x"}, {"a": 2, "b": "y"}) == "  a: 1 -> 2\n  b: x -> y"
    assert differences({"a": 64 * "0"}, {"a": 64 * "1"}) == "  a: 000000000000... -> 111111111111..."


# --- images that cannot be used --------------------------------------------------------------------------------------


@pytest.fixture
def broken(tmp_path) -> Path:
    """Five images of noise, the second of which is cut short."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / f"{i}.png")
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:40])
    return folder


def test_unreadable_images_are_as_in_training(broken, model, rae, tmp_path, capsys):
    data = DataConfig(source=str(broken))
    with pytest.raises(ImageError, match=r"1\.png"):
        write_cache(model, data, tmp_path / "cache", dtype="fp32")
    skip = data.model_copy(update={"on_broken": "skip"})
    folder = write_cache(model, skip, tmp_path / "cache", dtype="fp32")  # the same cache goes on
    assert "1.png cannot be read; the next image takes its place" in capsys.readouterr().err
    images = open_images(broken)
    memory, disk = cache_latents(rae, images, skip), stored_latents(folder, rae, images, skip)
    assert torch.equal(disk.gather(range(5), [False] * 5).to(CPU), memory.latents[0])
    with pytest.raises(CacheError, match=r"in the place of 1 that could not be read, such as .*1\.png, and .* error"):
        stored_latents(folder, rae, images, data)


def test_latents_that_do_not_fit_the_type_are_named(broken, model, tmp_path, monkeypatch):
    encode, scale = RAE.encode, torch.tensor([1, 1, 1e6, 1, 1])[:, None, None, None]
    monkeypatch.setattr(RAE, "encode", lambda self, x: encode(self, x) * scale)
    data = DataConfig(source=str(broken), on_broken="skip")
    with pytest.raises(CacheError, match=r"2\.png: its latents, up to .*e\+0., cannot be stored as fp16; bf16 has"):
        write_cache(model, data, tmp_path / "fp16")
    write_cache(model, data, tmp_path / "bf16", dtype="bf16")
    monkeypatch.setattr(RAE, "encode", lambda self, x: encode(self, x) / 0)
    with pytest.raises(CacheError, match=r"0\.png: its latents, up to inf, cannot be stored as int8\.$"):
        write_cache(model, data, tmp_path / "int8", dtype="int8")
