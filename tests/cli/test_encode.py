"""`vqdist encode`: every byte the same for any number of ranks, after a kill, and as encoding on the fly gives it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import torchrun
from scenarios import MULTISCALE, build_prior, build_vae, build_vq_ar
from source_files import message_of, save
from test_tokenizer import build
from workers import killed_while_encoding

from vqdist import Tokenizer
from vqdist.backends import create_backend
from vqdist.cli import main
from vqdist.data import cores, loader
from vqdist.data.codes import CodeDataset
from vqdist.data.dataset import ImageDataset
from vqdist.encoding import CodeWriter, say_nothing
from vqdist.files import LOCK

KINDS = {"dvae": 3, "residual_vq": 1, "lfq": 4}  # and channels


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> Path:
    """Return a folder with an exported tokenizer of each kind, and a model that is none."""
    folder = tmp_path_factory.mktemp("exports")
    for kind, channels in KINDS.items():
        Tokenizer(build(kind, channels=channels)).save_pretrained(folder / kind)
    return folder


@pytest.fixture
def quiet(capsys):
    """Encode in this process; the numbers that it prints, and what it says."""

    def encode(*arguments: str | Path) -> tuple[dict, str]:
        capsys.readouterr()
        assert main(["encode", *map(str, arguments)]) == 0
        printed = capsys.readouterr()
        (line,) = printed.out.splitlines()
        return json.loads(line), printed.err

    return encode


def refused(capsys, *arguments: str | Path) -> str:
    """Return the one line with which a command ends."""
    capsys.readouterr()
    assert main(["encode", *map(str, arguments)]) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.strip().splitlines()
    assert line.startswith("vqdist: error: ") and printed.out == ""
    return line


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder of codes, but for the lock that a killed process leaves."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != LOCK}


# --------------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [0, 1])
def test_the_files_hold_what_encoding_on_the_fly_gives(kind, workers, exports, tmp_path, quiet):
    out = tmp_path / "codes"
    sizes = ("--shard_size", 20, "--batch_size", 8, "--num_workers", workers)
    numbers, said = quiet(exports / kind, "--data", "synthetic:50", "--out", out, *sizes)
    tokenizer = Tokenizer.from_pretrained(exports / kind)
    images = ImageDataset("synthetic:50", 16, channels=KINDS[kind], augment=False)
    assert sorted(content(out)) == sorted(
        [f"{kind}_{shard:05d}.npy" for kind in ("codes", "labels") for shard in range(3)]
        + ["encode.json", "manifest.json"]
    )
    every = []
    for shard, rows in enumerate((range(20), range(20, 40), range(40, 50))):
        codes = np.load(out / f"codes_{shard:05d}.npy", mmap_mode="r")
        batches = torch.stack([images[index] for index in rows]).split(8)
        expected = torch.cat([tokenizer.encode(batch) for batch in batches])
        assert codes.dtype == np.uint8 and codes.shape == tuple(expected.shape)
        assert np.array_equal(codes, expected.numpy())
        labels = np.load(out / f"labels_{shard:05d}.npy", mmap_mode="r")
        assert labels.dtype == np.int64 and labels.tolist() == [images.label(index) for index in rows]
        every.append(expected)
    assert_numbers(numbers, torch.cat(every))
    assert said == ""


def assert_numbers(numbers: dict, codes: torch.Tensor) -> None:
    """Usage and perplexity by their definition, over all codes of each level."""
    assert list(numbers) == [
        *("count", "shards", "encoded", "images_per_second", "replaced", "codebook_usage", "codebook_perplexity")
    ]
    assert (numbers["count"], numbers["shards"], numbers["encoded"], numbers["replaced"]) == (50, 3, 50, 0)
    assert numbers["images_per_second"] > 0
    levels = codes.reshape(codes.shape[0] * codes.shape[1], -1)
    shares = [torch.bincount(level, minlength=32) / len(level) for level in levels.T]
    usage = np.mean([float((share > 0).double().mean()) for share in shares])
    perplexity = np.mean([float(torch.special.entr(share.double()).sum().exp()) for share in shares])
    assert numbers["codebook_usage"] == pytest.approx(usage)
    assert numbers["codebook_perplexity"] == pytest.approx(perplexity, rel=1e-5)


def test_the_manifest(exports, tmp_path, quiet):
    numbers, _ = quiet(exports / "dvae", "--data", "digits", "--out", tmp_path / "codes", "--shard_size", 4000)
    manifest = json.loads((tmp_path / "codes" / "manifest.json").read_text())
    shards = manifest.pop("shards")
    tokenizer = Tokenizer.from_pretrained(exports / "dvae")
    assert manifest == {
        "version": 1,
        "tokenizer": tokenizer.fingerprint(),
        "codes_fingerprint": tokenizer.codes_fingerprint(),
        "model_type": "dvae",
        "image_size": 16,
        "channels": 3,
        "codebook_size": 32,
        "num_codes": 16,
        "num_levels": 1,
        "code_side": 4,
        "scales": None,
        "count": 10_000,
        "shard_size": 4000,
        "batch_size": 64,
        "data": ImageDataset("digits", 16).fingerprint(),
        "classes_seen": 10,
        "classes": list("0123456789"),
        **{name: numbers[name] for name in ("codebook_usage", "codebook_perplexity")},
    }
    for number, shard in enumerate(shards):
        for kind in ("codes", "labels"):
            path = tmp_path / "codes" / f"{kind}_{number:05d}.npy"
            assert shard[kind]["file"] == path.name and shard[kind]["bytes"] == path.stat().st_size
    codes = CodeDataset(tmp_path / "codes")
    codes.verify()
    assert [codes.label(index) for index in range(3)] == [7, 2, 1]  # the first MNIST test digits


def test_a_large_codebook_takes_two_bytes(exports, tmp_path):
    model = build_vae("fsq", codebook_size=1024)
    model.image_size = 16
    CodeWriter(
        Tokenizer(model), ImageDataset("synthetic:6", 16, augment=False), tmp_path, batch_size=4, shard_size=6
    ).write(create_backend("local"), num_workers=0)
    assert np.load(tmp_path / "codes_00000.npy").dtype == np.uint16
    codes = CodeDataset(tmp_path)
    assert torch.stack([codes[index] for index in range(6)]).max() > 255


def test_the_maps_of_several_scales_are_one_row(tmp_path):
    model = build_vae("multiscale_vq", codebook_size=32, quantizer_kwargs=MULTISCALE)
    model.image_size = 16
    tokenizer, images = Tokenizer(model), ImageDataset("synthetic:6", 16, augment=False)
    CodeWriter(tokenizer, images, tmp_path, batch_size=6, shard_size=6).write(create_backend("local"), num_workers=0)
    codes = CodeDataset(tmp_path)
    assert (codes.scales, codes.code_side, codes.num_codes) == ((1, 2, 4), None, 21)
    expected = tokenizer.encode(torch.stack([images[index] for index in range(6)]))
    assert torch.equal(torch.stack([codes[index] for index in range(6)]), expected)


def test_a_model_that_learnt_its_codes_along_with_their_prediction(tmp_path, quiet):
    Tokenizer(build_vq_ar()).save_pretrained(tmp_path / "vq_ar")
    quiet(tmp_path / "vq_ar", "--data", "synthetic:9", "--out", tmp_path / "codes")
    codes, images = CodeDataset(tmp_path / "codes"), ImageDataset("synthetic:9", 16, augment=False)
    expected = Tokenizer.from_pretrained(tmp_path / "vq_ar").encode(torch.stack([images[index] for index in range(9)]))
    assert codes.model_type == "vq_ar"
    assert torch.equal(torch.stack([codes[index] for index in range(9)]), expected)


def test_a_run_is_as_good_as_its_export(exports, tmp_path, quiet):
    run = tmp_path / "run"
    shutil.copytree(exports / "dvae", run / "export")
    quiet(run, "--data", "synthetic:9", "--out", tmp_path / "a")
    quiet(run / "export", "--data", "synthetic:9", "--out", tmp_path / "b")
    assert content(tmp_path / "a") == content(tmp_path / "b")


# --------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "option, differ",
    [
        (("--shard_size", 4), {"encode.json", "manifest.json", "codes_00000.npy", "labels_00000.npy"}),
        (("--batch_size", 3), {"encode.json", "manifest.json"}),
        (("--num_workers", 1), set()),
        (("--backend", "local"), set()),
        (("--on_bad_image", "skip"), set()),
    ],
)
def test_options_change_what_they_are_about(option, differ, exports, tmp_path, quiet):
    quiet(exports / "residual_vq", "--data", "synthetic:9", "--out", tmp_path / "a")
    quiet(exports / "residual_vq", "--data", "synthetic:9", "--out", tmp_path / "b", *option)
    one, other = content(tmp_path / "a"), content(tmp_path / "b")
    assert {name for name in one if one[name] != other.get(name)} == differ


def test_image_size(exports, tmp_path, quiet):
    model = build("lfq", channels=4)
    Tokenizer(model).save_pretrained(tmp_path / "lfq")
    quiet(tmp_path / "lfq", "--data", "synthetic:9", "--out", tmp_path / "a", "--image_size", 32)
    codes = CodeDataset(tmp_path / "a")
    assert (codes.image_size, codes.num_codes) == (32, 64)
    assert codes.tokenizer == Tokenizer.from_pretrained(tmp_path / "lfq", 32).fingerprint()


def test_num_workers_of_the_loader(exports, tmp_path, quiet, monkeypatch):
    asked = []
    whole = loader.Workers
    monkeypatch.setattr(
        loader, "Workers", lambda *args, **kwargs: asked.append(kwargs["count"]) or whole(*args, **kwargs)
    )
    monkeypatch.setattr(cores, "cores_of_process", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # of four cores, two are this rank's, and one of them computes
    for number, option in enumerate([(), ("--num_workers", 0), ("--num_workers", 2)]):
        quiet(exports / "dvae", "--data", "synthetic:9", "--out", tmp_path / f"{number}", *option)
    assert asked == [1, 2]


def test_the_backend_is_the_one_that_is_asked_for(exports, tmp_path, capsys):
    arguments = (exports / "dvae", "--data", "synthetic:9", "--out", tmp_path / "codes", "--backend", "horovod")
    assert "backend 'horovod' is not supported" in refused(capsys, *arguments)


def test_progress_is_told_of_every_batch(exports, tmp_path):
    writer = CodeWriter(
        Tokenizer.from_pretrained(exports / "dvae"),
        ImageDataset("synthetic:10", 16, augment=False),
        tmp_path / "codes",
        batch_size=3,
        shard_size=5,
    )
    told = []
    writer.write(create_backend("local"), num_workers=0, progress=lambda images, **more: told.append((images, more)))
    assert told == [(images, {"of": 10, "replaced": []}) for images in (3, 2, 3, 2)]
    assert say_nothing(3, of=10, replaced=[]) is None


# --------------------------------------------------------------------------------------------- images that are broken


@pytest.fixture
def broken(tmp_path) -> Path:
    """Nine pictures in three classes; 1, 2 and 8 cannot be decoded."""
    for index in range(9):
        save(tmp_path / "images" / f"class{index // 3}" / f"{index}.png", value=25 * index, size=(16, 16))
    for index in (1, 2, 8):
        (tmp_path / "images" / f"class{index // 3}" / f"{index}.png").write_bytes(b"no picture")
    return tmp_path / "images"


def test_a_broken_image_ends_the_command_or_is_replaced_by_the_next_good_one(exports, broken, tmp_path, capsys, quiet):
    arguments = (exports / "dvae", "--data", broken, "--out", tmp_path / "codes", "--batch_size", 2)
    assert "cannot decode the image" in (message := refused(capsys, *arguments)) and "class0/1.png" in message
    numbers, said = quiet(*arguments, "--on_bad_image", "skip", "--max_bad_frac", "1")
    assert numbers["replaced"] == 3 and "3 images could not be decoded" in said
    assert re.findall(r"skipped an image that cannot be decoded: .*/(\d).png", said) == ["1", "2", "8"]
    codes, images = CodeDataset(tmp_path / "codes"), ImageDataset(str(broken), 16, augment=False, on_bad_image="skip")
    replaced = {1: 3, 2: 3, 8: 0}
    for index in range(9):  # of the picture that is there
        assert codes.label(index) == replaced.get(index, index) // 3
    for index, instead in replaced.items():
        assert torch.equal(codes[index], codes[instead])
        assert torch.equal(images[index], images[instead])


# --------------------------------------------------------------------------------------------- going on


def test_a_finished_folder_is_left_alone(exports, tmp_path, quiet):
    arguments = (exports / "dvae", "--data", "synthetic:50", "--out", tmp_path / "codes", "--shard_size", 20)
    first, _ = quiet(*arguments)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "codes").iterdir()}
    again, said = quiet(*arguments)
    assert "is finished: 50 images in 3 shards; nothing to do" in said
    assert again == {**first, "encoded": 0, "images_per_second": None}
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "codes").iterdir()} == before


@pytest.mark.parametrize(
    "names",
    [
        ["manifest.json"],
        ["manifest.json", "codes_00001.npy"],
        ["codes_00001.npy"],
        ["labels_00002.npy"],
        ["codes_00000.npy", "labels_00000.npy", "labels_00001.npy"],
    ],
)
@pytest.mark.parametrize("how", ["removed", "torn"])
def test_what_is_missing_or_torn_is_made_again(names, how, exports, tmp_path, quiet):
    arguments = (exports / "dvae", "--data", "synthetic:50", "--out", tmp_path / "codes", "--shard_size", 20)
    quiet(*arguments)
    before = content(tmp_path / "codes")
    for name in names:
        if how == "removed" or name == "manifest.json":
            (tmp_path / "codes" / name).unlink()
        else:
            (tmp_path / "codes" / name).write_bytes(before[name][:-7])
    numbers, _ = quiet(*arguments)
    shards = {int(name[-5]) for name in names if name.endswith(".npy")}
    assert numbers["encoded"] == sum((20, 20, 10)[shard] for shard in shards)
    assert content(tmp_path / "codes") == before


@pytest.mark.parametrize(
    "change, key",
    [
        (("--shard_size", 10), "shard_size: 20 -> 10"),
        (("--batch_size", 10), "batch_size: 64 -> 10"),
        (("--data", "synthetic:40"), "count: 50 -> 40"),
        (("--data", "digits"), "data: "),
        (("RUN", "lfq"), "tokenizer: "),
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_another_plan_is_refused_with_the_keys_that_differ(change, key, finished, exports, tmp_path, quiet, capsys):
    options = {"RUN": "dvae", "--data": "synthetic:50", "--out": tmp_path / "codes", "--shard_size": 20}

    def words(options):
        return exports / options["RUN"], *[word for name in options if name != "RUN" for word in (name, options[name])]

    quiet(*words(options))
    if not finished:
        (tmp_path / "codes" / "manifest.json").unlink()
    before = content(tmp_path / "codes")
    message = refused(capsys, *words({**options, change[0]: change[1]}))
    assert key in message and "holds codes of another encoding" in message
    assert content(tmp_path / "codes") == before


def test_images_that_changed_are_other_data(exports, tmp_path, quiet, capsys):
    for index in range(5):
        save(tmp_path / "images" / f"{index}.png", value=40 * index, size=(16, 16))
    arguments = (exports / "dvae", "--data", tmp_path / "images", "--out", tmp_path / "codes")
    quiet(*arguments)
    save(tmp_path / "images" / "4.png", value=3, size=(90, 90))
    assert re.search(r"another encoding \(data: \"\w+\.\.\. -> \"\w+\.\.\.\)", refused(capsys, *arguments))


# --------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "options, message",
    [
        (("--batch_size", 0), "batch_size 0 is not possible; it must be at least 1"),
        (("--shard_size", 0), "shard_size 0 is not possible; it must be at least 1"),
        (("--num_workers", -1), "num_workers -1 is not possible; it must be at least 0"),
        (("--dist_timeout", 0), "dist_timeout 0.0 is not possible; it must be above 0 and at most 525600"),
        (("--image_size", 18), "image_size 18 is not a multiple of 4"),
        (("--on_bad_image", "ignore"), "on_bad_image 'ignore' is not known"),
        (("--data", "/nowhere/at/all"), "no such folder: /nowhere/at/all"),
        (("--data", "codes:x"), "are codes already"),
        (("--out", ""), "--out is empty"),
        (("--batchsize", 1), "there is no option --batchsize; nearest: batch_size"),
    ],
)
def test_values(options, message, exports, tmp_path, capsys):
    given = {"--data": "synthetic:9", "--out": tmp_path / "codes", options[0]: options[1]}
    words = [word for pair in given.items() for word in pair]
    assert message in refused(capsys, exports / "dvae", *words)
    assert not (tmp_path / "codes").exists()


def test_options_that_are_missing(exports, capsys):
    assert "missing: --data, --out" in refused(capsys, exports / "dvae")


def test_runs_that_hold_no_tokenizer(exports, tmp_path, capsys):
    rest = ("--data", "synthetic:9", "--out", tmp_path / "codes")
    assert f"no such run, export or file: {tmp_path}/run" in refused(capsys, tmp_path / "run", *rest)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    assert "has no export/" in refused(capsys, tmp_path / "run", *rest)
    shutil.copytree(exports / "dvae", tmp_path / "run" / "export")
    (tmp_path / "run" / "export" / "config.json").write_text('{"model_type": "nothing"}')
    assert "a model of type 'nothing'" in refused(capsys, tmp_path / "run", *rest)
    build_prior().save_pretrained(tmp_path / "prior")
    assert "holds a Prior, which is no image tokenizer" in refused(capsys, tmp_path / "prior", *rest)
    assert not (tmp_path / "codes").exists()


def test_folders_that_codes_cannot_go_into(exports, tmp_path, capsys):
    for index in range(5):
        save(tmp_path / "images" / f"{index}.png", value=40 * index, size=(16, 16))
    words = (exports / "dvae", "--data", tmp_path / "images", "--out")
    for inside in (tmp_path / "images", tmp_path / "images" / "codes", tmp_path / "codes" / ".." / "images" / "new"):
        assert "lies in the folder of the images" in refused(capsys, *words, inside)
    other = tmp_path / "other"
    save(other / "holiday.png")
    assert "holds holiday.png and no encode.json" in refused(capsys, *words, other)
    assert "is a file, and a folder for the codes is expected" in refused(capsys, *words, other / "holiday.png")
    unwritable = other / "holiday.png" / "codes"
    assert f"the folder of codes {unwritable} cannot be written: Not a directory" in refused(
        capsys, *words, unwritable
    )
    assert [path.name for path in other.iterdir()] == ["holiday.png"]


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_plan_that_is_none(text, exports, tmp_path, capsys):
    (tmp_path / "codes").mkdir()
    (tmp_path / "codes" / "encode.json").write_text(text)
    message = refused(capsys, exports / "dvae", "--data", "synthetic:9", "--out", tmp_path / "codes")
    assert "encode.json" in message or "version: null -> 1" in message


def test_in_python_too(exports, tmp_path):
    tokenizer = Tokenizer.from_pretrained(exports / "dvae")
    images, augmented = (ImageDataset("synthetic:9", 16, augment=augment) for augment in (False, True))
    sizes = {"batch_size": 4, "shard_size": 4}
    assert "augment=False" in message_of(CodeWriter, tokenizer, augmented, tmp_path, **sizes)
    wrong = {**sizes, "shard_size": 0}
    assert "batch_size 4 and shard_size 0 are not possible" in message_of(
        CodeWriter, tokenizer, images, tmp_path, **wrong
    )


# --------------------------------------------------------------------------------------------- processes

SIZES = "--data synthetic:90 --shard_size 20 --batch_size 8 --num_workers 0".split()


@pytest.fixture(scope="module")
def undisturbed(exports, tmp_path_factory) -> dict[str, bytes]:
    """Return what one process writes that nobody kills."""
    out = tmp_path_factory.mktemp("undisturbed") / "codes"
    assert main(["encode", str(exports / "residual_vq"), *SIZES, "--out", str(out)]) == 0
    return content(out)


def test_a_folder_that_was_begun_before_its_plan_was_whole(exports, undisturbed, tmp_path, quiet):
    (tmp_path / "encode.json.partial").write_text("{")
    quiet(exports / "residual_vq", *SIZES, "--out", tmp_path)
    assert content(tmp_path) == undisturbed


def start(arguments: list[str], monkeypatch, renames: int | None = None) -> int:
    """Encode in a child of this process, which starts at once; its number. It is killed before its Nth renaming."""
    if renames is not None:
        monkeypatch.setattr(killed_while_encoding, "calls", 0)
        monkeypatch.setattr(Path, "replace", killed_while_encoding.killed_at(renames))
    child = os.fork()
    if child == 0:
        try:
            main(["encode", *arguments])
        finally:
            os._exit(1)
    monkeypatch.undo()
    return child


@pytest.mark.parametrize(
    "renames, names",
    [
        (1, ["encode.json.partial"]),
        (3, ["codes_00000.npy.partial", "encode.json", "labels_00000.npy"]),  # between the two files of a shard
        (
            6,
            [
                *("codes_00000.npy", "codes_00001.npy", "codes_00002.npy.partial"),
                *("encode.json", "labels_00000.npy", "labels_00001.npy", "labels_00002.npy.partial"),
            ],
        ),
    ],
)
def test_killed_while_writing(renames, names, exports, undisturbed, tmp_path, quiet, monkeypatch):
    arguments = [str(exports / "residual_vq"), *SIZES, "--out", str(tmp_path / "codes")]
    child = start(arguments, monkeypatch, renames)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert sorted(content(tmp_path / "codes")) == names
    if renames > 1:
        assert "was not finished" in message_of(CodeDataset, tmp_path / "codes")
    numbers, _ = quiet(*arguments)
    whole = sum(name.startswith("codes_") and name.endswith(".npy") for name in names)
    assert numbers["encoded"] == 90 - 20 * whole and numbers["count"] == 90
    assert content(tmp_path / "codes") == undisturbed


@pytest.mark.nightly
def test_killed_at_any_moment(exports, tmp_path, quiet, monkeypatch):
    """With loader processes, and not at a moment that suits."""
    sizes = "--data synthetic:400 --shard_size 20 --batch_size 8 --num_workers 1".split()
    arguments = [str(exports / "residual_vq"), *sizes, "--out"]
    encode = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda *args: time.sleep(0.1) or encode(*args))
    child = start([*arguments, str(tmp_path / "killed")], monkeypatch)
    deadline = time.monotonic() + 200
    while not (tmp_path / "killed" / "codes_00002.npy").exists():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not (tmp_path / "killed" / "manifest.json").exists()
    numbers, _ = quiet(*arguments, tmp_path / "killed")
    assert 0 < numbers["encoded"] <= 340
    quiet(*arguments, tmp_path / "whole")
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


@pytest.mark.distributed
def test_two_ranks_write_the_bytes_of_one(exports, undisturbed, tmp_path):
    arguments = ["encode", str(exports / "residual_vq"), *SIZES, "--out", str(tmp_path / "codes")]
    done = torchrun(["-m", "vqdist", *arguments])
    (line,) = done.stdout.strip().splitlines()
    numbers = json.loads(line)
    assert numbers["encoded"] == 90 and numbers["shards"] == 5  # three of them are rank 0's
    manifest = json.loads(undisturbed["manifest.json"])
    assert numbers["codebook_perplexity"] == manifest["codebook_perplexity"]
    assert content(tmp_path / "codes") == undisturbed


@pytest.mark.distributed
def test_two_ranks_killed_and_one_goes_on(exports, undisturbed, tmp_path, quiet):
    arguments = ["encode", str(exports / "residual_vq"), *SIZES, "--out", str(tmp_path / "codes")]
    killed = torchrun([killed_while_encoding.__file__, "4", *arguments], check=False)
    assert killed.returncode != 0
    assert not (tmp_path / "codes" / "manifest.json").exists()
    numbers, _ = quiet(*arguments[1:])
    assert 0 < numbers["encoded"] < 90
    assert content(tmp_path / "codes") == undisturbed


@pytest.mark.distributed
def test_two_ranks_count_a_broken_image_once(exports, broken, tmp_path):
    arguments = ["encode", str(exports / "dvae"), "--data", str(broken), "--out", str(tmp_path / "codes")]
    sizes = ["--batch_size", "1", "--shard_size", "2", "--num_workers", "0"]
    done = torchrun(["-m", "vqdist", *arguments, *sizes, "--on_bad_image", "skip", "--max_bad_frac", "1"])
    assert json.loads(done.stdout)["replaced"] == 3
    assert done.stderr.count("skipped an image") == 3


def test_freed_memory_is_kept(exports, tmp_path, quiet, monkeypatch):
    from vqdist import allocator

    devices = []
    monkeypatch.setattr(allocator, "keep_freed_memory", devices.append)
    quiet(exports / "dvae", "--data", "synthetic:9", "--out", tmp_path / "codes")
    assert devices == [create_backend("local").device]


def test_the_command_is_listed(capsys):
    assert main(["--help"]) == 0
    assert re.search(r"^  encode +Store the codes of images", capsys.readouterr().out, re.MULTILINE)


def test_ranks_with_other_plans_do_not_encode(exports, tmp_path):
    """Two commands run in two terminals: with other shards the ranks would write into one another's files."""
    writer = CodeWriter(
        Tokenizer.from_pretrained(exports / "dvae"),
        ImageDataset("synthetic:50", 16, channels=3, augment=False),
        tmp_path / "codes",
        batch_size=8,
        shard_size=20,
    )
    backend = create_backend("local")

    def gather(marks: torch.Tensor) -> torch.Tensor:
        theirs = marks.clone()
        theirs[list(writer.plan).index("shard_size")] += 1
        return torch.stack([marks, theirs])

    backend.gather = gather
    assert "the shard_size differs between processes or nodes" in message_of(writer.write, backend)
    assert [path.name for path in (tmp_path / "codes").iterdir()] == ["encode.json"]
