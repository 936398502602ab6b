"""What a GRPO run did, as one HTML page: `record` the trainer, then `write_report`."""

from fastgrpo.report.page import write_report
from fastgrpo.report.recorder import record
