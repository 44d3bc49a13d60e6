"""What makes the benchmarks' numbers mean something: equal mathematics on both sides; and bytes, which are a count."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from launching import ROOT, run, torchrun

sys.path.insert(0, str(ROOT))

from benchmarks import bare_loop, common, profile_step, traffic

SMALL = {"dim": 16, "layers": 2, "discr_layers": 2}


def small_trainer(folder, quantizer: str, **options):
    settings = {"backend": "local", "apply_grad_penalty_every": 0, "num_workers": 0, "batch_size": 4, **options}
    return common.build_trainer(common.build_vae(quantizer, **SMALL), folder, **settings)


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
    for ours, theirs in (
        (trainer.generator.module, bare.autoencoder),
        (trainer.discriminator.module, bare.discriminator),
    ):
        for name, tensor in ours.state_dict().items():
            torch.testing.assert_close(
                tensor,
                theirs.state_dict()[name],
                rtol=0,
                atol=tolerance,
                msg=lambda found, name=name: f"{name}: {found}",
            )
    assert (bare.autoencoder.last_layer.weight - before).abs().max() > 1e-5


def test_profile_accounts_for_the_whole_step(tmp_path):
    trainer = small_trainer(tmp_path, "lfq", apply_grad_penalty_every=1)
    parts = profile_step.profile(trainer, steps=2, warmup=1)
    total = parts.pop("step")
    assert total == pytest.approx(sum(parts.values()))
    for part in ("autoencoder forward", "autoencoder backward", "discriminator backward", "EMA", "adaptive weight"):
        assert parts[part] > 0


def test_table_and_results_file(tmp_path):
    rows = [common.Row("kept", 1.01, at_most=1.05), common.Row("missed", 1.2, at_least=1.3), common.Row("told", 7)]
    assert [row.verdict for row in rows] == ["yes", "NO", ""]
    done = run([sys.executable, "-m", "benchmarks.run", "--only", "nonsense"], check=False)
    assert done.returncode == 2
    assert "bare_loop" in done.stderr


@pytest.mark.distributed
def test_two_processes_exchange_each_gradient_once_per_step(tmp_path):
    done = torchrun(["-m", "benchmarks.traffic", "accelerate", "{}", "lfq,vq", str(tmp_path)])
    for quantizer, result in json.loads(done.stdout.strip().splitlines()[-1]).items():
        expected = result["expected"]
        needed = sum(expected.values()) - expected["adaptive weight"]
        for step in ("counted", "with_penalty"):
            assert traffic.total(result[step]) == pytest.approx(needed, rel=0.02), (quantizer, step)
