from setuptools import setup

# The folder `kernels/` is reached as `notus.kernels` through the link notus/kernels, and has no
# __init__.py: a top-level package of that name would shadow Hugging Face's `kernels`, which
# transformers looks for when it is imported.
setup(
    name="notus",
    version="0.1.0",
    description="Direct preference optimisation of Mistral-architecture models in raw PyTorch",
    license="MIT",
    python_requires=">=3.11",
    packages=[
        "notus",
        "notus.data",
        "notus.model",
        "notus.objective",
        "notus.engine",
        "notus.curation",
        "notus.generate",
        "notus.dryrun",
        "notus.card",
        "notus.evals",
        "notus.look",
        "notus.feedback",
        "notus.kernels",
    ],
    package_data={"notus.look": ["page.html", "page.css", "*.js"]},
    install_requires=[
        "torch>=2.11,<2.14",
        "triton; platform_system == 'Linux'",
        "transformers>=5.0",
        "datasets",
        "safetensors",
        "sentencepiece",
        "tensorboard",
        "numpy",
        "huggingface_hub",  # transformers installs these two as well
        "tqdm",
    ],
    extras_require={
        "test": ["pytest", "pytest-xdist", "hypothesis", "ruff", "matplotlib", "peft"],
        "eval": ["lm-eval[hf]>=0.4.13"],
        "vllm": ["vllm"],
        "report": ["matplotlib"],
        "wandb": ["wandb"],
        "trackio": ["trackio"],
    },
)
