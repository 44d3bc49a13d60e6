"""The loop: what one step does, what is averaged, logged, drawn and exported, and when the discriminator joins."""

from __future__ import annotations

import json
import os
import platform
import signal
import sys
import traceback
from functools import partial

import pytest
import torch
from launching import ROOT, run, torchrun
from PIL import Image
from scenarios import (
    AR_MODELS,
    DVAE_EVERYTHING,
    EVERYTHING,
    IMAGE_SIZE,
    QUALITY,
    build_ar_trainer,
    build_dvae_trainer,
    build_trainer,
    build_vae,
    train_steps,
    weights_of,
)
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from vqdist import UserError, VQGanVAE, VQGanVAETrainer
from vqdist.backends.base import Capabilities
from vqdist.completion import MANIFEST
from vqdist.options import names_with
from vqdist.schedules import learning_rate
from vqdist.stopping import Stopped
from vqdist.trainers.base import Trainer
from vqdist.trainers.config import TrainerConfig, differing_keys
from vqdist.trainers.feed import mark_last


def logged(trainer: VQGanVAETrainer) -> list[dict]:
    return [json.loads(line) for line in (trainer.run_folder / "metrics.jsonl").read_text().splitlines()]


def logs_of(trainer: VQGanVAETrainer, steps: int) -> list[dict[str, float]]:
    return [{name: float(value) for name, value in trainer.train_step().items()} for _ in range(steps)]


# ------------------------------------------------------------------------------------------- the interface


def test_train_tells_log_fn_numbers_and_returns_the_validation(tmp_path):
    lines = []
    trainer = build_trainer(tmp_path, **EVERYTHING)
    numbers = trainer.train(log_fn=lines.append)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(type(value) is float for line in lines for name, value in line.items() if name != "step")
    first = {"recon_loss", "aux_loss", "perceptual_loss", "lr", "generator_grad_norm"}
    joined = {"adversarial_loss", "adversarial_weight", "adaptive_weight", "discr_loss", "real_logits", "fake_logits"}
    of_the_run = {"step", "images_per_second", "data_wait", "memory_gb", "codebook_usage", "codebook_perplexity"}
    assert lines[0].keys() == first | of_the_run
    assert lines[1].keys() == first | of_the_run | joined | {"discriminator_grad_norm"}
    assert lines[2].keys() == lines[1].keys() | {"gradient_penalty"}
    assert numbers.keys() == {*QUALITY, "codebook_usage", "codebook_perplexity", "images"}
    assert numbers["images"] == 16
    in_file = logged(trainer)
    assert [line for line in in_file if "recon_loss" in line] == lines
    seconds, share = (in_file[-1].pop(f"valid/{name}") for name in ("seconds", "time_share"))
    assert seconds > 0 and 0 < share < 1
    assert in_file[-1] == {"step": 4, **{f"valid/{name}": value for name, value in numbers.items()}}
    assert all(0 <= line["data_wait"] <= 1 and line["images_per_second"] > 0 for line in lines)


def test_train_step_returns_tensors_that_nobody_waited_for(tmp_path):
    trainer = build_trainer(tmp_path)
    logs = trainer.train_step()
    assert all(isinstance(value, Tensor) and value.ndim == 0 and not value.requires_grad for value in logs.values())
    assert (trainer.step, trainer.position) == (1, 4)


def test_logged_numbers_are_means_since_the_last_line(tmp_path):
    trainer = build_trainer(tmp_path, log_every=3)
    steps = logs_of(trainer, 4)
    line = logged(trainer)[1]
    assert line["step"] == 3
    assert line["recon_loss"] == pytest.approx(sum(step["recon_loss"] for step in steps[1:3]) / 2, rel=1e-5)


def test_numbers_of_micro_batches_are_averaged(tmp_path):
    trainer = build_trainer(tmp_path, grad_accum_every=3, use_ema=False)
    batches = trainer.next_micro_batches()
    parts = [trainer.generator_loss(image, trainer.generator(image))[1] for image in batches]
    numbers = trainer.update(batches)
    for name in ("recon_loss", "perceptual_loss", "aux_loss", "adversarial_loss"):
        expected = sum(float(part[name].detach()) for part in parts) / 3
        assert float(numbers[name]) == pytest.approx(expected, rel=1e-5), name


