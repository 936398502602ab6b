"""One file per family: discovery, and what every family must show."""

import pytest
import torch

import fastgrpo as fg
from fastgrpo import models
from fastgrpo.models import registry
from fastgrpo.testing import models as tm

pytestmark = pytest.mark.engine

MISTRAL = """
from fastgrpo.models.family import Family

FAMILIES = (Family("mistral"),)
"""


@pytest.fixture
def added_family(tmp_path, monkeypatch):
    """A folder with one more file, beside those of `fastgrpo.models`."""
    (tmp_path / "mistral_of_a_test.py").write_text(MISTRAL)
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])
    registry.families.cache_clear()
    yield "mistral"
    registry.families.cache_clear()


def test_one_file_adds_a_family(added_family):
    model = tm.tiny_model(added_family)
    groups = tm.synthetic_groups(model)
    scores = [s.logp for s in fg.score(model, groups)]
    for row, plain in zip(scores, tm.naive_logp(model, groups), strict=True):
        for ours, theirs in zip(row, plain, strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)
    metrics = fg.GRPOStep(model, fg.Objective())(groups)
    assert metrics["ratio/min"] == metrics["ratio/max"] == 1.0
    assert all(p.grad is not None for p in model.parameters())
    (group,) = fg.generate(
        model, [fg.Group(groups[0].prompt_ids, [])], 2, max_new_tokens=3, eos_token_id=()
    )
    assert [len(ids) for ids in group.completions] == [3, 3]


def test_without_its_file_the_family_is_refused():
    from transformers import MistralConfig

    with pytest.raises(fg.InputError, match="'mistral' is not served"):
        registry.family_of(MistralConfig())
