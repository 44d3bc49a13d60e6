"""The moving average: weights by its formula, codebooks and counts as they are; checkpoints and exports of before."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from launching import ROOT
from safetensors.torch import load_file, save_file
from scenarios import (
    MULTISCALE,
    build_ar_trainer,
    build_dvae_trainer,
    build_prior,
    build_tokenizer,
    build_trainer,
    train_steps,
    unfollowed_buffers,
)
from torch import Tensor, nn

from vqdist import Prior, Tokenizer, VQGanVAE
from vqdist.cli import main
from vqdist.cli.models import MODELS
from vqdist.cli.train import make_trainer, train_options
from vqdist.evaluation import evaluate_reconstruction
from vqdist.files import sha256_of
from vqdist.manifest import read_manifest, sealed
from vqdist.models.averaged import averaged_tensors
from vqdist.models.pretrained import load_model_of_any_type

STARTED = {"codebook_dim": 8, "kmeans_init": True, "threshold_ema_dead_code": 2}  # k-means, dead codes
BY_GRADIENT = {"learnable_codebook": True, "ema_update": False, "use_cosine_sim": False}
SCALES = {"v_patch_nums": [1, 2, 4]}


@pytest.fixture
def said(caplog):
    """Return what vqdist logged since the last call."""

    def lines() -> list[str]:
        found = [record.getMessage() for record in caplog.records if record.name.startswith("vqdist")]
        caplog.clear()
        return found

    return lines


def vqgan(quantizer: str, **options):
    model = {"codebook_size": 32, **options}
    return lambda folder, **rest: build_trainer(folder, quantizer=quantizer, model=model, **rest)


# what is trained, and what of its codebook is averaged
NETWORKS = {
    "vq": (vqgan("vq", vq_kwargs=STARTED), ()),
    "vq by gradient": (vqgan("vq", vq_kwargs={**STARTED, **BY_GRADIENT}), ("embed",)),
    "residual_vq": (vqgan("residual_vq", vq_kwargs=STARTED), ()),
    "residual_vq, one codebook": (vqgan("residual_vq", vq_kwargs={**STARTED, "shared_codebook": True}), ()),
    "residual_vq by gradient": (vqgan("residual_vq", vq_kwargs={**STARTED, **BY_GRADIENT}), ("embed",)),
    "multiscale_vq": (vqgan("multiscale_vq", quantizer_kwargs=SCALES), ()),
    "multiscale_vq by gradient": (
        vqgan("multiscale_vq", quantizer_kwargs={**SCALES, "learnable_codebook": True, "use_cosine_sim": True}),
        ("codebook",),
    ),
    "simvq": (vqgan("simvq"), ("code_transform",)),
    "lfq": (vqgan("lfq"), ()),
    "fsq": (vqgan("fsq", codebook_size=256), ()),
    "dvae": (build_dvae_trainer, ("codebook",)),
    "vq_ar": (lambda folder, **rest: build_ar_trainer(folder, "vq_ar", **rest), ()),
    "prior": (lambda folder, **rest: build_ar_trainer(folder, "prior", **rest), ()),
    "var": (lambda folder, **rest: build_ar_trainer(folder, "var", **rest), ()),
}


def averages_by_hand(states: list[dict[str, Tensor]], *, beta: float, after: int, every: int) -> dict[str, Tensor]:
    """ema-pytorch's rule: copies up to `after`, then a decay that warms up as 1 - (1 + n) ** (-2 / 3) to `beta`."""
    average = states[0]
    for number, state in enumerate(states[1:], start=1):
        if number % every:
            continue
        decay = 0.0 if number <= after else min(beta, 1 - (1 + number - after) ** (-2 / 3))
        average = {name: average[name] + (1 - decay) * (state[name] - average[name]) for name in state}
    return average


def parameters_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().double() for name, parameter in network.named_parameters()}


def check_average(trainer, steps: int, *, beta: float, after: int, every: int) -> dict[str, Tensor]:
    """Train, compare after each step, and return the averaged parameters that are not the live ones."""
    states = []
    for _ in range(steps):
        trainer.train_step()
        states.append(parameters_of(trainer.main_engine.module))
        assert not unfollowed_buffers(trainer)
    expected = averages_by_hand(states, beta=beta, after=after, every=every)
    actual = parameters_of(trainer.ema.ema_model)
    for name, tensor in expected.items():
        assert torch.allclose(actual[name], tensor, atol=1e-6), name
    return {name: tensor for name, tensor in actual.items() if not torch.equal(tensor, states[-1][name])}