def test_networks_whose_weights_are_swapped_are_not_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr("vqdist.backends.local.capabilities_of_torch", lambda precision: Capabilities(compiles=False))
    with pytest.raises(UserError, match="compile is not possible on local, which swaps weights"):
        build_trainer(tmp_path, compile=True)


def test_properties_of_one_process(tmp_path):
    trainer = build_trainer(tmp_path, backend="auto", grad_accum_every=2)
    assert trainer.device == trainer.model.device == trainer.backend.device
    assert (trainer.is_distributed, trainer.is_main, trainer.is_local_main) == (False, True, True)
    assert (trainer.backend.name, trainer.global_batch, trainer.num_workers) == ("local", 8, 0)
    with trainer.averaged_network() as network:
        assert network is trainer.ema.ema_model
    assert trainer.picture_path == tmp_path / "results" / "step_00000000.png"
    assert trainer.engines.keys() == {"generator", "discriminator"}
    trainer.close()
    trainer.close()


def test_mark_last():
    assert list(mark_last([1, 2, 3])) == [(1, False), (2, False), (3, True)]
    assert list(mark_last(iter("a"))) == [("a", True)]


def test_learning_rates_follow_the_schedule(tmp_path):
    options = {"warmup_steps": 2, "lr_schedule": "cosine", "lr": 1e-3, "discr_lr": 2e-4, "num_train_steps": 5}
    trainer = build_trainer(tmp_path, **options)
    for step in range(5):
        rates = [
            learning_rate(step, peak=peak, schedule="cosine", warmup_steps=2, total_steps=5) for peak in (1e-3, 2e-4)
        ]
        logs = trainer.train_step()
        assert float(logs["lr"]) == pytest.approx(rates[0])
        used = [engine.optimizer.param_groups[0]["lr"] for engine in trainer.engines.values()]
        assert used == pytest.approx(rates)


@pytest.mark.parametrize(
    "schedule, factor", [("exponential", 0.98), ({"class_path": "exponential", "init_args": {"decay_rate": 0.5}}, 0.5)]
)
def test_the_discriminators_own_exponential_rate_falls_by_the_epoch(tmp_path, schedule, factor):
    trainer = build_trainer(tmp_path, discr_lr_schedule=schedule, discr_lr=1e-3)
    trainer.progress.advance(2 * len(trainer.split.train))
    assert trainer.discr_learning_rate() == pytest.approx(1e-3 * factor**2)


def test_a_loop_that_is_left_but_held_ends_before_the_next(tmp_path):
    trainer = build_trainer(tmp_path, num_train_steps=4)
    before = signal.getsignal(signal.SIGINT)
    held = [trainer.steps()]  # as a notebook holds it in the traceback of an error
    assert next(held[0])[0] == 1 and signal.getsignal(signal.SIGINT) is not before
    seen = []
    with pytest.raises(Stopped):
        for step, _ in trainer.steps():
            held.clear()  # if it ended only now, it would take signals and bar along
            assert trainer.report.bar is not None
            seen.append(step)
            if step == 3:
                os.kill(os.getpid(), signal.SIGUSR1)
    assert seen == [2, 3]
    assert signal.getsignal(signal.SIGINT) is before


def test_gradient_norms_are_those_before_clipping(tmp_path):
    plain = build_trainer(tmp_path / "plain").train_step()
    clipped = build_trainer(tmp_path / "clipped", max_grad_norm=1e-3, discr_max_grad_norm=1e-3).train_step()
    for name in ("generator_grad_norm", "discriminator_grad_norm"):
        assert float(clipped[name]) == float(plain[name]) > 1e-3


# ------------------------------------------------------------------------------------------- one step


