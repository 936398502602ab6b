# SPDX-License-Identifier: Apache-2.0
"""What a GRPO run did, as one HTML page."""

from fastgrpo.errors import require

require("fastgrpo.report", "report", "PIL")

from fastgrpo.report.page import write_report
