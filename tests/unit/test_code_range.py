"""Codes that are not in the codebook: at a log line of a quantizer of one's own, in validation, in a tokenizer."""

from __future__ import annotations

import pytest
import torch
from scenarios import build_ar_trainer, build_prior, build_trainer, build_vae
from torch import Tensor

from vqdist import Tokenizer, UserError
from vqdist.backends.local import LocalBackend
from vqdist.evaluation import evaluate_reconstruction
from vqdist.metrics import CodeHistogram
from vqdist.models.quantizers import Quantized, Quantizer


class Shifted(Quantizer):
    """Gives codes that are a few off, and takes them back."""

    def __init__(self, dim: int, shift: int = 0, levels: int = 1):
        super().__init__(dim, 4, levels)
        self.shift = shift

    def forward(self, features: Tensor) -> Quantized:
        ids = (features[:, 0].detach() * 100).long() % 4
        ids = ids if self.num_levels == 1 else torch.stack([ids] * self.num_levels, dim=-1)
        return Quantized(features, ids + self.shift, features.new_zeros(()))

    def decode_indices(self, indices: Tensor) -> Tensor:
        ids = indices if self.num_levels == 1 else indices[..., 0]
        return (ids.float() / 4)[:, None].expand(-1, self.dim, -1, -1)


def model(**options):
    return {"quantizer": {"class_path": f"{__name__}.Shifted", "init_args": options}, "codebook_size": 4}


WRONG = [(-4, "from -4 to -1"), (-1, "from -1 to 2"), (1, "from 1 to 4"), (100, "from 100 to 103")]
RANGE = r"^quantizer Shifted gave codes from -?\d+ to -?\d+; expected 0 to 3, since its codebook_size is 4: correct"


@pytest.mark.parametrize("shift", [shift for shift, _ in WRONG])
def test_a_run_ends_at_its_first_log_line(shift, tmp_path):
    trainer = build_trainer(tmp_path, model=model(shift=shift), log_every=1)
    with pytest.raises(UserError, match=RANGE):
        trainer.train_step()
    assert not list((tmp_path).glob("checkpoints/step_*"))


@pytest.mark.parametrize("shift, found", WRONG)
def test_a_tokenizer_and_a_validation_say_what_was_found(shift, found):
    vae = build_vae(**model(shift=shift), use_vgg_and_gan=False)
    images = torch.rand(8, 3, 16, 16)
    with pytest.raises(UserError, match=RANGE) as error:
        Tokenizer(vae, 16).encode(images)
    assert found in str(error.value)
    with pytest.raises(UserError, match=RANGE):
        evaluate_reconstruction(vae.network, [images], LocalBackend(device="cpu"), image_size=16)


def test_a_prior_over_such_a_tokenizer_ends_in_one_line(tmp_path):
    tokenizer = Tokenizer(build_vae(**model(shift=2), use_vgg_and_gan=False), 16)
    trainer_of = build_ar_trainer(tmp_path / "good")  # a good one trains
    trainer_of.train_step()
    with pytest.raises(UserError, match=RANGE):
        build_prior(tokenizer).codes_of(torch.rand(2, 3, 16, 16))


def test_codes_of_the_codebook_pass_and_levels_may_be_left_out(tmp_path):
    images = torch.rand(8, 3, 16, 16)
    codes = Tokenizer(build_vae(**model(), use_vgg_and_gan=False), 16).encode(images)
    assert sorted(codes.unique().tolist()) == [0, 1, 2, 3]
    build_trainer(tmp_path, model=model()).train_step()
    network = build_vae(**model(levels=2), use_vgg_and_gan=False).network
    histogram = CodeHistogram(network, torch.device("cpu"))
    histogram.add(torch.tensor([[[[0, -1], [3, 2]]]]))
    assert histogram.usage(LocalBackend(device="cpu"))["codebook_usage"] == pytest.approx(3 / 8)
    histogram.add(torch.tensor([[[[0, -2], [3, 4]]]]))
    with pytest.raises(UserError, match="gave codes from -2 to 4; expected 0 to 3"):
        histogram.usage(LocalBackend(device="cpu"))


@pytest.mark.parametrize("ids", [torch.tensor([[-1, 0, 1, 2, 3]]), torch.tensor([[0, 9, 1, 2, 3]])])
def test_codes_of_several_scales_are_looked_at_too(ids):
    network = build_vae(quantizer="multiscale_vq", codebook_size=4, quantizer_kwargs={"v_patch_nums": [1, 2]}).network
    histogram = CodeHistogram(network, torch.device("cpu"))
    histogram.add(ids)
    with pytest.raises(UserError, match=r"^quantizer \w+ gave codes from -?\d to \d; expected 0 to 3"):
        histogram.usage(LocalBackend(device="cpu"))