def test_one_forward_of_each_network_per_micro_batch(tmp_path):
    trainer = build_trainer(tmp_path, grad_accum_every=3, apply_grad_penalty_every=0, use_ema=False)
    seen = {"generator": [], "discriminator": []}
    for name, engine in trainer.engines.items():

        def note(module: nn.Module, args: tuple, out, name=name) -> None:
            trained = all(parameter.requires_grad for parameter in module.parameters())
            seen[name].append(("trained" if trained else "frozen", len(args[0])))

        engine.module.register_forward_hook(note)
    trainer.train_step()
    assert seen["generator"] == [("trained", 4)] * 3
    # for the generator with weights held fixed; for itself once, real and reconstructed images together
    assert seen["discriminator"] == [("frozen", 4), ("trained", 8)] * 3


def test_the_gradient_penalty_comes_every_so_many_steps(tmp_path):
    trainer = build_trainer(tmp_path, apply_grad_penalty_every=3, num_train_steps=7)
    assert ["gradient_penalty" in logs for logs in logs_of(trainer, 7)] == [True, False, False] * 2 + [True]


def test_the_generators_phase_leaves_the_discriminator_alone(tmp_path):
    trainer = build_trainer(tmp_path)
    image = torch.cat(trainer.next_micro_batches())
    loss, parts = trainer.generator_loss(image, trainer.generator(image))
    assert "adversarial_loss" in parts
    trainer.generator.backward(loss)
    discriminator = list(trainer.discriminator.module.parameters())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in discriminator)
    assert all(parameter.grad is not None for parameter in trainer.generator.module.parameters())


def test_the_discriminators_phase_leaves_the_generator_alone(tmp_path):
    trainer = build_trainer(tmp_path)
    image = torch.cat(trainer.next_micro_batches())
    loss, _ = trainer.discriminator_loss(image, trainer.generator(image).recon.detach())
    trainer.discriminator.backward(loss)
    assert all(parameter.grad is None for parameter in trainer.generator.module.parameters())
    assert all(parameter.grad is not None for parameter in trainer.discriminator.module.parameters())


def test_gradients_are_cleared_after_each_step(tmp_path):
    trainer = build_trainer(tmp_path, grad_accum_every=2)
    trainer.train_step()
    assert all(p.grad is None for engine in trainer.engines.values() for p in engine.module.parameters())


def test_accumulation_is_the_step_of_the_whole_batch(tmp_path):
    linear = {"adaptive_weight": False, "adversarial_weight": 0.3}
    whole = build_trainer(tmp_path / "whole", quantizer="fsq", batch_size=8, **linear)
    split = build_trainer(tmp_path / "split", quantizer="fsq", batch_size=2, grad_accum_every=4, **linear)
    expected, actual = train_steps(whole, 2), train_steps(split, 2)
    for name, tensor in expected.items():
        assert torch.allclose(tensor.double(), actual[name].double(), atol=1e-6), name


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's malloc")
def test_freed_memory_is_kept_for_the_next_step():
    """A tensor of 40 MB, made and freed over and over, takes its pages from the system once."""
    script = (
        "import resource, torch\n"
        "import vqdist.trainers.base\n"
        "from vqdist.allocator import keep_freed_memory\n"
        "keep_freed_memory(torch.device('cpu'))\n"
        "torch.ones(10_000_000)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(20): torch.ones(10_000_000)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
    )
    faults = [int(run([sys.executable, "-c", script], **told).stdout) for told in ({}, {"MALLOC_ARENA_MAX": "1"})]
    assert 4 * faults[0] < faults[1]  # 195,000 pages, against one to three times 9,800


READS = ("item", "tolist", "numpy", "cpu", "nonzero", "__float__", "__bool__", "__int__", "__index__")


@pytest.mark.parametrize("model", ["lfq", "fsq", "dvae"])
def test_an_update_never_waits_for_the_device(tmp_path, model, monkeypatch):
    if model == "dvae":
        trainer = build_dvae_trainer(tmp_path, model={"kl_div_loss_weight": 0.1}, **DVAE_EVERYTHING)
    else:
        trainer = build_trainer(tmp_path, quantizer=model, **{**EVERYTHING, "discriminator_start": 0})
    trainer.train_step()
    batches, reads = trainer.next_micro_batches(), []
    for name in READS:
        monkeypatch.setattr(Tensor, name, noting(getattr(Tensor, name), name, reads))
    numbers = trainer.update(batches)
    assert reads == []
    assert float(numbers["recon_loss"]) > 0 and reads == ["__float__"]  # the watch itself works


