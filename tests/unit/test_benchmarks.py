"""Conditions of the benchmarks' numbers: equal mathematics on both sides; and bytes, which are a count."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import statistics
import sys
from pathlib import Path

import pytest
import torch
from launching import ROOT, run, torchrun
from warm import programs

sys.path.insert(0, str(ROOT))

from benchmarks import ancestors, bare_loop, busy, common, llamagen, prior, profile_step, quantizers, traffic
from vqdist import sampling
from vqdist.data.cores import cores_of_process

SMALL = {"dim": 16, "layers": 2, "discr_layers": 2}


SMALL_DVAE = {"num_tokens": 32, "codebook_dim": 16, "num_resnet_blocks": 1, "hidden_dim": 16}


def small_trainer(folder, quantizer: str, **options):
    settings = {"backend": "local", "apply_grad_penalty_every": 0, "num_workers": 0, "batch_size": 4, **options}
    return common.build_trainer(common.build_vae(quantizer, **SMALL), folder, **settings)


def small_dvae_trainer(folder, **options):
    settings = {"backend": "local", "num_workers": 0, "batch_size": 4, "anneal_rate": 0.0, **options}
    return common.build_trainer(common.build_dvae(**SMALL_DVAE), folder, **settings)


def assert_same_weights(ours, theirs, tolerance: float):
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(
            tensor,
            theirs.state_dict()[name],
            rtol=0,
            atol=tolerance,
            msg=lambda found, name=name: f"{name}: {found}",
        )


@pytest.mark.parametrize("quantizer", ["lfq", "vq"])
@pytest.mark.parametrize(
    "loop, eps, tolerance",
    [
        (bare_loop.BareLoop, 1e-8, 1e-6),
        # Sums in another order: a gradient that is rounding noise must not become a step of full length in Adam, and
        # the EMA codebook adds up hundreds of normalised vectors.
        (bare_loop.TextbookLoop, 1e-2, 5e-5),
    ],
)
def test_a_plain_loop_and_the_trainer_reach_the_same_weights(tmp_path, quantizer, loop, eps, tolerance):
    trainer = small_trainer(tmp_path / "run", quantizer, use_ema=False)
    loader = small_trainer(tmp_path / "images", quantizer)
    images = [loader.next_micro_batches()[0] for _ in range(3)]
    vae = common.build_vae(quantizer, **SMALL)
    before = vae.autoencoder.last_layer.weight.detach().clone()
    bare = loop(vae, images)
    engines = trainer.engines.values()
    for optimizer in (*(engine.optimizer for engine in engines), bare.optimizer, bare.discr_optimizer):
        optimizer.param_groups[0]["eps"] = eps
    for _ in images:
        trainer.train_step()
        bare.step()
    assert_same_weights(trainer.generator.module, bare.autoencoder, tolerance)
    assert_same_weights(trainer.discriminator.module, bare.discriminator, tolerance)
    assert (bare.autoencoder.last_layer.weight - before).abs().max() > 1e-5


@pytest.mark.parametrize("from_memory", [False, True])
def test_the_plain_loop_of_a_discrete_vae_and_the_trainer_reach_the_same_weights(tmp_path, from_memory):
    trainer = small_dvae_trainer(tmp_path / "run", use_ema=False)
    loader = small_dvae_trainer(tmp_path / "images")
    images = [loader.next_micro_batches()[0][0] for _ in range(3)]
    places = itertools.count(step=0 if from_memory else 4)
    if from_memory:
        common.feed_from_memory(trainer, images)

    def draw(logits):
        start = next(places)
        return sampling.gumbel_softmax(logits, trainer.noise(range(start, start + len(logits))), temperature=1.0)

    vae = common.build_dvae(**SMALL_DVAE)
    before = vae.codebook.weight.detach().clone()
    bare = bare_loop.BareDVAELoop(vae, images, draw=draw)
    for _ in images:
        trainer.train_step()
        bare.step()
    assert_same_weights(trainer.engine.module, vae, 1e-6)
    assert (vae.codebook.weight - before).abs().max() > 1e-5


def test_the_plain_loop_of_a_prior_and_the_trainer_reach_the_same_weights(tmp_path):
    trainer = prior.build_trainer(tmp_path)
    batches = prior.code_batches(3)
    common.feed_from_memory(trainer, batches)
    bare = prior.BarePriorLoop(prior.build_prior(), batches)
    for _ in batches:
        trainer.train_step()
        bare.step()
    assert_same_weights(trainer.engine.module, bare.prior, 1e-6)


def test_the_plain_loop_of_llamagens_tokenizer_and_the_trainer_reach_the_same_weights(tmp_path):
    small = {"ch": 8, "ch_mult": [1, 2], "groups": 8, "z_channels": 8, "attn_resolutions": [32]}
    batches = common.image_batches(3, batch_size=2)
    trainer = llamagen.build(tmp_path, vae=llamagen.build_vae(**small), batch_size=2, num_workers=0)
    common.feed_from_memory(trainer, batches)
    bare = llamagen.BareLlamaGenLoop(llamagen.build_vae(**small), batches)
    before = bare.autoencoder.last_layer.weight.detach().clone()
    # a gradient that is rounding noise must not become a step of full length in Adam
    engines = trainer.engines.values()
    for optimizer in (*(engine.optimizer for engine in engines), bare.optimizer, bare.discr_optimizer):
        optimizer.param_groups[0]["eps"] = 1e-2
    for _ in batches:
        trainer.train_step()
        bare.step()
    assert_same_weights(trainer.generator.module, bare.autoencoder, 1e-6)
    assert_same_weights(trainer.discriminator.module, bare.discriminator, 1e-6)
    assert (bare.autoencoder.last_layer.weight - before).abs().max() > 1e-6


@pytest.mark.parametrize("name", quantizers.QUANTIZERS)
def test_quantizers_are_compared_by_as_many_codes_in_the_same_network(name):
    model, other = quantizers.build_vae(name, seed=3), quantizers.build_vae("fsq", seed=3)
    indices = model.autoencoder.eval()(torch.rand(1, 3, 64, 64)).indices
    assert indices.shape == (1, 16, 16)
    assert 1000 <= model.autoencoder.quantizer.codebook_size <= 1024
    ours, theirs = (vae.autoencoder.encoder.conv_in.weight for vae in (model, other))
    assert torch.equal(ours, theirs)


def test_the_table_of_quantizers_begins_with_the_best():
    numbers = {"ssim": 0.5, "codebook_usage": 0.25, "codebook_perplexity": 99.6}
    lines = quantizers.table({"ibq": {"psnr": 20.0, **numbers}, "fsq": {"psnr": 21.004, **numbers}})
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| `fsq`", "| `ibq`"]
    assert lines[2].endswith("| 21.00 | 0.500 | 25.0% | 100 |")


def test_cores_are_kept_busy_within_the_context_only():
    def children() -> set[str]:
        return set(Path("/proc/self/task").joinpath(str(os.getpid()), "children").read_text().split())

    before = children()
    with busy.busy(2):
        assert len(children() - before) == 2
    assert children() == before


@pytest.mark.nightly  # tests/unit/test_cores.py shows that the command says how threads wait
@pytest.mark.skipif(cores_of_process() < 2, reason="with one core there is one thread, which waits for none")
def test_threads_of_the_demo_leave_busy_cores_to_others(tmp_path):
    variants = {name: busy.VARIANTS[name] for name in (busy.AS_STARTED, busy.SPINNING)}
    with contextlib.ExitStack() as demos:
        started = {
            name: demos.enter_context(contextlib.closing(busy.Demo(tmp_path / name, **variables)))
            for name, variables in variants.items()
        }
        times = busy.turns(started, rounds=3, steps=8)
    loaded = {name: statistics.median(busily["cpu"] for _, busily in pairs) for name, pairs in times.items()}
    assert loaded[busy.AS_STARTED] < 0.8 * loaded[busy.SPINNING]  # seen on two cores: 0.45 to 0.6


def test_profile_accounts_for_the_whole_step(tmp_path):
    trainer = small_trainer(tmp_path, "lfq", apply_grad_penalty_every=1)
    parts = profile_step.profile(trainer, steps=2, warmup=1)
    total = parts.pop("step")
    assert total == pytest.approx(sum(parts.values()))
    for part in ("autoencoder forward", "autoencoder backward", "discriminator backward", "EMA", "adaptive weight"):
        assert parts[part] > 0


def side(**model):
    """Return a process of a comparison that this environment can run."""
    trainer = {"backend": "local", "batch_size": 4, "num_workers": 0}
    return str(programs() / "python"), {
        "side": "vqdist",
        "model": {**SMALL_DVAE, "image_size": 32, **model},
        "trainer": trainer,
    }


def compared(*sides):
    named = dict(zip("ab", sides, strict=True))
    return ancestors.launch(named, "benchmarks.dalle_worker", steady=False, steps=2, rounds=3)


def test_sides_of_a_comparison_train_by_turns():
    launch = compared(side(), side())
    assert launch.sizes == {"vae": sum(p.numel() for p in common.build_dvae(**SMALL_DVAE).parameters())}
    for timing in launch.timings.values():
        assert len(timing.wall) == len(timing.cpu) == 3 and min(timing.wall) > 0
    row = ancestors.compare("small", [launch], "a", "b", images=4, target=1e-3)
    assert row.verdict == "yes" and "images/s" in row.detail


@pytest.mark.parametrize("num_tokens, message", [(64, "differ in their parameter counts"), (0, "num_tokens 0 is")])
def test_sides_that_differ_or_cannot_start_are_not_compared(num_tokens, message):
    with pytest.raises(RuntimeError, match=message):
        compared(side(), side(num_tokens=num_tokens))


def test_table_and_results_file(tmp_path):
    rows = [common.Row("kept", 1.01, at_most=1.05), common.Row("missed", 1.2, at_least=1.3), common.Row("told", 7)]
    assert [row.verdict for row in rows] == ["yes", "NO", ""]
    done = run([sys.executable, "-m", "benchmarks.run", "--only", "nonsense"], check=False)
    assert done.returncode == 2
    assert "bare_loop" in done.stderr and "dalle" in done.stderr


@pytest.mark.distributed
def test_two_processes_exchange_each_gradient_once_per_step(tmp_path):
    done = torchrun(["-m", "benchmarks.traffic", "accelerate", "{}", "lfq,vq", str(tmp_path)])
    for quantizer, result in json.loads(done.stdout.strip().splitlines()[-1]).items():
        expected = result["expected"]
        needed = sum(expected.values()) - expected["adaptive weight"]
        for step in ("counted", "with_penalty"):
            assert traffic.total(result[step]) == pytest.approx(needed, rel=0.02), (quantizer, step)
