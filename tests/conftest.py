# SPDX-License-Identifier: Apache-2.0
"""Shared test set-up: the installed package is tested, not the checkout; torch.empty is NaN."""

import functools
import gc
import importlib.metadata
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(int(os.environ.get("FASTGRPO_TEST_THREADS", "1")))
# accelerate parses deepspeed's metadata anew at every unwrap_model: a tenth of a tiny run.
importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)


@pytest.fixture(scope="module", autouse=True)
def _keep_what_is_imported():
    """Every training run begins with a collection, a quarter of a tiny run's time if it looks
    through all imported modules."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed_and_poison():
    """A fixed seed, and NaN in every torch.empty, so that a read of unwritten memory shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def as_users_run(monkeypatch):
    """On a GPU, not the slower kernels that are asked for above; nor TF32, which is in the
    convolutions of a tower unless told otherwise."""
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A tiny Qwen2.5-VL and its processor, for trainers to load; nobody writes to it."""
    from fastgrpo.testing.trl import save_checkpoint

    return save_checkpoint(tmp_path_factory.mktemp("tiny") / "qwen2_5_vl")


@pytest.fixture(scope="session")
def launch():
    """Starts runs of several processes; see `fastgrpo.testing.launch`."""
    from fastgrpo.testing.launch import Launcher

    with Launcher(Path(__file__).parent / "distributed" / "job.py") as launcher:
        yield launcher


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A folder with the tiny checkpoints that runs of several processes begin from."""
    from fastgrpo.testing.models import tiny_model
    from fastgrpo.testing.processors import tiny_processor
    from fastgrpo.testing.trl import save_checkpoint

    folder = tmp_path_factory.mktemp("distributed")
    save_checkpoint(folder / "model_images")
    save_checkpoint(folder / "model_text", "qwen3")
    tied = tiny_model("qwen2_5_vl", text={"tie_word_embeddings": True}, tie_word_embeddings=True)
    tied.save_pretrained(folder / "model_tied")
    tiny_processor(tied.config).save_pretrained(folder / "model_tied")
    return folder


def pytest_sessionfinish():
    gc.unfreeze()  # what is frozen at the end counts as leaked


def pytest_ignore_collect(collection_path, config):
    """`-m gpu` imports the test_gpu_*.py alone, which need no package but torch, triton,
    transformers and pytest: a machine with a GPU need have no other."""
    name = collection_path.name
    if config.option.markexpr == "gpu" and name.startswith("test_"):
        return None if name.startswith("test_gpu_") else True
    return None


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
