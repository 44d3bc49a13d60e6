"""Which modules a start imports: what takes seconds is imported by those who need it only."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from vqdist import VQGanVAE

SLOW = ("einx", "sympy", "torch._dynamo", "torch._inductor", "torchvision", "torchmetrics", "matplotlib", "scipy")


def imported_after(code: str, *of: str) -> list[str]:
    """Return those of the modules that a new interpreter has imported when it has run the code."""
    code += f"\nimport json, sys; print(json.dumps([name for name in {of!r} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module", params=["vq", "lfq"])
def export(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    options = {"codebook_size": 16, "vq_kwargs": {"kmeans_init": False}} if request.param == "vq" else {}
    model = VQGanVAE(
        dim=16, layers=1, use_vgg_and_gan=False, quantizer=request.param, **{"codebook_size": 16, **options}
    )
    model.image_size = 8
    model.save_pretrained(folder)
    return folder


def test_a_tokenizer_encodes_and_measures_without_a_compiler(export):
    code = (
        "import torch\n"  # before vqdist, since einx tells torch's compiler of itself where torch is there already
        "from vqdist import Tokenizer\n"
        f"tokenizer = Tokenizer.from_pretrained({str(export)!r}, 8)\n"
        "images = torch.rand(2, 3, 8, 8)\n"
        "tokenizer.decode(tokenizer.encode(images))\n"
        "from vqdist.backends import create_backend\n"
        "from vqdist.evaluation import evaluate_reconstruction\n"
        "backend = create_backend('local')\n"
        "evaluate_reconstruction(tokenizer.network, [images], backend, image_size=8)"
    )
    assert imported_after(code, *SLOW) == []


def test_a_trainer_imports_no_more_than_its_optimizer():
    assert imported_after("from vqdist import ARTrainer, DiscreteVAETrainer, VQGanVAETrainer", *SLOW) == []


def test_a_prior_of_codes_is_imported_without_a_compiler():
    assert imported_after("from vqdist import VAR, Prior, VQImageAutoregressiveAutoencoder", *SLOW) == []


def test_einx_is_itself_after_a_library_was_imported_without_it():
    code = (
        "import torch, vqdist.models.quantizers.vector_quantize as library\n"
        "import sys; assert 'einx' not in sys.modules\n"
        "quantizer = library.SimVQ(dim=4, codebook_size=8)\n"
        "assert quantizer(torch.randn(1, 4, 4))[0].shape == (1, 4, 4)\n"  # calls get_at of einx
        "import einx; assert einx.__version__\n"
        "assert einx.get_at('[c] d, n -> n d', torch.eye(3), torch.arange(3)).sum() == 3"
    )
    assert imported_after(code, "einx") == ["einx"]