@pytest.mark.parametrize("beta, after, every", [(0.995, 0, 1), (0.5, 0, 1), (0.995, 3, 1), (0.9, 1, 2)])
def test_weights_are_averaged_by_the_formula_and_buffers_copied_at_every_step(tmp_path, beta, after, every):
    options = {"ema_beta": beta, "ema_update_after_step": after, "ema_update_every": every}
    trainer = build_trainer(tmp_path, quantizer="random_vq", lr=1e-2, num_train_steps=7, **options)
    assert "decoder.last_layer.weight" in check_average(trainer, 7, beta=beta, after=after, every=every)


@pytest.mark.parametrize("name", NETWORKS)
def test_codebooks_that_follow_by_themselves_are_the_live_ones(tmp_path, name):
    build, of_the_codebook = NETWORKS[name]
    moved = check_average(build(tmp_path, lr=1e-2), 4, beta=0.995, after=0, every=1)
    assert moved
    codebook = [key for key in moved if "quantizer" in key or key.startswith("codebook")]
    for part in of_the_codebook:
        assert any(part in key for key in codebook), f"{part} is not averaged"
    assert of_the_codebook or not any("embed" in key for key in codebook)


def test_a_codebook_moves_while_the_average_does_not(tmp_path):
    trainer = build_trainer(tmp_path, quantizer="vq", ema_beta=1.0, ema_update_every=3, lr=1e-2)
    first, last = train_steps(trainer, 1), train_steps(trainer, 3)
    embed = next(name for name in first if name.startswith("ema.") and name.endswith("embed"))
    assert not torch.equal(first[embed], last[embed]) and not unfollowed_buffers(trainer)
    assert torch.equal(first["ema.decoder.last_layer.weight"], last["ema.decoder.last_layer.weight"])


def test_the_average_of_the_digits_recipe_uses_the_codes_of_the_live_network(tmp_path):
    """300 steps, half as wide: the averages of an averaged codebook used 0.89 of the codes and lost 0.4 dB."""
    recipe = str(ROOT / "launch" / "recipes" / "digits_vqgan.yaml")
    given = ["--config", recipe, "--out", str(tmp_path), "--model.dim", "16", "--trainer.num_train_steps", "300"]
    trainer = make_trainer(MODELS["vqgan"], train_options("vqgan", given))
    for _ in range(300):
        trainer.update(trainer.next_micro_batches())
        trainer.networks.update_average()
        trainer.progress.step += 1
    options = {"backend": trainer.backend, "image_size": 28}
    with trainer.main_engine.whole() as live, trainer.averaged_network() as average:
        live, average = (
            evaluate_reconstruction(network, trainer.valid_batches(), **options) for network in (live, average)
        )
    assert average["codebook_usage"] >= 0.95 * live["codebook_usage"] > 0.9
    assert average["codebook_perplexity"] >= 0.95 * live["codebook_perplexity"]
    assert average["psnr"] >= live["psnr"] - 0.2  # the weights lag behind while they improve fast


# ------------------------------------------------------------------------------------------- the rule


class Means(nn.Module):
    """Keeps running means as a frozen parameter, as taming-transformers' EmbeddingEMA does."""

    def __init__(self):
        super().__init__()
        self.means = nn.Parameter(torch.zeros(4), requires_grad=False)
        self.weight = nn.Parameter(torch.zeros(4))
        self.register_buffer("count", torch.zeros(4))


class Deciding(Means):
    """Says itself that its count is averaged, and its weight is not."""

    def is_averaged(self, name: str, tensor: Tensor) -> bool:
        assert getattr(self, name) is tensor
        return name == "count"


def test_what_learns_by_gradient_is_averaged_unless_a_module_says_otherwise():
    network = nn.Sequential(nn.BatchNorm1d(4), Means(), nn.Sequential(Deciding()))
    assert averaged_tensors(network).keys() == {"0.weight", "0.bias", "1.weight", "2.0.count"}
    nested = Deciding()
    nested.inner = Deciding()
    nested.is_averaged = lambda name, tensor: True  # for its own, not for those of the one within
    assert averaged_tensors(nested).keys() == {"means", "weight", "count", "inner.count"}


def test_the_trainer_asks_the_module(tmp_path):
    trainer = build_trainer(tmp_path / "plain", quantizer="vq")
    codebook = type(trainer.generator.module.quantizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codebook, "is_averaged", lambda self, name, tensor: name.endswith("embed"), raising=False)
        trainer = build_trainer(tmp_path / "asked", quantizer="vq", lr=1e-2)
        weights = train_steps(trainer, 3)
    differing = {name.rpartition(".")[2] for name in unfollowed_buffers(trainer)}
    assert differing == {"embed"}
    for name, tensor in trainer.generator.module.quantizer.named_parameters():
        assert torch.equal(weights[f"ema.quantizer.{name}"], tensor), name


