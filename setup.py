"""What vqdist is called, what it needs and what it installs; settings of the tools are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def read_version() -> str:
    """Run vqdist/version.py alone: importing the package here would ask for torch before it can be installed."""
    names: dict[str, str] = {}
    exec((ROOT / "vqdist" / "version.py").read_text(encoding="utf-8"), names)
    return names["__version__"]


def read_readme() -> str:
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


CORE = [
    "torch>=2.6",
    "torchvision>=0.21",
    "accelerate>=1.6",
    "ema-pytorch>=0.7",
    "einops>=0.8",
    # vqdist repairs one function of this library (vqdist/models/quantizers.py): another minor version needs a look.
    "vector-quantize-pytorch>=1.32,<1.33",
    "x-transformers>=2.0",
    "pillow>=10.0",
    "safetensors>=0.4.3",
    "huggingface_hub>=0.25",
    "torchmetrics>=1.6",
    "torch-fidelity>=0.4",  # before it, which of precision and recall is which was the other way round
    "jsonargparse[signatures]>=4.40",
    "tqdm>=4.66",
    "pyyaml>=6.0",
    "numpy>=1.26",
    "packaging>=23.0",
]

EXTRAS = {
    # setuptools: torch imports it when DeepSpeed compiles its op, and an environment of Python 3.12 has none.
    "deepspeed": ["deepspeed>=0.18", "ninja>=1.11", "setuptools>=77.0.3"],
    "tracking": ["tensorboard>=2.16", "wandb>=0.19"],
    "data": ["webdataset>=0.2.100", "datasets>=3.0"],
}

# The tests use every extra; ruff is exact because another version formats differently.
EXTRAS["dev"] = [
    *(requirement for extra in EXTRAS.values() for requirement in extra),
    "pytest>=8.0",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "ruff==0.17.5",
    "build>=1.2",
    "wheel>=0.43",
]

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
    package_data={"vqdist": ["py.typed", "data/digits/*"]},
    install_requires=CORE,
    extras_require=EXTRAS,
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
