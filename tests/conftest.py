"""Models that several kinds of tests use."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest

# Torch's threads that compute while they wait take the processors from the test beside this one.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def load_tiny() -> ModuleType:
    """The module that makes tiny checkpoints; loaded by path, since tests are no package."""
    path = Path(__file__).parent / "gpu_worker" / "tiny.py"
    spec = importlib.util.spec_from_file_location("octavo_tests_tiny", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session", autouse=True)
def packed_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Workers that tests start keep no packed weights in the user's cache."""
    os.environ["OCTAVO_PACKED_CACHE_DIR"] = str(tmp_path_factory.mktemp("packed"))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint in the layout of the hub, with a byte-level tokenizer of its 320 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    load_tiny().make_checkpoint(folder, "llama")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(alphabet)}
    vocab |= {f"<|extra_{index}|>": index for index in range(len(vocab), 320)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}\n')
    return folder