# ------------------------------------------------------------------------------------------- files of before


def averaged_wrongly(trainer) -> dict[str, Tensor]:
    """Return the average as an older vqdist had it: of the codebook, too."""
    average = {name: tensor.clone() for name, tensor in trainer.ema.named_tensors()}
    for name, tensor in average.items():
        if name.endswith(("embed", "embed_avg", "cluster_size")):
            tensor.mul_(0.5)
    return average


def make_old(run, *, average: dict[str, Tensor], prefix: str) -> None:
    """Make a run's newest checkpoint and export those of an older vqdist."""
    path = max(run.glob("checkpoints/step_*")) / "ema.safetensors"
    save_file({**load_file(path), **average}, path)
    manifest = path.with_name("manifest.json")
    written = read_manifest(path.parent)
    del written["sha256"]
    written["files"][path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    manifest.write_text(json.dumps(sealed(written)))
    weights = run / "export" / "model.safetensors"
    exported = {f"{prefix}{name}": tensor for name, tensor in average.items()}
    save_file({name: exported[name].contiguous() for name in load_file(weights)}, weights, metadata={"format": "pt"})
    (run / "export" / "export.json").unlink()
    config = run / "export" / "config.json"
    config.write_text(
        json.dumps({key: value for key, value in json.loads(config.read_text()).items() if key != "buffers"})
    )


OLD = {
    "vq": (lambda folder, **rest: build_trainer(folder, quantizer="random_vq", **rest), "autoencoder."),
    "residual_vq": (NETWORKS["residual_vq, one codebook"][0], "autoencoder."),
    "multiscale_vq": (
        lambda folder, **rest: build_trainer(
            folder,
            quantizer="multiscale_vq",
            model={"codebook_size": 32, "quantizer_kwargs": MULTISCALE},
            **rest,
        ),
        "autoencoder.",
    ),
    "vq_ar": (lambda folder, **rest: build_ar_trainer(folder, "vq_ar", **rest), ""),
}


@pytest.fixture
def old_run(tmp_path, request):
    """Return a run of an older vqdist, its live and its averaged tensors, and a builder that resumes it."""
    build, prefix = OLD[request.param]
    trainer = build(tmp_path / "run", lr=1e-2, num_train_steps=3)
    trainer.train()
    live = {name: tensor.clone() for name, tensor in trainer.main_engine.named_tensors()}
    average = averaged_wrongly(trainer)
    trainer.close()
    make_old(tmp_path / "run", average=average, prefix=prefix)
    return tmp_path / "run", live, average, build


def codebook_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in network.state_dict().items() if name.endswith("embed")}


def is_codebook_of(network: nn.Module, tensors: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, tensors[name]) for name, tensor in codebook_of(network).items())


@pytest.mark.parametrize("old_run", OLD, indirect=True)
def test_an_old_export_takes_the_codebook_of_its_checkpoint(old_run, said, tmp_path):
    run, live, average, _ = old_run
    before = (run / "export" / "model.safetensors").read_bytes()
    for location in (run, run / "export"):
        network = load_model_of_any_type(location).network
        (line,) = said()
        assert str(run / "export") in line and "step_00000003" in line
        assert codebook_of(network) and is_codebook_of(network, live)
        for name, tensor in network.named_parameters():
            assert torch.equal(tensor, average[name]), name
    assert (run / "export" / "model.safetensors").read_bytes() == before  # in memory only
    assert is_codebook_of(Tokenizer.from_pretrained(run).network, live)

    said()
    model = load_model_of_any_type(run)
    model.save_pretrained(tmp_path / "saved")
    said()
    assert is_codebook_of(load_model_of_any_type(tmp_path / "saved").network, live)
    assert said() == []


@pytest.mark.parametrize("old_run", ["vq"], indirect=True)
def test_an_old_export_alone_says_that_its_codebook_may_be_an_average(old_run, said, capsys, tmp_path):
    run, _, average, _ = old_run
    shutil.copytree(run / "export", tmp_path / "moved")
    model = VQGanVAE.from_pretrained(tmp_path / "moved")
    (line,) = said()
    assert str(tmp_path / "moved") in line and "may be an average" in line
    assert is_codebook_of(model.network, average)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.root, "handlers", [])  # as outside of pytest
        VQGanVAE.from_pretrained(tmp_path / "moved")
        assert capsys.readouterr().err == line + "\n"
    model.save_pretrained(tmp_path / "again")  # nothing was put right, so it does not say so
    VQGanVAE.from_pretrained(tmp_path / "again")
    assert "may be an average" in said()[0]