def noting(method, name: str, reads: list[str]):
    """Return `method`, which notes its calls; Adam's own count of steps is on the CPU and waits for nothing."""

    def watched(self, *args, **kwargs):
        if not any("torch/optim/" in frame.filename for frame in traceback.extract_stack()):
            reads.append(name)
        return method(self, *args, **kwargs)

    return watched


# ------------------------------------------------------------------------------------------- the second player


def test_the_discriminator_joins_warms_up_and_ramps(tmp_path):
    options = {"discriminator_start": 2, "discriminator_warmup_steps": 2, "adversarial_ramp_steps": 4}
    trainer = build_trainer(
        tmp_path,
        adversarial_weight=0.8,
        adaptive_weight=False,
        num_train_steps=10,
        apply_grad_penalty_every=0,
        **options,
    )
    before = weights_of(trainer)
    logs = logs_of(trainer, 2)
    after = weights_of(trainer)
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("discriminator."))
    logs += logs_of(trainer, 8)
    assert ["discr_loss" in line for line in logs] == [False] * 2 + [True] * 8
    assert ["discriminator_grad_norm" in line for line in logs] == [False] * 2 + [True] * 8
    assert ["adversarial_loss" in line for line in logs] == [False] * 4 + [True] * 6
    weights = [line["adversarial_weight"] for line in logs[4:]]
    assert weights == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])
    assert not any("adaptive_weight" in line for line in logs)


def test_the_logged_weight_is_schedule_times_adaptive(tmp_path):
    trainer = build_trainer(tmp_path, adversarial_weight=0.5, adversarial_ramp_steps=2)
    first, second = logs_of(trainer, 2)
    assert first["adversarial_weight"] == pytest.approx(0.25 * first["adaptive_weight"])
    assert second["adversarial_weight"] == pytest.approx(0.5 * second["adaptive_weight"])
    capped = logs_of(build_trainer(tmp_path / "capped", max_adaptive_weight=0.01), 1)[0]
    assert capped["adaptive_weight"] == pytest.approx(0.01) and first["adaptive_weight"] > 0.01


def test_no_adversarial_weight_is_no_pass_through_the_discriminator(tmp_path):
    trainer = build_trainer(tmp_path, adversarial_weight=0.0)
    (logs,) = logs_of(trainer, 1)
    assert "adversarial_loss" not in logs and "discr_loss" in logs


def test_without_a_discriminator_there_is_one_engine(tmp_path):
    trainer = build_trainer(tmp_path, model={"use_gan": False})
    assert trainer.engines.keys() == {"generator"}
    (logs,) = logs_of(trainer, 1)
    assert logs.keys() == {"recon_loss", "aux_loss", "perceptual_loss", "lr", "generator_grad_norm"}
    trainer.finish()


def test_losses_alone_train_a_smaller_difference(tmp_path):
    trainer = build_trainer(tmp_path, model={"use_vgg_and_gan": False}, quantizer="fsq", lr=3e-3, num_train_steps=40)
    logs = logs_of(trainer, 40)
    assert logs[-1]["recon_loss"] < 0.5 * logs[0]["recon_loss"]


# ------------------------------------------------------------------------------------------- the average


def test_the_average_is_what_is_measured_and_exported(tmp_path):
    trainer = build_trainer(tmp_path, quantizer="vq", lr=1e-2)
    trainer.train()
    image = torch.stack([trainer.valid_dataset[0], trainer.valid_dataset[1]])
    loaded = VQGanVAE.from_pretrained(tmp_path / "export")
    averaged, live = (module.state_dict() for module in (trainer.ema.ema_model, trainer.generator.module))
    exported = loaded.autoencoder.state_dict()
    assert all(torch.equal(exported[name], averaged[name].cpu()) for name in averaged)
    assert not torch.equal(exported["decoder.last_layer.weight"], live["decoder.last_layer.weight"].cpu())
    with torch.no_grad():
        expected = trainer.ema.ema_model.eval()(image.to(trainer.device))
    assert torch.equal(loaded.encode(image)[1], expected.indices.cpu())
    assert trainer.model.autoencoder is trainer.generator.module  # the live one is back in its place
    assert [path.name for path in sorted(tmp_path.glob("export*"))] == ["export"]


