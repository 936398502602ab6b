# SPDX-License-Identifier: Apache-2.0
"""The cases of bench/sanitize.py launch every kernel of the package, seen by the interpreter."""

import os
import runpy
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run with TRITON_INTERPRET=1", allow_module_level=True)

from fastgrpo_kernels import aot

from fastgrpo.ops import select

pytestmark = pytest.mark.interpreter
SCRIPT = runpy.run_path(str(Path(__file__).parent.parent / "bench" / "sanitize.py"))


def test_sanitizer_cases_launch_every_kernel(monkeypatch):
    """But those of `linear_exp`, whose bfloat16 products the interpreter cannot make."""
    for order in select.ORDER.values():
        if "triton" in order.get("cuda", ()):
            monkeypatch.setitem(order, "cpu", ("triton",))
    modules = aot.kernel_modules()
    launched = []
    for module in modules.values():
        launch = module.launch

        def record(kernel, *args, launch=launch, **options):
            launched.append(kernel)
            launch(kernel, *args, **options)

        monkeypatch.setattr(module, "launch", record)
    for name in SCRIPT["CASES"]:
        SCRIPT["run"]("cpu", [name])
    specs = [s for stem, m in modules.items() if stem != "linear_exp" for s in m.aot_specs()]
    kernels = {spec.kernel for spec in specs}
    assert len(kernels) > 15
    assert not {kernel.__name__ for kernel in kernels - set(launched)}
