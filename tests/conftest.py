import pytest
import torch


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Every test compiles for itself: Hugging Face models share code, whose compilations Dynamo counts."""
    torch.compiler.reset()
    torch.manual_seed(0)
    yield