def test_without_an_average_the_live_weights_are_exported(tmp_path):
    trainer = build_trainer(tmp_path, use_ema=False, num_train_steps=1)
    trainer.train()
    exported, live = VQGanVAE.from_pretrained(tmp_path / "export").autoencoder, trainer.generator.module
    pairs = zip(exported.state_dict().values(), live.state_dict().values(), strict=True)
    assert all(torch.equal(a, b.cpu()) for a, b in pairs)


# ------------------------------------------------------------------------------------------- pictures and ends


@pytest.mark.parametrize("use_ema, views", [(True, 3), (False, 2)])
def test_the_picture_shows_originals_beside_reconstructions(tmp_path, use_ema, views):
    trainer = build_trainer(tmp_path, num_images_save=5, num_train_steps=1, use_ema=use_ema)
    trainer.train()
    cell = IMAGE_SIZE + 2
    with Image.open(trainer.picture_path) as picture:
        assert picture.size == (2 * views * cell + 2, 3 * cell + 2)  # two images a row
        first = torch.tensor(list(picture.crop((2, 2, 2 + IMAGE_SIZE, 2 + IMAGE_SIZE)).tobytes())) / 255
    original = trainer.valid_dataset[int(trainer.split.valid[0])]
    assert torch.allclose(first.view(IMAGE_SIZE, IMAGE_SIZE, 3).permute(2, 0, 1), original, atol=1 / 255)


def test_finish_does_its_work_once(tmp_path):
    trainer = build_trainer(tmp_path, num_train_steps=2, trackers=["tensorboard"])
    numbers = trainer.train()
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert trainer.finish() == numbers
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == files


def test_an_argument_of_a_network_is_compared_though_an_option_of_its_name_is_free():
    old = {"trainer": {"log_every": 1}, "model": {"encoder": {"init_args": {"backend": "a"}}}}
    new = {"trainer": {"log_every": 2}, "model": {"encoder": {"init_args": {"backend": "b"}}}}
    lines = differing_keys(old, new, names_with(TrainerConfig, "free"))
    assert lines == ["model.encoder.init_args.backend: 'a' -> 'b'"]


def test_a_finished_run_is_not_trained_further(tmp_path):
    first = build_trainer(tmp_path, num_train_steps=3, **{**EVERYTHING, "lr_schedule": "constant"})
    numbers = first.train()
    weights, lines = weights_of(first), []
    export = (tmp_path / "export" / "model.safetensors").read_bytes()
    again = build_trainer(tmp_path, num_train_steps=3, **{**EVERYTHING, "lr_schedule": "constant"})
    assert again.train(log_fn=lines.append) == numbers
    assert again.step == 3 and lines == []
    assert all(torch.equal(weights[name], tensor) for name, tensor in weights_of(again).items())
    assert again.checkpoints.steps() == [3]
    assert (tmp_path / "export" / "model.safetensors").read_bytes() == export


def test_more_steps_continue_a_finished_run(tmp_path):
    build_trainer(tmp_path / "a", num_train_steps=2).train()
    longer = build_trainer(tmp_path / "a", num_train_steps=4)
    longer.train()
    straight = build_trainer(tmp_path / "b", num_train_steps=4)
    straight.train()
    assert all(torch.equal(t, weights_of(longer)[name]) for name, t in weights_of(straight).items())
    assert [line["step"] for line in logged(longer) if "recon_loss" in line] == [1, 2, 3, 4]


def test_without_a_validation_split_nothing_is_measured(tmp_path):
    trainer = build_trainer(tmp_path, valid_frac=0.0, num_train_steps=1)
    assert trainer.train() == {}
    assert trainer.picture_path.is_file()  # of training images
    assert not any("valid/psnr" in line for line in logged(trainer))


