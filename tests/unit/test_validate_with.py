"""Measures that `validate_with` adds to validations: their numbers, what they cost the run, and what is missing."""

from __future__ import annotations

import json
import urllib.error
from pathlib import Path

import pytest
import torch
from launching import ROOT, torchrun
from scenarios import build_ar_trainer, build_trainer, largest_difference, train_steps
from test_best import checkpoints_of
from torch import nn
from torchvision.models import squeezenet1_1
from workers.measures_worker import build, measured, write_extractor
from workers.stopping_worker import signal_at, stopped

from vqdist import UserError
from vqdist.cli import main
from vqdist.evaluation.extractors import FeatureExtractor, KnownNetwork
from vqdist.evaluation.references import Reference
from vqdist.extractor_names import NAMES
from vqdist.protocol import differences, of_number
from vqdist.trainers import further_measures
from vqdist.trainers.measure import OF_FEATURES, asked_for
from vqdist.trainers.vqgan_config import VQGanTrainerConfig

VALID = {"valid": "synthetic:30", "valid_frac": 0.05}


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Return a folder with a feature extractor and random weights of SqueezeNet."""
    folder = tmp_path_factory.mktemp("weights")
    write_extractor(folder)
    torch.manual_seed(3)
    torch.save(squeezenet1_1(weights=None).state_dict(), folder / "squeeze.pth")
    return folder


class Sees(KnownNetwork):
    """Stands for Inception: features, spatial features and logits of an image."""

    def forward(self, images):
        return self.outputs(images)["features"]

    def outputs(self, images):
        pooled = nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)
        return {"features": pooled, "spatial": images[:, 0, ::5, ::5].flatten(1), "logits": 9 * pooled[:, :5]}


@pytest.fixture
def like_inception(monkeypatch):
    """Let every extractor be one that sees all that Inception does."""

    def load(spec, **shape):
        del shape["trust_code"]
        return FeatureExtractor(Sees(), spec, **shape)

    monkeypatch.setattr(further_measures, "load_extractor", load)


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --------------------------------------------------------------------------------------- the numbers


def test_a_tokenizers_numbers_are_those_of_evaluate(tmp_path, weights, capsys):
    words = f"lpips-squeeze:{weights / 'squeeze.pth'},rfid,kid"  # a tokenizer draws no samples: kid is rkid
    extractor = write_extractor(weights)
    trainer = build_trainer(
        tmp_path / "run", image_size=24, num_train_steps=2, validate_with=words, **VALID, **extractor
    )
    numbers = trainer.train()
    trainer.close()
    command = ["evaluate", str(tmp_path / "run"), "--data", "synthetic:30", "--features", extractor["features"]]
    command += ["--trust_features", "true", "--lpips", f"squeeze:{weights / 'squeeze.pth'}", "--batch_size", "4"]
    capsys.readouterr()
    assert main(command) == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert {"lpips", "rfid", "rkid"} <= numbers.keys() and "ris" not in numbers
    assert numbers == pytest.approx({name: evaluated[name] for name in numbers}, rel=1e-6)
    (line,) = [line for line in lines_of(tmp_path / "run") if "valid/rfid" in line]
    assert line["valid/rfid"] == numbers["rfid"] and 0 < line["valid/time_share"] <= 1 and line["valid/seconds"] > 0


def test_a_generators_numbers_are_those_of_evaluate(tmp_path, weights, capsys):
    extractor, with_ = write_extractor(weights), "fid,kid,precision,recall"
    options = {"num_train_steps": 2, "validate_with": with_, "validate_samples": 10, **VALID, **extractor}
    trainer = build_ar_trainer(tmp_path / "run", **options, sample_top_k=8)
    numbers = trainer.train()
    trainer.close()
    command = ["evaluate", str(tmp_path / "run"), "--data", "synthetic:30", "--features", extractor["features"]]
    command += ["--trust_features", "true", "--num_samples", "10", "--batch_size", "4", "--top_k", "8"]
    capsys.readouterr()
    assert main(command) == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert {"fid", "kid", "precision", "recall"} <= numbers.keys()
    assert numbers == pytest.approx({name: evaluated[name] for name in numbers}, rel=1e-6)


def test_every_measure_of_features_is_given(tmp_path, like_inception):
    from vqdist.evaluation.features import Features
    from vqdist.evaluation.fidelity import fidelity

    options = {"validate_with": [*OF_FEATURES], "features": "inception", **VALID}
    trainer = build_trainer(tmp_path, num_train_steps=1, **options)
    numbers = trainer.train()
    images = torch.cat(list(trainer.valid_batches()))
    with trainer.averaged_network() as network, torch.no_grad():
        recon = network.eval().reconstruct(images)[0].clamp(0, 1)
    seen = [Features(**trainer.further.extractor.outputs(side)) for side in (recon, images)]
    found = fidelity(*seen)
    assert {
        name: numbers[f"r{name}"] for name in ("fid", "sfid", "kid", "is", "precision", "recall")
    } == pytest.approx({name: found[name] for name in ("fid", "sfid", "kid", "is", "precision", "recall")}, rel=1e-4)


@pytest.mark.parametrize("words", ["ris", "rsfid", "rfid", "rprecision"])
def test_one_measure_alone_is_given(tmp_path, words, like_inception):
    numbers = build_trainer(tmp_path, num_train_steps=1, validate_with=words, **VALID).evaluate()
    assert numbers.keys() & {*OF_FEATURES} == {words}


def test_both_halves_of_vq_ar_are_measured(tmp_path, like_inception):
    options = {"validate_with": "fid,rfid,is", "validate_samples": 8, "num_train_steps": 1, **VALID}
    numbers = build_ar_trainer(tmp_path, "vq_ar", **options).train()
    assert {"fid", "rfid", "is"} <= numbers.keys() and numbers["fid"] != numbers["rfid"]


def test_samples_are_drawn_at_every_so_many_validations_and_at_the_end(tmp_path, weights):
    more = {"validate_with": "fid", "validate_samples": 8, "validate_samples_every": 2, "validate_every": 1}
    build_ar_trainer(tmp_path, num_train_steps=5, **more, **VALID, **write_extractor(weights)).train()
    lines = [line for line in lines_of(tmp_path) if "valid/nll" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in lines if "valid/fid" in line] == [2, 4, 5]


def test_samples_are_drawn_where_patience_ends_a_run(tmp_path, weights):
    more = {"validate_with": "fid", "validate_samples": 8, "validate_samples_every": 4, "validate_every": 1}
    options = {**more, **VALID, **write_extractor(weights), "num_train_steps": 9, "patience": 2}
    trainer = build_ar_trainer(tmp_path, **options)
    evaluate = trainer.evaluate
    trainer.evaluate = lambda: {**evaluate(), "nll": 2.0}
    numbers = trainer.train()
    lines = [line for line in lines_of(tmp_path) if "valid/nll" in line]
    assert [(line["step"], "valid/fid" in line) for line in lines] == [(1, False), (2, False), (3, False), (3, True)]
    assert {f"valid/{name}": value for name, value in numbers.items()}.items() <= lines[-1].items()
    assert numbers["nll"] == 2.0 and numbers["fid"] > 0
    assert trainer.train() == numbers and len(lines_of(tmp_path)) == len(lines) + 3  # and not once more


def test_the_best_step_by_a_measure_of_samples_is_kept(tmp_path, weights):
    more = {"validate_with": "fid", "validate_samples": 8, "validate_samples_every": 2, "validate_every": 1}
    kept = {"keep_best": "valid/fid", "patience": 1, "keep_checkpoints": 1}
    trainer = build_ar_trainer(tmp_path, num_train_steps=9, **more, **kept, **VALID, **write_extractor(weights))
    evaluate, fid = trainer.evaluate, {2: 3.0, 4: 1.0, 6: 2.0}
    trainer.evaluate = lambda: {**evaluate(), **({"fid": fid[trainer.step]} if trainer.step in fid else {})}
    trainer.train()
    assert (trainer.step, trainer.best.step, trainer.best.value) == (6, 4, 1.0)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000004", "step_00000006"]


def test_a_reference_stands_in_place_of_the_images(tmp_path, weights):
    options = {"validate_with": "rfid,rkid", "num_train_steps": 1, **VALID, **write_extractor(weights)}
    trainer = build_trainer(tmp_path / "images", **options)
    numbers = trainer.evaluate()
    images = torch.cat(list(trainer.valid_batches()))
    seen = further_measures.Features(trainer.further.extractor(images))
    for keep, measures in ((30, "rfid,rkid"), (0, "rfid")):
        path = tmp_path / f"{keep}.npz"
        Reference.of(seen, {"image_size": [16, 16]}).write(path, keep)
        compared = build_trainer(
            tmp_path / str(keep), **{**options, "validate_with": measures, "reference": str(path)}
        )
        found = compared.evaluate()
        assert found["rfid"] == pytest.approx(numbers["rfid"], rel=1e-5)
        assert keep == 0 or found["rkid"] == pytest.approx(numbers["rkid"], rel=1e-4)


def test_the_images_are_looked_at_once_in_a_run(tmp_path, weights):
    options = {"validate_with": "rfid", "validate_every": 1, **VALID, **write_extractor(weights)}
    trainer = build_trainer(tmp_path, num_train_steps=3, **options)
    looks, outputs = [], trainer.further.extractor.outputs
    trainer.further.extractor.outputs = lambda images: looks.append(len(images)) or outputs(images)
    trainer.train()
    assert sum(looks) == 30 * (1 + 3)


def test_features_that_are_not_finite_are_no_number(tmp_path, like_inception):
    trainer = build_trainer(tmp_path, num_train_steps=1, validate_with="rfid", validate_every=1, **VALID)
    trainer.further.of_reconstructions = _broken(trainer.further)
    trainer.train()
    (line,) = [line for line in lines_of(tmp_path) if "valid/psnr" in line]
    assert line["valid/rfid"] is None


def _broken(further):
    def of_reconstructions(evaluate):
        def spoilt(*, look, **options):
            return evaluate(look=lambda image, recon: look(image, recon * torch.nan), **options)

        return type(further).of_reconstructions(further, spoilt)

    return of_reconstructions


# --------------------------------------------------------------------------------------- the run


@pytest.mark.parametrize("kind", ["vqgan", "prior"])
def test_the_weights_are_those_of_a_run_that_measures_less(tmp_path, weights, kind):
    builder, words = {"vqgan": (build_trainer, "rfid"), "prior": (build_ar_trainer, "fid")}[kind]
    found = []
    for number, asked in enumerate((words, [])):
        more = {**write_extractor(weights), "validate_with": asked} if asked else {}
        more |= {"validate_samples": 8} if asked and kind == "prior" else {}
        trainer = builder(tmp_path / str(number), validate_every=1, **VALID, **more)
        found.append(train_steps(trainer, 3))
    assert largest_difference(*found)[0] == 0


@pytest.mark.parametrize("kind, call", [("vqgan", 3), ("prior", 2)])
def test_a_signal_breaks_it_off_and_the_resumed_run_makes_it_first(tmp_path, weights, kind, call):
    """While features are seen: of the images and reconstructions, or of the samples."""
    options = {"batch_size": 4, "validate_every": 2, "num_train_steps": 4}
    trainer = build(tmp_path, kind, **options)
    trainer.further.extractor.outputs = signal_at(call, trainer.further.extractor.outputs, None, trainer)
    assert stopped(trainer).code == 75
    assert trainer.step == 2 and not any("valid/images" in line for line in lines_of(trainer.run_folder))
    trainer.close()
    again = build(tmp_path, kind, **options)
    again.train()
    (tmp_path / "whole").mkdir()
    whole = build(tmp_path / "whole", kind, **options).train()
    validated = [line for line in lines_of(again.run_folder) if "valid/images" in line]
    assert [line["step"] for line in validated] == [2, 4]
    assert {name: validated[-1][f"valid/{name}"] for name in whole} == whole


@pytest.mark.distributed
def test_two_ranks_have_the_numbers_of_one(tmp_path):
    kinds = ["vqgan", "prior", "vq_ar"]
    torchrun([str(ROOT / "tests" / "workers" / "measures_worker.py"), str(tmp_path), "accelerate", *kinds])
    for kind in kinds:
        two = json.loads((tmp_path / f"{kind}_accelerate.json").read_text())
        one = measured(build(tmp_path, kind, batch_size=4))
        # the samples of both are drawn in blocks of other sizes, so that a code in thousands may be another one
        assert two == pytest.approx(one, rel=2e-4, abs=1e-6), kind
        assert one["looks"] == {"vqgan": 3 * 9, "prior": 3 * 9, "vq_ar": 5 * 9}[kind]


@pytest.mark.distributed
@pytest.mark.nightly  # the numbers are of whole weights, which every backend gives in `Engine.whole`
@pytest.mark.parametrize("backend", ["fsdp2", "zero1", "zero2", "zero3"])
def test_other_backends_have_the_numbers_of_one_process(tmp_path, backend):
    worker = str(ROOT / "tests" / "workers" / "measures_worker.py")
    torchrun([worker, str(tmp_path), backend, "vqgan", "prior"], timeout=500)
    for kind in ("vqgan", "prior"):
        two = json.loads((tmp_path / f"{kind}_{backend}.json").read_text())
        assert two == pytest.approx(measured(build(tmp_path, kind, batch_size=4)), rel=2e-4, abs=1e-6), kind


# --------------------------------------------------------------------------------------- the protocol


def protocols_of(folder: Path) -> list[dict]:
    events = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    return [event["validation"] for event in events if event["event"] in ("start", "resume")]


def test_a_start_says_what_validations_are_measured_on(tmp_path, weights, capsys):
    extractor = write_extractor(weights)
    trainer = build_trainer(tmp_path / "run", validate_with="rfid", num_train_steps=1, **VALID, **extractor)
    trainer.train()
    trainer.close()
    command = ["evaluate", str(tmp_path / "run"), "--data", "synthetic:30", "--features", extractor["features"]]
    capsys.readouterr()
    assert main([*command, "--trust_features", "true"]) == 0
    evaluated = json.loads(capsys.readouterr().out)["protocol"]
    (said,) = protocols_of(tmp_path / "run")
    assert said["weights"] == "averaged" and differences(said, evaluated) == {}
    options = {"num_train_steps": 2, "use_ema": False, "allow_config_change": True}
    build_trainer(tmp_path / "run", **VALID, valid_images=9, **options, validate_with=[]).close()
    resumed = protocols_of(tmp_path / "run")[1]
    assert resumed["images"] == 9 and resumed["weights"] == "live" and "features" not in resumed
    assert resumed["data_hash"] != said["data_hash"]


def test_a_number_that_is_measured_on_something_else_is_compared_anew(tmp_path, weights, capsys):
    options = {"validate_with": "fid", "validate_samples": 8, "keep_best": "valid/fid", "keep_checkpoints": 1}
    options |= {"validate_every": 1, "save_model_every": 1, "patience": 9, **VALID, **write_extractor(weights)}
    fid = {1: 3.0, 2: 1.0, 3: 2.0, 4: 5.0, 5: 6.0}

    def build_at(steps, **more):
        trainer = build_ar_trainer(tmp_path, **{**options, "num_train_steps": steps, **more})
        trainer.evaluate = lambda: {"fid": fid[trainer.step]}
        return trainer

    first = build_at(5)
    assert [step for step, _ in zip(range(1, 4), first.steps())] == [1, 2, 3]
    first.close()
    same = build_at(5, batch_size=2, grad_accum_every=2)  # the same number
    assert (same.best.step, same.best.value, same.best.standing.waited) == (2, 1.0, 1)
    same.close()
    capsys.readouterr()
    others = build_at(5, validate_samples=9)
    assert capsys.readouterr().err.count("warning: valid/fid is compared anew from step 3 on") == 1
    assert others.best.standing.waited == 0 and checkpoints_of(tmp_path) == [2, 3]
    assert json.loads((tmp_path / "export_best" / "export.json").read_text())["step"] == 2
    others.train()
    assert (others.best.step, others.best.value, others.best.standing.waited) == (4, 5.0, 1)
    assert checkpoints_of(tmp_path) == [4, 5]
    assert json.loads((tmp_path / "best.json").read_text())["value"] == 5.0


@pytest.mark.parametrize(
    "name, changes",
    [
        ("psnr", {"weights", "data_hash"}),
        ("lpips", {"weights", "data_hash", "lpips_hash"}),
        ("rfid", {"weights", "data_hash", "features_hash", "reference_hash"}),
        ("ris", {"weights", "data_hash", "features_hash", "reference_hash", "inception_score_over"}),
        ("fid", {"weights", "data_hash", "features_hash", "reference_hash", "samples", "seed", "top_k"}),
    ],
)
def test_a_number_is_measured_on_what_its_own_networks_see(name, changes):
    keys = ["weights", "data_hash", "lpips_hash", "features_hash", "reference_hash", "inception_score_over"]
    keys += ["samples", "seed", "top_k", "features", "reference", "data", "vqdist", "commit"]
    said = dict.fromkeys(keys, 1)
    assert {key for key in keys if of_number(name, {**said, key: 2}) != of_number(name, said)} == changes


def test_a_start_says_how_samples_are_drawn(tmp_path, weights):
    options = {"validate_with": "fid", "validate_samples": 8, "sample_top_k": 5, **write_extractor(weights)}
    build_ar_trainer(tmp_path, **options).close()
    (said,) = protocols_of(tmp_path)
    assert (said["samples"], said["seed"], said["top_k"], said["images"]) == (8, 0, 5, 16)
    build_trainer(tmp_path / "none", valid_frac=0.0).close()
    assert "validation" not in json.loads((tmp_path / "none" / "events.jsonl").read_text())


# --------------------------------------------------------------------------------------- mistakes


MISTAKES = [
    ({"validate_with": "rfidd"}, "^there is no measure 'rfidd'; nearest: rfid"),
    ({"validate_with": "lpips,lpips-alex"}, r"^validate_with names LPIPS more than once \(lpips, lpips-alex\)"),
    ({"validate_with": "lpips:nowhere.pth"}, "^no such file: nowhere.pth, which validate_with lpips names"),
    (
        {"validate_with": "rfid", "features": "nowhere.pth"},
        "^--features nowhere.pth is neither a file nor a known network",
    ),
    ({"validate_with": "rfid", "features": "inceptionn"}, "^--features inceptionn is neither .*inception_clean"),
    ({"validate_with": "rfid", "features": "dinov2:a.pth"}, "^--features dinov2:a.pth names a.pth, which is no file"),
    ({"validate_with": "rfid", "reference": "nowhere.npz"}, "^no such file: nowhere.npz, which reference names"),
    ({"validate_with": "lpips", "features": "vgg16"}, "^features vgg16 does nothing, because validate_with names"),
    ({"reference": "a.npz"}, "^reference a.npz does nothing, because validate_with names nothing like rfid"),
    ({"validate_with": "rfid", "features": "{program}"}, "is a TorchScript program.*--trust_features true"),
    (
        {"validate_with": "ris", "features": "{program}", "trust_features": True},
        "names is, and features .* gives none",
    ),
    ({"validate_with": "sfid", "features": "{program}", "trust_features": True}, "names sfid, and features .* none"),
    ({"validate_with": "rfid", "valid_frac": 0}, r"^validate_with \['rfid'\] does nothing, because there are no im"),
    ({"validate_with": "rfid", "valid_images": 3}, "^there are 3 images to validate on but"),
    ({"validate_with": "lpips-alex"}, "whose alexnet needs images of 31 pixels, and these have 16"),
]


@pytest.mark.parametrize("options, said", MISTAKES)
def test_a_mistake_is_one_line_before_anything_is_written(tmp_path, weights, options, said, monkeypatch):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", _offline)
    places = {"program": weights / "features.pt"}
    given = {k: v.format(**places) if isinstance(v, str) else v for k, v in options.items()}
    with pytest.raises(UserError, match=said) as error:
        build_trainer(tmp_path / "run", **given)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", NAMES)
def test_every_extractor_of_evaluate_is_taken(tmp_path, name):
    (tmp_path / "weights.pth").touch()
    for features in (name, f"{name}:{tmp_path}/weights.pth"):
        config = {"num_train_steps": 1, "batch_size": 4, "folder": "synthetic:8", "image_size": 16}
        assert VQGanTrainerConfig(**config, validate_with=["rfid"], features=features).check_values() is None


def _offline(*args, **kwargs):
    raise urllib.error.URLError("no network")


@pytest.mark.parametrize("words", ["rfid", "lpips"])
def test_weights_that_cannot_be_had_are_said_before_the_first_step(tmp_path, words, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "empty"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", _offline)
    arguments = "--data synthetic:64 --image_size 32 --model.dim 16 --model.layers 2 --model.perceptual none"
    arguments += " --model.use_gan false --trainer.num_train_steps 4 --trainer.batch_size 4 --data.valid synthetic:9"
    command = ["train", "vqgan", *arguments.split(), "--out", str(tmp_path / "run"), "--validate_with", words]
    assert main(command) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "loading" not in line]
    assert len(said) == 1 and "no network" in said[0] and "weights" in said[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "kind, options, said",
    [
        ("prior", {"validate_with": "rfid"}, "^validate_with names rfid, but a Prior reconstructs no images"),
        ("prior", {"validate_with": "lpips"}, "^validate_with names lpips, but a Prior reconstructs no images"),
        ("prior", {"validate_samples": 8}, "^validate_samples 8 does nothing, because validate_with names no measure"),
        ("vq_ar", {"validate_with": "rfid", "validate_samples_every": 3}, "^validate_samples_every 3 does nothing"),
        ("var", {"validate_with": "fid", "validate_samples": 3}, "^validate_samples 3 is not possible"),
    ],
)
def test_a_measure_is_of_what_the_model_makes(tmp_path, kind, options, said):
    with pytest.raises(UserError, match=said):
        build_ar_trainer(tmp_path, kind, **options)


def test_stored_codes_are_compared_with_a_reference(tmp_path, weights):
    from scenarios import build_tokenizer
    from test_best import stored_codes

    tokenizer = build_tokenizer()
    codes = stored_codes(tmp_path / "codes", tokenizer)
    given = {"model": {"tokenizer": tokenizer, "num_classes": 0}, "dataset": codes, "folder": None}
    given |= {"validate_with": "fid", "validate_samples": 8, "num_train_steps": 1, **write_extractor(weights)}
    with pytest.raises(UserError, match="^validate_with fid compares with images, and codes are validated on; give"):
        build_ar_trainer(tmp_path / "run", **given)
    images = torch.rand(20, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    path = tmp_path / "reference.npz"
    trainer = build_trainer(tmp_path / "other", validate_with="rfid", **write_extractor(weights))
    Reference.of(further_measures.Features(trainer.further.extractor(images))).write(path, 0)
    assert build_ar_trainer(tmp_path / "run", **given, reference=str(path)).train()["fid"] > 0
    with pytest.raises(UserError, match="^reference .* lacks what kid needs"):
        build_ar_trainer(tmp_path / "run2", **{**given, "validate_with": "fid,kid"}, reference=str(path))


def test_names_are_read_with_commas_and_without():
    assert asked_for(["lpips", "rfid"], draws=True).names == ("lpips", "rfid")
    assert asked_for(["fid", "rfid", "rfid"], draws=False).names == ("rfid",)
    assert asked_for(["fid", "rfid"], draws=True).of_samples == ("fid",)
    assert asked_for(["lpips-alex:a/b,c.pth"], draws=False)[1:] == ("alex", "a/b,c.pth")
