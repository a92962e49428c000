"""Each run of a Trainer collects garbage, which takes longer than the run: imports are no part."""

import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def _imports_are_not_looked_through():
    gc.freeze()
    yield
    gc.unfreeze()