@pytest.mark.parametrize("saved, value", [(True, "nan"), (False, "nan"), (True, "inf")])
def test_a_loss_that_is_no_number_stops_the_run(tmp_path, saved, value):
    trainer = build_trainer(tmp_path, save_model_every=1 if saved else 0)
    trainer.train_step()
    with torch.no_grad():
        trainer.generator.module.last_layer.bias.fill_(float(value))
    newest = f"the newest checkpoint is {tmp_path}/checkpoints/step_00000001: resume"
    kept = newest if saved else "there is no checkpoint yet: start"
    with pytest.raises(
        UserError,
        match=rf"recon_loss is {value}.* at step 2; {kept} with a lower lr or .*--trainer.allow_config_change true",
    ):
        trainer.train()
    with pytest.raises(UserError, match="resume it all the same with --trainer.allow_config_change true"):
        build_trainer(tmp_path, lr=1e-5)
    assert trainer.checkpoints.steps() == ([1] if saved else [])
    assert logged(trainer)[-1]["recon_loss"] is None


# ------------------------------------------------------------------------------------------- lines after a resume

PER_RUN = {"images_per_second", "data_wait", "memory_gb", "valid/seconds", "valid/time_share"}
RESUMED = {"num_train_steps": 7, "log_every": 4, "save_results_every": 5, "save_model_every": 3}


def numbers_of(trainer: Trainer) -> list[dict]:
    """Its lines, without those of its speed, and the bytes of its charts."""
    lines = [{name: value for name, value in line.items() if name not in PER_RUN} for line in logged(trainer)]
    return [*lines, {path.name: path.read_bytes() for path in trainer.run_folder.glob("results/*_codes.png")}]


AR_TRAINERS = [partial(build_ar_trainer, kind=kind) for kind in AR_MODELS]


@pytest.mark.parametrize("build", [build_trainer, build_dvae_trainer, *AR_TRAINERS])
def test_lines_and_charts_after_a_resume_are_those_of_an_undisturbed_run(tmp_path, build):
    """A line at step 4 and a chart at step 5, which begin before the checkpoint of step 3."""
    straight = build(tmp_path / "straight", **RESUMED)
    straight.train()
    train_steps(build(tmp_path / "killed", **RESUMED), 5)  # steps 4 and 5 are lost
    resumed = build(tmp_path / "killed", **RESUMED)
    assert resumed.step == 3
    resumed.train()
    assert numbers_of(resumed) == numbers_of(straight)
    if build not in AR_TRAINERS:
        assert numbers_of(resumed)[-1].keys() == {"step_00000005_codes.png", "step_00000007_codes.png"}


def test_a_checkpoint_from_before_numbers_were_saved_is_resumed(tmp_path):
    trainer = build_dvae_trainer(tmp_path, **RESUMED)
    train_steps(trainer, 3)
    folder = trainer.checkpoints.latest()
    (folder / "numbers_rank_00000.pt").unlink()
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["files"]["numbers_rank_00000.pt"]
    del manifest["version"], manifest["sha256"], manifest["skipped"]
    del manifest["picture_broken_off"], manifest["best"]  # they came later, too
    (folder / MANIFEST).write_text(json.dumps(manifest))
    resumed = build_dvae_trainer(tmp_path, **RESUMED)
    assert resumed.step == 3 and resumed.report.means.means() == {}
    assert not any(bool(counts.any()) for counts in resumed.counts_to_come().values())


@pytest.mark.distributed
def test_lines_and_charts_of_two_ranks_after_a_resume(tmp_path):
    """See the worker; then one process goes on from what two saved, and counts from there."""
    torchrun([str(ROOT / "tests" / "workers" / "numbers_worker.py"), str(tmp_path)])
    resumed = build_dvae_trainer(tmp_path / "killed", **{**RESUMED, "num_train_steps": 12})
    assert resumed.step == 7 and resumed.report.means.means() == {}
    assert not any(bool(counts.any()) for counts in resumed.counts_to_come().values())


# ------------------------------------------------------------------------------------------- data


