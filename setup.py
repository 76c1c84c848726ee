"""Package metadata of trackformer_sb; tool settings are in pyproject.toml."""

import pathlib

from setuptools import find_packages, setup

here = pathlib.Path(__file__).parent
version = "0.2.0"

setup(
    name="trackformer_sb",
    version=version,
    description=(
        "Music separation without labelled stems: Performer separators "
        "trained with MixIT, for SpeechBrain and Asteroid"
    ),
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    package_data={
        "trackformer_sb": ["pretrained/*", "pretrained_live/*"],
        "trackformer_sb.web": ["*.css", "*.js"],
        "trackformer_sb.hparams": ["*.yaml"],
    },
    packages=[
        *find_packages(include=["trackformer_sb", "trackformer_sb.*"]),
        "trackformer_sb.hparams",
    ],
    # what `trackformer adapt` trains by
    package_dir={"trackformer_sb.hparams": "hparams"},
    python_requires=">=3.10",
    install_requires=[
        # torchaudio 2.11.0 loads beside all of these (tried: 2.11.0, 2.12.0,
        # 2.12.1, 2.13.0, 2.14.0, 2.14.1), 2.11.1 does not beside 2.11 and
        # 2.12, and older ones beside their own torch alone
        "torch>=2.11,<2.15",
        "torchaudio==2.11.0",
        "speechbrain>=1.1.2",
        "hyperpyyaml>=1.2.3",
        "ruamel.yaml",
        "pyyaml",
        "soundfile>=0.12",
        "av>=17",
        "soxr",
        "numpy",
        "scipy",
        "tqdm",
        "matplotlib",
        "pillow",
        "tensorboard",
        "torchmetrics>=0.11",
        "huggingface_hub>=0.25",
        "safetensors",
    ],
    extras_require={
        "asteroid": ["asteroid>=0.7,<0.8"],
        "shards": ["webdataset>=1.0", "fsspec[http]"],
        "demo": ["gradio>=6.10,<7"],
        "live": ["sounddevice"],
        "onnx": ["onnx", "onnxscript", "onnxruntime"],
        # has to be compiled
        "pesq": ["pesq"],
        # make-music; later symusic renders silence
        "music": ["symusic==0.5.8", "espeakng-loader", "pyworld-prebuilt"],
        # basic-pitch, which asks for tensorflow, is installed without it
        "transcribe": ["torchcrepe", "onnxruntime"],
        # the peers of benchmarks/, and what they measure by
        "bench": [
            "performer-pytorch",
            "asteroid>=0.7,<0.8",
            "demucs",
            "openunmix",
            "mir_eval",
            "librosa",
        ],
        "dev": [
            "pytest>=8",
            "pytest-xdist",
            "psutil",
            "selenium",
            "webdataset>=1.0",
            "symusic==0.5.8",
            "espeakng-loader",
            "pyworld-prebuilt",
            "onnx",
            "onnxscript",
            "onnxruntime",
            "torchcrepe",
            "hypothesis",
            "ruff",
            "yamllint",
            "codespell",
        ],
    },
    entry_points={
        "console_scripts": ["trackformer=trackformer_sb.cli:main"],
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Multimedia :: Sound/Audio :: Analysis",
    ],
)
