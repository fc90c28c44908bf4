"""One small model, its pairs, and its diagnoses."""

import pytest
import zoo
from preference_pairs import some_pairs

import lddyn


@pytest.fixture(scope="session")
def model():
    return zoo.train(zoo.build("llama")).eval()


@pytest.fixture(scope="session")
def found(model):
    return lddyn.diagnose(model, some_pairs(), beta=0.3, lbk=True)


@pytest.fixture(scope="session")
def run():
    return lddyn.Run(lr=1e-4, epochs=3, batch=2, optimizer="sgd")


@pytest.fixture(scope="session")
def predicted(model, run):
    return lddyn.diagnose(model, some_pairs(), beta=0.3, run=run, close_ups=0)