@pytest.mark.parametrize("old_run", ["vq"], indirect=True)
def test_only_the_checkpoint_of_the_export_mends_it(old_run, said):
    run, _, average, _ = old_run
    checkpoint = run / "checkpoints" / "step_00000003"
    other = {name: tensor + 1 if name.endswith("embed") else tensor for name, tensor in average.items()}
    save_file({**load_file(checkpoint / "ema.safetensors"), **other}, checkpoint / "ema.safetensors")
    assert is_codebook_of(load_model_of_any_type(run).network, average)
    assert "may be an average" in said()[0]
    (checkpoint / "ema.safetensors").write_bytes(b"damaged")
    assert is_codebook_of(load_model_of_any_type(run).network, average)
    assert "may be an average" in said()[0]


@pytest.mark.parametrize("old_run", ["vq"], indirect=True)
def test_codes_and_priors_keep_the_tokenizer_that_they_were_made_with(old_run, said, tmp_path):
    run, live, average, _ = old_run
    exported = Tokenizer.from_pretrained(run, mend=False)
    assert is_codebook_of(exported.network, average) and said() == []
    kept = Tokenizer.from_pretrained(run, fingerprint=exported.fingerprint())
    assert is_codebook_of(kept.network, average) and said() == []
    build_prior(kept).save_pretrained(tmp_path / "prior")
    assert is_codebook_of(Prior.from_pretrained(tmp_path / "prior").tokenizer.network, average)
    assert said() == []
    mended = Tokenizer.from_pretrained(run)
    assert is_codebook_of(Tokenizer.from_pretrained(run, fingerprint=mended.fingerprint()).network, live)


@pytest.mark.parametrize("old_run", OLD, indirect=True)
def test_an_old_checkpoint_is_resumed_with_the_live_codebook(old_run, capsys):
    run, live, average, build = old_run
    trainer = build(run, lr=1e-2, num_train_steps=3)
    assert "the average takes the live ones of this checkpoint" in capsys.readouterr().err
    averaged = dict(trainer.ema.named_tensors())
    parameters = dict(trainer.main_engine.module.named_parameters())
    for name, tensor in averaged.items():
        assert torch.equal(tensor, (average if name in parameters else live)[name]), name
    trainer.close()


def test_new_and_live_exports_are_taken_as_they_are(tmp_path, said):
    trainer = build_trainer(tmp_path / "live", quantizer="random_vq", use_ema=False, num_train_steps=2)
    trainer.train()
    config = tmp_path / "live" / "export" / "config.json"
    written = json.loads(config.read_text())
    assert written.pop("buffers") == "live"
    config.write_text(json.dumps(written))  # an older one, of a run without an average
    build_tokenizer().save_pretrained(tmp_path / "new")
    build_tokenizer(quantizer="lfq", vq_kwargs=None, codebook_size=32).save_pretrained(tmp_path / "lfq")
    (tmp_path / "lfq" / "config.json").write_text(
        (tmp_path / "lfq" / "config.json").read_text().replace('"buffers": "live",', "")
    )
    said()
    for folder in ("live", "new", "lfq"):
        assert Tokenizer.from_pretrained(tmp_path / folder) and said() == [], folder


def test_an_old_prior_goes_on_with_the_tokenizer_of_its_beginning(tmp_path, said):
    trainer = build_trainer(tmp_path / "vq", quantizer="random_vq", lr=1e-2, num_train_steps=3)
    trainer.train()
    trainer.close()
    make_old(tmp_path / "vq", average=averaged_wrongly(trainer), prefix="autoencoder.")
    exported = Tokenizer.from_pretrained(tmp_path / "vq", mend=False).fingerprint()
    run = tmp_path / "prior"
    command = ["train", "prior", "--tokenizer", str(tmp_path / "vq"), "--data", "synthetic:64", "--out", str(run)]
    command += ["--model.dim", "32", "--model.depth", "1", "--model.heads", "2", "--model.dim_head", "32"]
    command += ["--trainer.batch_size", "4", "--data.num_workers", "0", "--trainer.num_train_steps"]
    assert main([*command, "1"]) == 0
    config = json.loads((run / "config.json").read_text())
    assert config["model"]["tokenizer"] != exported  # a new one is trained over the mended codebook
    for path in (run / "config.json", run / "export" / "config.json"):  # and this is one of before
        content = path.read_text().replace(config["model"]["tokenizer"], exported)
        path.write_text(content)
    said()
    assert main([*command, "1"]) == 0
    assert said() == []