class Pairs(torch.utils.data.Dataset):
    """Items are (image, label); there are 12."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((1, IMAGE_SIZE, IMAGE_SIZE), index / 12), index


@pytest.mark.parametrize(
    "dataset", [Pairs(), TensorDataset(torch.rand(12, 1, IMAGE_SIZE, IMAGE_SIZE)), list(torch.rand(12, 1, 16, 16))]
)
def test_a_dataset_of_tensors_trains_to_the_end(tmp_path, dataset):
    trainer = build_trainer(
        tmp_path,
        dataset=dataset,
        folder=None,
        model={"channels": 1, "vgg": None, "perceptual": "none"},
        num_train_steps=2,
    )
    numbers = trainer.train()
    assert numbers["images"] == 3 and trainer.step == 2
    assert VQGanVAE.from_pretrained(tmp_path / "export")(torch.rand(1, 1, 16, 16)).shape == (1, 1, 16, 16)


def test_every_training_image_is_seen_once_an_epoch(tmp_path):
    trainer = build_trainer(
        tmp_path, dataset=Pairs(), folder=None, batch_size=3, model={"channels": 1, "use_vgg_and_gan": False}
    )
    seen = [round(float(image.mean()) * 12) for _ in range(3) for image in trainer.next_micro_batches()[0]]
    assert sorted(seen) == trainer.split.train.tolist()
    assert set(seen).isdisjoint(trainer.split.valid.tolist())


def test_skipped_images_are_counted_and_named(tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for number in range(6):
        Image.new("RGB", (16, 16), (40 * number,) * 3).save(images / f"{number}.png")
    for name in ("bad_1.png", "bad_2.jpg"):
        (images / name).write_bytes(b"no image")
    options = {"folder": str(images), "valid_frac": 0.0, "batch_size": 8, "num_train_steps": 2, "max_bad_frac": 0.5}
    trainer = build_trainer(tmp_path / "run", on_bad_image="skip", **options)
    trainer.train()
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])["skipped_images"] == 2
    said = capsys.readouterr().err
    for name in ("bad_1.png", "bad_2.jpg"):
        assert said.count(f"rank 0: skipped an image that cannot be decoded: {images}/{name}") == 1  # not every epoch
    assert f"2 images could not be decoded and were skipped: {images}/bad_1.png, {images}/bad_2.jpg" in said


def test_nothing_but_the_progress_bar_is_written_to_the_terminal(tmp_path, capfd):
    build_trainer(tmp_path, num_train_steps=2, save_model_every=1, validate_every=1).train()
    written = capfd.readouterr()
    assert written.out == ""
    assert "local x1" in written.err and "2/2" in written.err


def test_the_resolved_configuration_is_written_before_the_first_step(tmp_path):
    trainer = build_trainer(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert trainer.step == 0 and config["trainer"]["lr"] == 3e-4 and config["trainer"]["batch_size"] == 4
    assert config["model"]["dim"] == 16 and config["model"]["codebook_size"] == 32


def test_a_model_of_ones_own_arguments_is_trained_as_in_the_readme(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for number in range(12):
        Image.new("L", (40, 36), 20 * number).save(images / f"{number}.png")
    vae = VQGanVAE(
        dim=16, layers=2, channels=1, codebook_size=64, lookup_free_quantization=False, use_vgg_and_gan=False
    )
    trainer = VQGanVAETrainer(
        vae, folder=str(images), num_train_steps=2, batch_size=8, image_size=32, results_folder=str(tmp_path / "run")
    )
    trainer.train(log_fn=print)
    vae = VQGanVAE.from_pretrained(tmp_path / "run" / "export")
    batch = torch.rand(2, 1, 32, 32)
    assert vae.decode_from_ids(vae.encode(batch)[1]).shape == batch.shape


def test_a_model_in_eval_mode_is_put_into_training_mode(tmp_path):
    vae = build_vae("vq").eval()  # as from_pretrained gives it
    options = {"folder": "synthetic:64", "image_size": IMAGE_SIZE, "num_train_steps": 1, "batch_size": 4}
    trainer = VQGanVAETrainer(vae, results_folder=str(tmp_path), num_workers=0, **options)
    assert all(module.training for module in vae.modules())
    codebook = vae.quantizer.inner.codebook.clone()
    trainer.train()
    assert not torch.equal(codebook, vae.quantizer.inner.codebook)
