# SPDX-License-Identifier: Apache-2.0
"""Settings under old and new names alike."""

import warnings

import pytest

pytest.importorskip("trl")

from fastgrpo.integrations.trl.config import RenamedConfig  # noqa: E402


@pytest.mark.parametrize("prefix", ["gradient", "activation"])
@pytest.mark.parametrize("on", [True, False])
def test_both_names_of_activation_checkpointing(tmp_path, prefix, on):
    given = {f"{prefix}_checkpointing": on}
    if on:
        given[f"{prefix}_checkpointing_kwargs"] = {"use_reentrant": False}
    if prefix == "activation" and not hasattr(RenamedConfig, "activation_checkpointing"):
        pytest.skip("before transformers 5.24")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = RenamedConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[], **given)
    assert config.gradient_checkpointing is on
    assert (config.gradient_checkpointing_kwargs or {}) == ({"use_reentrant": False} if on else {})
