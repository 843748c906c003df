import gc

import pytest
import torch


def pytest_collection_modifyitems(items):
    """The file that takes longest comes first: at the end one process would wait for the other."""
    items.sort(key=lambda item: item.path.name != "test_accuracy.py")


@pytest.fixture(scope="module", autouse=True)
def small_heap():
    """A file's tests collect their own garbage only: with all of transformers loaded, a collection takes a second.

    `explain` runs one at each call.
    """
    torch.compiler.reset()
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Every test compiles for itself: Hugging Face models share code, whose compilations Dynamo counts."""
    torch.compiler.reset()
    torch.manual_seed(0)
    yield


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M in bfloat16 and its tokenizer, read once, as reading takes long: tests leave them as they are."""
    from micromix_compile import models  # brings transformers, which most tests do without

    return models.load("smollm2")
